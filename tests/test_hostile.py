"""A sample of crafted inputs to the commands: none ends in a traceback, a signal, or without an end."""

import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.slow
def test_sample_is_refused_in_one_line_or_read():
    command = [sys.executable, ROOT / "benchmarks/hostile.py", "--every", "25"]
    done = subprocess.run(command, capture_output=True, text=True)
    faults = [line for line in done.stdout.splitlines() if line.startswith(("traceback", "signal", "memory", "lines"))]
    assert not faults, "\n".join(faults)
    assert done.stdout.count(" inputs, ") == 6, done.stderr[-2000:]
