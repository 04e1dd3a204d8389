"""The two apps: `rpq-convert` is one command, `rpq` groups all; and what every command's help ends with."""

from typing import Annotated, Any

import typer

from rpq_convert.version import __version__

HELP = {"help_option_names": ["--help", "-h"]}
SETTINGS: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "context_settings": HELP}
EXIT_CODES = (
    "Exit codes: 0 done, 2 usage, 3 plan, 4 input or output, 5 verification, 6 time limit, 130 interrupted, 143 terminated (after "
    "these three, run again to go on). "
    "RPQ_TRACEBACK=1 in the environment shows where an error arose."
)


def examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines), EXIT_CODES])


def _show_version(asked: bool) -> None:
    if asked:
        print(f"rpq-convert {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]
group = typer.Typer(
    **SETTINGS,
    help="Make neural networks small: product-quantize their weights.",
    epilog=examples(
        "rpq plan facebook/opt-125m --bits 4", "rpq convert facebook/opt-125m --bits 4", "rpq audit opt-125m-rpq"
    ),
)
main = typer.Typer(**SETTINGS, add_completion=False)


@group.callback()
def rpq(version: Version = False) -> None:
    """Take the options that stand before a command."""
