"""Builds, runs the GPU tests, the sanitizer and the timings, in one call of under nine minutes; JSON out.

    bench/on_gpu.sh [--dry] [--skip STAGE ...] [OUT]

OUT is a .json file or a folder (default: bench/results/gpu-DEVICE.json); logs lie in a folder beside it. The file is
written after every stage, so that a run that is cut off leaves what it has. Exit code 1 where anything failed. --dry
runs what needs no GPU: imports, the collection of the tests, the lists of what would be run.

A stage is a process with a limit of its own; all together end before TOTAL seconds. Nothing is installed: where
pydantic is missing, bitpalette's parts are imported without it (bench/parts_alone.py), and tests that need it skip.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_about import ROOT, describe

TOTAL = 520.0
TESTS = (
    "tests/kernels/test_gpu_products.py",
    "tests/kernels/test_gpu_int8.py",
    "tests/kernels/test_gpu_inputs.py",
    "tests/kernels/test_gpu_streams.py",
    "tests/kernels/test_gpu_kv.py",
    "tests/kernels/test_gpu_models.py",
    "tests/quant/test_gpu_solvers.py",
    "tests/csrc/test_trellis_cuda.py",
    "tests/kernels/test_triton_kernels.py",
)
TIMINGS_BUDGET = 190.0
WORKERS = 8
"""Processes of tests on one GPU: what takes long is compiling Triton kernels, on the CPU."""


class Run:
    """The stages and what they left, in a file."""

    def __init__(self, path: Path, dry: bool) -> None:
        self.path, self.logs, self.dry = path, path.with_suffix(".logs"), dry
        self.begun = time.monotonic()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.result: dict[str, Any] = {"about": describe(), "dry": dry, "complete": False, "failed": [], "stages": {}}
        self.save()

    def left(self) -> float:
        return TOTAL - (time.monotonic() - self.begun)

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.begun, 1)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n")
        part.replace(self.path)

    def stage(self, name: str, limit: float, work: Callable[[str, float], dict[str, Any]]) -> None:
        """work(name, seconds it may take) -> what it found; `failed` in it says why, or is empty."""
        print(f"-- {name}", flush=True)
        started = time.monotonic()
        limit = min(limit, self.left())
        if limit < 5:
            found: dict[str, Any] = {"failed": "no time left"}
        else:
            try:
                found = work(name, limit)
            except Exception as error:  # noqa: BLE001 - one stage must not cost the others
                found = {"failed": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - started, 1)
        self.result["stages"][name] = found
        if found.get("failed"):
            self.result["failed"].append(f"{name}: {found['failed']}")
            print(f"   FAILED {found['failed']}", flush=True)
        self.save()

    def command(
        self, name: str, limit: float, command: list[str], variables: dict[str, str] | None = None
    ) -> tuple[int | None, str]:
        """(exit status, None where the limit ended it; the end of what it printed). All of that is in a log."""
        log = self.logs / f"{name}.log"
        environment = {**os.environ, "PYTHONPATH": path_of(ROOT), **(variables or {})}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return status, log.read_text(errors="replace")[-3000:]


def path_of(root: Path) -> str:
    """PYTHONPATH with the tree first."""
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def failure(status: int | None, limit: float, text: str) -> str:
    if status == 0:
        return ""
    last = text.strip().splitlines()[-1:] or [""]
    return f"ended by its limit of {limit:.0f} s" if status is None else f"exit status {status}: {last[0][:300]}"


# -- stages


def build(run: Run, name: str, limit: float) -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    variables = {"BITPALETTE_CUDA": "1", "BITPALETTE_CUDA_ARCHITECTURES": f"{major}{minor}"}
    # as `python3 setup.py build_ext --inplace`, with as many compilers at once as there are cores
    code = f"import setup; setup.JOBS = {os.cpu_count() or 2}; setup.main()"
    status, text = run.command(name, limit, [sys.executable, "-c", code, "build_ext", "--inplace"], variables)
    return {"architecture": f"sm_{major}{minor}", "failed": failure(status, limit, text)}


def run_tests(run: Run, name: str, limit: float) -> dict[str, Any]:
    reports = run.logs / f"{name}.jsonl"
    reports.unlink(missing_ok=True)
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "-p", "bench.report_log"]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", str(WORKERS), "--dist", "worksteal"]
    variables = {"PYTEST_ADDOPTS": "-p bench.parts_alone", "GPU_TEST_LOG": str(reports), "OMP_NUM_THREADS": "2"}
    status, text = run.command(name, limit, [sys.executable, "-m", "pytest", *arguments, *TESTS], variables)
    found = counted(reports)
    found["failed"] = failure(status, limit, text)
    if not found["counts"].get("passed"):
        found["failed"] = found["failed"] or "no test passed"
    return found


def counted(reports: Path) -> dict[str, Any]:
    """{counts by outcome, names of what failed with why, reasons of skips with their number, the slowest}."""
    lines = [json.loads(line) for line in reports.read_text().splitlines()] if reports.exists() else []
    counts: dict[str, int] = {}
    skips: dict[str, int] = {}
    for line in lines:
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
        if line["outcome"] in ("skipped", "xfailed"):
            skips[line["why"]] = skips.get(line["why"], 0) + 1
    failures = {line["test"]: line["why"] for line in lines if line["outcome"] in ("failed", "error")}
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:10]
    return {
        "counts": counts,
        "failures": failures,
        "skipped": skips,
        "slowest": {line["test"]: line["seconds"] for line in slowest},
    }


def collect_tests(run: Run, name: str, limit: float) -> dict[str, Any]:
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--collect-only", "-p", "bench.report_log"]
    variables = {"PYTEST_ADDOPTS": "-p bench.parts_alone"}
    status, text = run.command(name, limit, [sys.executable, "-m", "pytest", *arguments, *TESTS], variables)
    found = re.search(r"^(\d+)(?:/\d+)? tests collected", text, re.MULTILINE)
    files = {line.partition("::")[0] for line in (run.logs / f"{name}.log").read_text().splitlines() if "::" in line}
    missing = sorted(set(TESTS) - files)
    failed = failure(status, limit, text) or (f"no gpu tests in {missing}" if missing else "")
    return {"collected": int(found[1]) if found else 0, "failed": failed}


def sanitize(tool: str) -> Callable[[Run, str, float], dict[str, Any]]:
    def stage(run: Run, name: str, limit: float) -> dict[str, Any]:
        if shutil.which("compute-sanitizer") is None:
            return {"verdict": "not run: no compute-sanitizer on PATH", "failed": ""}
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "bench/gpu_sanitize.py",
        ]
        status, text = run.command(name, limit, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        said = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
        kernels = len(re.findall(r"^ok ", (run.logs / f"{name}.log").read_text(errors="replace"), re.MULTILINE))
        return {"verdict": said[-1] if said else "none", "products": kernels, "failed": failure(status, limit, text)}

    return stage


def timings(run: Run, name: str, limit: float) -> dict[str, Any]:
    return timed_by(run, name, limit, "gpu_kernels.py", min(TIMINGS_BUDGET, limit - 20))


def cache_timings(run: Run, name: str, limit: float) -> dict[str, Any]:
    return timed_by(run, name, limit, "gpu_kv.py", limit - 20)


def timed_by(run: Run, name: str, limit: float, program: str, budget: float) -> dict[str, Any]:
    file = run.logs / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, f"bench/{program}", "--budget", f"{budget:.0f}", "--json", str(file)]
    status, text = run.command(name, limit, [*command, "--dry"] if run.dry else command)
    print((run.logs / f"{name}.log").read_text(errors="replace"), flush=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return {**found, "failed": failure(status, limit, text)}


def imports(run: Run, name: str, limit: float) -> dict[str, Any]:
    """What the stages import, each in a process: pydantic and gguf need not be there."""
    failed = []
    for module in ("gpu_kernels", "gpu_kv", "gpu_sanitize"):
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'bench'); import {module}"]
        status, text = run.command(f"{name}-{module}", limit, command)
        if status != 0:
            failed.append(f"{module}: {failure(status, limit, text)}")
    return {"failed": "; ".join(failed)}


def default_path(device: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "bench" / "results" / f"gpu-{slug}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="a .json file or a folder")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--skip", nargs="*", default=[], help="stages to leave out")
    given = parser.parse_args()
    device = "dry"
    if not given.dry:
        import torch

        if not torch.cuda.is_available():
            print("bench/on_gpu.sh: torch sees no CUDA device; --dry runs what needs none", file=sys.stderr)
            return 2
        device = torch.cuda.get_device_name(0)
    path = given.out.resolve() if given.out else default_path(device)
    if path.suffix != ".json":
        path = path / default_path(device).name
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Run(path, given.dry)
    run.result["device"] = device
    if given.dry:
        stages: list[tuple[str, float, Callable[[Run, str, float], dict[str, Any]]]] = [
            ("imports", 120, imports),
            ("tests", 180, collect_tests),
            ("timings", 60, timings),
            ("cache_timings", 60, cache_timings),
        ]
    else:
        stages = [
            ("build", 200, build),
            ("tests", 210, run_tests),
            ("memcheck", 50, sanitize("memcheck")),
            ("racecheck", 60, sanitize("racecheck")),
            ("cache_timings", 70, cache_timings),
            ("timings", 230, timings),
        ]
    for name, limit, work in stages:
        if name not in given.skip:
            run.stage(name, limit, lambda name, limit, work=work: work(run, name, limit))
    run.result["complete"] = True
    run.save()
    print(f"{path}: {'FAILED ' + '; '.join(run.result['failed']) if run.result['failed'] else 'all passed'}")
    return int(bool(run.result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
