"""ONNX Runtime's MatMulNBits: 4 bits, and 2 where it has them; accuracy level 4 is int8 inputs, level 0 float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peer_weight import Source
from torch import Tensor

from bitpalette.kernel_bench.contender import Absent, Call, Contender
from bitpalette.quant.bitstream import pack_bits

HOW = "pip install onnxruntime onnx"

VARIANTS = ((4, 32, 0), (4, 32, 4), (4, 128, 0), (4, 128, 4), (2, 128, 4))
"""(bits, block, accuracy level)"""

STEP = {2: 0.996, 4: 0.335}
"""Of the best uniform levels for N(0, 1), by bits (Max, IRE Trans. IT 6, 1960)."""


def contenders(source: Source, threads: int) -> Iterator[Contender | Absent]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        yield Absent("onnxruntime", "", f"{error}: {HOW}")
        return
    refused = onnxruntime.capi.onnxruntime_pybind11_state
    for bits, block, level in VARIANTS:
        name = f"{bits} bits, block {block}, level {level}"
        model = _model(source, bits, block, level)
        try:
            first = _session(model, source.shape[0], threads)
            first(_Input(source.x[:1]))
        except (refused.NotImplemented, refused.InvalidArgument, refused.Fail, refused.RuntimeException) as error:
            yield Absent("onnxruntime", name, str(error).partition("\n")[0])
            continue
        out, n = source.shape
        blocks = -(-n // block)
        yield Contender(
            kernel="onnxruntime",
            scheme=name,
            isa="",
            dtype="float32",
            shape=source.shape,
            nbytes=out * blocks * (block * bits // 8 + 4),
            first=first,
            new_copy=_maker(model, source.shape[0], threads),
            to_input=_Input,
            expected=source.expected(),
        )


class _Input:
    """x as ONNX Runtime takes it, bound once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.contiguous()


def _maker(model: bytes, out: int, threads: int) -> Callable[[], Call]:
    return lambda: _session(model, out, threads)


def _session(model: bytes, out: int, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it refuses comes as an exception, once
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    bound: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def run(z: _Input) -> Tensor:
        tokens = z.x.shape[0]
        if tokens not in bound or bound[tokens][1] is not z.x:
            y = torch.empty(tokens, out)
            binding = session.io_binding()
            for name, tensor, bind in (("x", z.x, binding.bind_input), ("y", y, binding.bind_output)):
                bind(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
            bound[tokens] = (binding, z.x, y)
        binding, _, y = bound[tokens]
        session.run_with_iobinding(binding)
        return y

    return run


def _model(source: Source, bits: int, block: int, level: int) -> bytes:
    """One node; weights rounded to the nearest level with a scale for each block, zero point 2^(bits-1)."""
    from onnx import TensorProto, helper, numpy_helper

    out, n = source.shape
    blocks = -(-n // block)
    rows = torch.zeros(len(source.rows), blocks * block)
    rows[:, :n] = source.rows
    grouped = rows.view(len(rows), blocks, block)
    scale = grouped.square().mean(-1, keepdim=True).sqrt() * STEP[bits]
    codes = (grouped / scale + (1 << (bits - 1))).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    packed = source.repeat(pack_bits(codes.view(len(rows), -1), bits)).view(out, blocks, block * bits // 8)
    scales = source.repeat(scale.view(len(rows), blocks))
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "scales"],
        ["y"],
        domain="com.microsoft",
        K=n,
        N=out,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", n])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", out])],
        [numpy_helper.from_array(packed.numpy(), "w"), numpy_helper.from_array(scales.flatten().numpy(), "scales")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())
