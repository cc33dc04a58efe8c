"""Packed checkpoints in transformers: importing this registers `quant_method: "bitpalette"` with `from_pretrained`.

Before loading, every module that owns a quantized parameter is replaced on the meta device by its packed form
(`replace_modules`), whose buffers carry the names of the file, so that transformers' own loader fills them, shards,
device maps and all. What the config claims is held against the model before and against the files' headers, so that no
quantized field can be left at random values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._version import __version__
from .calibrate.structure import EXPERT_PARAMETERS, Kind, is_conv1d, owner
from .formats.errors import FormatError
from .formats.kv_plan_file import KV_PLAN_NAME
from .formats.native import NativeConfig, QuantizedEntry, stored_specs
from .formats.safetensors_file import SafetensorsFile
from .kernels.embedding import QuantEmbedding
from .kernels.experts import QuantExperts, check_experts
from .kernels.linear import QuantLinear
from .kernels.module import QuantModule, offloads_buffers
from .kv_use import use_stored_plan
from .mapped_pages import drop_read_pages
from .quant.scheme import Scheme
from .quant.tensor import QuantizedTensor
from .rotated import loaded_parameter, norms_of, plain_head, restore_norms, rotate_norms

METHOD = "bitpalette"

Weights = NativeConfig | Mapping[str, QuantizedTensor]


class BitpaletteConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint, as transformers holds it. FormatError (a ValueError) if it is not.

    native: the validated contents; see `formats.native.NativeConfig`.
    """

    def __init__(self, quant_method: str = METHOD, **values: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers allows a plain string here
        self.native = NativeConfig.parse({"quant_method": quant_method, **values}, "config.json")

    @classmethod
    def of(cls, native: NativeConfig) -> BitpaletteConfig:
        return cls(**native.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return self.native.to_dict()


class BitpaletteQuantizer(HfQuantizer):
    """Loads, saves and dequantizes packed models inside transformers. Made by `from_pretrained`, or by `attach`."""

    requires_calibration = True
    quantization_config: BitpaletteConfig

    def __init__(self, quantization_config: BitpaletteConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError("bitpalette compiles before loading: run `quantize run MODEL OUT`, then load OUT")
        super().__init__(quantization_config, **kwargs)
        self._files_checked = False
        self._folder: Path | None = None
        self._files: tuple[str, ...] = ()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        native = self.quantization_config.native
        if checkpoint_files:
            check_files(native, checkpoint_files)
            self._files_checked = True
            self._folder = Path(checkpoint_files[0]).parent
            self._files = tuple(checkpoint_files)
        self.quantization_config = BitpaletteConfig.of(rename_for(model, native))
        rotate_norms(model, self.quantization_config.native.rotated_norms)
        return replace_modules(model, self.quantization_config.native)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self._files_checked:
            _check_loaded(model)
        _tie_biases(model)
        prepare(model)
        drop_read_pages(self._files)
        if (folder := plan_folder(model, self._folder)) is not None:
            use_stored_plan(model, folder)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Canonical fields; the bias of a tied head is left to the parameter that it is tied to."""
        state = model.state_dict()
        for target in _bias_ties(model):
            state.pop(target, None)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize_modules(model, dtype or torch.get_default_dtype())


if METHOD not in AUTO_QUANTIZER_MAPPING:  # transformers refuses a name twice, and a module may be reloaded
    register_quantizer(METHOD)(BitpaletteQuantizer)
    register_quantization_config(METHOD)(BitpaletteConfig)
else:
    AUTO_QUANTIZER_MAPPING[METHOD] = BitpaletteQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BitpaletteConfig


def plan_folder(model: Any, folder: Path | None) -> Path | None:
    """Where the plan of the KV cache is to be looked for: the weights' folder, for a hub id with the plan fetched."""
    name = getattr(model.config, "_name_or_path", "")
    if folder is not None and name and not Path(name).exists() and not (folder / KV_PLAN_NAME).exists():
        found = cached_file(
            name,
            KV_PLAN_NAME,
            revision=getattr(model.config, "_commit_hash", None),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found).parent
    return folder


# -- replacing modules


def replace_modules(model: Any, weights: Weights) -> Any:
    """Put packed modules in the place of those that own the weights, in place; returns the model.

    weights: a NativeConfig (the new modules' buffers are empty, on the devices of the old parameters: for a model on
    the meta device), or {parameter: QuantizedTensor} (they hold those tensors, without a copy, and the model can be
    saved with `save_pretrained`). A head that is tied to a quantized embedding computes from the embedding's buffers;
    one with a weight of its own is untied. FormatError where the model has no such parameter, one of another shape,
    or one that no packed module computes.
    """
    entries = _entries(weights)
    if not entries:
        return model
    by_module: dict[str, dict[str, tuple[Scheme, tuple[int, ...]]]] = {}
    kinds: dict[str, Kind] = {}
    for name, entry in entries.items():
        module_name, _, leaf = name.rpartition(".")
        kinds[module_name] = _check(model, name, entry[1])
        by_module.setdefault(module_name, {})[leaf] = entry
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    tied_heads = {t: s for t, s in ties.items() if s in entries and t not in entries}
    for target, source in tied_heads.items():
        kinds[target.rpartition(".")[0]] = _check(model, target, entries[source][1])
    for module_name, inside in by_module.items():
        model.set_submodule(module_name, _packed(model.get_submodule(module_name), kinds[module_name], inside))
    for target, source in tied_heads.items():
        _tie_head(model, target, source, entries[source], kinds[target.rpartition(".")[0]])
    _untie_in_transformers(model, ties)
    if not isinstance(weights, NativeConfig):
        _fill(model, weights)
        attach(model, NativeConfig.build(entries, bitpalette_version=__version__))
        _tie_biases(model)
        prepare(model)
    return model


def attach(model: Any, native: NativeConfig) -> None:
    """Make transformers see a model whose modules were replaced as one loaded from a packed checkpoint."""
    config = BitpaletteConfig.of(native)
    model.config.quantization_config = config
    model.hf_quantizer = BitpaletteQuantizer(config)
    model.is_quantized, model.quantization_method = True, METHOD
    # parameters are saved under the model's own names: no per-expert splitting on the way out
    model._weight_conversions = []


def prepare(model: nn.Module) -> None:
    """Choose the kernels and build their layouts now, for every packed module whose weights are present."""
    for module in model.modules():
        if not isinstance(module, QuantModule):
            continue
        holder = getattr(module, "tied_to", None) or module
        if not offloads_buffers(holder) and not any(buffer.is_meta for buffer in holder.buffers()):
            module.prepare()


def rename_for(model: Any, native: NativeConfig) -> NativeConfig:
    """The config under the names of `model`, which may be the base of the checkpoint's model, or hold it as its base.

    Entries outside the base (a head) are dropped where `model` is of another class than the checkpoint's. FormatError
    for any other entry that names no parameter of the model.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = model.base_model_prefix + "."
    foreign = type(model).__name__ not in (getattr(model.config, "architectures", None) or [])
    tensors: dict[str, QuantizedEntry] = {}
    for name, entry in native.tensors.items():
        candidates = (name, name.removeprefix(prefix), prefix + name)
        known = next((candidate for candidate in candidates if candidate in parameters), None)
        if known is not None:
            tensors[known] = entry
        elif not foreign or name.startswith(prefix):
            raise FormatError(
                f"config.json: quantized tensor {name!r} is no parameter of {type(model).__name__}; "
                "the config and the model disagree: write the checkpoint again"
            )
    norms = []
    for name in native.rotated_norms:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        norms.append(next((candidate for candidate in candidates if candidate in parameters), name))
    return native.model_copy(update={"tensors": tensors, "rotated_norms": norms})


def check_files(native: NativeConfig, files: Sequence[str]) -> None:
    """FormatError unless the safetensors files hold every field the config implies, in its dtype and shape.

    Reads headers only. Without this transformers would warn, and go on with random values.
    """
    found = {}
    for file in files:
        found.update(SafetensorsFile(file).tensors)
    for name, (shape, dtype) in stored_specs(native).items():
        info = found.get(name)
        if info is None:
            where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
            raise FormatError(f"{where}: tensor {name!r} is missing; write or copy the checkpoint again")
        if info.shape != shape or info.dtype != dtype:
            raise FormatError(
                f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, its scheme needs {dtype} "
                f"{list(shape)}; write or copy the checkpoint again"
            )


def dequantize_modules(model: Any, dtype: torch.dtype) -> Any:
    """Put the architecture's own modules back, in place, with the dequantized weights in `dtype`; ties are restored.

    A head behind a RotatedNorm gets a weight of its own, into which the rotation and the norm's gain go.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    own_heads = [m for m in packed.values() if isinstance(m, QuantLinear) and m.tied_to is None]
    norms, own_weight = norms_of(model), plain_head(model)
    if own_weight is not None or model.get_output_embeddings() in own_heads:
        model.config.tie_word_embeddings = False
    with torch.device("meta"):
        fresh = type(model)(model.config)
    for name, module in packed.items():
        original = fresh.get_submodule(name)
        device = next(module.buffers(), next(module.parameters(), torch.empty(0))).device
        for leaf, tensor in _dense(module, original, dtype).items():
            setattr(original, leaf, loaded_parameter(tensor))
        if any(buffer.is_meta for buffer in original.buffers()):  # constants such as Gemma's embedding scale
            for leaf, buffer in list(original.named_buffers(recurse=False)):
                setattr(original, leaf, torch.empty_like(buffer, device=device))
            model._init_weights(original)
        model.set_submodule(name, original.train(model.training))
    restore_norms(model, norms, fresh, dtype)
    if own_weight is not None:
        model.get_output_embeddings().weight = loaded_parameter(own_weight.to(dtype))
    for name, part in fresh.named_modules():
        if isinstance(part, PreTrainedModel):
            mine = model.get_submodule(name)
            mine.all_tied_weights_keys = part.all_tied_weights_keys
            mine.__dict__.pop("_tied_weights_keys", None)
            if "_tied_weights_keys" in part.__dict__:
                mine._tied_weights_keys = part._tied_weights_keys
    model.__dict__.pop("_weight_conversions", None)
    model.tie_weights()
    return model


# -- one module


def _entries(weights: Weights) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
    if isinstance(weights, NativeConfig):
        return {name: (weights.scheme_of(name), tuple(e.shape)) for name, e in weights.tensors.items()}
    return {name: (qt.scheme, qt.shape) for name, qt in weights.items()}


def _check(model: nn.Module, name: str, shape: tuple[int, ...]) -> Kind:
    """The kind of the weight. FormatError where it does not exist, has another shape or is of no kind we run."""
    try:
        found = owner(model, name)
    except KeyError:
        raise FormatError(
            f"quantized tensor {name!r} is no parameter of {type(model).__name__}; the config and the model disagree"
        ) from None
    have = tuple(model.get_parameter(name).shape)
    if found is None:
        raise FormatError(f"quantized tensor {name!r} {list(have)} is of a kind no packed module computes; keep it")
    module, kind = found
    logical = have[::-1] if kind == "conv1d" else have
    if logical != shape:
        raise FormatError(
            f"quantized tensor {name!r} has shape {list(shape)} in the config, {list(logical)} in the model "
            f"({type(module).__name__}); config.json and the weights are of different models"
        )
    return kind


def _packed(module: nn.Module, kind: Kind, inside: Mapping[str, tuple[Scheme, tuple[int, ...]]]) -> QuantModule:
    """The empty packed form of one module."""
    if kind == "experts":
        check_experts(module)
        kept = [module.get_parameter(leaf) for leaf in EXPERT_PARAMETERS]
        experts, hidden, intermediate = kept[1].shape
        up, down = (inside[leaf][0] if leaf in inside else None for leaf in EXPERT_PARAMETERS)
        act_fn: Any = module.act_fn
        made = QuantExperts(experts, hidden, intermediate, act_fn, up, down, kept[0].device, kept[0].dtype)
        for leaf, parameter in zip(EXPERT_PARAMETERS, kept, strict=True):
            if leaf not in inside:
                made.register_parameter(leaf, parameter)
        return made.train(module.training)
    weight = module.get_parameter("weight")
    scheme, shape = inside["weight"]
    if kind == "embedding":
        assert isinstance(module, nn.Embedding)
        scale = _embedding_scale(module)
        rows, dim, pad = shape[0], shape[1], module.padding_idx
        return QuantEmbedding(rows, dim, pad, scheme, scale, weight.device, weight.dtype).train(module.training)
    bias = getattr(module, "bias", None)
    linear = QuantLinear(shape[1], shape[0], False, scheme, weight.device)
    linear.bias = bias
    return linear.train(module.training)


def _embedding_scale(module: nn.Embedding) -> float | None:
    """What the module multiplies its rows by (Gemma); FormatError for a subclass that does something else."""
    if module.max_norm is not None:
        raise FormatError(f"{type(module).__name__} renormalises its rows (max_norm={module.max_norm}); keep it")
    if type(module).forward is nn.Embedding.forward:
        return None
    for name in ("scalar_embed_scale", "embed_scale"):
        value = getattr(module, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    raise FormatError(f"{type(module).__name__} changes its rows in a way not known; keep it")


def _tie_head(model: Any, target: str, source: str, entry: tuple[Scheme, tuple[int, ...]], kind: Kind) -> None:
    module_name = target.rpartition(".")[0]
    embedding = model.get_submodule(source.rpartition(".")[0])
    if kind == "embedding" and isinstance(embedding, QuantEmbedding):  # two tables (encoder, decoder) that are one
        model.set_submodule(module_name, embedding)
        return
    head = _packed(model.get_submodule(module_name), kind, {"weight": entry})
    if not isinstance(head, QuantLinear) or not isinstance(embedding, QuantEmbedding):
        raise FormatError(f"{target!r} is tied to {source!r}, a pair no packed module computes; keep them")
    head.tie(embedding)
    model.set_submodule(module_name, head)


def _untie_in_transformers(model: Any, ties: Mapping[str, str]) -> None:
    """Take the weights of packed modules out of transformers' tying, which knows parameters only.

    Its `tie_weights` would also pad the bias of a tied head to the length of the flat codes (BERT): `_tie_biases` does
    that tie instead.
    """
    if not isinstance(model, PreTrainedModel):
        return
    ours = {t: s for t, s in ties.items() if any(isinstance(m, QuantModule) for m in _owners(model, t, s))}
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        prefix = f"{name}." if name else ""
        keys = getattr(part, "all_tied_weights_keys", {})
        left = {t: s for t, s in keys.items() if prefix + t not in ours}
        if left != keys:
            part.all_tied_weights_keys = left
            part._tied_weights_keys = dict(left)
    biases = list(_bias_ties(model, ours))
    if biases:
        ignored = {f"^{re.escape(target)}$" for target in biases}
        model._keys_to_ignore_on_load_missing = set(model._keys_to_ignore_on_load_missing or ()) | ignored


def _owners(model: nn.Module, *names: str) -> list[nn.Module]:
    return [model.get_submodule(name.rpartition(".")[0]) for name in names]


def _bias_ties(model: Any, ties: Mapping[str, str] | None = None) -> dict[str, str]:
    """{head's bias: the parameter it is tied to} where the head is packed: transformers does not tie these then."""
    if ties is None:
        ties = dict(getattr(type(model), "_tied_weights_keys", None) or {})
        if not getattr(model.config, "tie_word_embeddings", False):
            return {}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        target: source
        for target, source in ties.items()
        if target.endswith(".bias") and {target, source} <= names and isinstance(_owners(model, target)[0], QuantLinear)
    }


def _tie_biases(model: Any) -> None:
    for target, source in _bias_ties(model).items():
        head: Any = _owners(model, target)[0]
        head.bias = model.get_parameter(source)


def _fill(model: nn.Module, weights: Mapping[str, QuantizedTensor]) -> None:
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, qt in weights.items():
        module_name, _, leaf = name.rpartition(".")
        fields = {leaf if field == "codes" else f"{leaf}_{field}": tensor for field, tensor in qt.fields.items()}
        by_module.setdefault(module_name, {}).update(fields)
    for module_name, state in by_module.items():
        model.get_submodule(module_name).load_state_dict(state, strict=False, assign=True)


def _check_loaded(model: nn.Module) -> None:
    """FormatError where a field was not loaded: transformers marks each tensor it takes from a state_dict."""
    for name, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if isinstance(module, QuantModule) and not getattr(buffer, "_is_hf_initialized", False):
                raise FormatError(f"tensor {f'{name}.{leaf}'!r} is missing from the state_dict")


def _dense(module: QuantModule, original: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """{leaf: tensor} of the original module's parameters."""
    if isinstance(module, QuantExperts):
        kept = {leaf: parameter.data.to(dtype) for leaf, parameter in module.named_parameters()}
        return {
            leaf: kept[leaf] if leaf in kept else module.to_tensor(leaf).dequantize(dtype) for leaf in EXPERT_PARAMETERS
        }
    assert isinstance(module, (QuantLinear, QuantEmbedding))
    weight = module.dequantize(dtype)
    if is_conv1d(original):
        weight = weight.T.contiguous()
    bias = getattr(module, "bias", None)
    return {"weight": weight} | ({} if bias is None else {"bias": bias.data.to(dtype)})
