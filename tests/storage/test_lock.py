"""The lock of an output folder: one holds it, the others say who, and nothing of it is left."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
from paths import ROOT

from rpq_convert.errors import FolderError
from rpq_convert.storage import lock
from rpq_convert.storage.lock import locked

HOLD = """
import sys
from rpq_convert.storage.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of `out`, and was given an access token."""
    command = [sys.executable, "-c", HOLD, tmp_path / "out", "--token", "hf_secret"]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    }
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_named_and_its_death_frees_the_lock(other, tmp_path):
    said = rf"out is being written by process {other.pid} on \S+ since 20\S+ \(-c .*out --token \*\*\*\); wait for it"
    for place in (tmp_path / "out", tmp_path / "x" / ".." / "out"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(FolderError, match=said), locked(place):
            pass
    with locked(tmp_path / "out2"):
        pass
    other.kill()
    other.wait()
    assert (tmp_path / "out.partial.lock").is_file()  # of the dead one
    with locked(tmp_path / "out"):
        assert json.loads((tmp_path / "out.partial.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob("*.lock"))


def test_a_thread_may_take_it_again_and_another_may_not(tmp_path):
    said = []

    def attempt():
        try:
            with locked(tmp_path / "out"):
                said.append("held")
        except FolderError as e:
            said.append(str(e))

    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"):
            pass
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    attempt()
    assert "another thread of this process" in said[0] and said[1] == "held"


def test_it_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "out"):
        raise ZeroDivisionError
    with locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_many_threads_take_turns(tmp_path):
    """Whoever gets the lock is alone, though the file is made and removed all the time."""
    inside, wrong, done = [], [], []

    def work():
        while len(done) < 60:
            try:
                with locked(tmp_path / "out"):
                    inside.append(1)
                    wrong.extend(inside[1:])
                    inside.pop()
                    done.append(1)
            except FolderError as e:
                assert re.search("being written", str(e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "a\\u001b[31m\\n", "command": "c", "since": "s"}']
)
def test_a_record_that_says_nothing_is_no_obstacle(text, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    path = tmp_path / "out.partial.lock"
    path.write_text(text)
    handle = os.open(path, os.O_RDWR)
    lock.fcntl.flock(handle, lock.fcntl.LOCK_EX)
    with pytest.raises(FolderError, match="out is being written by ") as caught, locked(tmp_path / "out"):
        pass
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    os.close(handle)
    with locked(tmp_path / "out"):
        pass
    assert not path.exists()


def test_without_locks_of_the_file_system_the_file_itself_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    path = tmp_path / "out.partial.lock"
    with locked(tmp_path / "out"):
        _held, lock._held = lock._held, {}
        with pytest.raises(FolderError, match="another thread of this process"), locked(tmp_path / "out"):
            pass
        lock._held = _held
    assert not path.exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    record = {**lock._record(), "pid": dead.pid}
    path.write_text(json.dumps(record))
    with locked(tmp_path / "out"):  # of a process of this machine that is no more
        pass
    assert not path.exists()
    path.write_text(json.dumps({**record, "host": "elsewhere"}))
    with pytest.raises(FolderError, match=f"process {dead.pid} on elsewhere"), locked(tmp_path / "out"):
        pass
    assert path.is_file()
