"""Addresses of stores (`s3://bucket/folder`, `gs://`, `https://`, …): how they are written, and how their store is reached, through fsspec.

An address names one place of one store. It never says how that place is to be read: chains (`zip::s3://`) and file systems that read what
other files say (`reference://`) are refused, and so is a password in an address. Credentials come from the environment, as each store's own
package looks for them. What a store raises becomes one line that says what to do. Free of torch; fsspec is imported when a store is asked.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from rpq_convert.errors import FolderError, SourceError

T = TypeVar("T")
_WRITTEN = re.compile(r"([A-Za-z][\w+.-]+):/{1,2}(?!/)(.*)", re.DOTALL)  # one slash where a path was made of it
_CHAIN = re.compile(r"([\w+.-]+(://[^:]*)?::)+[\w+.-]+:.*", re.DOTALL)
_FILE = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)
EXTRAS = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure", "adl": "azure",
    "http": "http", "https": "http",
}  # fmt: skip
HUB = "hf"  # the hub has ids and addresses of its own (sources.py)
WEB = ("http", "https")
OBJECTS = (
    "s3",
    "s3a",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
    "adl",
    "oci",
    "oss",
    "tos",
    "memory",
)  # stores without folders
NOT_STORES = (
    "arrow_hdfs", "async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "filecache", "generic", "git",
    "jlab", "jupyter", "libarchive", "local", "pyscript", "reference", "simplecache", "tar", "zip",
)  # fmt: skip  # of fsspec's: what reads other files, another process, or a text
TRIES, PAUSE = 4, 0.5  # of a transfer that fails; seconds before the second, and twice as many before each further one
MARKS = (
    "ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "crc32c", "checksum", "sha", "LastModified", "Last-Modified",
    "last_modified", "updated", "mtime", "created",
)  # fmt: skip  # what tells that an object is still the same, the surest first
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or a service account; FSSPEC_GS_TOKEN=anon for a public bucket",
}


@dataclass(frozen=True)
class Address:
    """A place of a store: its protocol, and its path there without a slash at its end."""

    protocol: str
    path: str

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    @property
    def name(self) -> str:
        """Its last part."""
        last = self.path.rpartition("/")[2]
        return unquote(last) if self.protocol in WEB else last

    def store(self) -> tuple[Any, str]:
        """Return its file system and its path there.

        Raises:
            SourceError: a package is missing, or the store cannot be reached.
        """
        from fsspec.core import url_to_fs

        try:
            with asking(self):
                system, path = url_to_fs(str(self))
        except ImportError as e:
            raise SourceError(f"{self} needs a package: {_install(self.protocol, str(e))}") from None
        return system, path


def address_of(src: str | Path) -> Address | None:
    """Return the address that a text is, or None where it is a path or an id of the hub.

    Raises:
        SourceError: an address that holds a password, or that names no store.
    """
    text = str(src)
    if _CHAIN.fullmatch(text):
        raise SourceError("an address with '::' is a chain of file systems; give the address of one place of one store")
    refuse_password(text)
    found = _WRITTEN.fullmatch(text)
    if found is None:
        return None
    protocol, rest = found[1].lower(), found[2].rstrip("/")
    if protocol in (HUB, "file"):
        return None
    if protocol in NOT_STORES or protocol not in _known():
        raise SourceError(
            f"{text}: {protocol}:// is no store that can be read; give a folder, a hub id, or an address such as s3://"
        )
    if protocol in WEB and ("?" in rest or "#" in rest):
        raise SourceError(
            f"{protocol}://{re.split('[?#]', rest)[0]} was given with a query (?…), which may be a signature that reports and logs would "
            "keep; give an address without one"
        )
    if not rest:
        raise SourceError(f"{protocol}:// names no place; give one, such as {protocol}://bucket/folder")
    return Address(protocol, rest)


def destination(out: str | Path) -> Address | None:
    """Return the address that an output is written to, or None where it is a path.

    Raises:
        FolderError: one that cannot be written to.
    """
    text = str(out)
    try:
        address = None if Path(out).exists() else address_of(out)
    except SourceError as e:
        raise FolderError(str(e)) from None
    if text.lower().startswith(f"{HUB}:/") and not Path(out).exists():
        name = re.sub(f"^{HUB}:/+", "", text, flags=re.IGNORECASE)
        raise FolderError(
            f"{HUB}://{name} is a repository of the hub; write a folder and push it: --push-to, or rpq push"
        )
    if address is not None and address.protocol in WEB:
        raise FolderError(
            f"{address} cannot be written to; give a folder, or an address of a store such as s3://bucket/folder"
        )
    return address


def is_address(src: str | Path) -> bool:
    """Return whether a text is the address of a store."""
    return address_of(src) is not None


def local_path(src: str | Path) -> str | None:
    """Return the path that a `file://` address names, or None for anything else; `%20` is a space, unless a file is called so.

    Raises:
        SourceError: it names another machine.
    """
    text = str(src)
    if not text.lower().startswith("file:/"):
        return None
    found = _FILE.fullmatch(text)
    if found is None:
        raise SourceError(f"{text} names another machine; give the path of a folder on this one, as file:///path")
    return found[1] if Path(found[1]).exists() else unquote(found[1])


def refuse_password(text: str) -> None:
    """Refuse an address that holds a password, before anything shows or keeps it.

    Raises:
        SourceError: without the address.
    """
    found = _WRITTEN.fullmatch(text)
    if found and _secret(found[2]):
        protocol = found[1].lower()
        raise SourceError(
            f"this {protocol}:// address holds a password, which reports and logs would keep; leave it out, and give it in "
            f"{CREDENTIALS.get(protocol, 'the environment')}"
        )


def without_password(text: str) -> str:
    """Return a text for a log, what may be a password in an address left out."""
    found = _WRITTEN.search(text)
    return f"{found[1]}://***" if found and (_secret(found[2]) or "?" in found[2]) else text


def _secret(rest: str) -> bool:
    """Return whether what follows a protocol begins with `user:password`; a port is none."""
    place = re.sub(r"\[[0-9a-fA-F:.]*\]", "", rest.partition("/")[0])
    return ":" in place and not re.fullmatch(r"([^@:]*@)?[^@:]*:\d+", place)


def _known() -> set[str]:
    from fsspec import available_protocols
    from fsspec.registry import registry

    return {*available_protocols(), *registry}


def _install(protocol: str, said: str) -> str:
    if protocol in EXTRAS:
        return f"pip install 'rpq-convert[{EXTRAS[protocol]}]'"
    return said.strip().splitlines()[0] if said.strip() else f"the one that fsspec needs for {protocol}://"


@contextmanager
def asking(address: Address | str) -> Iterator[None]:
    """Turn what a store raises into a SourceError of one line."""
    try:
        yield
    except (SourceError, ImportError):
        raise
    except FileNotFoundError as e:
        what = (
            "there is no such bucket"
            if "bucket does not exist" in str(e)
            else "nothing is there, or it was not reached"
        )
        raise SourceError(f"{address} does not exist: {what}") from None
    except PermissionError as e:
        raise SourceError(f"{address} may not be used with these credentials: {_first(e)}") from None
    except Exception as e:
        if not (
            isinstance(e, OSError)
            or type(e).__module__.partition(".")[0] in ("botocore", "aiohttp", "gcsfs", "google", "azure")
        ):
            raise
        if "redential" in f"{type(e).__name__} {e}":
            protocol = str(address).partition(":")[0]
            given = CREDENTIALS.get(protocol, "as its package looks for them")
            raise SourceError(f"{address} needs credentials in the environment: {given}") from None
        raise SourceError(f"{address} was not reached: {_first(e)}") from None


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def retried(act: Callable[[], T]) -> T:
    """Do a transfer again where it fails, a few times; what cannot get better by that is raised at once."""
    for number in range(TRIES - 1):
        try:
            return act()
        except (FileNotFoundError, PermissionError, SourceError):
            raise
        except Exception as e:
            if "redential" in f"{type(e).__name__} {e}":
                raise
            time.sleep(PAUSE * 2**number)
    return act()


def mark_of(info: Any) -> str:
    """Return what tells an object from one that takes its place, as its store says it; empty where it says nothing."""
    value = next((info[name] for name in MARKS if info.get(name)), "")
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
