"""Native kernels called by several Python threads at once, and by children that were forked after the parent had."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitpalette.kernels.linear import QuantLinear
from bitpalette.kernels.shared_input import LinearGroup
from bitpalette.quant.native import available_isas, cpu_module, isa_index
from bitpalette.quant.rotate import random_signs
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(not available_isas(), reason="the CPU extension is not built")

ROOT = Path(__file__).resolve().parents[2]
IN, OUT = 576, 1552  # enough for two threads, at one token and 4 bits too
SCHEMES = (
    {"codec": "int", "bits": 4, "group_size": 32},
    {"codec": "int", "bits": 8},
    {"codec": "lut", "entries": 16},
    {"codec": "trellis", "rate": 2.0, "window": 12},
)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def layer(values: dict, seed: int = 0) -> QuantLinear:
    scheme = Scheme.from_dict({**values, "transforms": ["rotate"]})
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))
    fields = dict(quantize_tensor(w, Scheme.from_dict(values)).fields)
    return QuantLinear.from_tensor(QuantizedTensor(scheme, (OUT, IN), {**fields, "signs": random_signs(seed, IN)}))


def test_threads_that_call_the_same_and_other_layers() -> None:
    layers = [layer(values) for values in SCHEMES]
    group = LinearGroup([layer(SCHEMES[0], 1), layer(SCHEMES[0], 1)])
    callers = 4
    inputs = [[torch.randn(tokens, IN) for tokens in (1, 7, 40)] for _ in range(callers)]

    def outputs(caller: int) -> list[Tensor]:
        order = layers[caller % len(layers) :] + layers[: caller % len(layers)]  # not all the same at the same time
        with torch.no_grad():
            found = {id(each): [each(x) for x in inputs[caller]] for each in order}
            return [y for each in layers for y in found[id(each)]] + [y for x in inputs[caller] for y in group(x)]

    expected = [outputs(i) for i in range(callers)]
    wrong: list[str] = []

    def call(caller: int) -> None:
        for turn in range(20):
            for i, (y, right) in enumerate(zip(outputs(caller), expected[caller], strict=True)):
                if not torch.equal(y, right):
                    wrong.append(f"caller {caller}, turn {turn}, output {i}")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_python_threads_go_on_during_a_call() -> None:
    w, x = torch.randn(256, 512), torch.randn(4096, 512)
    y = torch.empty(4096, 256)
    scalar = isa_index("scalar")
    weight = cpu_module().ReferenceWeight(w.data_ptr(), 256, 512, 0)
    call = cpu_module().LinearCall([weight], scalar, None)
    thread = threading.Thread(target=call.run, args=(x.data_ptr(), 0, 4096, 0, y.data_ptr(), 1))
    thread.start()
    steps = 0
    while thread.is_alive():
        time.sleep(0.001)
        steps += 1
    # the call takes some hundred milliseconds; had it kept the interpreter, one or two steps would fit before it
    assert steps >= 20
    assert torch.allclose(y, x @ w.T, atol=1e-3)


CHILD = """
import os, signal, sys, threading
import torch
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.native import cpu_module
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor

torch.set_num_threads(3)
scheme = Scheme.from_dict({"codec": "int", "bits": 4, "group_size": 32})
layer = QuantLinear.from_tensor(quantize_tensor(torch.randn(1552, 576), scheme))
x = torch.randn(5, 576)
if sys.argv[1] == "own":
    cpu_module().use_openmp_runtime(0, 0, 0)
with torch.no_grad():
    y = layer(x)
if sys.argv[1] == "torch":
    assert cpu_module().has_openmp_runtime()
    torch.randn(1000, 1000).mul(2.0)  # torch's own threads are there, too


def check(deep):
    signal.alarm(60)  # where the parent's threads are waited for, for ever
    with torch.no_grad():
        assert all(torch.equal(layer(x), y) for _ in range(10)), "wrong"
    assert not cpu_module().has_openmp_runtime()
    other = threading.Thread(target=lambda: layer(x))
    other.start()
    other.join()
    if deep:
        child(False)


def child(deep):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check(deep)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the child has failed"


child(True)
child(False)
with torch.no_grad():
    assert torch.equal(layer(x), y)
print("right")
"""

WORKERS = """
import torch
from torch.utils.data import DataLoader, Dataset
from bitpalette.kernels.linear import QuantLinear
from bitpalette.quant.scheme import Scheme
from bitpalette.quant.solver import quantize_tensor

torch.set_num_threads(3)
layer = QuantLinear.from_tensor(quantize_tensor(torch.randn(1552, 576), Scheme.from_dict({"codec": "int", "bits": 4})))
inputs = torch.randn(8, 4, 576)


class Outputs(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        torch.set_num_threads(2)  # a loader gives its workers one
        with torch.no_grad():
            return layer(inputs[i])


with torch.no_grad():
    expected = [layer(x) for x in inputs]
loaded = list(DataLoader(Outputs(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
assert all(torch.equal(y, right) for y, right in zip(loaded, expected, strict=True))
print("right")
"""


def run(code: str, *arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="fork with threads is for Linux")
@pytest.mark.parametrize("pool", ["torch", "own"])
def test_a_forked_child_has_threads_of_its_own(pool: str) -> None:
    if pool == "torch" and not cpu_module().has_openmp_runtime():
        pytest.skip("this torch has no OpenMP runtime that can be called")
    run(CHILD, pool)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork with threads is for Linux")
def test_workers_of_a_data_loader() -> None:
    run(WORKERS)
