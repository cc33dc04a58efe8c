"""The arrows and names of the repository: who may import whom, what the folders may hold, what may not be installed.

Every rule is a function of a root that returns the violations as lines; each is shown to fail on a small bad tree.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("quant", "formats", "kernels", "calibrate")

# what of bitpalette a folder may import beside itself; * stands for every module of the folder
ALLOWED = {
    "quant": (),
    "formats": ("quant",),
    "kernels": ("quant", "_cuda"),
    "calibrate": ("quant", "formats"),
}
EXCEPTIONS = {"calibrate/evaluate.py": ("kernels",), "quant/native.py": ("_cpu",)}
QUANT_THIRD_PARTY = {"torch", "numpy"}
THIRD_PARTY_EXCEPTIONS = {"quant/trellis_cuda.py": {"cupy"}}

MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|farm)/")
TEXT = {".py", ".pyi", ".md", ".toml", ".txt", ".cfg", ".in", ".h", ".hpp", ".cpp", ".cu", ".cuh", ".json", ".yml", ""}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of each import in a file of `package`, in functions and type-checking blocks too.

    `from a import b` gives a.b, which is a module or a name in one. Relative names are resolved against `package`.
    """
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            # import_module("bitpalette.kernels.base")
            called, first = ast.unparse(node.func), node.args[0]
            literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if literal and called.rpartition(".")[2] in ("import_module", "__import__"):
                yield node.lineno, str(first.value)  # type: ignore[attr-defined]


def python_files(root: Path, folder: str) -> list[Path]:
    return sorted(p for p in (root / folder).rglob("*.py") if "__pycache__" not in p.parts)


def arrow_violations(root: Path) -> list[str]:
    """Imports against the arrows of the design, one line each."""
    found = []
    for folder in FOLDERS:
        for path in python_files(root, folder):
            name = path.relative_to(root).as_posix()
            package = ".".join(["bitpalette", *path.relative_to(root).parent.parts])
            allowed = {folder, *ALLOWED[folder], *EXCEPTIONS.get(name, ())}
            third_party = QUANT_THIRD_PARTY | THIRD_PARTY_EXCEPTIONS.get(name, set())
            for line, module in imports(path, package):
                top, _, rest = module.partition(".")
                if top == "bitpalette":
                    if rest.split(".")[0] not in allowed:
                        found.append(f"{name}:{line} imports {module}: {folder} may import {sorted(allowed)}")
                elif top in FOLDERS:
                    found.append(f"{name}:{line} imports top-level {module}: use a relative import")
                elif folder == "quant" and top not in sys.stdlib_module_names and top not in third_party:
                    found.append(f"{name}:{line} imports {module}: quant may import only {sorted(third_party)}")
    return found


def link_violations(root: Path) -> list[str]:
    """bitpalette/FOLDER is a relative link to FOLDER, which has no __init__.py directly in it."""
    found = []
    for folder in FOLDERS:
        link = root / "bitpalette" / folder
        if not link.is_symlink() or os.readlink(link) != f"../{folder}":
            found.append(f"bitpalette/{folder} is no link to ../{folder}")
        if (root / folder / "__init__.py").exists():
            found.append(f"{folder}/__init__.py exists: transformers then cannot be imported in the root")
    return found


def test_place_violations(root: Path) -> list[str]:
    """Tests lie in tests/, whose folders mirror the root's; no packages there, no conftest.py at the root.

    tests/hostexec mirrors nothing: it is a tool of the tests, with tests of its own.
    """
    found = ["conftest.py at the root"] if (root / "conftest.py").exists() else []
    for path in python_files(root, "tests"):
        inside = path.relative_to(root / "tests")
        if inside.name == "__init__.py":
            found.append(f"tests/{inside.as_posix()}: tests are no packages")
        if inside.parts[0] not in {"conftest.py", "hostexec"} and (
            len(inside.parts) < 2 or not (root / inside.parent).is_dir()
        ):
            found.append(f"tests/{inside.as_posix()} mirrors no folder of the root")
    for folder in (*FOLDERS, "csrc", "bitpalette"):
        for path in python_files(root, folder):
            if path.name.startswith("test_") or path.name == "conftest.py":
                found.append(f"{path.relative_to(root).as_posix()} belongs in tests/")
    return found


