"""Weights of real models, [out_features, in_features], and schemes worth comparing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..calibrate.plan import PlanError, parse_scheme
from ..quant.scheme import Scheme


@dataclass(frozen=True)
class Layer:
    """One shape, and whose it is; `name` is empty for a shape given by hand."""

    name: str
    shape: tuple[int, int]


MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "smollm2-135m": {
        "q,o": (576, 576),
        "k,v": (192, 576),
        "gate,up": (1536, 576),
        "down": (576, 1536),
        "head": (49152, 576),
    },
    "llama-1b": {"q,o": (2048, 2048), "k,v": (512, 2048), "gate,up": (8192, 2048), "down": (2048, 8192)},
    "llama-8b": {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)},
    "qwen-7b": {"q,o": (3584, 3584), "k,v": (512, 3584), "gate,up": (18944, 3584), "down": (3584, 18944)},
    # nothing divides: a row, a short tile, columns beyond whole tiles and groups
    "awkward": {"": (1, 1536), "17": (17, 123), "123": (123, 1537), "1537": (1537, 577)},
}
"""SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B, Qwen2.5 7B: hidden and intermediate sizes of their config.json."""

DEFAULT_SHAPE = (4096, 4096)

TOKENS = (1, 2, 4, 8, 16, 64, 256, 512)

SCHEMES = (
    *(f"int,bits={bits},group_size={group}" for bits in (2, 3, 4, 8) for group in (128, 0)),
    *(f"lut,entries={1 << bits},group_size=128" for bits in (2, 3, 4)),
    *(f"trellis,rate={rate:g}" for rate in (2, 2.5, 3, 4)),
)
"""As `quantize run --set` takes them."""


def choose_layers(shapes: Iterable[str], models: Iterable[str]) -> list[Layer]:
    """The shapes "OUTxIN", then those of the models ("all": every one); DEFAULT_SHAPE where neither is given."""
    layers = [Layer("", _parse_shape(text)) for text in shapes]
    for model in models:
        if model not in (*MODELS, "all"):
            raise PlanError(f"--model is one of {[*MODELS, 'all']}; got {model!r}")
        for name in MODELS if model == "all" else (model,):
            layers += [Layer(f"{name} {layer}".strip(), shape) for layer, shape in MODELS[name].items()]
    unique = {layer.shape: layer for layer in reversed(layers)}  # a shape is timed once, under its first name
    return [layer for layer in layers if unique[layer.shape] is layer] or [Layer("", DEFAULT_SHAPE)]


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if not match or min(int(n) for n in match.groups()) < 1:
        raise PlanError(f"--shape is OUTxIN, such as 4096x4096; got {text!r}")
    return int(match[1]), int(match[2])


def choose_schemes(texts: Iterable[str]) -> list[Scheme]:
    """The schemes that the texts describe, each once. PlanError for one that keeps 16 bits or transforms its input."""
    chosen: dict[Scheme, None] = {}
    for text in texts:
        scheme = parse_scheme(text, None)
        if scheme is None:
            raise PlanError(f"--scheme {text!r} keeps 16 bits: torch's own linear is in every table")
        if scheme.transforms:
            raise PlanError(f"--scheme {text!r}: a layer transforms its input, not a kernel; leave the transforms out")
        chosen[scheme] = None
    return list(chosen)
