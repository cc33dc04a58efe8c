"""KL(original || student) from the inputs of both heads, a chunk of positions at a time: logits of a whole sequence are
never in memory (512 positions of a vocabulary of 49152 are 100 MB, and six such tensors would be needed)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .plan import PlanError
from .tune_student import Student

Map = Callable[[Tensor], Tensor]

_CHUNK = 1 << 23
"""Logits of a chunk, 32 MiB in float32: 170 positions of a vocabulary of 49152, enough for full speed of products."""

_RANGE = 60.0
"""Logits are tried from -60 to 60."""


def logit_map(student: Student) -> Map:
    """What stands between the head and the logits: nothing, a factor (Granite, Cohere), or a soft cap (Gemma 2).

    Found by giving the model a head's output and comparing. PlanError where it is none of these.
    """
    size = student.head_size
    given = torch.linspace(-_RANGE, _RANGE, 2 * size, device="cpu").view(1, 2, size)
    got = student.logits_of(given).float()
    factor = float((got * given).sum() / given.square().sum())
    cap = getattr(student.model.config.get_text_config(), "final_logit_softcapping", None)
    candidates: list[Map] = [lambda x: x, lambda x: x * factor]
    if cap:
        candidates.append(lambda x: torch.tanh(x / cap) * cap)
    for candidate in candidates:
        if got.shape == given.shape and torch.allclose(candidate(given), got, rtol=1e-5, atol=1e-5 * _RANGE):
            return candidate
    raise PlanError(
        f"{type(student.model).__name__} makes its logits from the head's output in a way that --effort best does not "
        "know; use --effort normal"
    )


def divergence(
    hidden: Tensor, head: Map, target: Tensor, target_head: Map, to_logits: Map, *, backward: bool = False
) -> float:
    """Mean over positions of KL(target || student) in nats, summed in float64.

    hidden, target: inputs of the student's and the original's head, float32 [..., hidden_size], the same positions.
    head, target_head: these heads, where `hidden` is; `target` may be on the CPU. backward: go on to the gradients of
    `hidden`'s graph and of the head's parameters.
    """
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    targets = target.to(hidden.device).reshape(-1, target.shape[-1])
    positions = flat.shape[0]
    gradient = torch.empty_like(flat) if backward else None
    total = 0.0
    with torch.no_grad():
        vocabulary = target_head(targets[:1]).shape[-1]
    step = max(1, _CHUNK // vocabulary)
    for start in range(0, positions, step):
        part = slice(start, start + step)
        with torch.no_grad():
            log_p = log_softmax(to_logits(target_head(targets[part]).float()), -1)
            p = log_p.exp()
        with torch.set_grad_enabled(backward):
            x = flat[part].clone().requires_grad_(backward)
            kl = (p * (log_p - log_softmax(to_logits(head(x).float()), -1))).sum(-1)
            total += float(kl.detach().sum(dtype=torch.float64))
            if gradient is not None:
                (kl.sum() / positions).backward()
                assert x.grad is not None
                gradient[part] = x.grad
    if gradient is not None and hidden.requires_grad:
        hidden.backward(gradient.view_as(hidden))
    return total / positions
