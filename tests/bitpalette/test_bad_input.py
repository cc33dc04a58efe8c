"""Bad input, by way of the command: exit code 2, exactly one line on stderr, nothing written, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpalette.cli import main

Change = Callable[[Path], None]
Refused = Callable[..., str]

SMALL = ("--group-size", "16", "--solver", "rtn")
CALIBRATED = ("--group-size", "16", "--calib-tokens", "64", "--seq-len", "16")


def tree(folder: Path) -> dict[str, bytes | None]:
    """{path: content} of everything below, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """call(*arguments) -> (exit code, stderr) of the command in this process."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, arguments)])
        code = main()
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def refused(tmp_path: Path, call: Callable[..., tuple[int, str]]) -> Refused:
    """refused(*arguments) -> the one line; asserts that the command refuses and that nothing under tmp_path changed."""

    def check(*arguments: object) -> str:
        before = tree(tmp_path)
        code, err = call(*arguments)
        assert code == 2, err
        assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("error: "), err
        assert tree(tmp_path) == before, "something was written"
        return err

    return check


# --- the model


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_tensor(**values: Any) -> Change:
    """Change the header's entry of one tensor."""

    def change(path: Path) -> None:
        header, data = header_of(path)
        header["model.layers.0.mlp.up_proj.weight"] |= values
        with_header(path, header, data)

    return change


def cut(n: int) -> Change:
    def change(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:n])

    return change


