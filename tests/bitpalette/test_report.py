"""`quantize report`: what the page shows, that it needs nothing but itself, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpalette
from bitpalette.cli import main
from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError
from bitpalette.formats.manifest import write_manifest
from bitpalette.recipe import make_plan
from bitpalette.report.data import gather, read_pareto, what_is_missing
from bitpalette.report.histogram import BINS, REACH, bin_centers, histograms, shape_of
from bitpalette.report.page import render
from bitpalette.report.theme import DARK, LIGHT

WITHOUT_END = {"meta", "wbr", "br", "hr", "img", "input", "link"}


@dataclass
class Made:
    """original, packed: folders. plan: the contents of a quantization_plan.json that fits."""

    original: Path
    packed: Path
    plan: dict[str, Any]

    def write_plan(self, **changes: Any) -> None:
        (self.packed / "quantization_plan.json").write_text(json.dumps(self.plan | changes))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, families: dict[str, Callable[[], Any]]) -> Made:
    """A tiny Llama in 4 bits, rotated, and a plan of it."""
    folder = tmp_path_factory.mktemp("report")
    original, packed = folder / "original", folder / "packed <b>"
    families["llama"]().save_pretrained(original)
    bitpalette.compile_checkpoint(str(original), packed, make_plan(bits=4, solver="rtn", rotate=True, group_size=16))
    report = json.loads((packed / "quantization_report.json").read_text())
    weights = {
        layer["parameter"]: {
            "part": "linear" if ".layers." in layer["parameter"] else "head",
            "shape": layer["shape"],
            "bits": layer["bits_per_weight"],
            "bytes": 1,
            "scheme": layer["scheme"],
            "alpha": 0.1 * (i + 1),
            "alpha_se": 0.01,
            "share": 0.2,
            "predicted": 0.001 * (i + 1),
        }
        for i, layer in enumerate(report["layers"])
    }
    plan = {
        "format_version": 1,
        "command": "quantize plan MODEL --bits 4.25",
        "model": report["job"]["model"],
        "text": "t",
        "text_name": "builtin",
        "tokens": 1024,
        "budget": {"bits": 4.25, "size_bytes": None},
        "plan": {},
        "bytes": {"linear": 1, "head": 1, "embedding": 1, "other": 1, "file": 4},
        "weights": weights,
        "bits_per_weight": 4.25,
        "predicted": {"kl": 0.1234, "kl_se": 0.011, "perplexity": 25.5, "reference_perplexity": 23.3, "seconds": 75.0},
        "solver": {"seconds": 0.05, "gap": 0.0, "bound": 0.1, "exact": True, "candidates": 13, "items": len(weights)},
        "rounds": [{"predicted": 0.1, "measured": 0.12, "measured_se": 0.002, "bought": 0.004}],
        "contexts": {"4GB": 65536},
        "measured": {
            "kl": 0.1357,
            "kl_se": 0.002,
            "perplexity": 25.9,
            "top1": 0.8125,
            "text_name": "prose",
            "tokens": 99,
        },
    }
    return Made(original, packed, plan)


@pytest.fixture
def made(compiled: Made) -> Any:
    """The same, with nothing beside the weights that a test before has put there."""
    yield compiled
    for name in ("quantization_plan.json", "pareto.json"):
        (compiled.packed / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def page(compiled: Made) -> str:
    """Of a checkpoint that has everything."""
    from dataclasses import replace

    points = [{"bits": b, "bytes": 10, "predicted": 1 / b, "measured": None if b == 3 else 1.1 / b} for b in (4, 2, 3)]
    (compiled.packed / "pareto.json").write_text(json.dumps(points))
    compiled.write_plan()
    data = gather(compiled.packed)
    name = data.weights[0].name
    data = replace(data, histograms=histograms(compiled.packed, str(compiled.original), [name], compiled.plan["model"]))
    shown = render(replace(data, missing=what_is_missing(data, True)), "1.2.3")
    for name in ("quantization_plan.json", "pareto.json"):
        (compiled.packed / name).unlink()
    return shown


class Reader(HTMLParser):
    """Tags that are opened and closed in order, their attributes, and the text outside <style>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def foreign(page: str) -> list[str]:
    """Everything in a page that a browser would fetch or run."""
    found = re.findall(r"(?i)\bhttps?:[^\s\"']*|@import|url\((?!['\"]?#)[^)]*\)|//[\w.-]+\.\w+/", page)
    for tag, attributes in read(page).tags:
        if tag in ("script", "link", "iframe", "object", "embed", "img", "image", "base"):
            found.append(f"<{tag}>")
        found += [f"{tag} {k}={v}" for k, v in attributes.items() if k.startswith("on") or k in ("src", "srcset")]
        for key in ("href", "xlink:href"):
            if not (attributes.get(key) or "#").startswith("#"):
                found.append(f"{tag} {key}={attributes[key]}")
    return found


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    assert foreign(page) == []


