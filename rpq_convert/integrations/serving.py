"""`transformers serve` in a process that knows RPQ: an HTTP server that answers as OpenAI's does.

transformers has no way to name a library that its commands should import first, so its own command runs in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.finding import at_hand
from rpq_convert.errors import SourceError
from rpq_convert.hf import torchvision
from rpq_convert.storage.addresses import is_address
from rpq_convert.storage.files import refuse_links
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.sources import located

torchvision.fix()

from transformers.utils.import_utils import is_serve_available  # noqa: E402


def serve(arguments: Sequence[str]) -> None:
    """Run `transformers serve` with these arguments until it is stopped.

    Args:
        arguments: the folder or the repository of the hub, then options of `transformers serve`.
    """
    if not is_serve_available():
        raise SourceError('serving needs fastapi, uvicorn and openai: pip install "rpq-convert[serve]"')
    given, *options = arguments
    place, asked = located(given, HubOptions())
    folder = at_hand(place, asked)
    name = str(folder) if is_address(place) else f"{place}@{asked.revision}" if asked.revision else str(place)
    refuse_links(folder)
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.transformers import app

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # without it the list of models is an error

    here = Path(name).exists()
    _known_as(dict.fromkeys([folder.resolve().name, name] if here else [name]), name, folder)
    app(args=["serve", name, *options], prog_name="rpq")


def _known_as(names: Iterable[str], given: str, folder: Path) -> None:
    """Let the server list its model and answer for it under these names; transformers lists the hub's cache alone.

    Args:
        given: the name that transformers knows it by.
    """
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler

    cached, resolve, known = ModelManager.get_gen_models, BaseHandler._resolve_model, list(names)
    made = int(folder.stat().st_mtime)
    own = [{"id": name, "object": "model", "owned_by": "", "created": made} for name in known]

    def listed(cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [*own, *(m for m in cached(cache_dir) if m["id"] not in known)]

    def resolved(self: Any, body: dict[str, Any]) -> Any:
        if body.get("model") in known:
            body["model"] = given
        return resolve(self, body)

    ModelManager.get_gen_models = staticmethod(listed)  # type: ignore[method-assign, assignment]
    BaseHandler._resolve_model = resolved  # type: ignore[method-assign]
