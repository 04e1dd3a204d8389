"""`transformers serve` in a process that knows RPQ: an HTTP server that answers as OpenAI's does.

transformers has no way to name a library that its commands should import first, so its own command runs in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpq_convert.errors import SourceError
from rpq_convert.hf import torchvision
from rpq_convert.storage.files import refuse_links

torchvision.fix()

from transformers.utils.import_utils import is_serve_available  # noqa: E402


def serve(arguments: Sequence[str]) -> None:
    """Run `transformers serve` with these arguments until it is stopped."""
    if not is_serve_available():
        raise SourceError('serving needs fastapi, uvicorn and openai: pip install "rpq-convert[serve]"')
    refuse_links(arguments[0])
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.transformers import app

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # without it the list of models is an error

    app(args=["serve", *arguments], prog_name="rpq")
