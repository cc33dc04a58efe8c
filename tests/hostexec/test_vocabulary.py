"""ptx.cuh and launch.cuh have a twin for every name, and nothing else of csrc/cuda speaks to the machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
OF_ONE_SIDE = {"shared_address"}, {"mma", "byte_of", "dp4a", "exchange"}  # parts of others
# runs in CuPy without ptx.cuh, see its first lines
EXEMPT = {"ptx.cuh", "launch.cuh", "trellis_encode.cuh"}
FOREIGN = re.compile(r"\basm\b|<<<|\b__[a-z]\w*\(|\bthreadIdx\b|\bblockIdx\b|cooperative_groups|\bextern __shared__")


def names(text: str) -> set[str]:
    functions = re.findall(r"^BP_DEVICE [\w ]*?(\w+)\(", text, re.MULTILINE)
    return {*functions, *re.findall(r"^#define (BP_\w+)", text, re.MULTILINE)}


def test_every_name_has_its_twin() -> None:
    device = (CUDA / "ptx.cuh").read_text().split("#else\n", 2)[2]
    only_device, only_host = OF_ONE_SIDE
    found = names(device)
    assert len(found) > 70 and {"BP_GLOBAL", "prmt", "lop3", "shfl", "lds"} <= found
    assert found - only_device == names((HERE / "ptx_host.h").read_text()) - only_host
    functions = [set(re.findall(r"^int (\w+)\(", p.read_text(), re.MULTILINE)) for p in _launchers()]
    assert {"launch", "resident_blocks"} <= functions[0] & functions[1]


def _launchers() -> tuple[Path, Path]:
    return CUDA / "launch.cuh", HERE / "launch_host.h"


@pytest.mark.parametrize("path", sorted(p for p in CUDA.glob("*.cu*") if p.name not in EXEMPT), ids=lambda p: p.name)
def test_kernels_speak_through_ptx(path: Path) -> None:
    code = re.sub(r"//.*", "", path.read_text())
    assert FOREIGN.findall(code) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo.cu", "mini.cu", "misuse.cu"])
def test_the_same_source_compiles_for_a_gpu(name: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-c", f"-I{CUDA}", "-o", str(tmp_path / "out.o"), str(HERE / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
