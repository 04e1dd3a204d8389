"""What memory is left: by limits of the process, and by what its user asked for."""

import subprocess
import sys

import pytest

from rpq_convert.running.memory import available, peak, within

LIMITED = """
import resource, sys
from rpq_convert.running.memory import available
resource.setrlimit(getattr(resource, sys.argv[1]), (1 << 30, 1 << 30))
print(available())
"""


def test_a_limit_holds_inside_and_ends_with_it():
    before, most = available(), peak() + (1 << 30)
    with within(most):
        assert 0 < available() < most
        with within(None):  # none of its own
            assert available() < most
        with within(1):
            assert available() == 0
    assert available() > most or available() == pytest.approx(before, rel=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_system_are_seen(kind):
    done = subprocess.run([sys.executable, "-c", LIMITED, kind], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1 << 30
    assert peak() > 1 << 20
