"""A finished folder takes its name at once, with and without an exchange of names, and a killed swap is undone."""

import os

import pytest

from rpq_convert.storage import swap


def folder(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("before", ["nothing", "a folder", "an empty folder", "a link"])
def test_the_new_folder_has_the_name_and_nothing_is_left(exchanges, before, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    out = tmp_path / "out"
    if before == "a folder":
        folder(out, "old")
    elif before == "an empty folder":
        out.mkdir()
    elif before == "a link":
        out.symlink_to(folder(tmp_path / "elsewhere", "old"))
    swap.put_in_place(folder(swap.work_of(out), "new"), out)
    assert (out / "file").read_text() == "new" and not out.is_symlink()
    left = {"out", "elsewhere"} if before == "a link" else {"out"}
    assert {p.name for p in tmp_path.iterdir()} == left
    if before == "a link":
        assert (tmp_path / "elsewhere" / "file").read_text() == "old"


def test_an_exchange_leaves_a_whole_folder_at_any_moment(tmp_path):
    one, other = folder(tmp_path / "one", "1"), folder(tmp_path / "other", "2")
    if not swap.exchange(one, other):
        pytest.skip("this system or file system exchanges no names")
    assert ((one / "file").read_text(), (other / "file").read_text()) == ("2", "1")
    with pytest.raises(FileNotFoundError):
        swap.exchange(one, tmp_path / "nothing")


def test_a_killed_swap_is_undone_or_cleared(tmp_path):
    out = tmp_path / "out"
    folder(swap.old_of(out), "old")
    swap.recover(out)  # killed between two renames
    assert (out / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    folder(swap.old_of(out), "older")
    swap.recover(out)  # killed while the replaced folder was deleted
    assert (out / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    swap.recover(tmp_path / "other")
