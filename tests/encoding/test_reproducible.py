"""Reproducible fits have the same bytes everywhere: those on record, whatever the processor that runs these tests."""

import json
import os
import subprocess
import sys

import pytest
from reproducible_fits import MORE, QUICK, digest

import rpq_convert as rpq
from rpq_convert.errors import PlanError

PROGRAM = os.path.join(os.path.dirname(__file__), "..", "support", "reproducible_fits.py")
OLD = {  # a processor of 2008, as far as each library can be told
    "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41", "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "", "NPY_DISABLE_CPU_FEATURES": "X86_V3 AVX2 FMA3", "OMP_NUM_THREADS": "2",
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_the_bytes_are_those_on_record(name):
    options, known = QUICK[name]
    assert digest(options) == known


@pytest.mark.slow
def test_an_old_processor_gives_the_same_bytes(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM],
        env={**os.environ, **OLD, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {name: known for name, (_, known) in (QUICK | MORE).items()}


def test_it_is_on_record_and_is_only_asked_of_fits_to_weights():
    from reproducible_fits import net

    plan = rpq.plan(net(), bits=4, reproducible=True)
    assert plan.options["reproducible"] and all(job.reproducible for job in plan.jobs)
    assert rpq.Plan.from_dict(plan.to_dict()) == plan
    assert "reproducible" not in rpq.plan(net(), bits=4).to_json()
    with pytest.raises(PlanError, match="reproducible serves fits to weights alone"):
        rpq.convert(net(), plan=plan, calibration=lambda model: [])
