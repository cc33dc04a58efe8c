"""transform_input on the host executor: against quant/'s transforms; int8 forms to the last bit where x is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitpalette.quant.hartley import hartley_hadamard, odd_part
from bitpalette.quant.order import pack_order
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.transform import get_transform

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "csrc" / "cuda"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
EPSILON = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # float32: of the sums
SAME, INT8, PLANES = range(3)
LIMIT = 99 * 1024


def hartley_matrix(p: int) -> Tensor:
    """float32 [p, p rounded up to 16]: what the kernel is given; DHT_p is R of an odd size."""
    return torch.nn.functional.pad(hartley_hadamard(torch.eye(p)), (0, -p % 16))


class Result:
    def __init__(self, y: Any, low: Any, scale: Any, total: Any, n: int) -> None:
        self.y, self.n = y.tensor, n
        self.low = None if low is None else low.tensor
        self.scale = None if scale is None else scale.tensor
        self.sum = None if total is None else total.tensor

    def codes(self) -> Tensor:
        """int64 [tokens, stride], columns in their natural order: code, or 256 * code + low."""
        codes = self.y.long() if self.low is None else 256 * self.y.long() + self.low.long()
        return codes.view(len(codes), -1, 4)[:, :, [0, 2, 1, 3]].reshape(codes.shape)


class Kernel:
    def __init__(self, hostexec: Any) -> None:
        self.hostexec = hostexec
        self.library = hostexec.build([CUDA / "transform_input.cu", HERE / "transform_input_entry.cpp"])

    def run(
        self,
        x: Tensor,
        names: tuple[str, ...] = (),
        fields: dict[str, Tensor] | None = None,
        output: int = SAME,
        limit: int = LIMIT,
        options: Any = None,
        stride: int | None = None,
    ) -> Result:
        guarded, fields = self.hostexec.guarded, fields or {}
        tokens, n = x.shape
        odd = odd_part(n)[0]
        rotate = "rotate" in names
        factors = guarded(fields["input_scale"].float().reciprocal()) if "scale" in names else None
        order = guarded(self.order.to(torch.int32)) if "order" in names else None
        stride = stride or -(-n // 64) * 64
        y = guarded(torch.full((tokens, stride), 99, dtype=x.dtype if output == SAME else torch.int8))
        low = guarded(torch.full((tokens, stride), 99, dtype=torch.int8)) if output == PLANES else None
        scale = guarded(torch.full((tokens,), torch.nan)) if output != SAME else None
        total = guarded(torch.full((tokens,), -(2**31), dtype=torch.int32)) if output != SAME else None
        room = -(-n // 32) * 32
        workspace = guarded(torch.full((tokens, room), torch.nan)) if 4 * room + 256 > limit else None
        self.library.call(
            "run_transform_input",
            guarded(torch.nn.functional.pad(x, (0, 3), value=torch.nan)),
            n + 3,
            tokens,
            n,
            DTYPES[x.dtype],
            factors,
            guarded(fields["signs"]) if rotate else None,
            rotate,
            guarded(hartley_matrix(odd)) if rotate and odd > 1 else None,
            order,
            output,
            y,
            low,
            scale,
            total,
            stride,
            workspace,
            limit,
            options=options,
        )
        return Result(y, low, scale, total, n)

    order: Tensor = torch.empty(0)

    def fields(self, n: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(n)
        self.order = torch.randperm(n, generator=g)
        input_scale = (torch.rand(n, generator=g) + 0.5).to(torch.float16)
        return {"signs": random_signs(7, n), "order": pack_order(self.order), "input_scale": input_scale}


@pytest.fixture(scope="module")
def kernel(hostexec: Any) -> Kernel:
    return Kernel(hostexec)


def reference(x: Tensor, names: tuple[str, ...], fields: dict[str, Tensor]) -> Tensor:
    y = x.float()
    for name in names:
        y = get_transform(name).apply_input(y, fields)
    return y


def random_input(tokens: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(n + tokens)).to(dtype)


# odd parts of 4, 8 and 16 rows to a thread, of several parts and of no power of two at all; 1 to 14 bits
SIZES = [1, 2, 3, 17, 60, 64, 123, 576, 1000, 1536, 2048, 3584, 4864, 11008, 14336, 16384]
ALL = ("scale", "rotate", "order")


@pytest.mark.parametrize("n", SIZES)
def test_rotations_of_every_kind_of_size(kernel: Kernel, n: int) -> None:
    x, fields = random_input(2, n, torch.float32), kernel.fields(n)
    for names in (("rotate",), ALL):
        want = reference(x, names, fields)
        got = kernel.run(x, names, fields)
        error = (got.y[:, :n] - want).norm(dim=1) / want.norm(dim=1)
        assert (error <= 1e-6).all(), error
        assert (got.y[:, n:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names", [(), ("scale",), ("order",), ("scale", "order"), ("rotate",), ("rotate", "order"), ALL]
)
def test_types_and_transforms(kernel: Kernel, names: tuple[str, ...], dtype: torch.dtype) -> None:
    for n in (123, 576):
        x, fields = random_input(3, n, dtype), kernel.fields(n)
        want = reference(x, names, fields)
        got = kernel.run(x, names, fields)
        assert got.y.dtype == dtype
        assert ((got.y[:, :n].float() - want).abs() <= EPSILON[dtype] * (want.abs() + 1)).all()
        if names in ((), ("order",)):
            assert torch.equal(got.y[:, :n], want.to(dtype))


def quantized(x: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """(integers [tokens, n], scale [tokens]) of float32, as csrc/cpu/activations.h has them, with a scale a token."""
    largest = x.abs().amax(1).numpy()
    inverse = np.float32(units) / largest
    codes = np.rint(x.numpy() * inverse[:, None])
    return torch.from_numpy(codes).long(), torch.from_numpy(largest / np.float32(127))


@pytest.mark.parametrize("output", [INT8, PLANES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_of_plain_activations(kernel: Kernel, dtype: torch.dtype, output: int) -> None:
    for n in (1, 64, 123, 576, 1537, 6000):
        x = random_input(3, n, dtype)
        got = kernel.run(x, output=output, stride=-(-n // 64) * 64 + 64)
        codes, scale = quantized(x.float(), 127 if output == INT8 else 32512)
        assert torch.equal(got.codes()[:, :n], codes)
        assert (got.codes()[:, n:] == 0).all()
        assert torch.equal(got.scale, scale)
        assert torch.equal(got.sum.long(), codes.sum(1))


@pytest.mark.parametrize("output", [INT8, PLANES])
def test_int8_of_exact_rotations(kernel: Kernel, output: int) -> None:
    """Integers through a Hadamard matrix of 4^k columns: nothing is rounded, so codes are known to the last bit."""
    for n in (64, 1024, 4096):
        g = torch.Generator().manual_seed(n)
        x, fields = torch.randint(-7, 8, (2, n), generator=g).float(), kernel.fields(n)
        rounded = hartley_hadamard(x * 2**10)
        want = rounded.round()  # multiples of 16, of which the reference is a little off
        assert ((want - rounded).abs() <= 0.1).all() and (want % 16 == 0).all()
        fields["signs"] = torch.zeros_like(fields["signs"])
        got = kernel.run(x * 2**10, ("rotate", "order"), fields, output)
        codes, scale = quantized(want[:, kernel.order], 127 if output == INT8 else 32512)
        assert torch.equal(got.codes(), codes)
        assert torch.equal(got.scale, scale)
        assert torch.equal(got.sum.long(), codes.sum(1))


@pytest.mark.parametrize("output", [INT8, PLANES])
@pytest.mark.parametrize("n", [60, 123, 576, 11008])
def test_int8_of_rotations(kernel: Kernel, n: int, output: int) -> None:
    """What is rounded differently is off by one at most, and seldom."""
    x, fields = random_input(2, n, torch.bfloat16), kernel.fields(n)
    got = kernel.run(x, ALL, fields, output)
    codes, scale = quantized(reference(x, ALL, fields), 127 if output == INT8 else 32512)
    off = (got.codes()[:, :n] - codes).abs()
    assert (off <= 1).all() and (off.float().mean() <= (0.01 if output == INT8 else 0.2)).all()
    assert ((got.scale / scale - 1).abs() <= 1e-6).all()
    assert torch.equal(got.sum.long(), got.codes().sum(1))


def test_rows_longer_than_shared_memory(kernel: Kernel) -> None:
    """The same steps on a workspace in global memory give the same bits."""
    for n in (576, 1408, 28672):
        x, fields = random_input(2, n, torch.float16), kernel.fields(n)
        shared = kernel.run(x, ALL, fields, INT8, limit=1 << 20)
        spilled = kernel.run(x, ALL, fields, INT8, limit=1024)
        assert torch.equal(spilled.y, shared.y) and torch.equal(spilled.scale, shared.scale)
        assert torch.equal(spilled.sum, shared.sum)


def test_schedules(kernel: Kernel) -> None:
    for n, limit in ((1376, LIMIT), (1376, 1024), (2048, LIMIT)):  # 43 * 32: several parts to a column
        x, fields = random_input(2, n, torch.float16), kernel.fields(n)
        first = kernel.run(x, ALL, fields, PLANES, limit)
        for options in kernel.hostexec.all_options(coresident=2):
            again = kernel.run(x, ALL, fields, PLANES, limit, options)
            assert torch.equal(again.y, first.y) and torch.equal(again.low, first.low)
            assert torch.equal(again.sum, first.sum) and torch.equal(again.scale, first.scale)


@pytest.mark.parametrize("output", [INT8, PLANES])
def test_tokens_that_have_no_scale(kernel: Kernel, output: int) -> None:
    x = random_input(6, 130, torch.float32)
    x[0, 5], x[1, 129], x[2, 64] = torch.nan, torch.inf, -torch.inf
    x[3] = 0
    x[4] *= 1e-38  # 32512 / largest overflows
    got = kernel.run(x, output=output)
    assert got.scale[:3].isnan().all()
    assert (got.scale[3:5] == 0).all()
    assert (got.codes()[:5] == 0).all() and (got.sum[:5] == 0).all()
    assert torch.equal(got.codes()[5:, :130], quantized(x[5:], 127 if output == INT8 else 32512)[0])


def test_the_largest_sums_of_two_planes(kernel: Kernel) -> None:
    x = torch.full((1, 65536), 3.0)
    got = kernel.run(x, output=PLANES)
    assert (got.codes() == 32512).all() and got.sum.tolist() == [32512 * 65536]


def test_shared_memory_without_bank_conflicts(kernel: Kernel) -> None:
    for n in (4096, 2048 * 7, 512 * 3):
        x, fields = random_input(1, n, torch.float16), kernel.fields(n)
        kernel.run(x, ("rotate",), fields, options=kernel.hostexec.Options(conflicts=True))
        counted = kernel.library.conflicts()
        stores = [v for (file, _, kind), v in counted.items() if kind == "sts"]
        assert stores and all(extra == 0 for _, extra in stores), counted
        loads = [v for (file, _, kind), v in counted.items() if kind == "lds"]
        # the last reading is by fours, two lanes to a bank: n / 32 accesses
        assert sum(extra for _, extra in loads) <= n // 32, counted


def test_a_wrong_call_is_refused_with_its_numbers(kernel: Kernel) -> None:
    def refusal(x: Tensor, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(RuntimeError, match="returned -1"):
            kernel.run(x, *args, **kwargs)
        text = kernel.hostexec.guarded(np.zeros(512, np.uint8))
        kernel.library.call("refused", text, 512)
        return bytes(text.array).rstrip(b"\0").decode()

    x = random_input(1, 70, torch.float32)
    assert "written 96 apart" in refusal(x, stride=96)
    assert "written 64 apart" in refusal(x, stride=64)
    wide = random_input(1, 1025 * 2, torch.float32)
    assert "the odd part 1025" in refusal(wide, ("rotate",), kernel.fields(2050))
