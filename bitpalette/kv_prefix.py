"""Keys and values of a prefix that come from the full-precision model (IntactKV, arXiv 2403.01241): of the pivot tokens
that nearly all attention goes to, a BOS token or a system prompt, where errors of a model with few bits cost most.

    prefix = compute_prefix(original, tokenizer(system_prompt, return_tensors="pt")["input_ids"][0])
    save_prefix("prefix.safetensors", prefix)
    cache = with_prefix(QuantizedCache(model.config, "k4v4"), load_prefix("prefix.safetensors"), dtype=model.dtype)
    model.generate(input_ids, past_key_values=cache)       # input_ids begin with prefix.tokens

The first tokens of a prefix are the cache's sinks and stay in 16 bits; a prefix longer than these is packed behind them
like any other tokens. Takes transformers' DynamicCache as well.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from .formats.atomic import write_atomically
from .formats.errors import FormatError
from .formats.safetensors_file import SafetensorsFile
from .kv_layer import PackedLayer
from .quant.kv_format import KVError

VERSION = 1
KEY = "bitpalette_kv_prefix"
NAMES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class Prefix:
    """tokens: int64 [n]. layers: of every layer that has keys of its own, by its index, (keys [kv_heads, n, D] behind
    rotary embedding, values [kv_heads, n, Dv])."""

    tokens: Tensor
    layers: dict[int, tuple[Tensor, Tensor]]

    def begins(self, input_ids: Tensor) -> bool:
        """Whether every row of input_ids int64 [batch, length] starts with the prefix, as it must for `generate`."""
        n = len(self.tokens)
        return input_ids.shape[1] >= n and bool((input_ids[:, :n].cpu() == self.tokens).all())


@torch.no_grad()
def compute_prefix(model: Any, tokens: Tensor) -> Prefix:
    """The prefix of tokens int64 [n], computed by `model`. KVError for a model whose cache is not keys and values, or
    a prefix that its sliding windows do not hold."""
    if tokens.ndim != 1 or len(tokens) == 0:
        raise KVError(f"a prefix is tokens [n], not {list(tokens.shape)}; give the ids of one row")
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            keys, values = layer.keys, layer.values
            if keys is None or values is None or keys.numel() == 0:
                continue  # reads the keys of another
            if keys.shape[2] != len(tokens):
                raise KVError(
                    f"layer {index} keeps {keys.shape[2]} of the prefix's {len(tokens)} tokens (a sliding window); "
                    "give a shorter prefix"
                )
            layers[index] = (keys[0].cpu().contiguous(), values[0].cpu().contiguous())
        elif type(layer).__name__ != "DummyLayer":
            raise KVError(f"layer {index} is a {type(layer).__name__}, which holds more than keys and values")
    if not layers:
        raise KVError(f"{type(model).__name__} wrote no keys into the cache; it has no prefix")
    return Prefix(tokens.cpu().clone(), layers)


def save_prefix(path: str | os.PathLike[str], prefix: Prefix) -> None:
    """Write a safetensors file: tokens int64, layer.I.keys and layer.I.values."""
    tensors = {"tokens": prefix.tokens}
    for index, pair in prefix.layers.items():
        tensors |= {f"layer.{index}.{name}": t.contiguous() for name, t in zip(NAMES, pair, strict=True)}
    write_atomically(Path(path), save(tensors, {KEY: json.dumps({"version": VERSION})}))


def load_prefix(path: str | os.PathLike[str]) -> Prefix:
    """The inverse. FormatError for a file that is no prefix, or of a newer version."""
    file = SafetensorsFile(Path(path))
    try:
        version = json.loads(file.metadata[KEY])["version"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"{path}: is no prefix of a cache; bitpalette.kv_prefix.save_prefix writes one") from None
    if version != VERSION:
        raise FormatError(f"{path}: version {version!r} of a prefix, this program knows {VERSION}; update bitpalette")
    names = set(file.tensors)
    layers = sorted(int(name.split(".")[1]) for name in names if name.startswith("layer.") and name.endswith(".keys"))
    if names != {"tokens", *(f"layer.{i}.{name}" for i in layers for name in NAMES)}:
        raise FormatError(f"{path}: tensors {sorted(names)[:4]}.. are not those of a prefix; write it again")
    tokens = file.read("tokens")
    pairs = {i: (file.read(f"layer.{i}.keys"), file.read(f"layer.{i}.values")) for i in layers}
    for index, pair in pairs.items():
        if any(t.ndim != 3 or t.shape[1] != len(tokens) or not t.isfinite().all() for t in pair):
            shapes = [list(t.shape) for t in pair]
            raise FormatError(f"{path}: layer {index} has {shapes} for {len(tokens)} tokens, or what is no number")
    return Prefix(tokens, pairs)


@torch.no_grad()
def with_prefix(
    cache: Cache,
    prefix: Prefix,
    batch: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    padding: list[int] | None = None,
) -> Cache:
    """The cache, which must be empty, with the prefix in `batch` rows. dtype: of the model (None: of the prefix).

    padding: how many padding tokens stand to the left of each row, in front of the prefix. The cache's first columns
    are then padding, and of the prefix a row has only the tokens that are left: the model computes the others itself.
    KVError for a cache that is not empty, is static, or has other layers.
    """
    n = len(prefix.tokens)
    skip = np.array([0] * batch if padding is None else padding, np.int64)
    if cache.get_seq_length() != 0:
        raise KVError(f"the cache has {cache.get_seq_length()} tokens; a prefix goes into an empty one")
    if len(skip) != batch or (skip < 0).any():
        raise KVError(f"padding {skip.tolist()} of {batch} rows; give one number of tokens a row, 0 or more")
    for index, layer in enumerate(cache.layers):
        known = isinstance(layer, PackedLayer | DynamicLayer)
        if known != (index in prefix.layers) or (not known and type(layer).__name__ != "DummyLayer"):
            raise KVError(
                f"layer {index} of the cache is a {type(layer).__name__}, the prefix has keys for layers "
                f"{sorted(prefix.layers)}; compute it with a model of this architecture, for a cache that grows"
            )
    if strange := [index for index in prefix.layers if index >= len(cache.layers)]:
        raise KVError(f"the prefix has keys for layers {strange}, the cache has {len(cache.layers)} layers")
    skip = np.minimum(skip, n)
    for index, pair in prefix.layers.items():
        keys, values = (_shifted(t, skip).to(device, dtype) for t in pair)
        layer = cache.layers[index]
        if isinstance(layer, PackedLayer):
            layer.put(keys, values, skip)
        elif isinstance(layer, DynamicLayer):
            layer.update(keys, values)
    return cache


def _shifted(x: Tensor, skip: np.ndarray) -> Tensor:
    """x [heads, n, D] -> [rows, heads, n, D] with skip[r] zeros in front of row r, and so many less at its end."""
    out = x.new_zeros(len(skip), *x.shape)
    for row, padding in enumerate(skip.tolist()):
        out[row, :, padding:] = x[:, : x.shape[1] - padding]
    return out
