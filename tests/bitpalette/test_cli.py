"""The command, in this process: what it prints, what it writes, its exit codes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitpalette.cli import main
from bitpalette.commands.text import duration, parse_size, size
from bitpalette.quant.native import why_no_cpu_module

SMALL = ("--group-size", "16", "--solver", "rtn")


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """call(*arguments) -> stdout; asserts exit code 0."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, arguments)])
        code = main()
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return run


def test_help(call: Callable[..., str]) -> None:
    shown = call("--help")
    for command in ("run", "eval", "inspect", "verify", "generate", "demo"):
        assert command in shown
    options = call("run", "--help")
    for option in ("--bits", "--codec", "--solver", "--group-size", "--keep", "--set", "--head-bits", "--dry-run"):
        assert option in options


def test_no_arguments_show_the_help() -> None:
    from bitpalette.cli import app

    assert "Usage" in CliRunner().invoke(app, []).output


def test_dry_run_tells_what_the_run_writes(model: Path, call: Callable[..., str]) -> None:
    out = model.parent / "out"
    for options in (("--bits", "3", "--rotate"), ("--max-shard-size", "50kB"), ("--bits", "16")):
        arguments = ("run", model, out, *SMALL, *options)
        told = json.loads(call(*arguments, "--dry-run", "--json"))
        assert not out.exists()
        summary = json.loads(call(*arguments, "--json"))
        written = {p.name: p.stat().st_size for p in out.glob("*.safetensors*")}
        assert told["files"] == written
        assert told["file_bytes"] == summary["file_bytes"] == sum(written.values())
        assert (len(written) > 1) == ("--max-shard-size" in options)
        for key in ("bits_per_weight", "file_bits_per_weight"):
            assert told[key] == summary[key]
        out.rename(model.parent / "-".join(options))
    assert f"({told['file_bytes']:,} bytes)" in call(*arguments, "--dry-run")


def test_run_prints_a_line_for_each_layer(
    model: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["quantize", "run", str(model), str(out), *SMALL])
    assert main() == 0
    shown = capsys.readouterr()
    told, *lines = shown.err.splitlines()
    assert told.startswith("int group_size=16, solver rtn: about ") and told.endswith(" on this machine")
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["tensors"]
    assert sorted(line.split()[0] for line in lines) == sorted(entries)
    line = next(line for line in lines if line.startswith("model.layers.0.mlp.down_proj.weight"))
    for part in ("int bits=4 group_size=16" if "bits=4" in line else "int group_size=16", "5.120 bits", "error", " s"):
        assert part in line
    for part in ("16 weights at", "over the file", "peak memory", "from_pretrained"):
        assert part in shown.out
    assert main() == 0  # again: complete already, nothing changes
    assert capsys.readouterr().err == f"{out} is complete already\n"


def test_summary(model: Path, call: Callable[..., str]) -> None:
    out = model.parent / "out"
    summary = json.loads(call("run", model, out, *SMALL, "--json"))
    assert summary["out"] == str(out) and len(summary["layers"]) == 16
    layers = summary["layers"]
    weights = [math.prod(layer["shape"]) for layer in layers]
    bits = sum(n * layer["bits_per_weight"] for n, layer in zip(weights, layers, strict=True)) / sum(weights)
    assert summary["bits_per_weight"] == pytest.approx(bits, abs=1e-5)
    assert summary["source_bytes"] == (model / "model.safetensors").stat().st_size
    assert summary["peak_memory_bytes"] > 10**7 and summary["seconds"] >= 0


def test_inspect(model: Path, call: Callable[..., str]) -> None:
    out = model.parent / "out"
    summary = json.loads(call("run", model, out, *SMALL, "--json", "--set", "q_proj=bits=2"))
    shown = json.loads(call("inspect", out, "--json"))
    assert shown["format_version"] == 1
    assert shown["model_bytes"] == summary["file_bytes"]
    for key in ("bits_per_weight", "file_bits_per_weight"):
        assert shown[key] == pytest.approx(summary[key], abs=1e-5)
    records = {layer["parameter"]: layer for layer in summary["layers"]}
    assert {layer["parameter"] for layer in shown["layers"]} == set(records)
    for got in shown["layers"]:
        want = records[got["parameter"]]
        assert got["error"] == want["error"] and got["shape"] == want["shape"]
        assert got["bits_per_weight"] == pytest.approx(want["bits_per_weight"], abs=1e-5)
        assert got["bytes"] * 8 == pytest.approx(got["bits_per_weight"] * math.prod(got["shape"]), rel=1e-4)
    q = next(layer for layer in shown["layers"] if layer["parameter"] == "model.layers.1.self_attn.q_proj.weight")
    assert q["scheme"] == {"codec": "int", "bits": 2, "group_size": 16}
    (out / "quantization_report.json").unlink()  # the errors are recorded there alone
    (out / "manifest.json").unlink()
    from bitpalette.formats.manifest import write_manifest

    write_manifest(out)
    assert {layer["error"] for layer in json.loads(call("inspect", out, "--json"))["layers"]} == {None}
    assert "16 quantized weights" in call("inspect", out)


