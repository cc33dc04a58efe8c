"""Pictures that commands write: matplotlib comes with the extra `bench`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


def check_plot(path: Path | None) -> None:
    """PlanError where the picture could not be written, before minutes are spent on its contents."""
    from ..calibrate.plan import PlanError

    if path is None:
        return
    if path.suffix.lower() != ".png" or path.is_dir():
        raise PlanError(f"--plot writes a .png file; got {str(path)!r}")
    if not path.parent.is_dir():
        raise PlanError(f"--plot {path}: the folder {path.parent} does not exist; create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlanError("--plot needs matplotlib; pip install 'bitpalette[bench]' brings it") from None


def write_picture(path: Path, figure: Any) -> None:
    """A matplotlib figure as PNG, complete or absent. FormatError where the system refuses to write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..formats.atomic import write_atomically

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())
