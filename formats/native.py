"""The native checkpoint: a transformers directory whose quantized weights are stored as their codec's fields.

config.json carries `quantization_config` (`NativeConfig`): the distinct schemes, and for every quantized parameter its
scheme and logical shape. Field "codes" of parameter P is stored under P itself, as flat uint8: a transformers without
this package then fails on the shape instead of loading random weights. Every other field F is stored as `P_F`
(`model.layers.0.self_attn.q_proj.weight_scale`). Parameters that are not quantized are stored as they are.

`rotated_norms` names, by their gains, norms that compute R norm(R x), R the Hartley-Hadamard transform: a head tied to
embeddings that the transform `rotate` is folded into needs one.

A manifest of hashes (`manifest.py`) is written last; a directory without one is incomplete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..quant.scheme import Scheme, SchemeError
from ..quant.tensor import QuantizedTensor, field_specs
from .config_json import quant_method
from .directory import OURS, DirectorySource, is_native
from .errors import FormatError
from .manifest import MANIFEST_NAME, is_complete
from .safetensors_file import TensorInfo

FORMAT_VERSION = 1
"""Raised whenever an older reader would misread what is written."""

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantizedEntry(BaseModel):
    """scheme: index into `NativeConfig.schemes`; shape: logical, [out, in] or [experts, out, in]."""

    model_config = ConfigDict(strict=True, extra="forbid")

    scheme: Annotated[int, Field(ge=0)]
    shape: Annotated[list[Annotated[int, Field(ge=1, lt=2**40)]], Field(min_length=2, max_length=3)]


class NativeConfig(BaseModel):
    """config.json's `quantization_config`. `parse` checks everything that can be checked without the weights."""

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["bitpalette"] = OURS
    format_version: int = FORMAT_VERSION
    bitpalette_version: str
    schemes: list[dict[str, Any]]
    tensors: dict[str, QuantizedEntry]
    rotated_norms: list[str] = Field(default_factory=list)
    seed: int = 0
    produced_by: dict[str, Any] | None = None

    @staticmethod
    def build(
        schemes: Mapping[str, tuple[Scheme, Sequence[int]]],
        *,
        bitpalette_version: str,
        rotated_norms: Sequence[str] = (),
        seed: int = 0,
        produced_by: dict[str, Any] | None = None,
    ) -> NativeConfig:
        """From {parameter: (scheme, shape)}; equal schemes are stored once, in the order of first use."""
        distinct: dict[Scheme, int] = {}
        tensors = {}
        for name, (scheme, shape) in schemes.items():
            number = distinct.setdefault(scheme, len(distinct))
            tensors[name] = QuantizedEntry(scheme=number, shape=[int(n) for n in shape])
        return NativeConfig(
            bitpalette_version=bitpalette_version,
            schemes=[scheme.to_dict() for scheme in distinct],
            tensors=tensors,
            rotated_norms=list(rotated_norms),
            seed=seed,
            produced_by=produced_by,
        )

    @staticmethod
    def parse(values: Any, where: str | os.PathLike[str]) -> NativeConfig:
        """From the JSON value of `quantization_config`. FormatError naming `where` (the file it stands in)."""
        version = values.get("format_version") if isinstance(values, Mapping) else None
        if isinstance(version, int) and version > FORMAT_VERSION:  # before anything else: the rest may look different
            raise FormatError(
                f"{where}: written by a newer bitpalette (format {version}, this one reads up to {FORMAT_VERSION}); "
                "upgrade bitpalette"
            )
        try:
            config = NativeConfig.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise FormatError(f"{where}: quantization_config.{place}: {first['msg']}; write it again") from error
        if config.format_version < 1:
            raise FormatError(f"{where}: format_version {config.format_version} does not exist; they begin at 1")
        config.specs(where)
        both = config.tensors.keys() & set(config.rotated_norms)
        if both:
            raise FormatError(f"{where}: {min(both)!r} is a quantized tensor and a rotated norm; write it again")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for config.json; `produced_by` and `rotated_norms` are left out where there are none."""
        values = self.model_dump(mode="json")
        if not values["rotated_norms"]:
            del values["rotated_norms"]
        if values["produced_by"] is None:
            del values["produced_by"]
        return values

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of a quantized parameter. KeyError for another name."""
        return Scheme.from_dict(self.schemes[self.tensors[name].scheme])

    def specs(self, where: str | os.PathLike[str] = "config.json") -> dict[str, tuple[Scheme, Specs]]:
        """{parameter: (scheme, {field: (shape, dtype)})}. FormatError for an unknown codec or a scheme that misfits."""
        schemes = []
        for number, values in enumerate(self.schemes):
            try:
                schemes.append(Scheme.from_dict(values))
            except SchemeError as error:
                raise FormatError(f"{where}: scheme {number}: {error}; is this bitpalette older?") from error
        out = {}
        for name, entry in self.tensors.items():
            if entry.scheme >= len(schemes):
                raise FormatError(f"{where}: tensor {name!r}: scheme {entry.scheme} of {len(schemes)} does not exist")
            scheme = schemes[entry.scheme]
            try:
                out[name] = (scheme, field_specs(scheme, tuple(entry.shape)))
            except SchemeError as error:
                raise FormatError(f"{where}: tensor {name!r}: {error}; write it again") from error
        return out


def stored_name(param: str, field: str) -> str:
    """Name in the safetensors file of one field of a quantized parameter."""
    return param if field == "codes" else f"{param}_{field}"


def stored_specs(config: NativeConfig) -> Specs:
    """{stored name: (shape, dtype)} of every field of every quantized parameter."""
    return {
        stored_name(param, field): spec
        for param, (_, fields) in config.specs().items()
        for field, spec in fields.items()
    }


