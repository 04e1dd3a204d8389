"""Publish: a converted folder as a repository of the hub.

Nothing is sent before the folder is known to be whole, and all of it becomes one commit, so that a repository never holds
half of a model. What was there of an earlier conversion goes in the same commit: a stale shard would be loaded instead of
the new ones. A repository of another model is never written over, nor anything private put where everybody sees it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.verifying import verify
from rpq_convert.core.keywords import keywords
from rpq_convert.errors import HubError
from rpq_convert.hf.hub import asking, client
from rpq_convert.running.progress import Progress
from rpq_convert.storage.addresses import destination
from rpq_convert.storage.delivery import Target, send
from rpq_convert.storage.records import CARD, MANIFEST, read_manifest

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@keywords()
def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Upload a converted folder to the hub, in one commit.

    Args:
        folder: complete, as `rpq.verify` checks; its README.md may have been edited.
        repo: the repository's id, `user/name` or `name`; it is made if it does not exist. Or an address, such as s3://bucket/folder.
        private: whether only you see it; of an existing repository this must be what it is.
        token: instead of the stored one. revision: the branch to commit to; it is made if it does not exist.
        progress: called with a file's name, and the bytes that are uploaded and that there are.

    Returns:
        The address of the repository, or of its branch.

    Raises:
        VerifyError: the folder is not complete; nothing was sent.
        SourceError: it is not a converted folder; nothing was sent.
        HubError: the hub refused, the repository holds another model, or it is public and a private one was asked for.

    Example:
        >>> rpq.push("opt-125m-rpq", "me/opt-125m-rpq")
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    place = Path(folder)
    if (target := destination(repo)) is not None:
        verify(place)
        send(place, target, progress=progress)
        return str(target)
    names = verify(place, edited=(CARD,))
    api = client(token)
    with asking(repo):
        address = api.create_repo(repo, private=private, exist_ok=True)
        name = address.repo_id
        _check_visibility(api.model_info(name).private, private, name)
        held = _files(api, name, revision)
        if held is None:  # a new branch: it starts with what main holds
            api.create_branch(name, branch=revision)
            held = set(api.list_repo_files(name, revision=revision))
        elif any(f.endswith(WEIGHTS) for f in held) and MANIFEST not in held:
            raise HubError(f"{name} holds the weights of another model; push to a repository or a revision of its own")
        contents = _contents(place, names, name)
        stale = sorted(f for f in held if f.endswith(WEIGHTS) and "/" not in f and f not in contents)
        added = [CommitOperationAdd(f, c) for f, c in contents.items()]
        sizes, done = [a.upload_info.size for a in added], 0
        for one, size in zip(added, sizes):
            if progress:
                progress(f"uploading {one.path_in_repo}", done, sum(sizes))
            api.preupload_lfs_files(name, [one], revision=revision)
            done += size
        api.create_commit(
            name,
            [CommitOperationDelete(f) for f in stale] + added,
            commit_message="Upload a model converted with rpq-convert",
            revision=revision,
        )
    return str(address) if revision is None else f"{address}/tree/{revision}"


def check_login(repo: str, *, token: str | bool | None = None) -> None:
    """Raise a `HubError` where nobody is logged in, or a store refuses, before hours are spent on what is to be pushed."""
    if (target := destination(repo)) is not None:
        Target(target).check(overwrite=False)
        return
    with asking(repo):
        client(token).whoami()


def _files(api: Any, name: str, revision: str | None) -> set[str] | None:
    """Return the files of a branch, or None where there is no such branch."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return set(api.list_repo_files(name, revision=revision))
    except RevisionNotFoundError:
        return None


def _check_visibility(is_private: bool, private: bool, name: str) -> None:
    if is_private == private:
        return
    has, want, do = (
        ("private", "public", "pass private=True") if is_private else ("public", "private", "pass private=False")
    )
    raise HubError(
        f"{name} exists and is {has}, not {want}: {do}, change its settings on the hub, or choose another name"
    )


def _contents(folder: Path, names: list[str], repo: str) -> Mapping[str, Path | bytes]:
    """Return what is sent: the folder's files, the card's loading code naming the repository, and the manifest with it."""
    manifest = read_manifest(folder)
    card = (folder / CARD).read_text("utf8").replace(f'("{folder.resolve().name}"', f'("{repo}"').encode()
    manifest["files"][CARD] = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    return {**files, CARD: card, MANIFEST: json.dumps(manifest, indent=1).encode()}