@pytest.mark.parametrize(
    "bad",
    [
        "<script>1</script>",
        "<img src='x.png'>",
        "<a href='https://example.org'>x</a>",
        "<style>@import 'x.css';</style>",
        "<p style='background: url(x.png)'></p>",
        "<p onclick='x()'></p>",
    ],
)
def test_something_to_fetch_would_be_noticed(bad: str) -> None:
    assert foreign(f"<main>{bad}</main>")


def test_identifiers_are_unique_and_references_resolve(page: str) -> None:
    ids = [a["id"] for _, a in read(page).tags if a.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used, "pictures refer to their markers"
    assert used <= set(ids)


def test_every_colour_is_a_variable_of_both_themes(page: str) -> None:
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert {"ink", "surface", "s0", "s1"} <= used
    assert used <= set(LIGHT.variables()) == set(DARK.variables())
    for theme in (LIGHT, DARK):
        for name, colour in theme.variables().items():
            assert f"--{name}:{colour};" in page
    assert "#fe00" not in page, "a stand-in colour was left"
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", drawn)) <= {"#000000", "#ffffff"}, "a colour that no theme changes"


def test_all_sections_and_figures_are_there(page: str) -> None:
    text = " ".join(" ".join(read(page).text).split())
    for title in (
        "Predicted and measured", "Rounds of refinement", "Bits by layer", "Bytes by part", "Where the cost comes from",
        "Sensitivities", "Errors", "Weights before and after rotation", "Quality against size", "Every weight",
    ):  # fmt: skip
        assert title in text, title
    for figure in ("0.1357", "± 0.0020", "0.1234", "(-9%)", "25.90", "original 23.30", "81.2%", "65,536 tokens"):
        assert figure in text, figure
    assert "quantize plan MODEL --bits 4.25" in text
    assert 'compile_checkpoint("MODEL", "OUT", job["plan"])' in text
    assert "packed <b>" in text, "names are escaped"
    assert "Not on this page" not in text
    assert page.count("<svg") == 2 * 9, "a wide and a narrow form of each picture"
    assert f"get {-math.expm1(-0.1357):.1%} less probability" in text


def test_the_costliest_weights_come_first(made: Made) -> None:
    made.write_plan()
    worst = gather(made.packed).worst(3)
    last = list(made.plan["weights"])[-3:][::-1]
    assert [w.name for w, _ in worst] == last
    whole = sum(w["predicted"] for w in made.plan["weights"].values())
    shares = torch.tensor([share for _, share in worst], dtype=torch.float64)
    want = torch.tensor([made.plan["weights"][name]["predicted"] / whole for name in last], dtype=torch.float64)
    assert ((shares - want).abs() <= 1e-12).all()


def test_bytes_of_parts_are_those_of_the_files(made: Made) -> None:
    data = gather(made.packed)
    assert sum(data.parts.values()) == (made.packed / "model.safetensors").stat().st_size == data.file_bytes
    assert data.source_bytes == (made.original / "model.safetensors").stat().st_size
    source = open_source(str(made.packed))
    assert data.parts["head"] == source.tensors["lm_head.weight"].nbytes
    assert data.parts["embedding"] == source.tensors["model.embed_tokens.weight"].nbytes


def test_without_a_plan_the_page_says_what_would_bring_it(made: Made) -> None:
    data = gather(made.packed)
    missing = what_is_missing(data, False)
    assert [m.command.split()[:2] for m in missing] == [["quantize", c] for c in ("run", "pareto", "report")]
    (made.packed / "quantization_report.json").rename(made.packed.parent / "away")
    write_manifest(made.packed)
    try:
        without = gather(made.packed)
        assert [w.error for w in without.weights] == [None] * len(data.weights)
        assert what_is_missing(without, False)[0].what.startswith("errors of layers")
    finally:
        (made.packed.parent / "away").rename(made.packed / "quantization_report.json")
        write_manifest(made.packed)


def test_a_plan_of_other_schemes_is_said(made: Made) -> None:
    weights = json.loads(json.dumps(made.plan["weights"]))
    first = next(iter(weights))
    weights[first]["scheme"] = "int bits=2"
    made.write_plan(weights=weights)
    (note,) = gather(made.packed).notes
    assert note.startswith(f"1 of {len(weights)} weights") and first in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "written by a newer bitpalette (plan 2, this one reads up to 1)"),
        ({"predicted": {"kl": math.nan}}, "predicted.kl: Input should be a finite number"),
        ({"predicted": {"kl": -1, "kl_se": 0}}, "predicted.kl: Input should be greater than or equal to 0"),
        ({"measured": {"kl": 1}}, "measured.kl_se: Field required"),
        ({"rounds": [{"predicted": 1}]}, "rounds.0.measured: Field required"),
        ({"model": "f" * 64}, "a plan for the model ffffffffffff"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(made: Made, changes: dict[str, Any], message: str) -> None:
    made.write_plan(**changes)
    with pytest.raises(FormatError) as error:
        gather(made.packed)
    assert message in str(error.value)
    assert "quantization_plan.json" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_report_is_refused(made: Made) -> None:
    path = made.packed / "quantization_report.json"
    kept = path.read_text()
    try:
        path.write_text(kept.replace('"error": 0.0', '"error": -10', 1))  # as long: the manifest has sizes
        assert path.read_text() != kept
        with pytest.raises(FormatError, match=r"layers\.0: .*write it again"):
            gather(made.packed)
    finally:
        path.write_text(kept)


def test_pareto_points_come_by_rising_bits(tmp_path: Path) -> None:
    path = tmp_path / "pareto.json"
    path.write_text('[{"bits": 3, "predicted": 0.1}, {"bits": 2, "measured": 0.5, "bytes": 7}]')
    assert [(p.bits, p.bytes) for p in read_pareto(path)] == [(2, 7), (3, None)]
    for bad, message in (('{"bits": 3}', "the file"), ('[{"bits": -1}]', "0.bits"), ("[", "the file")):
        path.write_text(bad)
        with pytest.raises(FormatError, match=f"{re.escape(message)}: .*quantize pareto"):
            read_pareto(path)
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        read_pareto(tmp_path / "none.json")


def test_the_shape_of_gaussian_values() -> None:
    shape = shape_of(3 + 5 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)))
    assert abs(shape.kurtosis - 3) <= 0.03  # five standard errors, sqrt(24 / n)
    want = torch.tensor([math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in bin_centers()])
    assert ((torch.tensor(shape.density) - want).abs() <= 4e-3).all()
    assert abs(sum(shape.density) * 2 * REACH / BINS - 1) <= 1e-9
    spiked = torch.zeros(1000)
    spiked[7] = 1.0
    assert abs(shape_of(spiked).largest - 999 / math.sqrt(999)) <= 1e-3
    assert abs(sum(shape_of(spiked).density) * 2 * REACH / BINS - 1) <= 1e-9, "what lies beyond is counted"
    with pytest.raises(FormatError, match="has no histogram"):
        shape_of(torch.ones(5))


