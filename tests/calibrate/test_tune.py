"""Scales and norms tuned against the original model: better on held-out text, resumable, in time, or nothing at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitpalette.calibrate import tune as tuning
from bitpalette.calibrate import tune_loss, tune_reference, tune_student
from bitpalette.calibrate.plan import PlanError
from bitpalette.calibrate.skeleton import Skeleton
from bitpalette.calibrate.tune import Compiled, Tuned, TuneEvents, TuneSettings, tune
from bitpalette.calibrate.tune_schedule import held_out_of, learning_rate, schedule
from bitpalette.calibrate.tune_student import ScaledLinear, Student, gain_offset
from bitpalette.calibrate.whole import load_model
from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError
from bitpalette.formats.native import NativeSource, stored_name
from bitpalette.quant.tensor import QuantizedTensor

SEQ_LEN = 32
QUICK = TuneSettings(steps=16, scale_rate=1e-2, norm_rate=1e-2, step_tokens=2 * SEQ_LEN)
INT2 = {"codec": "int", "bits": 2, "group_size": 0}
Make = Callable[..., "Case"]


class Killed(BaseException):
    """As a signal: nothing in the product catches it."""


def scheme_in_blocks(name: str, weight: Any) -> dict[str, Any] | None:
    return None if weight.router or weight.embedding or weight.head else INT2


class Case:
    """A quantized tiny model on disk, beside its original."""

    def __init__(self, original: Path, packed: Any) -> None:
        self.original, self.packed = original, packed
        self.native = NativeSource(packed.path, allow_incomplete=True)

    def compiled(self, written: dict[str, Tensor] | None = None) -> Compiled:
        """As of a run of its own; written: values that are stored instead."""
        schemes = {name: self.native.quantization.scheme_of(name) for name in self.native.quantized_names}
        written = written or {}
        read = self.native.read_stored
        return Compiled(
            Skeleton(open_source(self.original)), schemes, lambda n: written[n] if n in written else read(n)
        )

    def model(self, values: dict[str, Tensor]) -> Any:
        """The model that has these values stored, put together without the product's student."""
        model = copy.deepcopy(self.packed.reference)
        for name, qt in self.packed.tensors.items():
            if stored_name(name, "scale") in values:
                fields = qt.fields | {"scale": values[stored_name(name, "scale")]}
                w = QuantizedTensor(qt.scheme, qt.shape, fields).dequantize()
                parameter = model.get_parameter(name)
                parameter.data.copy_(w if parameter.shape == w.shape and not _conv1d(model, name) else w.T)
        for name, value in values.items():
            if not name.endswith("_scale"):
                model.get_parameter(name).data.copy_(value)
        return model

    def divergence(self, values: dict[str, Tensor], tokens: Tensor) -> float:
        """Of that model from the original, plainly."""
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(input_ids=tokens).logits.double(), -1)
                for m in (load_model(open_source(self.original)), self.model(values))
            )
        return float((p.exp() * (p - q)).sum(-1).mean())