def test_verify(
    model: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    call("run", model, out, *SMALL)
    assert "as written" in call("verify", out)
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["quantize", "verify", str(out)])
    assert main() == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_eval(model: Path, call: Callable[..., str]) -> None:
    from bitpalette.commands.evaluate import KEYS

    out = model.parent / "out"
    summary = json.loads(call("run", model, out, *SMALL, "--bits", "8", "--json"))
    chunks = ("--seq-len", "24", "--chunks", "3")
    alone = json.loads(call("eval", out, *chunks, "--json"))
    assert set(alone) == set(KEYS)
    assert alone["tokens"] == 72 and alone["kl_divergence"] is None and alone["reference_perplexity"] is None
    against = json.loads(call("eval", out, "--against", model, *chunks, "--json"))
    assert against["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert 0 < against["kl_divergence"] < 0.01 and against["top1_agreement"] > 0.9
    assert against["model_bytes"] == summary["file_bytes"]
    assert against["bits_per_weight"] == pytest.approx(summary["bits_per_weight"], abs=1e-5)
    assert against["file_bits_per_weight"] == pytest.approx(summary["file_bits_per_weight"], abs=1e-5)
    same = json.loads(call("eval", model, "--against", model, *chunks, "--json"))
    assert abs(same["kl_divergence"]) < 1e-6 and same["top1_agreement"] == 1
    assert same["perplexity"] == pytest.approx(against["reference_perplexity"], rel=1e-6)
    assert "top1 agreement" in call("eval", out, "--against", model, *chunks)
    assert alone["activations"] == "exact"
    narrow = json.loads(call("eval", out, "--against", model, *chunks, "--activations", "int8", "--json"))
    assert narrow["activations"] == "int8"
    if why_no_cpu_module() is None:  # the reference multiplies in float32, whatever is asked for
        assert narrow["kl_divergence"] > against["kl_divergence"]
    assert "BITPALETTE_CPU_ACTIVATIONS" not in os.environ


@pytest.fixture
def wide(model: Path) -> Path:
    """`model` with heads of 32 channels: those of 18 are kept at 16 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig.from_pretrained(model, head_dim=32)).save_pretrained(model)
    return model


def test_eval_through_the_cache(wide: Path, call: Callable[..., str]) -> None:
    from bitpalette.commands.evaluate import KEYS, KV_KEYS

    model, out = wide, wide.parent / "out"
    call("run", model, out, *SMALL, "--bits", "8")
    chunks = ("--seq-len", "120", "--chunks", "2", "--json")
    plain = json.loads(call("eval", out, "--against", model, *chunks))
    found = json.loads(call("eval", out, "--against", model, *chunks, "--kv", "k3v3", "--kv-step", "9"))
    assert set(found) == {*KEYS, *KV_KEYS} and (found["kv"], found["kv_step"]) == ("k3v3", 9)
    assert found["reference_perplexity"] == pytest.approx(plain["reference_perplexity"], rel=1e-5)
    assert found["kv_dense_perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert 0 < found["kv_kl_divergence"] < found["kv_kl_of_packed_reads"]
    assert 0 < found["kv_bytes"] == found["kv_formula_bytes"] < found["kv_dense_bytes"]
    off = json.loads(call("eval", out, "--against", model, *chunks, "--kv", "16"))
    assert off["kl_divergence"] == pytest.approx(plain["kl_divergence"], abs=1e-9) and "kv_bytes" not in off
    assert "kv formula bytes" in call("eval", model, "--kv", "k2v2-channel", *chunks[:-1])


def test_needle(wide: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpalette import kv_needle

    monkeypatch.setattr(kv_needle, "PAIRS", 1)  # a tokenizer of bytes: a pair is 34 tokens
    options = ("--needle", "--kv", "k2v2", "--lengths", "80,90", "--depths", "0,1")
    cells = json.loads(call("eval", wide, *options, "--json"))["cells"]
    assert [(c["length"], c["depth"]) for c in cells] == [(80, 0), (80, 1), (90, 0), (90, 1)]
    for cell in cells:
        assert 0 <= cell["dense"]["answered"] <= 1 and 0 < cell["packed"]["probability"] < 1
    assert "answered" in call("eval", wide, *options)


def test_generate(model: Path, call: Callable[..., str]) -> None:
    out = model.parent / "out"
    call("run", model, out, *SMALL)
    options = ("--prompt", "Once upon", "--max-new-tokens", "5")
    first = call("generate", out, *options)
    assert first == call("generate", out, *options)
    assert call("generate", out, *options, "--temperature", "1", "--seed", "1") == call(
        "generate", out, *options, "--temperature", "1", "--seed", "1"
    )


def test_numbers_as_people_read_them() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5e9, 2e13)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.23 MB",
        "5.00 GB",
        "20.00 TB",
    ]
    assert [duration(s) for s in (0.04, 59.94, 75.2, 3600, 7384)] == [
        "0.0 s",
        "59.9 s",
        "1 min 15 s",
        "1 h 0 min",
        "2 h 3 min",
    ]
    assert [parse_size(t) for t in ("5GB", "500mb", " 1.5 kB", "17", "8B")] == [5 * 10**9, 5 * 10**8, 1500, 17, 8]
    for text in ("", "huge", "5XB", "1e", "GB"):
        with pytest.raises(ValueError, match=r"could not convert|^$|huge|5X|1e"):
            parse_size(text)
