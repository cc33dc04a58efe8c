"""The `quantize` command. Bad input ends in one line on stderr and exit code 2; nothing is left half-written."""

from __future__ import annotations

import sys
from typing import Any

import typer

from .commands import bench, demo, evaluate, generate, inspect, plan, plan_kv, report, run, verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for module in (run, plan, plan_kv, evaluate, inspect, report, verify, generate, demo, bench):
    module.register(app)

UsageError: Any = typer.BadParameter.__bases__[0]
"""click's, or that of the copy of click that newer versions of typer carry: only its subclass is public."""

INTERRUPTED = 130


def main() -> int:
    """Entry point: exit code 0 only where all that was asked for was done."""
    import torch
    from rich.console import Console
    from rich.text import Text

    from .calibrate.plan import PlanError
    from .calibrate.text import CalibrationError
    from .formats.errors import FormatError
    from .quant.kv_format import KVError
    from .quant.native import NativeError
    from .quant.scheme import SchemeError

    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "quantize"
        message = f"{error.format_message()} (see {command} --help)"
    except (FormatError, PlanError, CalibrationError, SchemeError, NativeError, KVError) as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        needed = str(error).partition(" GPU ")[0]  # what follows counts torch's own memory over several sentences
        message = f"{needed} Use a GPU with more memory, or the CPU"
    else:
        if code == INTERRUPTED:
            resumes = "; the same command goes on where it stopped" if sys.argv[1:2] == ["run"] else ""
            print("interrupted" + resumes, file=sys.stderr)
        return int(code or 0)
    line = Text.assemble(("error:", "red"), " ", " ".join(message.split()))
    Console(stderr=True, soft_wrap=True).print(line)
    return 2