def _conv1d(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


@pytest.fixture
def case(families: Any, packed: Any, tmp_path: Path) -> Make:
    def make(family: str = "llama", scheme_of: Any = scheme_in_blocks, dtype: torch.dtype = torch.float32) -> Case:
        original = tmp_path / f"{family}-original"
        families[family]().to(dtype).save_pretrained(original)
        return Case(original, packed(family, scheme_of, dtype))

    return make


@pytest.fixture
def text() -> Tensor:
    return torch.randint(4, 203, (24, SEQ_LEN), generator=torch.Generator().manual_seed(3))


def held_out(text: Tensor, settings: TuneSettings = QUICK) -> Tensor:
    return text[held_out_of(len(text), text.shape[1], settings)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what it is worth


def test_held_out_divergence_falls(case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case()
    seen: list[tuple[int, int, float, float]] = []
    blocks: list[tuple[int, int]] = []
    events = TuneEvents(original=lambda *a: blocks.append(a), step=lambda *a: seen.append(a))
    result = tune(it.compiled(), text, QUICK, tmp_path / "w", events)
    assert blocks == [(1, 2), (2, 2)]
    assert result.after < 0.9 * result.before
    assert result.before == pytest.approx(it.divergence({}, held_out(text)), rel=1e-4)
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=1e-4)
    assert [s[:2] for s in seen] == [(i + 1, 16) for i in range(16)] and seen[-1][3] == 0
    assert [step for step, _ in result.history] == [0, 4, 8, 12, 16]


def test_every_family(family: str, case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case(family)
    compiled = it.compiled()
    result = tune(compiled, text, QUICK, tmp_path / "w")
    assert result.after < 0.97 * result.before
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=1e-3)
    assert all("3-D" in why for why in result.left_out.values())
    tuned = {stored_name(n, "scale") for n in it.packed.tensors if n not in result.left_out}
    norms = {n for n, m in it.packed.reference.named_modules() if "Norm" in type(m).__name__}
    assert result.values.keys() == tuned | {f"{n}.weight" for n in norms}
    for name, value in result.values.items():
        stored = it.native.read_stored(name)
        assert (value.shape, value.dtype) == (stored.shape, stored.dtype) and not torch.equal(value, stored)


def test_model_is_given_back(case: Make, text: Tensor, tmp_path: Path) -> None:
    compiled = case("gpt2").compiled()
    before = {name: type(m) for name, m in compiled.skeleton.model.named_modules()}
    tune(compiled, text, QUICK, tmp_path / "w")
    assert {name: type(m) for name, m in compiled.skeleton.model.named_modules()} == before
    assert all(p.is_meta for p in compiled.skeleton.model.parameters())


@pytest.mark.parametrize("which", ["scale", "norm"])
def test_one_of_the_two(which: str, case: Make, text: Tensor, tmp_path: Path) -> None:
    rates = {"scale_rate": 1e-2, "norm_rate": 0.0} if which == "scale" else {"scale_rate": 0.0, "norm_rate": 1e-2}
    result = tune(case().compiled(), text, TuneSettings(steps=16, step_tokens=64, **rates), tmp_path / "w")
    assert result.after < 0.98 * result.before
    assert all(name.endswith("_scale") == (which == "scale") for name in result.values)


@pytest.mark.parametrize(
    "scheme",
    [
        {"codec": "trellis", "rate": 2.0, "window": 12, "transforms": ("rotate",)},
        {"codec": "int", "bits": 2, "group_size": 16, "symmetric": False},
        {"codec": "lut", "entries": 4, "table": "lloyd", "group_size": 0},
    ],
    ids=lambda s: s["codec"],
)
def test_codecs(scheme: dict[str, Any], case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case(scheme_of=lambda n, w: None if w.router or w.embedding or w.head else scheme)
    result = tune(it.compiled(), text, QUICK, tmp_path / "w")
    assert result.after < 0.95 * result.before
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=1e-3)


@pytest.mark.parametrize(
    "table",
    [
        {"codec": "lut", "entries": 4, "table": "kmeans", "table_scope": "row", "scaled": False},
        {
            "codec": "float",
            "scale_format": "e8m0",
            "group_size": 32,
        },  # a scale's code times a factor is another scale's
    ],
    ids=lambda s: s["codec"],
)
def test_left_out_with_its_reason(table: dict[str, Any], case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case(scheme_of=lambda n, w: INT2 if w.embedding else table if "up_proj" in n else None)
    notes: list[str] = []
    result = tune(it.compiled(), text, QUICK, tmp_path / "w", TuneEvents(note=notes.append))
    assert len(result.left_out) == 3
    assert result.left_out["model.embed_tokens.weight"] == "embeddings are looked up"
    assert "stores no scale" in result.left_out["model.layers.0.mlp.up_proj.weight"]
    assert any("up_proj.weight and 1 more" in note for note in notes)
    assert result.values and all("norm" in name for name in result.values)


def test_quantized_head(case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case(scheme_of=lambda n, w: INT2 if w.head else None)
    result = tune(it.compiled(), text, QUICK, tmp_path / "w")
    assert "lm_head.weight_scale" in result.values
    assert result.before == pytest.approx(it.divergence({}, held_out(text)), rel=1e-4)
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=1e-4)
    assert result.after < 0.995 * result.before  # the errors of a row of random numbers hardly depend on its scale


def test_quantized_tied_head(case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case("qwen3", lambda n, w: {**INT2, "bits": 4} if w.head else scheme_in_blocks(n, w))
    result = tune(it.compiled(), text, QUICK, tmp_path / "w")
    assert "tied" in result.left_out["model.embed_tokens.weight"]
    assert result.before == pytest.approx(it.divergence({}, held_out(text)), rel=1e-4)
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=1e-4)


def test_gains_are_judged_as_rounded(case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case(dtype=torch.bfloat16)
    settings = TuneSettings(steps=16, scale_rate=0, norm_rate=1e-2, step_tokens=64)
    result = tune(it.compiled(), text, settings, tmp_path / "w")
    assert {v.dtype for v in result.values.values()} == {torch.bfloat16}
    assert result.after == pytest.approx(min(kl for _, kl in result.history), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # qwen3's head is tied: its last norm rotates
def test_folded_rotation(
    family: str, checkpoint: Callable[..., Path], compilation: Any, text: Tensor, tmp_path: Path
) -> None:
    run = compilation(
        checkpoint(family), tmp_path / "out", bits=2, codec="int", solver="rtn", rotate=True, fold=True, head_bits=16
    )
    assert run.skeleton.fold is not None
    run.run()
    native = NativeSource(tmp_path / "out")
    result = tune(Compiled(run.skeleton, run.schemes, native.read_stored), text, QUICK, tmp_path / "w")
    assert result.after < 0.95 * result.before
    from bitpalette.api import load

    tokens = held_out(text)
    with torch.no_grad():
        p = torch.log_softmax(load_model(run.source)(input_ids=tokens).logits, -1)
        q = torch.log_softmax(load(tmp_path / "out", dtype=torch.float32)(input_ids=tokens).logits, -1)
    assert result.before == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-2)


def test_weights_in_sixteen_bits(case: Make, text: Tensor, tmp_path: Path) -> None:
    settings = TuneSettings(steps=16, scale_rate=1e-2, norm_rate=1e-2, step_tokens=64, dtype="bfloat16")
    it = case()
    result = tune(it.compiled(), text, settings, tmp_path / "w")
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=5e-2)
    assert result.after < 0.9 * result.before


# -- nothing, rather than something worse


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (TuneSettings(steps=0), "nothing to tune"),
        (TuneSettings(scale_rate=0, norm_rate=0), "nothing to tune"),
        (TuneSettings(steps=8, scale_rate=2.0, norm_rate=2.0, step_tokens=64), "no better since"),
    ],
)
def test_nothing_where_nothing_improves(
    settings: TuneSettings, why: str, case: Make, text: Tensor, tmp_path: Path
) -> None:
    notes: list[str] = []
    result = tune(case().compiled(), text, settings, tmp_path / "w", TuneEvents(note=notes.append))
    assert result.values == {} and why in notes[-1]
    again = tune(case().compiled(), text, settings, tmp_path / "w")
    assert again.values == {} and again.history == result.history


def test_best_state_is_kept_not_the_last(case: Make, text: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    it = case()
    plain = tuning._Run._held_out
    monkeypatch.setattr(tuning._Run, "_held_out", lambda run, plan: plain(run, plan) * (next(factors)))
    factors = iter([1.0, 0.5, 9.0, 9.0, 9.0, 1.0])
    notes: list[str] = []
    result = tune(
        it.compiled(), text, TuneSettings(steps=24, step_tokens=64), tmp_path / "w", TuneEvents(note=notes.append)
    )
    assert result.steps == 16 and "no better for 3 evaluations" in " ".join(notes)
    assert result.after == pytest.approx(it.divergence(result.values, held_out(text)), rel=1e-4)
    assert result.history[1][1] * 2 == pytest.approx(result.after, rel=1e-3)


def test_nothing_where_rounding_spoils_it(case: Make, text: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    plain = Student.values
    monkeypatch.setattr(Student, "values", lambda s: {k: torch.zeros_like(v) for k, v in plain(s).items()})
    notes: list[str] = []
    result = tune(case().compiled(), text, QUICK, tmp_path / "w", TuneEvents(note=notes.append))
    assert result.values == {} and "rounded as stored" in notes[-1]


def test_bad_settings(case: Make, text: Tensor, tmp_path: Path) -> None:
    for values in ({"steps": -1}, {"scale_rate": math.nan}, {"held_out": 1.0}, {"dtype": "int8"}, {"seconds": -2.0}):
        with pytest.raises(PlanError, match=next(iter(values))):
            TuneSettings(**values)
    with pytest.raises(PlanError, match="at least 4 sequences"):
        tune(case().compiled(), text[:3], QUICK, tmp_path / "w")


# -- killed and gone on with


def watched(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, *, after: bool = False) -> None:
    """The `at`-th call (from 1) of a function is where the run is killed."""
    calls = iter(range(1, 1 << 30))
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == at
        if due and not after:
            raise Killed
        value = plain(*args, **kwargs)
        if due:
            raise Killed
        return value

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "at", "after", "every"),
    [
        (tuning._Run, "_step", 1, False, 0.0),
        (tuning._Run, "_step", 6, False, 0.0),  # between evaluations
        (tuning._Run, "_step", 6, False, 1e9),  # nothing saved since the beginning
        (tuning._Run, "_evaluate", 1, True, 0.0),
        (tuning._Run, "_save", 1, True, 0.0),  # only planned
        (tuning._Run, "_save", 5, True, 0.0),
        (tuning._Run, "_finish", 1, False, 1e9),
        (Student, "store", 1, True, 0.0),
        (tune_reference, "_save", 1, True, 0.0),  # behind the first block
        (tune_reference, "_save", 3, True, 0.0),
        (tuning, "save_state", 11, False, 0.0),  # before the result
    ],
)
def test_killed_run_ends_in_the_same_bytes(
    owner: Any,
    name: str,
    at: int,
    after: bool,
    every: float,
    case: Make,
    text: Tensor,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(tuning, "SAVE_EVERY", every)
    settings = TuneSettings(steps=8, scale_rate=1e-2, norm_rate=1e-2, step_tokens=SEQ_LEN)
    it, text = case(), text[:8]
    whole = tune(it.compiled(), text, settings, tmp_path / "whole")
    assert whole.values and [step for step, _ in whole.history] == [0, 4, 8]
    with monkeypatch.context() as patch:
        watched(patch, owner, name, at, after=after)
        with pytest.raises(Killed):
            tune(it.compiled(), text, settings, tmp_path / "w")
    notes: list[str] = []
    again = tune(it.compiled(), text, settings, tmp_path / "w", TuneEvents(note=notes.append))
    assert same(again.values, whole.values)
    assert again.history == whole.history and again.after == whole.after
    if (name, at) == ("_step", 6):
        assert f"going on with tuning after {5 if every == 0 else 0} of 8 steps" in notes


def test_same_values_while_they_are_being_written(case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case()
    first = tune(it.compiled(), text, QUICK, tmp_path / "w")
    half = dict(list(first.values.items())[: len(first.values) // 2])
    again = tune(it.compiled(half), text, QUICK, tmp_path / "w")
    assert same(again.values, first.values) and again == Tuned(**{**vars(first), "values": again.values})


def test_state_of_other_settings(case: Make, text: Tensor, tmp_path: Path) -> None:
    it = case()
    tune(it.compiled(), text, QUICK, tmp_path / "w")
    for tokens, settings in ((text, TuneSettings(steps=3)), (text.flip(0), QUICK)):
        with pytest.raises(FormatError, match="other settings"):
            tune(it.compiled(), tokens, settings, tmp_path / "w")
    (tmp_path / "w" / tuning.RESULT).write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="delete it"):
        tune(it.compiled(), text, QUICK, tmp_path / "w")


# -- time


class Clock:
    """Time passes only while the student computes: `cost` seconds a forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[int], float]) -> None:
        self.now, self.forwards = 0.0, 0
        plain = Student.hidden

        def hidden(student: Student, tokens: Tensor) -> Tensor:
            self.forwards += 1
            self.now += cost(self.forwards) * len(tokens)
            return plain(student, tokens)

        monkeypatch.setattr(Student, "hidden", hidden)
        monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_plan_fits_in_the_time_box(case: Make, text: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    clock = Clock(monkeypatch, lambda n: 1.0)
    steps: list[int] = []
    settings = TuneSettings(steps=10_000, seconds=120, step_tokens=32)
    events = TuneEvents(step=lambda done, planned, kl, left: steps.append(planned - done))
    result = tune(case().compiled(), text, settings, tmp_path / "w", events)
    assert steps[-1] == 0 and result.steps == len(steps)  # the schedule was completed
    assert 60 < clock.now <= 120 and result.seconds == clock.now
    assert result.steps > 40


def test_stops_when_the_time_is_up(case: Make, text: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    clock = Clock(monkeypatch, lambda n: 1.0 if n < 30 else 5.0)
    notes: list[str] = []
    settings = TuneSettings(steps=10_000, seconds=120, step_tokens=32, scale_rate=1e-2, norm_rate=1e-2)
    result = tune(case().compiled(), text, settings, tmp_path / "w", TuneEvents(note=notes.append))
    assert "the time is up" in notes[-1]
    assert 120 <= clock.now <= 120 + 5 * 5  # the last step, and the held-out text twice
    assert result.after < result.before


def test_too_little_time(case: Make, text: Tensor, tmp_path: Path, monkeypatch: Any) -> None:
    Clock(monkeypatch, lambda n: 1.0)
    notes: list[str] = []
    settings = TuneSettings(seconds=9, step_tokens=32)
    assert tune(case().compiled(), text, settings, tmp_path / "w", TuneEvents(note=notes.append)).values == {}
    assert "9 s are too short" in notes[-1]


# -- the parts


def test_schedule() -> None:
    settings = TuneSettings(step_tokens=64)
    plan = schedule(40, 32, settings, 45)
    assert plan.held_out == [36, 37, 38, 39]
    assert [len(step) for step in plan.order] == [2] * 45
    flat = [i for step in plan.order for i in step]
    assert sorted(flat[:36]) == sorted(flat[36:72]) == list(range(36)) and flat[:36] != flat[36:72]
    assert plan.rate(0) == 1 and 0 < plan.rate(44) < 0.01
    assert schedule(40, 32, settings, 9).order == plan.order[:9]
    assert len(held_out_of(1000, 512, settings)) == 8
    assert held_out_of(4, 512, settings) == [2, 3]


@pytest.mark.parametrize("chunk", [1, 203 * 5, 1 << 23])
def test_divergence_and_its_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_loss, "_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    target, wt, ws = (torch.randn(*s, generator=g) for s in ((2, 9, 7), (203, 7), (203, 7)))
    source = torch.randn(2, 9, 7, generator=g, requires_grad=True)
    m = torch.ones(203, requires_grad=True)
    cap = lambda x: 3 * torch.tanh(x / 3)  # noqa: E731
    log_p = torch.log_softmax(cap(target @ wt.T), -1)
    want = (log_p.exp() * (log_p - torch.log_softmax(cap(source * 2 @ ws.T * m), -1))).sum(-1).mean()
    gradients = torch.autograd.grad(want, (source, m))
    got = tune_loss.divergence(source * 2, lambda x: x @ ws.T * m, target, lambda x: x @ wt.T, cap, backward=True)
    assert got == pytest.approx(float(want.detach()), rel=1e-5)
    torch.testing.assert_close((source.grad, m.grad), gradients, rtol=1e-4, atol=1e-6)
    again = tune_loss.divergence(source * 2, lambda x: x @ ws.T * m, target, lambda x: x @ wt.T, cap)
    assert again == got


def test_what_stands_behind_the_head(case: Make) -> None:
    x = torch.linspace(-50, 50, 11)
    with Student(case("gemma2").compiled(), torch.float32) as student:
        cap = student.model.config.final_logit_softcapping
        torch.testing.assert_close(tune_loss.logit_map(student)(x), torch.tanh(x / cap) * cap)
    compiled = case().compiled()
    with Student(compiled, torch.float32) as student:
        assert torch.equal(tune_loss.logit_map(student)(x), x)
        plain = student.logits_of
        student.logits_of = lambda given: plain(given) / 8  # type: ignore[method-assign]
        torch.testing.assert_close(tune_loss.logit_map(student)(x), x / 8)
        student.logits_of = lambda given: plain(given) ** 3  # type: ignore[method-assign]
        with pytest.raises(PlanError, match="--effort normal"):
            tune_loss.logit_map(student)


def test_no_head() -> None:
    with pytest.raises(PlanError, match="no linear output head"):
        tune_student.find_head(nn.Linear(3, 3))


def test_what_a_norm_multiplies_by(families: Any) -> None:
    offsets = {name: gain_offset(_norm(families[name]())) for name in ("llama", "gemma2", "opt")}
    assert offsets == {"llama": 0.0, "gemma2": 1.0, "opt": 0.0}

    class SquareNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    class PairNorm(nn.LayerNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    assert gain_offset(SquareNorm(8)) is None and gain_offset(PairNorm(8)) is None


def _norm(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if "Norm" in type(m).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_linear(dtype: torch.dtype, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(17, 11, generator=g).to(dtype)
    b = nn.Parameter(torch.randn(17, generator=g), requires_grad=False) if bias else None
    layer = ScaledLinear(w, b)
    layer.multiplier.data = 1 + 0.1 * torch.randn(17, generator=g)
    x = torch.randn(2, 5, 11, generator=g, requires_grad=True)
    m = layer.multiplier.detach().clone().requires_grad_()
    want = torch.nn.functional.linear(x, w.float() * m[:, None], b)
    dy = torch.randn(want.shape, generator=g)
    want_x, want_m = torch.autograd.grad(want, (x, m), dy)
    got = layer(x)
    got.backward(dy)
    torch.testing.assert_close((got, x.grad, layer.multiplier.grad), (want, want_x, want_m), rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None


def test_learning_rate() -> None:
    assert [learning_rate(b) for b in (1, 2, 3, 4)] == [4e-3, 4e-3, 2e-3, 1e-3]
