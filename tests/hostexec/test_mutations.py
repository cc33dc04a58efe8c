"""Every bug that BP_MUTATE puts into a kernel is caught, and by whom it should be; without one nobody complains.

A file X.cuh with BP_MUTATE in it has beside these tests a check_X.py: `MUTATIONS`, name -> {mode: what is said}, and
`check(executor, defines)`, which raises where the kernel is wrong. This is what keeps the executor itself honest.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.hostexec

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
PATTERN = re.compile(r"\bBP_MUTATE\(\s*(\w+)\s*,")


def mutations(*folders: Path) -> dict[str, Path]:
    """Name -> the file that has it. ptx.cuh defines the macro, and names none."""
    found: dict[str, Path] = {}
    for path in sorted(p for folder in folders for p in folder.glob("*.cu*") if p.name != "ptx.cuh"):
        for name in PATTERN.findall(path.read_text()):
            assert found.setdefault(name, path) == path, f"mutation {name} in {found[name].name} and in {path.name}"
    return found


@cache
def checks_of(stem: str) -> ModuleType:
    path = HERE / f"check_{stem}.py"
    assert path.exists(), f"{stem}.cuh has mutations: write {path.name}, as check_demo.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOUND = mutations(CUDA, HERE)
CASES = [(name, mode) for name in FOUND for mode in checks_of(FOUND[name].stem).MUTATIONS.get(name, {})]
STEMS = sorted({path.stem for path in FOUND.values()})


def marked(stem: str, mode: str) -> list[pytest.MarkDecorator]:
    """The KV cache's kernels under a sanitizer: half a minute each to compile."""
    return [pytest.mark.release] if stem.startswith("kv_") and mode != "plain" else []


@pytest.mark.parametrize("stem", STEMS)
def test_every_mutation_has_somebody_who_catches_it(stem: str) -> None:
    assert {name for name, path in FOUND.items() if path.stem == stem} == set(checks_of(stem).MUTATIONS)
    assert all(checks_of(stem).MUTATIONS.values())


@pytest.mark.parametrize("stem", STEMS)
def test_without_mutation(hostexec: Any, stem: str) -> None:
    checks_of(stem).check(hostexec, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "mode"), [pytest.param(s, m, marks=marked(s, m)) for s in STEMS for m in ("asan", "tsan")]
)
def test_without_mutation_sanitized(hostexec: Any, stem: str, mode: str) -> None:
    hostexec.isolated(mode, checks_of(stem).check, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"), [pytest.param(name, mode, marks=marked(FOUND[name].stem, mode)) for name, mode in CASES]
)
def test_mutation_is_caught(hostexec: Any, name: str, mode: str) -> None:
    checks = checks_of(FOUND[name].stem)
    with pytest.raises(hostexec.IsolatedError, match=checks.MUTATIONS[name][mode]):  # plain as well: it may crash
        hostexec.isolated(mode, checks.check, [f"BITPALETTE_MUTATE_{name}=~,"])