def length(n: int) -> Change:
    def change(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(n.to_bytes(8, "little") + file.read_bytes()[8:])

    return change


def no_json(path: Path) -> None:
    _, data = header_of(path)
    with_header(path, b'{"a": [1, 2', data)


def config(**values: Any) -> Change:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def config_text(text: str) -> Change:
    return lambda path: (path / "config.json").write_text(text) and None


def remove(*names: str) -> Change:
    return lambda path: [(path / name).unlink() for name in names] and None


def sharded_without_one(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = list(tensors)
    where = {n: f"model-0000{1 + (i > 5)}-of-00002.safetensors" for i, n in enumerate(names)}
    save_file({n: tensors[n] for n in names[:6]}, path / "model-00001-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def value(tensor: str, what: float) -> Change:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors[tensor].view(-1)[-1] = what
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def drop(tensor: str) -> Change:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


MODELS: dict[str, tuple[Change, str]] = {
    "header truncated": (cut(100), "truncated"),
    "file of 3 bytes": (cut(3), "truncated"),
    "empty file": (cut(0), "truncated"),
    "data truncated": (cut(50_000), "truncated"),
    "header length overflows": (length(2**64 - 1), "header claims"),
    "header length beyond the file": (length(2**40), "header claims"),
    "header is no JSON": (no_json, "not valid JSON"),
    "unknown dtype": (edit_tensor(dtype="F31"), "unknown dtype 'F31'"),
    "shape overflows": (edit_tensor(shape=[2**62, 2**62]), "up_proj"),
    "shape is negative": (edit_tensor(shape=[-100, -72]), "up_proj"),
    "offsets beyond the file": (edit_tensor(data_offsets=[2**62, 2**62 + 28800]), "up_proj"),
    "offsets are inverted": (edit_tensor(data_offsets=[28800, 0]), "up_proj"),
    "offsets overlap": (edit_tensor(data_offsets=[0, 28800]), "overlaps"),
    "offsets overflow": (edit_tensor(data_offsets=[0, 2**64]), "up_proj"),
    "index names a missing shard": (sharded_without_one, "model-00002-of-00002.safetensors"),
    "no weights": (remove("model.safetensors"), "no model.safetensors"),
    "no config": (remove("config.json"), "no config.json"),
    "config is no JSON": (config_text("{"), "not valid JSON"),
    "config is a list": (config_text("[]"), "not a JSON object"),
    "config is empty": (config_text("{}"), "model_type"),
    "already quantized": (config(quantization_config={"quant_method": "gptq"}), "already quantized with 'gptq'"),
    "unknown model_type": (config(model_type="nonsuch"), "'nonsuch'"),
    "model_type is a list": (config(model_type=["llama"]), "model_type"),
    "unknown architecture": (config(architectures=["NonsuchForCausalLM"]), "'NonsuchForCausalLM'"),
    "architecture is no model": (config(architectures=["__version__"]), "config.json makes no model"),
    "unknown dtype in config": (config(dtype="float31"), "'float31'"),
    "hidden_size lies": (config(hidden_size=80), "do not belong together"),
    "hidden_size is a word": (config(hidden_size="many"), "config.json makes no model"),
    "hidden_size is zero": (config(hidden_size=0), "config.json"),
    "vocab_size lies": (config(vocab_size=204), "[204, 72]"),
    "more layers than there are": (config(num_hidden_layers=3), "lacks model.layers.2"),
    "far more layers": (config(num_hidden_layers=10**9), "1000000000 layers"),
    "fewer layers than there are": (config(num_hidden_layers=1), "model.layers.1"),
    "key heads lie": (config(num_key_value_heads=4), "k_proj"),
    "another architecture": (config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "transformer.wte.weight"),
    "a tensor is missing": (drop("model.norm.weight"), "lacks model.norm.weight"),
    "NaN in the last block": (
        value("model.layers.1.mlp.down_proj.weight", float("nan")),
        "model.layers.1.mlp.down_proj",
    ),
    "infinite norm": (value("model.norm.weight", float("inf")), "model.norm.weight holds NaN or infinite"),
    "infinite embedding": (value("model.embed_tokens.weight", float("-inf")), "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", list(MODELS))
def test_model(case: str, model: Path, refused: Refused) -> None:
    change, message = MODELS[case]
    change(model)
    assert message in refused("run", model, model.parent / "out", *SMALL)


def test_hashes_do_not_save_a_bad_model(model: Path, refused: Refused) -> None:
    """A dry run finds what the headers tell, too."""
    config(hidden_size=80)(model)
    refused("run", model, model.parent / "out", "--dry-run", *SMALL)


def test_no_such_model(tmp_path: Path, refused: Refused) -> None:
    assert "no such model" in refused("run", tmp_path / "nothing", tmp_path / "out")
    assert "no such model" in refused("run", "nobody/nothing", tmp_path / "out")
    assert "no such model" in refused("run", "", tmp_path / "out")
    assert "no such model" in refused("eval", tmp_path / "nothing")
    refused("inspect", tmp_path / "nothing")
    refused("generate", tmp_path / "nothing", "--prompt", "x")


def test_no_checkpoint(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no checkpoint" in refused("run", folder, tmp_path / "out")
    (folder / "note.txt").write_text("nothing")
    assert "is no checkpoint" in refused("run", folder / "note.txt", tmp_path / "out")


# --- GGUF


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patch(offset: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + content + data[offset + len(content) :]


GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (patch(0, b"GGML"), "not a GGUF file"),
    "version": (patch(4, (99).to_bytes(4, "little")), "99"),
    "header truncated": (lambda d: d[:40], "GGUF"),
    "data truncated": (lambda d: d[:-100], "truncated"),
    "empty": (lambda d: b"", "GGUF"),
    "tensor count overflows": (patch(8, b"\xff" * 8), "claims"),
    "metadata count overflows": (patch(16, b"\xff" * 8), "claims"),
    "key length overflows": (patch(24, b"\xff" * 8), "claims"),
    "no configuration": (lambda d: d, "model.gguf"),
}


@pytest.mark.parametrize("case", list(GGUF))
def test_gguf(case: str, gguf_file: Path, refused: Refused) -> None:
    change, message = GGUF[case]
    gguf_file.write_bytes(change(gguf_file.read_bytes()))
    assert message in refused("run", gguf_file, gguf_file.parent / "out")


# --- options


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "0 bits": (("--bits", "0"), "got 0"),
    "9 bits": (("--bits", "9"), "got 9"),
    "-3 bits": (("--bits", "-3"), "got -3"),
    "17 bits": (("--bits", "17"), "got 17"),
    "2.5 bits in groups": (("--bits", "2.5"), "one scale a row"),
    "a third of a bit": (("--bits", "2.33", "--codec", "trellis"), "one scale a row"),
    "many bits": (("--bits", "many"), "valid number"),
    "group of 3": (("--group-size", "3"), "got 3"),
    "group of -1": (("--group-size", "-1"), "got -1"),
    "group wider than the layer": (("--group-size", "80"), "wider than the weight's 72 columns"),
    "99 bits of the head": (("--head-bits", "99"), "got 99"),
    "0 bits of embeddings": (("--embed-bits", "0"), "got 0"),
    "keep nothing": (("--keep", "nonsuch"), "'nonsuch' matches none"),
    "set nothing": (("--set", "nonsuch=bits=3"), "'nonsuch' matches none"),
    "keep by no pattern": (("--keep", "re:("), "no regular expression"),
    "set without a scheme": (("--set", "down_proj"), "not PATTERN=SCHEME"),
    "set without a pattern": (("--set", "=bits=3"), "not PATTERN=SCHEME"),
    "set an unknown codec": (("--set", "down_proj=nonsuch,bits=3"), "nonsuch"),
    "set an unknown key": (("--set", "down_proj=colour=3"), "colour"),
    "set 12 bits": (("--set", "down_proj=bits=12"), "got 12"),
    "set a wide group": (("--set", "q_proj=group_size=4096"), "q_proj"),
    "set no number": (("--set", "down_proj=bits=x"), "'x'"),
    "set bad JSON": (("--set", 'down_proj={"codec": '), "is no scheme"),
    "set an unknown transform": (("--set", 'down_proj={"codec": "int", "transforms": ["spin"]}'), "spin"),
    "unknown codec": (("--codec", "nonsuch"), "unknown codec 'nonsuch'"),
    "unknown solver": (("--solver", "nonsuch"), "unknown solver 'nonsuch'"),
    "unknown codec, kept": (("--codec", "nonsuch", "--bits", "16"), "unknown codec 'nonsuch'"),
    "unknown solver, kept": (("--solver", "nonsuch", "--bits", "16"), "unknown solver 'nonsuch'"),
    "asymmetric table": (("--codec", "lut", "--asymmetric"), "--asymmetric"),
    "unknown dtype": (("--dtype", "float31"), "'float31'"),
    "unknown device": (("--device", "abacus"), "abacus"),
    "device meta": (("--device", "meta"), "meta"),
    "no such GPU": (("--device", "cuda:99"), "CUDA devices; --device cpu"),
    "size is a word": (("--max-shard-size", "huge"), "'huge'"),
    "size is zero": (("--max-shard-size", "0"), "at least 1"),
    "size is negative": (("--max-shard-size", "-5GB"), "at least 1"),
    "size is infinite": (("--max-shard-size", "infGB"), "'infGB'"),
    "no sequence": (("--seq-len", "0"), "too short"),
    "no tokens": (("--calib-tokens", "-5"), "-5 calibration tokens"),
    "unknown option": (("--nonsuch",), "--nonsuch"),
    "one argument too many": (("third",), "third"),
}


@pytest.mark.parametrize("case", list(OPTIONS))
def test_options(case: str, model: Path, refused: Refused) -> None:
    options, message = OPTIONS[case]
    assert message in refused("run", model, model.parent / "out", *SMALL, *options)


def test_brackets_of_a_message_are_shown(model: Path, refused: Refused) -> None:
    """They are no markup: rich would drop [red] and raise over [/]."""
    assert "'[red]x[/]'" in refused("run", model, model.parent / "out", "--group-size", "16", "--keep", "[red]x[/]")


def test_usage(refused: Refused) -> None:
    assert "model" in refused("run")
    assert "nonsuch" in refused("nonsuch")
    assert "--prompt" in refused("generate", "x")


def test_tied_head_and_embeddings_of_two_kinds(checkpoint: Callable[..., Path], refused: Refused, call: Any) -> None:
    tied = checkpoint("qwen2")
    out = tied.parent / "out"
    message = refused("run", tied, out, *SMALL, "--head-bits", "16", "--embed-bits", "8")
    assert "one tensor (tied)" in message and "--head-bits and --embed-bits the same value" in message
    rule = ("--head-bits", "16", "--embed-bits", "8", "--set", "lm_head=int,bits=6")
    assert call("run", tied, out, *SMALL, *rule)[0] == 0
    entries = json.loads((out / "config.json").read_text())["quantization_config"]
    assert entries["schemes"][entries["tensors"]["model.embed_tokens.weight"]["scheme"]] == {"codec": "int", "bits": 6}


# --- the output


def test_output_is_a_file(model: Path, refused: Refused) -> None:
    out = model.parent / "out"
    out.write_text("mine")
    assert "is a file" in refused("run", model, out, *SMALL)
    assert "error" in refused("run", model, out / "below", *SMALL)


def test_output_holds_something_else(model: Path, refused: Refused) -> None:
    out = model.parent / "out"
    (out / "folder").mkdir(parents=True)
    assert "is not empty (it holds folder)" in refused("run", model, out, *SMALL)
    assert "is not empty" in refused("run", model, model, *SMALL)


def test_output_is_finished_with_other_settings(model: Path, refused: Refused, call: Any) -> None:
    out = model.parent / "out"
    assert call("run", model, out, *SMALL)[0] == 0
    assert "finished checkpoint of other settings" in refused("run", model, out, *SMALL, "--bits", "3")


def test_a_packed_checkpoint_is_no_input(model: Path, refused: Refused, call: Any) -> None:
    out = model.parent / "out"
    assert call("run", model, out, *SMALL)[0] == 0
    assert "already quantized" in refused("run", out, model.parent / "again", *SMALL)


@pytest.fixture
def interrupted(model: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder whose run was interrupted after one finished part."""
    from bitpalette.calibrate.journal import Journal

    def stop(self: Journal, part: dict[str, Any], add: Any = Journal.add) -> None:
        add(self, part)
        raise KeyboardInterrupt

    out = model.parent / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add", stop)
        code, err = call("run", model, out, *SMALL)
    assert code == 130 and "the same command goes on" in err
    assert (out / ".bitpalette" / "journal.jsonl").exists()
    return out


def test_output_is_unfinished_with_other_settings(model: Path, interrupted: Path, refused: Refused, call: Any) -> None:
    message = refused("run", model, interrupted, *SMALL, "--seed", "1")
    assert "unfinished run with other settings (plan.seed: 0 then, 1 now)" in message
    for command in (("eval",), ("inspect",), ("generate", "--prompt", "x")):
        refused(*command, interrupted)
    assert call("run", model, interrupted, *SMALL)[0] == 0
    assert not (interrupted / ".bitpalette").exists()


def test_partial_files_are_gone(model: Path, interrupted: Path, call: Any) -> None:
    """Nothing is computed in silence for tensors that the journal says are written."""
    (interrupted / "model.safetensors.partial").unlink()
    before = tree(interrupted)
    for _ in range(2):
        code, err = call("run", model, interrupted, *SMALL)
        assert code == 2 and err.count("\n") == 1 and "model.safetensors of an unfinished run is gone" in err
        assert tree(interrupted) == before


def test_work_folder(model: Path, refused: Refused) -> None:
    out, work = model.parent / "out", model.parent / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    assert "is not empty (it holds thesis.txt)" in refused("run", model, out, *SMALL, "--work", work)
    assert "is a file" in refused("run", model, out, *SMALL, "--work", work / "thesis.txt")
    for folder in (out, out.parent, out / "below"):
        assert "hold one another" in refused("run", model, out, *SMALL, "--work", folder)


# --- the disk


def test_full_disk_as_the_system_says_it(model: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "No space left on device" in refused("run", model, model.parent / "new" / "out", *SMALL)
    (model.parent / "empty").mkdir()
    assert "No space left on device" in refused("run", model, model.parent / "empty", *SMALL)
    work = model.parent / "work"
    assert "No space left on device" in refused("run", model, model.parent / "out", *SMALL, "--work", work)


def run_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitpalette", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_files_may_not_grow(model: Path, tmp_path: Path) -> None:
    """A limit of the system, met in a process of its own."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = tree(tmp_path)
    assert_refused(run_process("run", model, tmp_path / "out", *SMALL, preexec_fn=limit), "File too large")
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_full_disk(model: Path, small_disk: Path, refused: Refused) -> None:
    assert "No space left on device" in refused("run", model, small_disk / "out", *SMALL)
    assert not list(small_disk.iterdir())


def test_disk_fills_up_at_the_end(model: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is worth keeping then: the same command goes on."""
    from bitpalette.formats import sidecar

    def full(source: Path, target: Path) -> None:
        from bitpalette.formats.errors import FormatError

        raise FormatError(f"cannot copy {source}") from OSError(28, "No space left on device")

    out, whole = model.parent / "out", model.parent / "whole"
    assert call("run", model, whole, *SMALL)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(sidecar, "copy_atomically", full)
        code, err = call("run", model, out, *SMALL)
    assert code == 2 and "cannot copy" in err.splitlines()[-1]
    assert not (out / "manifest.json").exists()
    code, err = call("run", model, out, *SMALL)
    assert code == 0 and "going on after 3 finished parts" in err
    assert tree(out) == tree(whole)


# --- the calibration text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"Too short.", "10 tokens"),
        (b"\xff\xfe\x00text", "cannot be read as text"),
    ],
)
def test_calibration_text(content: bytes | None, message: str, model: Path, refused: Refused) -> None:
    text = model.parent / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert message in refused("run", model, model.parent / "out", *CALIBRATED, "--calib", text)


def test_calibration_text_is_a_folder(model: Path, refused: Refused) -> None:
    assert "cannot be read as text" in refused("run", model, model.parent / "out", *CALIBRATED, "--calib", model)


def test_sequences_longer_than_the_model_can(model: Path, refused: Refused) -> None:
    message = refused("run", model, model.parent / "out", "--group-size", "16", "--seq-len", "129")
    assert "--seq-len 128" in message


def test_no_tokenizer(model: Path, refused: Refused) -> None:
    remove("tokenizer.json", "tokenizer_config.json")(model)
    assert "has no tokenizer" in refused("run", model, model.parent / "out", *CALIBRATED)


def test_broken_tokenizer(model: Path, refused: Refused) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert "no tokenizer can be made" in refused("run", model, model.parent / "out", *CALIBRATED)


def test_tokenizer_of_another_model(checkpoint: Callable[..., Path], refused: Refused) -> None:
    model = checkpoint("llama")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {k: i + 1000 for k, i in tokenizer["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the model has 203" in refused("run", model, model.parent / "out", *CALIBRATED)


def test_a_model_that_writes_nothing(checkpoint: Callable[..., Path], refused: Refused) -> None:
    encoder = checkpoint("bert")
    options = (*CALIBRATED, "--no-rotate", "--calib", "self")
    assert "does not write text" in refused("run", encoder, encoder.parent / "out", *options)


# --- packed checkpoints


@pytest.fixture
def packed_folder(model: Path, call: Any) -> Path:
    out = model.parent / "out"
    assert call("run", model, out, *SMALL)[0] == 0
    return out


COMMANDS = (("eval",), ("inspect",), ("verify",), ("generate", "--prompt", "x"))


def rewrite(packed: Path, **values: Any) -> None:
    """Change quantization_config, and make the manifest right again."""
    from bitpalette.formats.manifest import write_manifest

    file = packed / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= values
    file.write_text(json.dumps(config))
    write_manifest(packed)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_format_of_the_future(command: tuple[str, ...], packed_folder: Path, call: Any) -> None:
    rewrite(packed_folder, format_version=99, schemes="in a new way")
    before = tree(packed_folder)
    code, err = call(command[0], packed_folder, *command[1:])
    assert code == 2 and err.count("\n") == 1
    assert "newer bitpalette" in err and "format 99" in err
    assert tree(packed_folder) == before


def test_format_of_the_future_in_python(packed_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    import bitpalette

    rewrite(packed_folder, format_version=99, schemes="in a new way")
    with pytest.raises(ValueError, match="newer bitpalette"):
        bitpalette.load(packed_folder)
    with pytest.raises(ValueError, match="newer bitpalette"):
        AutoModelForCausalLM.from_pretrained(packed_folder)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_unfinished_checkpoint(command: tuple[str, ...], packed_folder: Path, call: Any) -> None:
    (packed_folder / "manifest.json").unlink()
    code, err = call(command[0], packed_folder, *command[1:])
    assert code == 2 and err.count("\n") == 1 and "incomplete" in err


def test_inspect_and_verify_are_for_packed_checkpoints(model: Path, refused: Refused, call: Any) -> None:
    assert "not a bitpalette checkpoint" in refused("inspect", model)
    assert call("verify", model)[0] == 2


def test_evaluation_options(packed_folder: Path, model: Path, refused: Refused) -> None:
    text = model.parent / "text.txt"
    text.write_text("word " * 40)  # 200 tokens
    short = model.parent / "short.txt"
    short.write_text("word " * 10)
    assert "'float31'" in refused("eval", packed_folder, "--dtype", "float31")
    assert "'int4'" in refused("eval", packed_folder, "--activations", "int4")
    assert "--seq-len" in refused("eval", packed_folder, "--seq-len", "1")
    assert "--chunks" in refused("eval", packed_folder, "--chunks", "0")
    assert "No such file" in refused("eval", packed_folder, "--seq-len", "32", "--text", model / "nothing.txt")
    assert "--chunks 6" in refused("eval", packed_folder, "--text", text, "--seq-len", "32", "--chunks", "7")
    assert "shorter chunks" in refused("eval", packed_folder, "--text", short, "--seq-len", "128", "--chunks", "2")
    assert "no such model" in refused("eval", packed_folder, "--seq-len", "32", "--against", model / "nothing")
    assert "128 positions" in refused("eval", packed_folder, "--seq-len", "129", "--chunks", "1")


def test_evaluation_against_another_vocabulary(
    packed_folder: Path, checkpoint: Callable[..., Path], refused: Refused
) -> None:
    import transformers

    values = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=150, **values))
    other.save_pretrained(packed_folder.parent / "other")
    message = refused(
        "eval", packed_folder, "--against", packed_folder.parent / "other", "--seq-len", "16", "--chunks", "1"
    )
    assert "150" in message and "203" in message


def test_generation_options(packed_folder: Path, refused: Refused) -> None:
    refused("generate", packed_folder, "--prompt", "")
    refused("generate", packed_folder, "--prompt", "x", "--max-new-tokens", "0")
    refused("generate", packed_folder, "--prompt", "x", "--temperature", "-1")
    refused("generate", packed_folder, "--prompt", "x", "--dtype", "float31")
    assert "chat template" in refused("generate", packed_folder, "--prompt", "x", "--chat")


# --- a process as a user starts it


def test_process(model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert_refused(run_process("run", tmp_path / "nothing", tmp_path / "out"), "no such model")
    value("model.layers.1.self_attn.o_proj.weight", float("nan"))(model)
    before = tree(tmp_path)
    done = run_process("run", model, tmp_path / "out", *CALIBRATED)
    assert_refused(done, "model.layers.1.self_attn.o_proj.weight holds NaN or infinite values")
    assert tree(tmp_path) == before
