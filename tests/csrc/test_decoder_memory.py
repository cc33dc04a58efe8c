"""The decoder built with AddressSanitizer and UndefinedBehaviorSanitizer, run on awkward sizes."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("activations", "attention_decode", "decoder", "decoder_model", "dense_weight", "input_transform", "isa")
PARTS += ("kv_cache", "linear", "parallel", "vector_math")


def sources() -> list[tuple[str, list[str]]]:
    """(file, flags of its instruction set) of the decoder and what it stands on."""
    spec = importlib.util.spec_from_file_location("bitpalette_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    found = []
    for source in setup.cpu_sources(ROOT, platform.machine()):
        stem = Path(source).stem
        if source.startswith("csrc/cpu/") and (stem in PARTS or stem.rpartition("_")[0] in PARTS):
            found.append((source, setup.isa_flags(source)))
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_no_address_outside_and_nothing_undefined(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += [f"-I{ROOT / 'csrc'}"]
    objects = []
    for i, (name, own) in enumerate([*sources(), ("tests/csrc/decoder_memory.cpp", [])]):
        objects.append(str(tmp_path / f"{i}.o"))
        subprocess.run(["g++", *flags, *own, "-c", str(ROOT / name), "-o", objects[-1]], check=True)
    program = tmp_path / "decoder_memory"
    subprocess.run(["g++", *flags, *objects, "-o", str(program), "-pthread"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "clean\n", "")
