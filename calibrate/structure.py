"""What a model is made of: which parameters are weights that a scheme can encode, and its repeated blocks.

By rule, not by list of architectures: an `nn.Linear` (or a subclass), transformers' `Conv1D`, the table behind
`get_input_embeddings()`, and modules that hold the experts of a mixture as 3-D parameters. Works on a meta model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["linear", "conv1d", "embedding", "experts"]

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Weight:
    """A parameter that a scheme can encode.

    shape: [out_features, in_features], or [experts, out_features, in_features] of a stack. For `conv1d` this is the
        transpose of the parameter; for `embedding` it is [num_embeddings, embedding_dim].
    router: its output chooses the experts; small, and a wrong choice costs far more than a rounded weight.
    head: it gives the logits. embedding: it is the table of input embeddings. Tied weights are both.
    """

    kind: Kind
    module_name: str
    shape: tuple[int, ...]
    router: bool = False
    head: bool = False
    embedding: bool = False


def quantizable(model: nn.Module) -> dict[str, Weight]:
    """{parameter name: Weight} in the model's order; a tied weight appears once, under its first name."""
    heads, embeddings = _output_weights(model), _input_weights(model)
    routers = _routers(model)
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, kind, shape in _weights_of(module, embeddings):
            parameter = module.get_parameter(name)
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[f"{module_name}.{name}" if module_name else name] = Weight(
                kind,
                module_name,
                shape,
                router=module_name in routers,
                head=id(parameter) in heads,
                embedding=id(parameter) in embeddings,
            )
    return found


def skipped(model: nn.Module) -> dict[str, str]:
    """{parameter name: reason} of every other parameter with two dimensions or more: none is left out in silence."""
    known = quantizable(model)
    names = {id(model.get_parameter(name)) for name in known}
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in names:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            reason = "an embedding other than the input embeddings (positions, token types)"
        elif parameter.ndim == 2 and _is_router(owner):
            reason = "a router"
        elif parameter.ndim == 3:
            reason = f"a 3-D parameter of {type(owner).__name__}, not [experts, out_features, in_features]"
        else:
            reason = f"a parameter {list(parameter.shape)} of {type(owner).__name__}, used in ways not known"
        out[name] = reason
    return out


def owner(model: nn.Module, parameter_name: str) -> tuple[nn.Module, Kind] | None:
    """(module that holds the parameter, kind of weight), or None if `quantizable` would not list it.

    Unlike `quantizable` this accepts every name of a tied weight. KeyError if the model has no such parameter.
    """
    module_name, _, name = parameter_name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        module.get_parameter(name)
    except AttributeError:
        raise KeyError(parameter_name) from None
    for have, kind, _ in _weights_of(module, _input_weights(model)):
        if have == name:
            return module, kind
    return None


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """[(name, block)] in order: the children of the nn.ModuleList that holds most parameters, the outermost of equals.

    ValueError for a model without such a list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:  # outer lists come before inner ones
                best = (size, name, module)
    if best is None or best[0] == 0:
        raise ValueError(f"{type(model).__name__} has no list of repeated blocks")
    return [(f"{best[1]}.{i}", block) for i, block in enumerate(best[2])]


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: y = x W + b with W [in_features, out_features]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _weights_of(module: nn.Module, embeddings: set[int]) -> list[tuple[str, Kind, tuple[int, ...]]]:
    if isinstance(module, nn.Linear):
        # the projection inside nn.MultiheadAttention is never called: its weight is read by the attention itself
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or not _parameter(module, "weight"):
            return []
        return [("weight", "linear", tuple(module.weight.shape))]
    if isinstance(module, nn.Embedding):
        if not _parameter(module, "weight") or id(module.weight) not in embeddings:
            return []
        return [("weight", "embedding", tuple(module.weight.shape))]
    if is_conv1d(module):
        weight = module.get_parameter("weight")
        return [("weight", "conv1d", (weight.shape[1], weight.shape[0]))]
    if is_experts(module):
        return [(name, "experts", tuple(module.get_parameter(name).shape)) for name in EXPERT_PARAMETERS]
    return []


def is_experts(module: nn.Module) -> bool:
    """gate_up_proj [experts, 2 * intermediate, hidden] and down_proj [experts, hidden, intermediate], without biases.

    The transposed layout of some architectures ([experts, hidden, 2 * intermediate]), interleaved gates and biases are
    not: `skipped` lists them.
    """
    if not all(_parameter(module, name) for name in EXPERT_PARAMETERS):
        return False
    up, down = (module.get_parameter(name) for name in EXPERT_PARAMETERS)
    if up.ndim != 3 or down.ndim != 3 or getattr(module, "has_bias", False):
        return False
    if not getattr(module, "is_concatenated", True) or getattr(module, "has_post_expert_norm", False):
        return False
    experts, hidden, intermediate = down.shape
    return tuple(up.shape) == (experts, 2 * intermediate, hidden)


def _parameter(module: nn.Module, name: str) -> bool:
    return isinstance(module._parameters.get(name), nn.Parameter)


def _input_weights(model: nn.Module) -> set[int]:
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return set()
    try:
        module = get()
    except (NotImplementedError, AttributeError):  # transformers raises for models without a table
        return set()
    return {id(p) for p in module.parameters()} if isinstance(module, nn.Embedding) else set()


def _output_weights(model: nn.Module) -> set[int]:
    get = getattr(model, "get_output_embeddings", None)
    module = get() if get is not None else None
    weight = getattr(module, "weight", None)
    tied = set()
    if weight is not None:
        tied.add(id(weight))
        names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
        # on a meta skeleton tied names may still be two parameters
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            if target == names.get(id(weight)):
                tied.add(id(model.get_parameter(source)))
    return tied


def _routers(model: nn.Module) -> set[str]:
    """Names of nn.Linear that choose experts: children of a module that also holds experts, with one output for each
    expert, or with a single output (the gate of a shared expert)."""
    found = set()
    for name, module in model.named_modules():
        counts = {n for child in module.children() for n in [_expert_count(child)] if n}
        if not counts:
            continue
        for child_name, child in module.named_children():
            for inner, linear in child.named_modules():
                direct = inner == "" or _is_router(child)
                if isinstance(linear, nn.Linear) and direct and linear.out_features in counts | {1}:
                    found.add(".".join(part for part in (name, child_name, inner) if part))
    return found


def _expert_count(module: nn.Module) -> int:
    """Experts that a module holds, fused in 3-D parameters or as a list; 0: none."""
    first = module._parameters.get("down_proj")
    if first is not None and first.ndim == 3:
        return first.shape[0]
    if isinstance(module, nn.ModuleList) and len(module) > 1 and "expert" in type(module[0]).__name__.lower():
        return len(module)
    return 0


def _is_router(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "router" in name or "gate" in name
