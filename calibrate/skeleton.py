"""A transformers model without weights, into which one part at a time is loaded.

The model class and its parameter names, shapes and tie are transformers'; so is the mapping from a checkpoint's tensor
names to them (renamed prefixes, experts merged into one 3-D parameter). Only what a step of the compilation works on
is in memory.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..formats.base import Source
from ..formats.errors import FormatError
from .structure import decoder_blocks

if TYPE_CHECKING:
    from .fold import Fold

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Skeleton:
    """The model of a source, parameters on the meta device and in the checkpoint's dtype, buffers real.

    model: the transformers model. blocks: [(name, module)] of the repeated blocks. parameters: {name: tensor on meta},
    and the buffers a checkpoint stores. origin: {parameter name: checkpoint tensor names it is made of}. tied: {name of
    a parameter that is another's: that other, under which it is stored once}. fold: what is done to every part that is
    loaded; see `fold_in`. device: where parts are loaded; see `use`.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        packed = source.config.get("quantization_config")
        if isinstance(packed, dict) and packed.get("rotated_norms"):
            raise FormatError(
                f"{source.path}: its head is tied to rotated embeddings, which its architecture alone cannot compute; "
                "start from the checkpoint that it was made from"
            )
        self.model = _meta_model(source)
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}) or {})
        self.parameters: dict[str, Tensor] = {k: v for k, v in self.model.state_dict().items() if k not in self.tied}
        self.mapping = _conversion_mapping(self.model)
        self.origin = self._match()
        try:
            self.blocks = decoder_blocks(self.model)
        except ValueError as error:
            raise FormatError(f"{source.path}: {error}, which is what is quantized one after another") from error
        self._check_left_over()
        self.fold: Fold | None = None
        self.device = torch.device("cpu")

    def use(self, device: torch.device) -> None:
        """Be on this device from now on: buffers at once, parameters as parts are loaded."""
        self.device = device
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def fold_in(self, fold: Fold) -> None:
        """From now on be the equivalent model with a rotated residual stream: every part is changed as it is loaded,
        so parts are to be loaded whole."""
        self.fold = fold
        fold.install(self)

    def _match(self) -> dict[str, list[str]]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        origin: dict[str, list[str]] = defaultdict(list)
        for key in self.source.tensors:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name in state and name not in self.tied:
                origin[name].append(key)
                if pattern is None and self.source.tensors[key].shape != tuple(state[name].shape):
                    raise FormatError(
                        f"{self.source.path}: tensor {key} has shape {list(self.source.tensors[key].shape)}, but its "
                        f"config.json makes it {list(state[name].shape)}; the two do not belong together"
                    )
        missing = [k for k, v in self.parameters.items() if k not in origin and v.is_meta]
        split = any(len(c.target_patterns) > 1 for c in converters)
        if missing and not split:  # where one tensor becomes several, only the first of them is known by name
            raise FormatError(
                f"{self.source.path}: the checkpoint lacks {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                + f" that a {type(self.model).__name__} with its config.json has"
            )
        for name, keys in origin.items():
            have = sum(_numel(self.source.tensors[k].shape) for k in keys)
            if not split and have != self.parameters[name].numel():
                raise FormatError(
                    f"{self.source.path}: {name} should hold {self.parameters[name].numel()} values by config.json, "
                    f"the checkpoint has {have} ({len(keys)} tensors); the two do not belong together"
                )
        return dict(origin)

    def _check_left_over(self) -> None:
        """FormatError where the checkpoint has blocks beyond those of its config.json, of which transformers only
        warns; unless the model class says that it ignores them (DeepSeek-V3: a last block for predicting ahead)."""
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        used = {key for keys in self.origin.values() for key in keys}
        prefix = re.compile(re.escape(self.blocks[0][0].removesuffix("0")) + r"(\d+)\.")
        for key in self.source.tensors:
            found = prefix.match(key)
            beyond = found is not None and int(found[1]) >= len(self.blocks)
            if beyond and key not in used and not any(re.search(pattern, key) for pattern in ignored):
                raise FormatError(
                    f"{self.source.path}: the checkpoint holds {key}, but its config.json makes {len(self.blocks)} "
                    "blocks; the two do not belong together"
                )

    def check_finite(self) -> None:
        """Read every tensor once. FormatError names the first with NaN or infinite values.

        Not those that are stored in fewer bits than their dtype has, as in most GGUF files: decoding them takes longer
        (17 s for 135M weights) than finding out, rarely, when they are loaded.
        """
        for keys in self.origin.values():
            for key in keys:
                info = self.source.tensors[key]
                if info.nbytes >= _numel(info.shape) * info.dtype.itemsize:
                    self._read(key)

    def _read(self, key: str) -> Tensor:
        tensor = self.source.read(key)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FormatError(f"{self.source.path}: tensor {key} holds NaN or infinite values")
        return tensor

    def block_of(self, parameter: str) -> int | None:
        """Index of the block that holds a parameter, None for embeddings, final norm and head."""
        for i, (name, _) in enumerate(self.blocks):
            if parameter.startswith(name + "."):
                return i
        return None

    def parameters_of(self, block: int | None) -> list[str]:
        """Names of a block's parameters, in the model's order; None: of everything outside the blocks."""
        if block is None:
            return [p for p in self.parameters if self.block_of(p) is None]
        prefix = self.blocks[block][0] + "."
        return [p for p in self.parameters if p.startswith(prefix)]

    @contextlib.contextmanager
    def loaded(self, parameters: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """{name: weight} read into the model, in the checkpoint's dtype, on `device`; back to meta at the end."""
        names = list(parameters)
        self.load(names)
        try:
            yield {name: self.get(name) for name in names}
        finally:
            self.release(names)

    def load(self, names: list[str]) -> None:
        """Read parameters from the source into the model, on `device`. FormatError names one with NaN or infinite
        values."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        keys = [key for name in names for key in self.origin.get(name, ())]
        tensors = {}
        for key in keys:
            tensors[key] = self._read(key)
        config = LoadStateDictConfig(weight_mapping=_conversion_mapping(self.model), device_map={"": "cpu"})
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        broken = [*info.mismatched_keys, *info.conversion_errors]
        still = [name for name in names if self.get(name).is_meta]
        if broken or still:
            raise FormatError(
                f"{self.source.path}: {broken[0] if broken else still[0]} could not be made from the checkpoint's "
                "tensors; its config.json and its weights do not belong together"
            )
        for name in names:
            value = self.get(name)
            if value.device != self.device:
                self.put(name, value.to(self.device))
        if self.fold is not None:
            for block in dict.fromkeys(self.block_of(name) for name in names):
                self.fold.apply(self, block)

    def release(self, names: list[str]) -> None:
        for name in names:
            self.put(name, self.parameters[name])

    def cast(self, names: Iterable[str], dtype: torch.dtype) -> None:
        """Loaded floating-point parameters to the dtype that the forward is to be computed in."""
        for name in names:
            value = self.get(name)
            if value.is_floating_point() and value.dtype != dtype:
                self.put(name, value.to(dtype))

    def put(self, name: str, value: Tensor) -> None:
        """Make `value` the model's parameter (or buffer) of that name, of any dtype."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def get(self, name: str) -> Tensor:
        """The parameter or buffer of that name as it is in the model now."""
        owner, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(owner), leaf)
        return value.data if isinstance(value, nn.Parameter) else value


