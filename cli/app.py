"""The two apps: `rpq-convert` is one command, `rpq` groups all; and what every command's help ends with."""

from typing import Any

import typer

SETTINGS: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}
EXIT_CODES = (
    "Exit codes: 0 done, 2 usage, 3 plan, 4 input or output, 5 verification, 130 interrupted (run again to go on)."
)


def examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines), EXIT_CODES])


group = typer.Typer(
    **SETTINGS,
    help="Make neural networks small: product-quantize their weights.",
    epilog=examples(
        "rpq plan facebook/opt-125m --bits 4", "rpq convert facebook/opt-125m --bits 4", "rpq audit opt-125m-rpq"
    ),
)
main = typer.Typer(**SETTINGS)
