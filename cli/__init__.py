"""The command line: `rpq-convert SRC` converts; `rpq` groups every command.

Nothing here imports torch: the library is imported inside the commands, so that help and usage errors answer at once.
"""

from .commands import group, main

__all__ = ["group", "main"]
