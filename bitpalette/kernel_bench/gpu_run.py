"""The measurement on a GPU, from shapes, schemes and settings to rows, and from rows to the table of choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..kernels.measured_choice import CLASSES, choice_key, store_times
from ..kernels.registry import kernels
from ..provenance import commit
from ..quant.scheme import Scheme, SchemeError
from ..quant.tensor import QuantizedTensor
from .contender import Absent, Call, Contender, Expected, expected_output, scheme_label
from .gpu_contenders import TORCH, gpu_contender, names_on, torch_contender
from .gpu_rounds import Copier, time_on_gpu
from .random_weight import random_weight
from .rows import Place, Row, absent_row, row_of
from .run import Settings, Step
from .shapes import Layer

CLOCK = "gpu"
"""Of rows: CUDA events around graphs of calls."""


def measure_on_gpu(
    layers: Sequence[Layer], schemes: Sequence[Scheme], settings: Settings, step: Step = lambda text: None
) -> Iterator[list[Row]]:
    """The rows of one layer and one count of tokens after another. All of a layer's schemes are in the same rounds."""
    device = settings.device
    where = (0, CLOCK, settings.cache, device_name(device), commit() or "installed")
    copier = Copier(device)
    for layer in layers:
        generator = torch.Generator(device).manual_seed(settings.seed)
        x = torch.randn(max(settings.tokens), layer.shape[1], generator=generator, device=device)
        taking_part: list[tuple[Contender, list[Call]]] = [
            (torch_contender(name, layer.shape, generator), []) for name in TORCH
        ]
        absent: list[Absent] = []
        for scheme in schemes:
            found = _of_scheme(scheme, layer, settings, x, generator)
            if isinstance(found, Absent):
                absent.append(found)
            else:
                taking_part += [(contender, []) for contender in found]
        for tokens in settings.tokens:
            step(f"{layer.name} {layer.shape[0]}x{layer.shape[1]} tokens={tokens}".strip())
            timed = time_on_gpu(
                taking_part,
                x[:tokens],
                rounds=settings.rounds,
                memory=settings.memory // len(taking_part),
                copier=copier,
                cache=settings.cache,
            )
            place = Place(layer, tokens, *where)
            baselines = {t.contender.kernel: t for t in timed if t.contender.kernel in TORCH}
            yield [row_of(t, place, baselines) for t in timed] + [absent_row(a, place) for a in absent]


def _of_scheme(
    scheme: Scheme, layer: Layer, settings: Settings, x: torch.Tensor, generator: torch.Generator
) -> list[Contender] | Absent:
    names = list(names_on(scheme, layer.shape, settings.device, settings.kernels))
    if not names:
        reasons = {n: kernels()[n].why_not(scheme, layer.shape, settings.device) for n in settings.kernels}
        return Absent("", scheme_label(scheme), "; ".join(f"{n}: {why}" for n, why in reasons.items() if why))
    try:
        qt: QuantizedTensor = random_weight(scheme, layer.shape, generator)
    except SchemeError as error:
        return Absent("", scheme_label(scheme), str(error))
    expected: Expected = expected_output(qt, x, settings.dtype)
    return [gpu_contender(name, qt, settings.dtype, expected) for name in names]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def store_rows(rows: Sequence[Row], schemes: Sequence[Scheme], device: str) -> Path:
    """The medians of what was timed, into the table that `kernels.base.choose` ranks by; its path."""
    labels = {scheme_label(scheme): scheme for scheme in schemes}
    measured: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row.median_us is not None and row.scheme in labels and row.tokens in CLASSES:
            key = choice_key(labels[row.scheme], (row.out_features, row.in_features))
            measured.setdefault((key, row.tokens), {})[row.kernel] = row.median_us
    return store_times(device, measured)