def test_histograms_before_and_after_the_stored_rotation(made: Made) -> None:
    from bitpalette.quant.rotate import TRANSFORM, random_signs

    name = "model.layers.1.mlp.down_proj.weight"
    (found,) = histograms(made.packed, str(made.original), [name], made.plan["model"])
    weight = open_source(str(made.original)).read(name)
    rotated = TRANSFORM.apply_weight(weight, {"signs": random_signs(0, weight.shape[1])})
    assert found.transforms == ("rotate",)
    assert found.before == shape_of(weight) and found.after == shape_of(rotated)
    assert found.before != found.after


def test_histograms_of_another_model_are_refused(made: Made, tmp_path: Path, families: Any) -> None:
    families["mistral"]().save_pretrained(tmp_path / "other")
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(FormatError, match=r"not the model that .* was made from"):
        histograms(made.packed, str(tmp_path / "other"), [name], made.plan["model"])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments) -> (exit code, stdout, stderr) of `quantize report`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", "report", *map(str, arguments)])
        code = main()
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_the_command_writes_page_and_pictures(made: Made, tmp_path: Path, call: Any) -> None:
    out, pictures = tmp_path / "page.html", tmp_path / "pictures"
    code, shown, error = call(made.packed, "--out", out, "--png", pictures, "--json")
    assert code == 0, error
    values = json.loads(shown)
    assert values["file_bytes"] == (made.packed / "model.safetensors").stat().st_size
    assert values["predicted"] is None and len(values["missing"]) == 3
    assert sorted(p.name for p in pictures.iterdir()) == ["bits_by_layer.png", "bytes_by_part.png", "errors.png"]
    assert [Path(p).name for p in values["pictures"]] == ["bits_by_layer.png", "bytes_by_part.png", "errors.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures.iterdir())
    page = out.read_text()
    assert foreign(page) == [] and "Not on this page" in page and "quantize pareto MODEL" in page


def test_bad_arguments_end_in_one_line(made: Made, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    page = tmp_path / "x.html"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((made.packed, "--out", tmp_path / "x.txt"), "--out writes a .html file"),
        ((made.packed, "--out", tmp_path / "no" / "x.html"), "does not exist; create it first"),
        ((made.packed, "--out", page, "--png", tmp_path / "file"), "a file; name a folder"),
        ((made.original, "--out", page), "not a bitpalette checkpoint"),
        ((made.packed, "--out", page, "--pareto", tmp_path / "none"), "cannot be read"),
    ]
    for arguments, message in cases:
        code, _, error = call(*arguments)
        assert code == 2 and message in error and error.count("\n") == 1, error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = call(made.packed, "--out", page)
    assert code == 2 and "pip install 'bitpalette[report]'" in error
    assert not page.exists()