test_place_violations.__test__ = False  # type: ignore[attr-defined]


def project_files(root: Path) -> list[Path]:
    """Files that are or will be committed: git's word where root is a clone, else all."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [root / name for name in names if name]
    else:
        found = sorted(root.rglob("*"))
    return [p for p in found if p.is_file() and not p.is_symlink()]


def name_violations(root: Path) -> list[str]:
    """Files named for no idea."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    return [f"{p.relative_to(root).as_posix()}: name the idea" for p in project_files(root) if p.stem in vague]


def machine_path_violations(root: Path) -> list[str]:
    """Paths of somebody's machine in a committed text file."""
    found = []
    for path in project_files(root):
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    found.append(f"{path.relative_to(root).as_posix()}:{number} {line.strip()[:100]}")
    return found


def native_violations(root: Path) -> list[str]:
    """Native code outside bind/ knows neither Python nor torch; the build needs no torch."""
    found = []
    foreign = re.compile(r"^\s*#\s*include\s*[<\"](?:Python\.h|pybind11/|torch/|ATen/|c10/)", re.MULTILINE)
    for path in sorted((root / "csrc").rglob("*")):
        inside = path.relative_to(root / "csrc")
        if path.is_file() and inside.parts[0] != "bind" and foreign.search(path.read_text(errors="replace")):
            found.append(f"csrc/{inside.as_posix()} includes Python or torch headers: only csrc/bind may")
    for line, module in imports(root / "setup.py", ""):
        if module.split(".")[0] in ("torch", "numpy", "bitpalette"):
            found.append(f"setup.py:{line} imports {module}: an isolated build has only setuptools and pybind11")
    return found


