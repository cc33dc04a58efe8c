"""The rotation of the residual stream, folded into the weights beside it, so that no layer applies it while it runs.

With h' = T h in place of the stream h (T of transform `rotate`, signs by the seed and hidden_size), a model computes
the same if

    embedding         E' = E T^T                                      a writer, as every row is added to the stream
    writers           W' = T W,  b' = T b                             o_proj, down_proj, down_proj of experts, ...
    readers of norms  W' = W diag(gain) T^T, then gain = 1            q, k, v, gate, up, routers, a head of its own
    tied head         the final norm becomes T norm(T^T h'): logits = E' T norm(T^T h') = E norm(h); gain stays
                      (T = R diag(s), and s cancels there: R norm(R h') is the same)

in exact arithmetic. Here it is a change of the original weights as they are loaded: everything behind it works on a
model that is equivalent, and whose readers see rotated inputs without doing anything. What reads and what writes is
found by `residual.py`; every block is computed before and after its change, so a wrong finding cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..quant.hartley import hartley_hadamard
from ..quant.rotate import TRANSFORM, random_signs
from .plan import PlanError
from .residual import TOKENS, Residual, probe_weight, trace_residual
from .skeleton import Skeleton
from .trace import Unfoldable

TOLERANCE = 1e-4
"""Largest relative error of what a block adds to the stream, in float32; seen: 2e-7 to 3e-6. A wrong fold gives 1."""

_CHUNK = 1 << 22  # values in float32 at a time
_ROWS = 512  # of the vocabulary that the check of the head looks at


@dataclass(frozen=True)
class Fold:
    """How to fold. residual: what reads and writes. signs: field of transform `rotate`, uint8 [ceil(hidden_size/8)].

    `install` has to be called once for a skeleton, `apply` for every part that is loaded into it.
    """

    residual: Residual
    signs: Tensor

    @property
    def hidden_size(self) -> int:
        return self.residual.hidden_size

    @property
    def rotated_weights(self) -> set[str]:
        """Weights whose inputs are rotated afterwards: the readers, and a tied head under the name it is stored by."""
        tied = {self.residual.embedding} if self.residual.head is None else set()
        return set(self.residual.readers) | tied

    @property
    def rotated_norm(self) -> str | None:
        """The gain of the norm that rotates back and forth while it runs; None where the head is not tied."""
        return self.residual.final_gain if self.residual.head is None else None

    def install(self, skeleton: Skeleton) -> None:
        """Make the skeleton's forward that of the folded model."""
        if self.rotated_norm is not None:
            norm = skeleton.model.get_submodule(self.rotated_norm.rpartition(".")[0])
            norm.register_forward_pre_hook(lambda module, args: (hartley_hadamard(args[0]), *args[1:]))
            norm.register_forward_hook(lambda module, args, out: hartley_hadamard(out))

    def apply(self, skeleton: Skeleton, block: int | None) -> None:
        """Change the parameters of one part (a block; None: all outside the blocks), all of them loaded, in place.

        Computed in float32, rounded once to the dtype they are in. Raises PlanError where the part does not compute
        the same as before.
        """
        with torch.no_grad():
            if block is None:
                self._apply_outside(skeleton)
            else:
                self._apply_block(skeleton, block)

    # -- one part

    def _apply_block(self, skeleton: Skeleton, index: int) -> None:
        names = skeleton.parameters_of(index)
        dtypes = {name: skeleton.get(name).dtype for name in names}
        skeleton.cast(names, torch.float32)
        # a token may stand on the edge between two experts: one draw of three has to agree
        seeds = range(3 if any(skeleton.get(name).ndim == 3 for name in names) else 1)
        draws = [_draw(seed, (1, TOKENS, self.hidden_size), skeleton.device) for seed in seeds]
        before = [self._run(skeleton, index, h) - h for h in draws]
        self._change(skeleton, names)
        error = float("inf")
        for h, want in zip(draws, before, strict=True):
            got = self._run(skeleton, index, self._there(h)) - self._there(h)
            error = min(error, _error(got, self._there(want), h))
            if error <= TOLERANCE:
                break
        if not error <= TOLERANCE:
            raise _broken(skeleton.blocks[index][0], error)
        for name in names:
            skeleton.cast([name], dtypes[name])

    def _apply_outside(self, skeleton: Skeleton) -> None:
        found = self.residual
        norm = skeleton.model.get_submodule(found.final_gain.rpartition(".")[0])
        head = found.head or found.embedding
        gain = skeleton.get(found.final_gain).float()
        rows = torch.linspace(0, skeleton.get(head).shape[0] - 1, _ROWS, device="cpu").long().unique()
        rows = rows.to(skeleton.device)
        h = _draw(0, (TOKENS, self.hidden_size), skeleton.device)
        want = probe_weight(norm, gain).forward(h) @ skeleton.get(head)[rows].float().T
        self._change(skeleton, skeleton.parameters_of(None))
        changed = probe_weight(norm, skeleton.get(found.final_gain).float())  # a tied head's with what `install` did
        got = changed(self._there(h)) @ skeleton.get(head)[rows].float().T
        # what is stored is rounded to 16 bits: two digits are left, enough to tell a wrong fold
        tolerance = max(TOLERANCE, 4 * torch.finfo(skeleton.get(head).dtype).eps)
        error = _error(got, want, want)
        if not error <= tolerance:
            raise _broken(f"the head {head}", error)

    def _change(self, skeleton: Skeleton, names: Iterable[str]) -> None:
        """The formulas at the top of this file, for all weights of a part and then its gains."""
        found = self.residual
        names = list(names)
        for name in names:
            reader, axis = found.readers.get(name), found.writers.get(name)
            if reader is not None:
                gain = skeleton.get(reader.gain).float() + (1.0 - found.gains[reader.gain])
                skeleton.put(name, rotate_axis(skeleton.get(name), reader.axis, self.signs, gain))
            if axis is not None:
                skeleton.put(name, rotate_axis(skeleton.get(name), axis, self.signs))
        for name in names:
            if name in found.gains and name != self.rotated_norm:
                skeleton.put(name, torch.full_like(skeleton.get(name), found.gains[name]))

    def _run(self, skeleton: Skeleton, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = tree_map(lambda value: _to_float32(value, skeleton.device), self.residual.calls[index])
        out: Any = skeleton.blocks[index][1](hidden.clone(), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _there(self, x: Tensor) -> Tensor:
        return TRANSFORM.apply_input(x, {"signs": self.signs.to(x.device)})


def find_fold(skeleton: Skeleton, seed: int) -> Fold | str:
    """How the rotation by `seed` folds into the skeleton's model, or in one line why it cannot. Loads no weights."""
    try:
        found = trace_residual(skeleton)
    except Unfoldable as reason:
        return str(reason)
    lost = [name for name in (*found.readers, *found.writers, *found.gains) if name not in skeleton.parameters]
    if lost:
        return f"{lost[0]} is a weight that several blocks share"
    for name, reader in found.readers.items():
        if skeleton.block_of(name) != skeleton.block_of(reader.gain):
            return f"{name} and the norm {reader.gain} that it reads stand in different blocks"
    return Fold(found, random_signs(seed, found.hidden_size))


def rotate_axis(w: Tensor, axis: int, signs: Tensor, gain: Tensor | None = None) -> Tensor:
    """T along one axis (-1 or -2) of w, 1- to 3-dimensional, after multiplying by the gain along that axis.

    axis -1 of a weight [out, in] is W diag(gain) T^T, axis -2 is T W. Computed in float32, a piece at a time; the
    result is new and of w's dtype.
    """
    out, signs = torch.empty_like(w, memory_format=torch.contiguous_format), signs.to(w.device)
    pairs = zip(w, out, strict=True) if w.ndim == 3 else [(w, out)]
    for source, target in pairs:
        source, target = (t[None] if t.ndim == 1 else t.transpose(axis, -1) for t in (source, target))
        step = max(1, _CHUNK // source.shape[1])
        for start in range(0, source.shape[0], step):
            rows = source[start : start + step].float()
            rows = rows if gain is None else rows * gain
            target[start : start + step] = TRANSFORM.apply_input(rows, {"signs": signs}).to(w.dtype)
    return out


def _error(got: Tensor, want: Tensor, stream: Tensor) -> float:
    """Relative error, with what rounding of the stream in float32 alone accounts for taken off. NaN stays NaN."""
    difference = (got - want).norm() - 1e-6 * stream.norm()
    return float((difference / want.norm().clamp(min=1e-30)).clamp(min=0))


def _broken(where: str, error: float) -> PlanError:
    return PlanError(
        f"{where}: with the rotation folded in it computes something else (relative error {error:.1e}); "
        "use --no-fold, which rotates while the model runs"
    )


def _to_float32(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype)


def _draw(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The same normal numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(device)
