"""Colours of the pictures and the page, light and dark, and pictures as SVG that follows the page's colours.

matplotlib writes a colour as six hex digits. Pictures of the page are drawn in stand-in colours, one for each variable,
which `inline_svg` replaces by `var(--name)`: the same SVG is right on either ground.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

SERIES = 8
RAMP = 12


@dataclass(frozen=True)
class Theme:
    """ink: text; muted: axes and second lines; grid: rules; surface: the ground. series: SERIES colours that are told
    apart; ramp: RAMP colours, little to much."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """{CSS variable: colour}"""
        plain = {"ink": self.ink, "muted": self.muted, "grid": self.grid, "surface": self.surface}
        plain |= {f"s{i}": colour for i, colour in enumerate(self.series)}
        return plain | {f"r{i}": colour for i, colour in enumerate(self.ramp)}


def _ramp(low: str, middle: str, high: str) -> tuple[str, ...]:
    """RAMP colours over two straight lines in RGB."""
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (low, middle, high)]
    colours = []
    for step in range(RAMP):
        place = 2 * step / (RAMP - 1)
        a, b = (ends[0], ends[1]) if place < 1 else (ends[1], ends[2])
        share = place if place < 1 else place - 1
        colours.append("#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b, strict=True)))
    return tuple(colours)


def _stand_in(number: int) -> str:
    return f"#fe00{number:02x}"


LIGHT = Theme(
    ink="#1b1b19",
    muted="#63625c",
    grid="#dddcd5",
    surface="#fcfcfa",
    series=("#2a78d6", "#d9660f", "#178f65", "#b8389a", "#8a6d00", "#6a54c8", "#d03b3b", "#4b7d00"),
    ramp=_ramp("#dfeafa", "#4a8fe0", "#0b2c5c"),
)
DARK = Theme(
    ink="#f2f1ec",
    muted="#aaa9a1",
    grid="#3a3a37",
    surface="#191918",
    series=("#5fa4f2", "#ee8a3f", "#3fbf91", "#e07cc8", "#cfae35", "#a394ee", "#f07f7a", "#96c24a"),
    ramp=_ramp("#1c3049", "#3d80cf", "#d4e6fd"),
)
_NAMES = list(LIGHT.variables())
_DIGITS = re.compile(r"(\d+\.\d{2})\d+")
"""Of coordinates: hundredths of a point are enough."""
STAND_IN = Theme(
    ink=_stand_in(0),
    muted=_stand_in(1),
    grid=_stand_in(2),
    surface=_stand_in(3),
    series=tuple(_stand_in(4 + i) for i in range(SERIES)),
    ramp=tuple(_stand_in(4 + SERIES + i) for i in range(RAMP)),
)


def css_variables(theme: Theme) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in theme.variables().items())


def inline_svg(figure: Any, name: str, label: str) -> str:
    """A figure drawn in STAND_IN as an <svg> element for the page: no namespaces, no metadata, no identifier that
    another picture could have too. label: what it shows, for readers who cannot see it."""
    from html import escape

    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--{_NAMES[int(found[1], 16)]})", svg)
    svg = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda found: _DIGITS.sub(r"\1", found[0]), svg)
    svg = re.sub(
        r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">',
        svg,
        count=1,
    )
    return re.sub(r"\n\s*", "\n", svg).strip()


def png(figure: Any) -> bytes:
    """A figure drawn in LIGHT, 160 dots an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    figure.set_dpi(160)
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()
