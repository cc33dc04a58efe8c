"""Measurements behind plan_latency.py: single layers as a decode step calls them, and whole steps of random codes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate.plan import PlanError
from .hf import replace_modules
from .kernel_bench.contender import CPU, Call, Contender, expected_output, packed_contender
from .kernel_bench.random_weight import random_weight
from .kernel_bench.rounds import MARGIN, Spread, make_reader, spread, time_rounds
from .kernels.base import choose
from .kernels.decoder import NativeDecoder, why_not
from .kernels.native_linear import native_linear
from .quant.native import DTYPES, chosen_isa, cpu_module, isa_index, why_no_cpu_module
from .quant.scheme import Scheme

ROUNDS = 25
SECONDS = 0.5
"""Of one layer's rounds, about."""

MEMORY = 2 << 30
"""Bytes that copies of weights may take together."""

POSITIONS = 64
"""Tokens of context that timed steps have: few, so that attention is the constant that short answers see."""

STEPS = 24


def layer_times(schemes: Sequence[Scheme | None], shape: tuple[int, int], threads: int, read: int) -> list[Spread]:
    """Seconds of one token through a layer [out, in] by each scheme, with `read` bytes read between two uses of a
    weight. PlanError without native code, or where a kernel computes something else than its codec."""
    if reason := why_no_cpu_module():
        raise PlanError(f"times of layers need the native kernels: {reason}; install bitpalette with its native code")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape[1], generator=generator)
    contenders: list[tuple[Contender, list[Call], int]] = [
        (_contender(scheme, shape, x, generator), [], threads) for scheme in schemes
    ]
    reader = make_reader(min(int(MARGIN * read), MEMORY // 4))
    timed = time_rounds(
        contenders, x, rounds=ROUNDS, seconds=SECONDS, memory=MEMORY, cache=int(read / MARGIN), reader=reader
    )
    for t in timed:
        if t.wrong:
            raise PlanError(f"{t.contender.kernel} {t.contender.scheme} {list(shape)}: {t.wrong}")
    return [spread(list(t.seconds.values())) for t in timed]


def _contender(scheme: Scheme | None, shape: tuple[int, int], x: Tensor, generator: torch.Generator) -> Contender:
    if scheme is None:
        return _dense_contender(shape, generator)
    bare = scheme.replace(transforms=())
    kernel = choose(bare, shape, CPU)
    qt = random_weight(bare, shape, generator)
    return packed_contender(kernel, "", qt, torch.float32, expected_output(qt, x, torch.float32))


def _dense_contender(shape: tuple[int, int], generator: torch.Generator) -> Contender:
    """A bfloat16 weight as the native decoder multiplies it (csrc/cpu/dense_weight.h)."""
    isa = isa_index(chosen_isa())

    def new_copy() -> Call:
        w = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        weight = cpu_module().DenseWeight(isa, w.data_ptr(), DTYPES[w.dtype], *shape)

        def call(x: Tensor, keep: Tensor = w) -> Tensor:  # keep: the weight points to it
            y = x.new_empty(x.shape[0], shape[0])
            native_linear([weight], isa, None, x, [None], [y])
            return y

        return call

    nbytes = 2 * shape[0] * shape[1]
    return Contender("dense", "16 bits", "", "float32", shape, nbytes, new_copy(), new_copy, lambda x: x)


def random_model(config: Any, schemes: Mapping[str, Scheme | None], seed: int = 0) -> nn.Module:
    """A transformers model of this config in bfloat16 on the CPU, its weights {parameter: scheme} packed with random
    codes, all others random."""
    import transformers

    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    generator = torch.Generator().manual_seed(seed)
    with _skipping_init():
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        values = torch.ones(()) if parameter.ndim == 1 else torch.empty_like(parameter).normal_(0, 0.02)
        parameter.data.copy_(values)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in schemes}
    packed = {k: random_weight(s, shapes[k], generator) for k, s in schemes.items() if s is not None}
    return replace_modules(model, packed) if packed else model


@contextlib.contextmanager
def _skipping_init() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def rest_of_step(config: Any, schemes: Mapping[str, Scheme | None], threads: int) -> Spread:
    """Seconds of a whole step of the model with random codes. PlanError where it has no native decoder."""
    return step_times(random_model(config, schemes), threads)


@torch.inference_mode()
def step_times(model: nn.Module, threads: int, steps: int = STEPS) -> Spread:
    """Seconds of a decode step, the choice of the next token with it, at up to POSITIONS + steps tokens of context."""
    if reason := why_not(model):
        raise PlanError(f"tokens a second are planned for the native decoder: {reason}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = NativeDecoder(model, POSITIONS + steps + 1)
        token = torch.tensor([1])
        taken = []
        for position in range(POSITIONS + steps):
            start = time.perf_counter()
            logits = decoder.step(token, position)
            token = logits.nan_to_num().argmax(dim=-1)
            if position >= POSITIONS:
                taken.append(time.perf_counter() - start)
        return spread(taken)
    finally:
        torch.set_num_threads(before)
