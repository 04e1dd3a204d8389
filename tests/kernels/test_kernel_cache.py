"""The cache of compiled kernels: an edit anywhere makes it stale, and a folder that cannot be written is no error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rpq_convert

INNER = """
from rpq_convert.kernels.jit.cache import njit


@njit(cache=True)
def inner():
    return {}
"""
OUTER = """
from rpq_convert.kernels.cpu.inner import inner
from rpq_convert.kernels.jit.cache import njit


@njit(cache=True)
def outer():
    return 10 * inner()
"""
ASK = """
from rpq_convert.kernels.cpu.outer import outer
from rpq_convert.kernels.jit.cache import folder
print(outer(), len(outer.stats.cache_hits), folder())
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the package with two kernels more: one calls the other, which stands in another file."""
    copy = tmp_path / "tree"
    package = Path(rpq_convert.__file__).parent
    shutil.copytree(package, copy / "rpq_convert", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "rpq_convert/kernels/__init__.py").write_text("")  # without torch, processes start in a second
    (copy / "rpq_convert/kernels/cpu/inner.py").write_text(INNER.format(4))
    (copy / "rpq_convert/kernels/cpu/outer.py").write_text(OUTER)
    return copy


def ask(tree, **environment):
    """Return (value of the outer kernel, whether it came from the cache, the cache's folder) and stderr, of a new process."""
    known = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=tree, env={**known, "PYTHONPATH": str(tree), **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value, hits, folder = done.stdout.split()
    return (int(value), int(hits), folder), done.stderr


@pytest.mark.slow
def test_an_edit_in_another_file_is_seen(tree):
    folder = str(tree / "rpq_convert/__pycache__/numba")
    assert ask(tree) == ((40, 0, folder), "")
    assert ask(tree) == ((40, 1, folder), "")
    files = sorted(os.listdir(folder))
    (tree / "rpq_convert/kernels/cpu/inner.py").write_text(INNER.format(5))
    assert ask(tree) == ((50, 0, folder), "")
    assert ask(tree) == ((50, 1, folder), "")
    assert sorted(os.listdir(folder)) == files  # what is stale is overwritten


def test_numbas_own_setting_is_followed(tree, tmp_path):
    (_, hits, folder), said = ask(tree, NUMBA_CACHE_DIR=str(tmp_path / "own"))
    assert not hits and not said and folder.startswith(str(tmp_path / "own")) and os.listdir(folder)
    assert not (tree / "rpq_convert/__pycache__/numba").exists()


def block(tree):
    """Make a file of what would be the cache's folder, which stops root as well; return an environment without a home."""
    shutil.rmtree(tree / "rpq_convert/__pycache__", ignore_errors=True)
    (tree / "rpq_convert/__pycache__").write_text("")
    return {"HOME": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another folder for caches")
def test_where_nothing_can_be_written_a_temporary_folder_serves_and_one_line_says_so(tree, tmp_path):
    environment = block(tree) | {"TMPDIR": str(tmp_path)}
    for hits in (0, 1):
        (value, found, folder), said = ask(tree, **environment)
        assert (value, found) == (40, hits) and Path(folder).parent == tmp_path
        assert said.count("\n") == 1 and folder in said and "NUMBA_CACHE_DIR" in said
    Path(folder).chmod(0o777)  # anybody could put code there
    (value, found, folder), said = ask(tree, **environment)
    assert (value, found, folder) == (40, 0, "None") and said.count("\n") == 1 and "in every process" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another folder for caches")
def test_the_users_cache_serves_where_the_package_cannot_be_written(tree, tmp_path):
    (_, _, folder), said = ask(tree, **block(tree) | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert not said and folder.startswith(str(tmp_path / "cache/rpq_convert"))


@pytest.mark.slow
def test_other_users_of_numba_keep_their_cache(tree, tmp_path):
    (tmp_path / "stranger.py").write_text("import numba\n\n\n@numba.njit(cache=True)\ndef f():\n    return 1\n")
    code = "import rpq_convert.kernels.jit.cache, stranger; stranger.f(); print(stranger.f.stats.cache_path)"
    path = os.pathsep.join([str(tree), str(tmp_path)])
    known = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    out = subprocess.run(
        [sys.executable, "-c", code], env={**known, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert out.stdout.strip() == str(tmp_path / "__pycache__"), out.stderr