def _meta_model(source: Source) -> Any:
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    values = {k: v for k, v in source.config.items() if k != "quantization_config"}
    model_type = str(values.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise FormatError(
            f"{source.path}: model_type {model_type!r} is not one that transformers {transformers.__version__} knows"
        )
    names = values.get("architectures")
    name = str(names[0] if isinstance(names, list) and names else names or "AutoModelForCausalLM")
    cls = getattr(transformers, name, None)
    if cls is None:
        raise FormatError(f"{source.path}: transformers {transformers.__version__} has no architecture {name!r}")
    dtype = str(values.get("dtype", values.get("torch_dtype")) or _commonest_dtype(source))
    if dtype not in DTYPES:
        raise FormatError(f"{source.path}: config.json's dtype is {dtype!r}; it can be one of {list(DTYPES)}")
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(values)
        config.dtype = DTYPES[dtype]
        layers = getattr(config, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > len(source.tensors):  # before they are built one by one
            raise FormatError(
                f"{source.path}: config.json makes {layers} layers, the checkpoint has {len(source.tensors)} tensors; "
                "the two do not belong together"
            )
        with no_init_weights(), init_empty_weights(include_buffers=False), _default_dtype(DTYPES[dtype]):
            model = cls._from_config(config) if hasattr(cls, "_from_config") else cls.from_config(config)
    except FormatError:
        raise
    except Exception as error:  # whatever a config that makes no sense runs into inside transformers
        raise FormatError(f"{source.path}: config.json makes no model: {type(error).__name__}: {error}") from error
    return model.eval()


def _commonest_dtype(source: Source) -> str:
    counts: dict[str, int] = defaultdict(int)
    for info in source.tensors.values():
        counts[str(info.dtype).removeprefix("torch.")] += info.nbytes
    return max(counts, key=lambda k: counts[k])


def _conversion_mapping(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bar off, for loads that are parts of one progress of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
