"""The `quantize` command. Bad input ends in one line on stderr and exit code 2; nothing is left half-written."""

from __future__ import annotations

import sys

import typer

from .commands import demo, evaluate, generate, inspect, run, verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for module in (run, evaluate, inspect, verify, generate, demo):
    module.register(app)


def main() -> int:
    """Entry point: exit code 0 only where all that was asked for was done."""
    from rich.console import Console

    from .calibrate.plan import PlanError
    from .calibrate.text import CalibrationError
    from .formats.errors import FormatError
    from .quant.scheme import SchemeError

    try:
        app()
    except (FormatError, PlanError, CalibrationError, SchemeError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {' '.join(str(error).split())}", highlight=False)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0
