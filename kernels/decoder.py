"""A Llama-like transformers model as one native call a token (csrc/cpu/decoder.h), read from the model's own modules.

What is not understood is refused in words (`why_not`), never guessed: classes are known by name, and every module that
a step passes by must be of the class that its family has there, without hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.hartley import DENSE_ODD, odd_part
from ..quant.native import DTYPES, chosen_isa, cpu_module, isa_index, why_no_cpu_module
from ..quant.order import unpack_order
from ..quant.rotate import sign_vector
from .embedding import QuantEmbedding
from .input_transform import input_transforms
from .linear import QuantLinear
from .native_linear import NativeLinear
from .norm import RotatedNorm

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
"""transformers' classes whose blocks are computed here: <family>ForCausalLM, <family>Attention and so on."""

GATES = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "NewGELUActivation": 1}
"""Class of an MLP's act_fn -> its number in csrc/cpu/decoder_model.h."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the length of the sequence."""

MOST_TOKENS = 8
"""Tokens of one step (csrc/cpu/decoder.h)."""


class NotNativeError(Exception):
    """This model cannot run as a native decoder; the message says why, in words."""


def why_not(model: nn.Module) -> str | None:
    """None where NativeDecoder runs this transformers model, else the reason in words.

    Prepares packed layers, as their first forward would.
    """
    try:
        _Reader(model).read()
    except NotNativeError as reason:
        return str(reason)
    return None


class NativeDecoder:
    """One sequence through a model, a few tokens a call. Vectors between layers are float32.

    Keys and values are kept in bfloat16 for a bfloat16 model, else in float32. Reads the model's weights where they
    lie: not to be used after they were changed or moved. Calls come from one thread at a time.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        """capacity: positions to make room for; more may come. NotNativeError where `why_not` has a reason."""
        self._read = _Reader(model).read()
        dtype = torch.bfloat16 if self._read.dtype == torch.bfloat16 else torch.float32
        self._native = cpu_module().Decoder(self._read.isa, self._read.native, DTYPES[dtype], max(capacity, 1))
        self._logits = torch.empty(MOST_TOKENS, self._native.vocabulary)

    @property
    def length(self) -> int:
        """Positions that are held."""
        return self._native.length

    def step(self, ids: Tensor, first: int, keep: int = 1) -> Tensor:
        """Logits float32 [keep, vocabulary] of the last `keep` tokens of ids, int64 [n] on the CPU, n from 1 to 8.

        They are at positions first..first + n - 1; what was held from `first` on is forgotten. The tensor is a buffer
        that the next step overwrites. ValueError for a token or a position that does not exist.
        """
        ids = ids.contiguous()
        n, threads = ids.shape[0], torch.get_num_threads()
        logits = self._logits[:keep]
        if self._read.embedding is None:
            self._native.step(ids.data_ptr(), n, first, logits.data_ptr(), keep, threads)
        else:
            rows = self._read.embedding(ids).float().contiguous()
            self._native.step_rows(rows.data_ptr(), n, first, logits.data_ptr(), keep, threads)
        return logits

    def fill(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take over keys and values [1, kv_heads, n, head_dim] of every layer, as a forward pass left them."""
        for i, (keys, values) in enumerate(layers):
            keys, values = keys.contiguous(), values.contiguous()
            self._native.fill(i, keys.data_ptr(), values.data_ptr(), DTYPES[keys.dtype], keys.shape[-2])


@dataclass
class _Read:
    """What was read of a model."""

    native: Any
    isa: int
    dtype: torch.dtype
    embedding: nn.Module | None = None
    """The module that gives the rows of tokens, where that is not the native model."""
    alive: list[Any] = field(default_factory=list)
    """Owners of memory that native weights point to."""


