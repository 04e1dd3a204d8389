"""Where things are: the checkout, and the modules that tests import (pytest's `pythonpath`; other processes' PYTHONPATH)."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
