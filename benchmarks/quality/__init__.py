"""Peers, side by side: the same real models made small by the tools that a user would pick, quality against bytes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks beside this one are scripts: they go by bare names
