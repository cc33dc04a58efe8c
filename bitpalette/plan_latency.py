"""Tokens a second of a plan, before it is quantized: times of single layers on this machine, and of the rest of a step.

    seconds of a token = rest + sum over the linear layers of layer(scheme, shape)

A layer is timed by the machinery of `quantize bench kernels`, one token, float32 in and out as the native decoder has
it, its weight in turn with as many others as a decode step reads in between: a model smaller than the last-level cache
is partly read from there, and is so here. The rest (attention, norms, transforms of inputs, the embedding, sampling,
what calls cost) is what a whole step of a model with random codes takes beyond its layers: measured once for a model's
shape. Layers that share an input (q, k and v; gate and up) share its transformed form in the decoder already
(csrc/cpu/decoder.cpp, `multiply`), whatever their schemes: fusing them is no choice of a plan.

What was measured is kept in the user's cache folder, a file for each processor, number of threads and version.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ._version import __version__
from .calibrate.plan import PlanError
from .formats.atomic import write_atomically
from .formats.errors import FormatError
from .kernel_bench.rounds import Spread
from .kernels.cache_folder import cache_folder, device_slug
from .kernels.measured_choice import choice_key
from .plan_step import layer_times, rest_of_step
from .provenance import last_level_cache, processor
from .quant.scheme import Scheme
from .quant.tensor import stored_bytes

Matrix = tuple[int, int]
Layer = tuple[Scheme | None, Matrix]
"""A scheme (None: the model's 16 bits) and [out_features, in_features]."""

Step = Callable[[str], None]
"""Called with a description as each measurement begins."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Times(BaseModel):
    """Seconds: median of the rounds, p20 and p80."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: _Positive
    p20: _Positive
    p80: _Positive


class Rest(BaseModel):
    """Seconds of a decode step beyond its layers; below 0 where single calls cost more than in a step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: _Finite
    p20: _Finite
    p80: _Finite


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    processor: str
    threads: Annotated[int, Field(ge=1)]
    bitpalette_version: str
    layers: dict[str, Times] = {}
    """By `_layer_key`."""
    rests: dict[str, Rest] = {}
    """By `_shape_key`."""


class LatencyTable:
    """Times on this machine with so many threads, measured as they are first asked for, and kept.

    PlanError for a device whose times cannot be had.
    """

    def __init__(
        self,
        threads: int | None = None,
        device: str = "cpu",
        *,
        again: bool = False,
        step: Step = lambda text: None,
    ) -> None:
        """threads: None: torch's. again: measure anew what the file has. step: told of every measurement."""
        check_device(device)
        self.threads = threads or torch.get_num_threads()
        self.step = step
        self.path = cache_folder() / f"latency-{device_slug(processor())}-t{self.threads}.json"
        self._file = _empty(self.threads) if again else _read(self.path, self.threads)

    def layer(self, scheme: Scheme | None, shape: Matrix, model_bytes: int) -> Times:
        """Seconds of one token through a layer of a model whose weights take about `model_bytes`."""
        return self.layers([(scheme, shape)], model_bytes)[scheme, shape]

    def layers(self, wanted: Iterable[Layer], model_bytes: int) -> dict[Layer, Times]:
        """The same for several; those of one shape that are new are timed in turn, round by round."""
        read = _read_between(model_bytes)
        unique = list(dict.fromkeys((None if s is None else s.replace(transforms=()), shape) for s, shape in wanted))
        wanted = list(wanted)
        missing = [layer for layer in unique if _layer_key(*layer, read) not in self._file.layers]
        for shape in dict.fromkeys(shape for _, shape in missing):
            schemes = [s for s, of in missing if of == shape]
            self.step(f"{shape[0]} x {shape[1]}: {len(schemes)} schemes, {self.threads} threads")
            for scheme, spread in zip(schemes, layer_times(schemes, shape, self.threads, read), strict=True):
                self._file.layers[_layer_key(scheme, shape, read)] = Times(**vars(spread))
            self._write()
        bare = {layer: (None if layer[0] is None else layer[0].replace(transforms=()), layer[1]) for layer in wanted}
        return {layer: self._file.layers[_layer_key(*of, read)] for layer, of in bare.items()}

    def rest(self, config: Any, reference: Mapping[str, Layer]) -> Rest:
        """Seconds of a step beyond its layers. config: of the transformers model; reference: {parameter: layer} of a
        typical plan, which is built with random codes and timed where the file has no model of this shape."""
        key = _shape_key(config)
        if key not in self._file.rests:
            self.step(f"a whole step of {len(reference)} layers, {self.threads} threads")
            total = rest_of_step(config, {name: scheme for name, (scheme, _) in reference.items()}, self.threads)
            layers = self._sum(reference)
            values = {name: getattr(total, name) - layers.median for name in ("median", "p20", "p80")}
            self._file.rests[key] = Rest(**values)
            self._write()
        return self._file.rests[key]

    def seconds(self, config: Any, layers: Mapping[str, Layer], reference: Mapping[str, Layer] | None = None) -> Spread:
        """Seconds of a token of the model that has these {parameter: layer}; reference: see `rest`; None: layers."""
        rest, of = self.rest(config, layers if reference is None else reference), self._sum(layers)
        return Spread(rest.median + of.median, rest.p20 + of.p20, rest.p80 + of.p80)

    def tokens_per_second(
        self, config: Any, layers: Mapping[str, Layer], reference: Mapping[str, Layer] | None = None
    ) -> Spread:
        """1 / `seconds`, the slower fifth of steps as p20. PlanError where the times make no sense together."""
        s = self.seconds(config, layers, reference)
        if not s.p20 > 0 or not s.median > 0:
            raise PlanError(f"times of layers and of a step disagree ({s.median:.3g} s a token): measure again")
        return Spread(1 / s.median, 1 / s.p80, 1 / s.p20)

    def _sum(self, layers: Mapping[str, Layer]) -> Spread:
        """Of independent times: medians add up, deviations from them by squares."""
        counts = Counter(layers.values())
        times = self.layers(counts, weights_bytes(layers))
        median = sum(n * times[layer].median for layer, n in counts.items())
        below = math.sqrt(sum(n * (times[layer].median - times[layer].p20) ** 2 for layer, n in counts.items()))
        above = math.sqrt(sum(n * (times[layer].p80 - times[layer].median) ** 2 for layer, n in counts.items()))
        return Spread(median, median - below, median + above)

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(
                f"{self.path.parent}: {error.strerror}; set BITPALETTE_CACHE to another folder"
            ) from error
        write_atomically(self.path, (self._file.model_dump_json(indent=1) + "\n").encode())


def check_device(device: str) -> None:
    """PlanError for a device that steps cannot be timed on."""
    kind = torch.device(device).type
    if kind == "cpu":
        return
    if kind == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"--device {device}: no GPU here; plan with --device cpu, or on the machine that will run it")
    raise PlanError(f"--device {device}: times of decode steps are measured on a CPU only; plan with --device cpu")


