"""Runs the files of triton_device/, each in a process of its own: by Triton's interpreter, and on a GPU where one is.

Triton decides when it is imported whether it interprets, for the whole process, and torch imports it when it likes. An
interpreted kernel that reads outside its tensors ends its process, which is here one failed test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "triton_device"
FILES = sorted(path.name for path in CASES.glob("*_cases.py"))
ROOT = CASES.parents[2]


def run(file: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if not variables:
        environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def assert_all_passed(result: subprocess.CompletedProcess[str]) -> None:
    text = result.stdout[-6000:] + result.stderr[-2000:]
    assert result.returncode == 0, text
    assert re.search(r"^[1-9]\d* passed(?!.*skipped)", result.stdout, re.MULTILINE), text


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    assert_all_passed(run(CASES / file, TRITON_INTERPRET="1"))


@pytest.mark.gpu
@pytest.mark.parametrize("file", FILES)
def test_on_gpu(file: str) -> None:
    assert_all_passed(run(CASES / file))


def test_a_failure_and_a_crash_are_seen(tmp_path: Path) -> None:
    for name, body in {"fails": "assert False", "crashes": "import os; os.kill(os.getpid(), 11)"}.items():
        file = tmp_path / f"test_{name}.py"
        file.write_text(f"def test_it():\n    {body}\n")
        with pytest.raises(AssertionError):
            assert_all_passed(run(file, TRITON_INTERPRET="1"))
    file = tmp_path / "test_skips.py"
    file.write_text("import pytest\n\n\ndef test_it():\n    pytest.skip('no device')\n")
    with pytest.raises(AssertionError):
        assert_all_passed(run(file, TRITON_INTERPRET="1"))
