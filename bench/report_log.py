"""A pytest plugin that writes a line of JSON for every test as it ends, so that a run that is cut off leaves them.

    GPU_TEST_LOG=FILE pytest -p bench.report_log ...

Keys: test (node id), outcome (passed, failed, error, skipped or xfailed), seconds, why (of a failure or a skip).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "GPU_TEST_LOG"


def outcome(report: pytest.TestReport) -> str | None:
    """None for the parts of a test that say nothing: setup and teardown that pass."""
    if report.when == "call":
        if hasattr(report, "wasxfail"):
            return "failed" if report.passed else "xfailed"
        return report.outcome
    if report.failed:
        return "error"
    return "skipped" if report.skipped else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path, how = os.environ.get(VARIABLE), outcome(report)
    if not path or how is None or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    why = ""
    if how != "passed":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        said = [line for line in text.strip().splitlines() if line.startswith("E ")] or text.strip().splitlines()[-1:]
        why = said[0].removeprefix("E").strip()[:300] if said else ""
    line = {"test": report.nodeid, "outcome": how, "seconds": round(report.duration, 2), "why": why}
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