def weights_bytes(layers: Mapping[str, Layer]) -> int:
    """Bytes that a step reads of these layers."""
    return sum(2 * math.prod(shape) if s is None else stored_bytes(s, shape) for s, shape in layers.values())


def _read_between(model_bytes: int) -> int:
    """Bytes that are read between two uses of a weight: the model's, to a power of two so that plans share times, and
    not beyond the last-level cache, where more changes nothing."""
    rounded = 1 << round(math.log2(max(model_bytes, 1 << 20)))
    return min(rounded, last_level_cache() or rounded)


def _layer_key(scheme: Scheme | None, shape: Matrix, read: int) -> str:
    name = f"16 bits {shape[0]}x{shape[1]}" if scheme is None else choice_key(scheme, shape)
    return f"{name} of {read >> 20} MiB"


def _shape_key(config: Any) -> str:
    text = config.get_text_config(decoder=True)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = (*sizes, "head_dim", "vocab_size")
    return " ".join([text.model_type, *(f"{name}={getattr(text, name, None)}" for name in names)])


def _empty(threads: int) -> _File:
    return _File(processor=processor(), threads=threads, bitpalette_version=__version__)


def _read(path: Path, threads: int) -> _File:
    """What the file has of this processor, these threads and this version; nothing, and a line on stderr, where it is
    damaged."""
    if not path.exists():
        return _empty(threads)
    try:
        found = _File.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        print(f"bitpalette: times are measured again, {path} is unreadable: {reason}", file=sys.stderr)
        return _empty(threads)
    mine = (processor(), threads, __version__)
    return found if (found.processor, found.threads, found.bitpalette_version) == mine else _empty(threads)
