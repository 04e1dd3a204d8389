"""Addresses of stores: how they are read, and that no password gets any further."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from rpq_convert.errors import FolderError, SourceError
from rpq_convert.storage import addresses
from rpq_convert.storage.addresses import (
    address_of,
    asking,
    destination,
    local_path,
    mark_of,
    retried,
    without_password,
)
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.sources import is_remote, located


@pytest.mark.parametrize(
    ("text", "address", "name"),
    [
        ("s3://bucket/a/model", "s3://bucket/a/model", "model"), ("S3://bucket/a/model/", "s3://bucket/a/model", "model"),
        ("s3://bucket", "s3://bucket", "bucket"), ("gs://b/my model", "gs://b/my model", "my model"),
        ("s3://b/50%20x.safetensors", "s3://b/50%20x.safetensors", "50%20x.safetensors"),
        ("https://host:8080/a%20b.safetensors", "https://host:8080/a%20b.safetensors", "a b.safetensors"),
        ("sftp://me@host:22/model", "sftp://me@host:22/model", "model"), ("http://[::1]:80/m", "http://[::1]:80/m", "m"),
        (Path("s3://bucket/model"), "s3://bucket/model", "model"),
    ],
)  # fmt: skip
def test_addresses_are_told_from_paths_and_ids(text, address, name):
    found = address_of(text)
    assert str(found) == address and found.name == name and is_remote(located(text, HubOptions())[0])


@pytest.mark.parametrize(
    "text", ["facebook/opt-125m", "./a:b/c", "model", "C:/model", "hub:org/data", "a::b/", "/a/s3:/x"]
)
def test_paths_and_ids_are_no_addresses(text):
    assert address_of(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "s3://key:geheim@bucket/x", "s3://key:geheim@bucket", "https://me:geheim@host/x.safetensors", "s3://key:ge/heim@bucket/x",
        "s3://key:geheim/x", "hf://me:geheim@org/name", "https://host/x.safetensors?sig=geheim", "s3:/key:geheim@bucket/x",
        "ftp://u:geheim@host:21/x", "zip::s3://key:geheim@bucket/x",
    ],
)  # fmt: skip
def test_a_password_is_refused_and_shown_nowhere(text):
    for refuse in (lambda: located(text, HubOptions()), lambda: destination(text)):
        with pytest.raises((SourceError, FolderError)) as caught:
            refuse()
        assert "geheim" not in str(caught.value) and "heim@" not in str(caught.value) and "\n" not in str(caught.value)
    assert "heim" not in without_password(text)
    assert without_password("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("reference://x", "reference:// is no store"), ("nothing://x/y", "nothing:// is no store"), ("s3://", "names no place"),
        ("simplecache::s3://b/x", "a chain of file systems"), ("hf://datasets/a/b", "the address of a dataset"),
        ("hf://a/b/model.safetensors", "names a part of a repository; give all of it: hf://a/b"),
        ("file://elsewhere/x", "names another machine"), ("data:/text", "data:// is no store"),
    ],
)  # fmt: skip
def test_what_is_no_place_of_a_store_is_refused(text, says):
    with pytest.raises(SourceError, match=says):
        located(text, HubOptions())


def test_the_hub_as_fsspec_writes_it():
    place, options = located("hf://org/name@v2", HubOptions())
    assert (place, options.revision) == ("org/name", "v2")
    assert located("hf://org/name@v2", HubOptions(revision="v3"))[1].revision == "v3"
    assert located("hf://org/name", HubOptions())[1].revision is None
    with pytest.raises(SourceError, match=r"s3://b/x is no repository of the hub, so it has no revision"):
        located("s3://b/x", HubOptions(revision="v2"))


def test_file_addresses_are_paths(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "c%20d").mkdir()
    assert (
        local_path((tmp_path / "a b").as_uri())
        == str(tmp_path / "a b")
        == located(f"file:{tmp_path}/a b", HubOptions())[0]
    )
    assert local_path(f"file://localhost{tmp_path}/c%20d") == str(tmp_path / "c%20d")  # a folder of this very name
    assert local_path("s3://b") is None and destination(f"file://{tmp_path}/new") is None


def test_outputs_that_cannot_be_written_to():
    with pytest.raises(FolderError, match=r"hf://me/x is a repository of the hub; write a folder and push it"):
        destination(Path("hf://me/x"))
    with pytest.raises(FolderError, match="https://host/x cannot be written to"):
        destination("https://host/x")
    assert destination("out/folder") is None and str(destination("gs://b/x/")) == "gs://b/x"


@pytest.mark.parametrize(("protocol", "package", "extra"), [("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")])
def test_a_missing_package_is_named(protocol, package, extra):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(SourceError, match=rf"needs a package: pip install 'rpq-convert\[{extra}\]'"):
        address_of(f"{protocol}://b/x").store()


def test_what_stores_raise_becomes_one_line():
    errors = {
        FileNotFoundError("The specified bucket does not exist"): "no such bucket", PermissionError("Access Denied\nmore"): "may not be used",
        OSError("Unable to locate credentials"): "needs credentials in the environment: AWS_ACCESS_KEY_ID",
        TimeoutError("slow"): "was not reached: slow", FileNotFoundError("b/x"): "nothing is there",
    }  # fmt: skip
    for error, says in errors.items():
        with pytest.raises(SourceError, match=says) as caught, asking(address_of("s3://b/x")):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), asking("s3://b/x"):
        raise KeyError("a bug stays one")


def test_transfers_are_tried_again_where_that_can_help(monkeypatch):
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    asked = []

    def act(error, good_at):
        asked.append(1)
        if len(asked) < good_at:
            raise error
        return "there"

    assert retried(lambda: act(OSError("reset"), 4)) == "there" and len(asked) == 4
    for error, tries in ((OSError("reset"), 4), (FileNotFoundError(), 1), (PermissionError(), 1)):
        asked.clear()
        with pytest.raises(type(error)):
            retried(lambda error=error: act(error, 99))
        assert len(asked) == tries


def test_marks_are_the_surest_that_a_store_has():
    assert mark_of({"size": 3, "ETag": '"ab"', "LastModified": 7}) == "ab"
    assert mark_of({"mtime": 7.5}) == "7.5" and mark_of({"size": 3}) == ""