RULES: list[Callable[[Path], list[str]]] = [
    arrow_violations,
    link_violations,
    test_place_violations,
    name_violations,
    machine_path_violations,
    native_violations,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A tree that keeps every rule."""
    sources = {
        "quant/scheme.py": "import math\nimport numpy as np\nimport torch\nfrom .codec import x\n",
        "quant/codec.py": "x = 1\n",
        "quant/trellis_cuda.py": "def f():\n    import cupy\n",
        "formats/native.py": "import safetensors\nfrom ..quant.scheme import x\nfrom .base import y\n",
        "formats/base.py": "from bitpalette.quant import scheme\n",
        "kernels/cpu.py": "def f():\n    from .. import _cuda\n    from ..quant import scheme\n",
        "calibrate/run.py": "import transformers\nfrom ..formats import native\nfrom ..quant.scheme import x\n",
        "calibrate/evaluate.py": "from ..kernels import cpu\n",
        "csrc/cpu/a.cpp": "#include <vector>\n",
        "csrc/bind/cpu_module.cpp": "#include <pybind11/pybind11.h>\n",
        "setup.py": "from setuptools import setup\n",
        "tests/conftest.py": "",
        "tests/quant/test_scheme.py": "from bitpalette.quant import scheme\n",
        "README.md": "see network/work/x and https://example.org/work.html\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bitpalette").mkdir()
    for folder in FOLDERS:
        (tmp_path / "bitpalette" / folder).symlink_to(f"../{folder}")
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_small_tree_keeps_the_rule(rule: Callable[[Path], list[str]], small_tree: Path) -> None:
    assert rule(small_tree) == []


BAD = [
    (arrow_violations, "quant/a.py", "import transformers\n", "imports transformers"),
    (arrow_violations, "quant/a.py", "def f():\n    import cupy\n", "imports cupy"),
    (arrow_violations, "quant/a.py", "from ..formats import native\n", "imports bitpalette.formats.native"),
    (arrow_violations, "quant/deep/a.py", "from ...kernels.cpu import x\n", "imports bitpalette.kernels.cpu.x"),
    (arrow_violations, "quant/a.py", "from .. import _cpu\n", "imports bitpalette._cpu"),
    (
        arrow_violations,
        "formats/a.py",
        "def f():\n    from ..kernels import cpu\n",
        "a.py:2 imports bitpalette.kernels",
    ),
    (arrow_violations, "formats/a.py", "import bitpalette.calibrate.run\n", "imports bitpalette.calibrate.run"),
    (arrow_violations, "formats/a.py", "import bitpalette\n", "imports bitpalette:"),
    (arrow_violations, "formats/a.py", "import quant.scheme\n", "imports top-level quant.scheme"),
    (arrow_violations, "kernels/a.py", "from ..formats.base import y\n", "imports bitpalette.formats"),
    (arrow_violations, "kernels/a.py", "import_module('bitpalette.formats.base')\n", "imports bitpalette.formats"),
    (
        arrow_violations,
        "kernels/a.py",
        "if TYPE_CHECKING:\n    from ..calibrate.run import z\n",
        "bitpalette.calibrate",
    ),
    (arrow_violations, "calibrate/a.py", "from ..kernels import cpu\n", "imports bitpalette.kernels.cpu"),
    (arrow_violations, "calibrate/a.py", "from ..hf import register\n", "imports bitpalette.hf"),
    (arrow_violations, "calibrate/evaluate.py", "from .. import cli\n", "imports bitpalette.cli"),
    (link_violations, "kernels/__init__.py", "", "kernels/__init__.py exists"),
    (link_violations, "bitpalette/quant", None, "bitpalette/quant is no link"),
    (test_place_violations, "tests/quant/__init__.py", "", "tests are no packages"),
    (test_place_violations, "tests/test_all.py", "", "mirrors no folder"),
    (test_place_violations, "tests/other/test_a.py", "", "mirrors no folder"),
    (test_place_violations, "conftest.py", "", "conftest.py at the root"),
    (test_place_violations, "kernels/test_cpu.py", "", "belongs in tests/"),
    (name_violations, "formats/utils.py", "", "formats/utils.py"),
    (name_violations, "csrc/cpu/common.h", "", "csrc/cpu/common.h"),
    (machine_path_violations, "formats/a.py", "# see /" + "work/x/y\n", "formats/a.py:1"),
    (machine_path_violations, "README.md", "\n`/" + "root/x`\n", "README.md:2"),
    (native_violations, "csrc/cpu/b.cpp", "#include <vector>\n#include <torch/extension.h>\n", "csrc/cpu/b.cpp"),
    (native_violations, "csrc/codec/b.h", '# include "Python.h"\n', "csrc/codec/b.h"),
    (native_violations, "setup.py", "def f():\n    import torch.utils\n", "setup.py:2 imports torch"),
]


@pytest.mark.parametrize(("rule", "name", "text", "message"), BAD, ids=lambda v: str(getattr(v, "__name__", v))[:40])
def test_rule_fails_on_a_bad_tree(
    rule: Callable[[Path], list[str]], name: str, text: str | None, message: str, small_tree: Path
) -> None:
    bad = small_tree / name
    if text is None:
        bad.unlink()
        bad.mkdir()
    else:
        bad.parent.mkdir(parents=True, exist_ok=True)
        bad.write_text(text)
    found = rule(small_tree)
    assert len(found) == 1, found
    assert message in found[0]


ROOT_IMPORT = """
from importlib.util import find_spec
spec = find_spec("kernels")
origin = None if spec is None else spec.origin
assert origin is None or not origin.startswith({root!r}), f"`kernels` can be imported from {{origin}}"
from transformers import LlamaConfig
print(LlamaConfig.model_type)
"""


def start_in(root: Path) -> subprocess.CompletedProcess[str]:
    """Python with `root` as the working directory, where a folder `kernels/` would shadow the package of that name."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", ROOT_IMPORT.format(root=f"{root}{os.sep}")]
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=120)


def test_transformers_can_be_imported_in_the_root() -> None:
    done = start_in(ROOT)
    assert done.stdout == "llama\n", done.stderr


def test_kernels_as_a_package_would_be_noticed(small_tree: Path) -> None:
    (small_tree / "kernels/__init__.py").write_text("")
    done = start_in(small_tree)
    assert done.returncode != 0
    assert "`kernels` can be imported from" in done.stderr
