"""Every Triton kernel compiles for sm_80 and sm_90, spills nothing and multiplies with matrix instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="Triton is for Linux alone")


def static_triton(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "bench/static_triton.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(("arch", "instruction"), [("80", "HMMA="), ("90", "HGMMA=")])
def test_one_kernel(arch: str, instruction: str, tmp_path: Path) -> None:
    name = "linear int bits4 group 32 asymmetric fp16 M=1"
    result = static_triton(tmp_path, "--arch", arch, "--match", name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"sm_{arch}  {name}" in result.stdout and instruction in result.stdout


def test_no_kernel_is_no_success(tmp_path: Path) -> None:
    result = static_triton(tmp_path, "--arch", "80", "--match", "no such kernel")
    assert result.returncode == 1 and "no kernel's name holds 'no such kernel'" in result.stdout


@pytest.mark.parametrize("name", ["kv attention k4v2 D=128 rows=4 bf16", "kv append 3 bits D=80", "kv rotate D=128"])
def test_one_kernel_of_the_kv_cache(name: str, tmp_path: Path) -> None:
    result = static_triton(tmp_path, "--arch", "80", "--match", name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"sm_80  {name}" in result.stdout and ("HMMA=" in result.stdout) == ("attention" in name)


FAMILIES = {
    *("linear int", "linear table", "linear trellis", "linear e4m3", "linear_w4a8 int", "dense int", "dense table"),
    *("dense trellis", "dense e4m3", "sum of", "gather", "rotate rows", "rotate columns", "quantize_activations bf16"),
    *("kv attention", "kv append", "kv combine", "kv rotate"),
}


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_kernel(arch: str, tmp_path: Path) -> None:
    result = static_triton(tmp_path, "--arch", arch, "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    names = [line.removeprefix(f"sm_{arch}  ") for line in result.stdout.splitlines() if line.startswith(f"sm_{arch}")]
    assert not [family for family in FAMILIES if not any(name.startswith(f"{family} ") for name in names)]
    assert len([name for name in names if name.startswith("kv attention")]) >= 12
