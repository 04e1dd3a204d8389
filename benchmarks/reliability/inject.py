"""Every file operation of a run fails once, in every way; then the same call is repeated. Counted is what came of it.

Each trial is a process that was forked for it. After the fault the output's name must hold nothing, or one whole folder; after the repeated
call it must hold the bytes that an undisturbed run writes, with nothing beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rpq_convert.cli.errors import code_of
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from benchmarks.reliability.faults import MODES, Faults
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.core.results import Evaluation
from rpq_convert.storage.manifest import is_whole
from rpq_convert.storage.records import MANIFEST, read_manifest

VARYING = ("rpq_report.json", "README.md", "rpq_manifest.json")  # hold times
KNOWN, UNKNOWN = 10, 11  # exit codes of a trial: an error of one line, a traceback


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))


class Scenario:
    """A kind of run, over files of its own.

    Args:
        name: of `SCENARIOS`. place: an empty folder.
    """

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place, self.out = name, place, place / "out"
        torch.manual_seed(0)
        model = net()
        save_file(model.state_dict(), place / "dense.safetensors")
        self.options: dict[str, Any] = {
            "factory": net,
            "bits": 4,
            "grow": True,
            "executor": "serial",
            "progress": False,
        }
        if name == "sharded":
            self.options["max_shard_size"] = "3KB"
        if name == "calibrated":
            self.options["calibration"] = list(torch.randint(64, (4, 2, 8)))
        if name in ("overwriting", "restore", "evaluated"):
            before = self.out if name != "restore" else place / "converted"
            self.convert(before, seed=1 if name == "overwriting" else 0)
        if name == "saved":
            self.model = model
            rpq.convert(model, bits=4, grow=True, executor="serial")

    def convert(self, out: Path, **more: Any) -> None:
        rpq.convert_checkpoint(self.place / "dense.safetensors", out, **{**self.options, **more})

    def run(self) -> None:
        if self.name == "restore":
            rpq.restore_checkpoint(self.place / "converted", self.out, max_shard_size="10KB")
        elif self.name == "saved":
            rpq.save(self.model, self.out)
        elif self.name == "evaluated":
            add_evaluation(self.out, "a text", Evaluation("outputs", {"cosine": 0.5}, 3))
        else:
            self.convert(self.out, overwrite=self.name == "overwriting")


SCENARIOS = ("plain", "sharded", "calibrated", "overwriting", "restore", "saved", "evaluated")


def forked(action: Callable[[], Any], said: Path) -> int:
    """Run something in a process of its own; return its exit code, below 0 the signal that ended it."""
    if (pid := os.fork()) == 0:
        code = 0
        try:
            with open(said, "w", buffering=1) as file:
                os.dup2(file.fileno(), 2)
            action()
        except BaseException as e:
            code = UNKNOWN if code_of(e) is None else KNOWN
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder: Path) -> dict[str, Any]:
    """Return what is in a folder: bytes, and of files that hold times that they are there."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {n: "there" if n in VARYING else p.read_bytes() for n, p in files.items()}


def whole(folder: Path) -> bool:
    """Whether all files of a folder are as its manifest says; dense folders have one too."""
    files = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
    return bool(files) and all(
        is_whole(folder / n, f) or is_whole(folder / n, f.get("earlier", f)) for n, f in files.items()
    )


def faulty(result: str) -> bool:
    """Whether a result is one that must not be."""
    return result.startswith("FAULT")


def trials(name: str, every: int = 1, modes: tuple[str, ...] = MODES, first: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield (mode, operation, what came of it) for every `every`-th fault of a scenario."""
    with tempfile.TemporaryDirectory() as scratch:
        template, work, said = Path(scratch, "template"), Path(scratch, "work"), Path(scratch, "said")
        template.mkdir()
        scenario = Scenario(name, template)
        before = content(template / "out")

        def fresh() -> None:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(template, work)

        fresh()
        scenario.place, scenario.out = work, work / "out"
        record = Path(scratch, "record")

        def count() -> None:
            faults = Faults(work)
            faults.install()
            scenario.run()
            record.write_text(json.dumps(faults.seen))

        assert forked(count, said) == 0, said.read_text()
        wanted, beside = content(work / "out"), {p.name for p in work.iterdir()}
        operations = json.loads(record.read_text())
        for number in range(len(operations) * len(modes))[first::every]:
            at, mode = divmod(number, len(modes))
            operation, path = operations[at]
            if modes[mode] == "short" and operation not in ("write", "pwrite"):
                continue
            fresh()
            found = trial(scenario, at, modes[mode], said, (before, wanted, beside))
            yield modes[mode], f"{operation} {os.path.relpath(path, work)}", found


def trial(scenario: Scenario, at: int, mode: str, said: Path, known: tuple[Any, Any, set[str]]) -> str:
    """Let one operation fail, repeat the call, and say what came of it."""
    before, wanted, beside = known
    out = scenario.out

    def disturbed() -> None:
        Faults(scenario.place, at, mode).install()
        scenario.run()

    code = forked(disturbed, said)
    if code == UNKNOWN:
        return f"FAULT: a traceback: {said.read_text().strip()}"
    if out.exists():
        if not whole(out):
            return "FAULT: what has the output's name is not whole"
        if scenario.name != "evaluated" and content(out) not in (before, wanted):
            return "FAULT: what has the output's name is a mixture"
    elif before:
        return "FAULT: no folder has the output's name"
    if code != 0 or scenario.name in ("overwriting", "evaluated"):
        if code != 0 and out.exists() and not before:  # it was all there, but for something after the end
            again, code = 0, 0
        else:
            again = forked(scenario.run, said)
        if again:
            return f"FAULT: the repeated call failed: {said.read_text().strip()}"
    if content(out) != wanted:
        return "FAULT: other bytes than an undisturbed run"
    if not whole(out):
        return "FAULT: the result is not whole"
    left = {p.name for p in scenario.place.iterdir()} - beside
    if left - ({"out.partial.lock"} if code == 0 else set()):
        return f"FAULT: left behind: {', '.join(sorted(left))}"
    return "no harm" if code == 0 else "resumed to equal bytes"


def inject(names: list[str], every: int, first: int = 0) -> int:
    """Print what came of all faults; return how many were harmful."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:  # everything is imported and compiled once, before the forks
        warm = Scenario("calibrated", Path(scratch))
        warm.run()
        rpq.verify(warm.out)
        rpq.restore_checkpoint(warm.out, Path(scratch, "dense"))
        add_evaluation(warm.out, "a text", Evaluation("outputs", {"cosine": 0.5}, 3))
    total: Counter[str] = Counter()
    for name in names or SCENARIOS:
        found: Counter[str] = Counter()
        for mode, operation, result in trials(name, every, first=first):
            found["FAULT" if faulty(result) else result] += 1
            if faulty(result):
                print(f"  {name}, {mode} at {operation}: {result}", flush=True)
        total.update(found)
        print(
            f"{name}: {sum(found.values())} faults; " + ", ".join(f"{n} {what}" for what, n in sorted(found.items())),
            flush=True,
        )
    print(f"all: {sum(total.values())} faults; " + ", ".join(f"{n} {what}" for what, n in sorted(total.items())))
    return total["FAULT"]


if __name__ == "__main__":
    sys.exit(inject(sys.argv[1:], 1) > 0)
