"""The command line: `rpq-convert SRC` converts; `rpq` groups every command.

Nothing here imports torch: the library is imported inside the commands, so that help and usage errors answer at once.
"""

from . import convert, folders, diff, about  # noqa: F401, I001 - commands register themselves, in the order of `rpq --help`
from .app import group, main

__all__ = ["group", "main"]
