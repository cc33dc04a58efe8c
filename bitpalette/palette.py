"""Which schemes a plan may choose from: `--palette`.

"trellis" is every quarter of a bit from 1.5 to 5; "int=3/4/8" uniform codes of these bits. Texts add up.
"""

from __future__ import annotations

from collections.abc import Sequence

from .calibrate.plan import PlanError
from .quant.scheme import Scheme
from .recipe import EFFORTS, scheme_for

CODECS = {
    "trellis": tuple(r / 4 for r in range(6, 21)),
    "int": (2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    "lut": (2.0, 3.0, 4.0),
    "float": (4.0, 6.0, 8.0),
}
"""Bits of a codec that is named without them."""

DEFAULT = ("trellis", "int=6/8")
"""Above 5 bits, where the trellis ends, a weight that the output hangs on is worth 6 or 8."""

GROUPED = 64
"""Columns of a scale of uniform and table codes up to this many bits below 8; above, a row has one."""


def palette(texts: Sequence[str], effort: str) -> list[Scheme]:
    """Schemes for layers that are multiplied: rotated, what feedback asks for in order. PlanError for a text that names
    no codec or bits that it has not."""
    found: dict[Scheme, None] = {}
    for text in (part.strip() for given in (texts or DEFAULT) for part in given.split(",") if part.strip()):
        codec, separator, bits = text.partition("=")
        if codec not in CODECS:
            raise PlanError(
                f"--palette {text!r}: codecs are {list(CODECS)}, with bits as in 'int=3/4/8' or 'trellis=2/2.5/3'"
            )
        try:
            widths = [float(b) for b in bits.split("/")] if separator else list(CODECS[codec])
        except ValueError:
            raise PlanError(f"--palette {text!r}: {bits!r} are no bits such as 2/2.5/3") from None
        for width in widths:
            found[_scheme(codec, width, effort)] = None
    return list(found)


def _scheme(codec: str, bits: float, effort: str) -> Scheme:
    window = EFFORTS[effort]
    if codec == "trellis":
        return scheme_for(codec, bits, None, window=window).replace(transforms=("rotate", "order"))
    group = 0 if bits >= 6 else GROUPED
    return scheme_for(codec, bits, group).replace(transforms=("rotate",))


OUTER_TRELLIS = tuple(r / 4 for r in range(8, 21))
OUTER_INT = (6.0, 8.0)


def outer_palette(texts: Sequence[str], effort: str) -> list[Scheme]:
    """The same for head and embeddings: of a palette that is named, what it has; else trellis codes from 2 bits on, and
    6 and 8 bits with a scale a row, not rotated."""
    if texts:
        return palette(texts, effort)
    found = [_scheme("trellis", bits, effort) for bits in OUTER_TRELLIS]
    return found + [scheme_for("int", bits, 0) for bits in OUTER_INT]
