"""What a parameter's name tells: its block, its kind within the block, its part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")

PARTS = ("linear", "head", "embedding", "other")
"""Of a model's bytes: layers inside the blocks, output head, table of embeddings, all the rest (norms, biases)."""

_HEADS = ("lm_head", "embed_out", "output", "score", "predictions.decoder")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embedding", "shared")


def block_of(parameter: str) -> int | None:
    """ "model.layers.3.mlp.up_proj.weight" -> 3, the first number in the name; None outside the blocks."""
    found = _NUMBER.search(parameter)
    return int(found[1]) if found else None


def kinds_of(parameters: Iterable[str]) -> dict[str, str]:
    """{parameter: kind}: the last parts of the name, as many as tell it from other kinds; ".weight" is left out.

    "model.layers.3.mlp.up_proj.weight" -> "up_proj"; where a block also has "shared_experts.up_proj", "mlp.up_proj".
    """
    inner = {name: _within_block(name) for name in parameters}
    distinct = sorted(set(inner.values()))
    short = {}
    for path in distinct:
        pieces = path.split(".")
        for count in range(1, len(pieces) + 1):
            tail = pieces[-count:]
            if sum(other.split(".")[-count:] == tail for other in distinct) == 1 or count == len(pieces):
                short[path] = ".".join(tail)
                break
    return {name: short[path] for name, path in inner.items()}


def part_of(parameter: str) -> str:
    """One of PARTS, for a weight with two dimensions or more."""
    if block_of(parameter) is not None:
        return "linear"
    path = _within_block(parameter)
    if path.endswith(_HEADS):
        return "head"
    return "embedding" if path.endswith(_EMBEDDINGS) else "other"


def _within_block(parameter: str) -> str:
    found = _NUMBER.search(parameter)
    return (parameter[found.end() :] if found else parameter).removesuffix(".weight")