class _Reader:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.alive: list[Any] = []

    def read(self) -> _Read:
        model = self.model
        reason = why_no_cpu_module()
        if reason is not None:
            raise NotNativeError(reason)
        family = type(model).__name__.removesuffix("ForCausalLM")
        if family not in FAMILIES or not type(model).__module__.startswith("transformers."):
            known = ", ".join(f"{name}ForCausalLM" for name in FAMILIES)
            raise NotNativeError(f"{type(model).__name__} is none of {known}")
        self._check_hooks()
        self.isa = isa_index(chosen_isa())
        config, base = model.config, model.model
        blocks = list(base.layers)[: config.num_hidden_layers]
        rotary = _expect("rotary_emb", base.rotary_emb, f"{family}RotaryEmbedding")
        if rotary.rope_type not in ROPE_TYPES:
            raise NotNativeError(f"rope type {rotary.rope_type!r} is none of {', '.join(ROPE_TYPES)}")
        if model.training and config.attention_dropout:
            raise NotNativeError(f"the model is in training mode with attention dropout {config.attention_dropout}")
        if not getattr(config, "is_causal", True):
            raise NotNativeError("its attention is not causal")
        attention = [_expect(f"layers.{i}.self_attn", b.self_attn, f"{family}Attention") for i, b in enumerate(blocks)]
        mlps = [_expect(f"layers.{i}.mlp", b.mlp, f"{family}MLP") for i, b in enumerate(blocks)]
        if not blocks:
            raise NotNativeError("it has no blocks")
        gates = {type(mlp.act_fn).__name__ for mlp in mlps}
        if len(gates) != 1 or not gates <= GATES.keys():
            raise NotNativeError(f"activation {', '.join(sorted(gates))} is none of {', '.join(GATES)}")
        native = cpu_module().DecoderModel(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention[0].head_dim,
            score_scale=attention[0].scaling,
            gate=GATES[gates.pop()],
            inverse_frequency=_on_cpu("rotary_emb", rotary.inv_freq).float().tolist(),
            rotary_scale=float(rotary.attention_scaling),
        )
        for i, block in enumerate(blocks):
            _expect(f"layers.{i}", block, f"{family}DecoderLayer")
            self._add_block(native, f"layers.{i}", block, family, _window(family, config, i))
        read = _Read(native, self.isa, model.dtype, alive=self.alive)
        if not self._set_embedding(native, base.embed_tokens):
            read.embedding = base.embed_tokens
        norm, rotation = base.norm, None
        if type(norm) is RotatedNorm:
            rotation = self._transform(config.hidden_size, [("rotate", None)])
            _expect("norm", norm.__dict__["norm"], f"{family}RMSNorm")
            eps = norm.__dict__["norm"].variance_epsilon
        else:
            eps = _expect("norm", norm, f"{family}RMSNorm").variance_epsilon
        native.set_head(self._gain("norm", norm.weight, eps), rotation, self._linear("lm_head", model.lm_head))
        try:
            cpu_module().Decoder(self.isa, native, DTYPES[torch.float32], 1)
        except ValueError as error:
            raise NotNativeError(str(error)) from error
        return read

    def _check_hooks(self) -> None:
        for name, module in self.model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise NotNativeError(f"{name or 'the model'} has forward hooks, which would not run")
            if "forward" in module.__dict__:
                raise NotNativeError(f"{name or 'the model'} has a forward of its own, which would not run")

    def _add_block(self, native: Any, name: str, block: Any, family: str, window: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        linears = [self._linear(f"{name}.self_attn.{p}", getattr(attention, p)) for p in _ATTENTION]
        linears += [self._linear(f"{name}.mlp.{p}", getattr(mlp, p)) for p in _MLP]
        norms = [
            self._norm(f"{name}.{part}", getattr(block, part), family)
            for part in ("input_layernorm", "post_attention_layernorm")
        ]
        heads = [
            self._norm(f"{name}.self_attn.{part}", getattr(attention, part), family)
            if hasattr(attention, part)
            else None
            for part in ("q_norm", "k_norm")
        ]
        rotary = bool(getattr(attention, "use_rope", True))
        native.add_block(*norms, *heads, linears, rotary, window)

    def _norm(self, name: str, module: nn.Module, family: str) -> Any:
        norm = _expect(name, module, f"{family}RMSNorm")
        return self._gain(name, norm.weight, norm.variance_epsilon)

    def _gain(self, name: str, weight: Tensor, eps: float) -> Any:
        gain = _on_cpu(name, weight).float().contiguous()
        return cpu_module().DecoderNorm(gain.data_ptr(), gain.shape[0], eps)

    def _linear(self, name: str, layer: nn.Module) -> Any:
        transform = None
        if type(layer) is QuantLinear:
            owner = layer.tied_to or layer
            weight = self._packed(name, owner)
            fields = owner._transform_fields("weight")
            made = input_transforms(layer.scheme.transforms, fields, layer.in_features, self.isa)
            if made.why_not is not None:
                raise NotNativeError(f"{name}: {made.why_not}")
            transform = made.native
        elif type(layer) is nn.Linear:
            weight = self._dense(name, layer.weight)
        else:
            raise NotNativeError(f"{name} is a {type(layer).__name__}, not an nn.Linear or a QuantLinear")
        bias = None if layer.bias is None else _on_cpu(name, layer.bias).float().contiguous()
        return cpu_module().DecoderLinear(weight, transform, 0 if bias is None else bias.data_ptr())

    def _packed(self, name: str, owner: Any) -> Any:
        kernel, packed = owner._ready("weight")
        device = next(iter(packed.tensors.values())).device
        if device.type != "cpu":
            raise NotNativeError(f"{name} is on {device}, not on the CPU")
        if not isinstance(kernel, NativeLinear):
            raise NotNativeError(f"{name} runs on kernel {kernel.name}, which is no native linear")
        self.alive.append(packed)
        return kernel.native(packed)

    def _dense(self, name: str, weight: Tensor) -> Any:
        values = _on_cpu(name, weight).contiguous()
        if values.dtype not in DTYPES:
            raise NotNativeError(f"{name} is {values.dtype}, none of {', '.join(map(str, DTYPES))}")
        self.alive.append(values)
        return cpu_module().DenseWeight(self.isa, values.data_ptr(), DTYPES[values.dtype], *values.shape)

    def _set_embedding(self, native: Any, module: Any) -> bool:
        """Whether the native model has the rows itself."""
        if type(module) is QuantEmbedding:
            if module.embed_scale is not None:
                raise NotNativeError("embed_tokens scales its rows")
            kernel, _ = module._ready("weight")
            if not isinstance(kernel, NativeLinear):
                return False
            fields, n = module._transform_fields("weight"), module.embedding_dim
            undo = self._transform(n, _undone(_steps("embed_tokens", module.scheme.transforms, fields, n)))
            native.set_embedding(self._packed("embed_tokens", module), undo)
        elif type(module) is nn.Embedding and module.max_norm is None:
            native.set_embedding(self._dense("embed_tokens", module.weight), None)
        else:
            raise NotNativeError(f"embed_tokens is {module}, not an nn.Embedding as it comes or a QuantEmbedding")
        return True

    def _transform(self, n: int, steps: Sequence[_Step]) -> Any:
        """A native InputTransform of n columns that is no layer's own (input_transform.py has those): of embeddings and
        norms. None for no steps."""
        if not steps:
            return None
        if odd_part(n)[0] > DENSE_ODD and any(kind == "rotate" for kind, _ in steps):
            raise NotNativeError(f"a rotation of {n} columns has an odd part above {DENSE_ODD}")
        transform = cpu_module().InputTransform(self.isa, n)
        for kind, values in steps:
            if values is None:
                transform.add_rotate()
            elif kind == "gather":
                transform.add_gather(values.data_ptr())
            else:
                transform.add_multiply(values.data_ptr())
        return transform


_Step = tuple[str, Tensor | None]
"""("multiply", float32 [n]), ("rotate", None) or ("gather", int64 [n]), as in csrc/cpu/input_transform.h."""


def _steps(name: str, transforms: Sequence[str], fields: Mapping[str, Tensor], n: int) -> list[_Step]:
    """What `transforms` do to an input of n columns."""
    steps: list[_Step] = []
    for transform in transforms:
        if transform == "rotate":
            steps += [("multiply", sign_vector(fields["signs"], n)), ("rotate", None)]
        elif transform == "scale":
            steps.append(("multiply", 1 / fields["input_scale"].float()))
        elif transform == "order":
            steps.append(("gather", unpack_order(fields["order"], n)))
        else:
            raise NotNativeError(f"{name} has transform {transform!r}, which has no native form")
    return [(kind, None if values is None else values.contiguous()) for kind, values in steps]


def _undone(steps: Sequence[_Step]) -> list[_Step]:
    """The inverse map; the rotation is its own."""
    return [
        (kind, None if values is None else values.argsort() if kind == "gather" else 1 / values)
        for kind, values in reversed(steps)
    ]


def _expect(name: str, module: Any, class_name: str) -> Any:
    if type(module).__name__ != class_name:
        raise NotNativeError(f"{name} is a {type(module).__name__}, not a {class_name}")
    return module


def _on_cpu(name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise NotNativeError(f"{name} is on {tensor.device}, not on the CPU")
    return tensor.detach()


def _window(family: str, config: Any, layer: int) -> int:
    """Positions that a token of the layer sees, its own among them; 0: all. As the family's model makes its masks."""
    if family == "Llama":
        return 0
    if family == "Mistral":
        return config.sliding_window or 0
    kind = config.layer_types[layer]
    if kind not in ("full_attention", "sliding_attention"):
        raise NotNativeError(f"layers.{layer} has {kind}")
    return config.sliding_window if kind == "sliding_attention" else 0


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