def build_entries(
    tensors: Sequence[tuple[str, Sequence[int], torch.dtype]], config: NativeConfig
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """The entries for `plan_shards`: the model's parameters in order, the quantized ones replaced by their fields.

    tensors: (name, shape, dtype) as the model has them. FormatError where a quantized parameter is not among them, has
    another shape than `config` says, or a field's stored name is also a parameter's.
    """
    specs, names = config.specs(), {name for name, _, _ in tensors}
    absent = [name for name in specs if name not in names]
    if absent:
        raise FormatError(f"quantized tensor {absent[0]!r} is not a tensor of the model")
    entries: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape, dtype in tensors:
        if name not in specs:
            entries.append((name, tuple(shape), dtype))
            continue
        if list(shape) != config.tensors[name].shape:
            raise FormatError(f"tensor {name!r} has shape {list(shape)}, planned as {config.tensors[name].shape}")
        entries += [(stored_name(name, field), *spec) for field, spec in specs[name][1].items()]
    return entries


def stored_fields(param: str, qt: QuantizedTensor) -> dict[str, Tensor]:
    """{stored name: Tensor}: what to hand to `ShardWriter.write` for one quantized parameter."""
    return {stored_name(param, field): tensor for field, tensor in qt.fields.items()}


class NativeSource:
    """An opened native checkpoint; also a `Source`, whose `read` gives plain tensors.

    tensors: {parameter: TensorInfo} under the model's names; for a quantized parameter the logical shape, the config's
        dtype, and nbytes as stored.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> None:
        self.path = Path(path)
        self._stored = DirectorySource(path)
        self.config: dict[str, Any] = self._stored.config
        config_path = self.path / "config.json"
        if quant_method(self.config) != OURS:
            raise FormatError(f"{self.path}: not a bitpalette checkpoint; its config.json has no quant_method {OURS!r}")
        self.quantization = NativeConfig.parse(self.config["quantization_config"], config_path)
        if not allow_incomplete and not is_complete(self.path):
            raise FormatError(
                f"{self.path}: incomplete: no {MANIFEST_NAME}, or files it lists are missing or of another size; "
                "repeat the command that wrote it, or copy it again"
            )
        self._specs = self.quantization.specs(config_path)
        self.dtype = _dtype(self.config, config_path)
        self.tensors = self._check()

    @property
    def quantized_names(self) -> list[str]:
        return list(self.quantization.tensors)

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """{stored name: TensorInfo}: what the files hold, field by field."""
        return self._stored.tensors

    @property
    def size_bytes(self) -> int:
        return self._stored.size_bytes

    def read_quantized(self, param: str) -> QuantizedTensor:
        """A quantized parameter in canonical layout. KeyError for another name."""
        scheme, fields = self._specs[param]
        tensors = {field: self._stored.read(stored_name(param, field)) for field in fields}
        return QuantizedTensor(scheme, tuple(self.quantization.tensors[param].shape), tensors)

    def read(self, name: str) -> Tensor:
        """A tensor as floats: unquantized ones as stored, quantized ones dequantized to the config's dtype."""
        return self.read_quantized(name).dequantize(self.dtype) if name in self._specs else self._stored.read(name)

    def read_stored(self, name: str) -> Tensor:
        """One tensor of the files under its stored name: a field, or an unquantized parameter."""
        return self._stored.read(name)

    def __iter__(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        for name in self.tensors:
            yield name, self.read_quantized(name) if name in self._specs else self._stored.read(name)

    def write_sidecar(self, directory: Path) -> list[str]:
        return self._stored.write_sidecar(directory)

    def sidecar_bytes(self) -> int:
        return self._stored.sidecar_bytes()

    def fingerprint(self) -> str:
        return self._stored.fingerprint()

    def _check(self) -> dict[str, TensorInfo]:
        """Hold the files against `field_specs`, and name file and tensor where they disagree."""
        rest = dict(self._stored.tensors)
        logical = {}
        for param, (scheme, fields) in self._specs.items():
            nbytes = 0
            for field, (shape, dtype) in fields.items():
                name = stored_name(param, field)
                info = rest.pop(name, None)
                if info is None:
                    raise FormatError(f"{self.path}: tensor {name!r} ({scheme}) is missing; write or copy it again")
                if info.shape != shape or info.dtype != dtype:
                    raise FormatError(
                        f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; {scheme} of shape "
                        f"{self.quantization.tensors[param].shape} needs {dtype} {list(shape)}"
                    )
                nbytes += info.nbytes
            file = self._stored.tensors[param].file
            shape = tuple(self.quantization.tensors[param].shape)
            logical[param] = TensorInfo(param, shape, self.dtype, nbytes, file)
        for gain in self.quantization.rotated_norms:
            if gain not in rest:
                raise FormatError(f"{self.path}: tensor {gain!r} (a rotated norm) is missing; write or copy it again")
        return logical | rest


def open_native(path: str | os.PathLike[str]) -> NativeSource:
    """Open a complete native checkpoint. FormatError: incomplete, from a newer version, or fields that disagree."""
    return NativeSource(path)


class NativeFormat:
    name = "native"

    def sniff(self, path: str) -> bool:
        return os.path.isdir(path) and is_native(path)

    def open(self, path: str) -> NativeSource:
        return NativeSource(path)


def _dtype(config: Mapping[str, Any], where: Path) -> torch.dtype:
    """The dtype of the unquantized model; text models inside a larger config state it one level down."""
    inner = config.get("text_config")
    name = config.get("dtype") or config.get("torch_dtype") or (inner.get("dtype") if isinstance(inner, dict) else None)
    dtype = getattr(torch, str(name or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FormatError(f"{where}: dtype {name!r} is no floating-point dtype; write it again")
    return dtype


FORMAT = NativeFormat()
