"""`quantize verify`: is the checkpoint whole?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("verify")(verify_command)


def verify_command(checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")]) -> None:
    """Check every hash, decode every tensor, look for values that are not finite. Exit code 2 names what is bad."""
    from ..formats.verify import verify

    problems = list(verify(checkpoint))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(2)
    print(f"{checkpoint}: every file and tensor is as written")
