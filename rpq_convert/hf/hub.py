"""The hub: only the files of a repository that are needed are fetched.

A plan reads the config and the headers of the weight files, by range requests. A conversion fetches the chosen weight files
once, into huggingface_hub's own cache, which also repairs broken transfers. All files of one run come from one commit. What
the hub refuses becomes a `HubError` that says what to do.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpq_convert.errors import HubError, SourceError
from rpq_convert.storage.files import files_in, is_inside
from rpq_convert.storage.headers import entries_of
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.remote import Remote
from rpq_convert.storage.sources import near
from rpq_convert.version import __version__

if TYPE_CHECKING:  # a report is fetched without torch
    from rpq_convert.storage.pickles import PickleSource
    from rpq_convert.storage.reader import SafetensorsSource, TensorInfo

LOGIN = "log in with `hf auth login`, or give a token (HF_TOKEN)"
REFUSALS = {  # an error of huggingface_hub, or its nearest ancestor here -> what it means, and what to do
    "HFValidationError": "is neither a folder nor a hub id such as facebook/opt-125m",
    "GatedRepoError": f"is gated: accept its terms on its page on the hub, then {LOGIN} of the same account",
    "RevisionNotFoundError": "has no such revision on the hub; give a branch, tag or commit that it has",
    "RepositoryNotFoundError": f"is no local folder, and the hub shows no such repository. If it is private, {LOGIN}",
    "LocalTokenNotFoundError": f"needs a login: {LOGIN}",
    "LocalEntryNotFoundError": "is incomplete in the local cache, and the hub was not reached; give a local path, or try again with "
    "a connection",
    "OfflineModeIsEnabled": "is no local folder, and HF_HUB_OFFLINE forbids to ask the hub; give a path, or unset it",
    "HfHubHTTPError": "was refused by the hub",
    "HTTPError": "could not be downloaded: the connection failed; repeat the command to continue",
    "SafetensorsParsingError": "has a broken safetensors file",
    "OSError": "could not be downloaded from the hub",
    "ValueError": "has something that the hub does not accept",
}
ABSENT = ("RepositoryNotFoundError", "LocalEntryNotFoundError", "OfflineModeIsEnabled")  # or a local path was meant
ADDING = ("LocalEntryNotFoundError", "HfHubHTTPError", "HTTPError", "SafetensorsParsingError", "OSError", "ValueError")


@contextmanager
def asking(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises over a repository into a `HubError`."""
    try:
        yield
    except SourceError:
        raise
    except Exception as e:
        known = next((c.__name__ for c in type(e).__mro__ if c.__name__ in REFUSALS), None)
        if known is None:
            raise
        status = getattr(getattr(e, "response", None), "status_code", None)
        said = f"{name} {REFUSALS[known]}"
        if known == "HfHubHTTPError" and status in (401, 403):
            said += f": the token may not do this; {LOGIN} that may"
        elif known in ADDING:
            said += f": {_first(e)}"
        if known in ABSENT and (meant := near(name)):
            said += f"; did you mean {meant}?"
        raise HubError(said) from e


def _first(error: BaseException) -> str:
    """Return an error's first sentence. The hub's list of mistakes in a card follows it and is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines if lines[0].startswith("Invalid metadata") else lines[:1])


@dataclass(frozen=True)
class Repository(Remote):
    """A repository at one commit; its folder is its commit's in the local cache.

    Args:
        name, folder, files: as for `Remote`.
        token: the access token that was given.
        offline: why only the cache is used; empty where the hub answered.
    """

    token: str | bool | None = None
    offline: str = ""

    @property
    def commit(self) -> str:  # type: ignore[override]
        return self.folder.name

    def fetch(self, names: Sequence[str]) -> Path:
        absent = [n for n in names if not (self.folder / n).is_file()]
        if absent and self.offline:
            raise HubError(f"{self.name}: {absent[0]} is not in the local cache, and {self.offline}")
        if absent:
            patterns = [glob.escape(n) for n in absent]
            _download(self.name, patterns, revision=self.commit, token=self.token)
        return self.folder

    def tensors(
        self, *, allow_pickle: bool = False, named: str | None = None, key: str | None = None
    ) -> SafetensorsSource | PickleSource:
        from rpq_convert.storage.folder import open_folder

        folder = self.fetch_weights(allow_pickle=allow_pickle, named=named)
        return open_folder(folder, allow_pickle=allow_pickle, named=named, key=key)

    def header(self, file: str) -> dict[str, TensorInfo]:
        from rpq_convert.storage.reader import infos_of

        with asking(self.name):
            found = client(self.token).parse_safetensors_file_metadata(self.name, file, revision=self.commit)
        return infos_of(entries_of({k: asdict(t) for k, t in found.tensors.items()}, Path(self.name, file), 0))


def find(src: str | Path, wanted: Sequence[str], options: HubOptions) -> Repository:
    """Find a repository and fetch its small files.

    Args:
        src: its id.
        wanted: patterns of the small files.
        options: which revision, with which token, and whether only the cache is used.

    Raises:
        HubError: it could not be downloaded; says why.
    """
    from huggingface_hub.errors import HTTPError

    name, token = str(src), options.token
    folder = _download(name, wanted, **options.hub)
    offline = "the hub was not to be used"
    if not options.local_files_only:
        try:
            info = client(token).model_info(name, revision=folder.name, files_metadata=True)
            files = {f.rfilename: f.size for f in info.siblings or () if is_inside(f.rfilename)}
            return Repository(name, folder, files, token)
        except (HTTPError, OSError) as e:  # the cache had it, or nothing would have been found above
            offline = f"the hub was not reached: {_first(e)}"
    cached = {n: p.stat().st_size for n, p in files_in(folder).items()}
    return Repository(name, folder, cached, token, offline)


def _download(name: str, patterns: Sequence[str], **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    with asking(name), _saying_nothing("huggingface_hub._snapshot_download"):
        return Path(snapshot_download(name, allow_patterns=[*patterns], **options))


@contextmanager
def _saying_nothing(logger: str) -> Iterator[None]:
    """Hold back what a library says of files that a repository does not have: that is judged, and said, here."""
    speaker = logging.getLogger(logger)
    level = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        speaker.setLevel(level)


def hold_back_if_silent(seconds: float = 5.0) -> None:
    """Keep libraries that would ask the hub for a minute from asking at all where it does not answer; they use what is cached."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except (HTTPError, OSError):
        constants.HF_HUB_OFFLINE = True


def client(token: str | bool | None) -> Any:
    """Return huggingface_hub's client."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="rpq-convert", library_version=__version__)
