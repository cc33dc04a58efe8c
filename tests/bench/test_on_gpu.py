"""bench/on_gpu.sh as far as it goes without a GPU, and what it makes of tests and stages that fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "gguf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench("on_gpu") -> the module of bench/on_gpu.py."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.slow
def test_dry_without_pydantic_and_gguf(tmp_path: Path) -> None:
    """Everything can be imported, every file of GPU tests collected, on a machine that has neither."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "GIT_COMMIT": "abc1234"}
    check = [sys.executable, "-c", "import pydantic"]
    assert subprocess.run(check, env=environment, capture_output=True, check=False).returncode == 1
    command = ["sh", str(BENCH / "on_gpu.sh"), "--dry", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu-dry.json").read_text())
    assert found["complete"] and found["failed"] == [] and found["about"]["commit"] == "abc1234"
    assert list(found["stages"]) == ["imports", "tests", "timings", "cache_timings"]
    assert found["stages"]["tests"]["collected"] > 500


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["sh", str(BENCH / "on_gpu.sh"), str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "sees no CUDA device; --dry" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_fails_or_is_cut_off_leaves_the_others(bench: Any, tmp_path: Path) -> None:
    on_gpu = bench("on_gpu")
    path = tmp_path / "gpu.json"
    run = on_gpu.Run(path, dry=True)

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def raises(name: str, limit: float) -> dict[str, Any]:
        raise ValueError("no such thing")

    def hangs(name: str, limit: float) -> dict[str, Any]:
        status, text = run.command(name, 1.0, [sys.executable, "-c", "import time; time.sleep(60)"])
        return {"failed": on_gpu.failure(status, 1.0, text)}

    def exits(name: str, limit: float) -> dict[str, Any]:
        status, text = run.command(name, limit, [sys.executable, "-c", "print('last words'); raise SystemExit(3)"])
        return {"failed": on_gpu.failure(status, limit, text)}

    run.stage("a", 10, raises)
    assert seen()["failed"] == ["a: ValueError: no such thing"] and not seen()["complete"]
    started = time.monotonic()
    run.stage("b", 10, exits)
    run.stage("c", 10, lambda name, limit: {"failed": "", "figures": [1]})
    assert seen()["stages"]["b"]["failed"] == "exit status 3: last words"
    assert seen()["stages"]["c"]["figures"] == [1] and len(seen()["failed"]) == 2
    run.stage("d", 10, hangs)
    assert time.monotonic() - started < 10
    assert seen()["failed"][2] == "d: ended by its limit of 1 s"
    run.begun -= on_gpu.TOTAL
    run.stage("e", 10, lambda name, limit: {"failed": ""})
    assert seen()["failed"][3] == "e: no time left"


FILE = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_fails(n):
    assert n == 1

def test_skips():
    pytest.skip("no device")

@pytest.fixture
def broken():
    raise RuntimeError("a fixture")

def test_errs(broken):
    pass

@pytest.mark.xfail(strict=True, reason="not built")
def test_waits():
    assert False

def test_cut_off():
    import os
    os._exit(1)
"""


def test_reports_survive_a_run_that_is_cut_off(bench: Any, tmp_path: Path) -> None:
    file, log = tmp_path / "test_some.py", tmp_path / "log.jsonl"
    file.write_text(FILE)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outside, "PYTHONPATH": str(ROOT), "GPU_TEST_LOG": str(log)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.report_log", "-p", "no:cacheprovider", str(file)]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)
    found = bench("on_gpu").counted(log)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 1, "xfailed": 1}
    [failed, error] = found["failures"].items()
    assert failed[0].endswith("test_fails[2]") and "assert 2 == 1" in failed[1]
    assert error[0].endswith("test_errs") and "RuntimeError: a fixture" in error[1]
    assert any("no device" in why for why in found["skipped"])
    assert bench("on_gpu").counted(tmp_path / "none")["counts"] == {}


def test_targets_are_means_of_the_large_shapes(bench: Any) -> None:
    gpu_kernels = bench("gpu_kernels")

    def cell(shape: tuple[int, int], x: float, wrong: str = "") -> dict[str, Any]:
        return {"format": "int4 g128", "shape": list(shape), "tokens": 1, "x_cublas": x, "wrong": wrong}

    shapes = gpu_kernels.LARGE
    cells = [cell(s, x) for s, x in zip(shapes, (2.0, 4.0, 8.0), strict=True)] + [cell((4096, 4096), 1.0)]
    [line] = [t for t in gpu_kernels.against_targets(cells) if (t["format"], t["tokens"]) == ("int4 g128", 1)]
    assert line["x_cublas"] == 4.0 and line["met"] and line["shapes"] == 3
    [line] = [t for t in gpu_kernels.against_targets(cells[1:]) if (t["format"], t["tokens"]) == ("int4 g128", 1)]
    assert not line["met"]  # a shape is missing
    names = {entry.name for entry in gpu_kernels.ENTRIES}
    assert {name for name, _ in gpu_kernels.TARGETS} <= names and len(names) == len(gpu_kernels.ENTRIES)
    first = list(gpu_kernels.cells())
    assert len(set(first)) == len(first) == len(gpu_kernels.SHAPES) * len(gpu_kernels.TOKENS)
    assert {tokens for _, tokens in first[:4]} == {1}
