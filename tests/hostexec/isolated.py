"""What Executor.isolated runs: python isolated.py FILE FUNCTION ARGUMENTS FOLDER."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    file, function, arguments, folder = sys.argv[1:]
    driver = load(Path(__file__).with_name("driver.py"))
    getattr(load(Path(file)), function)(driver.Executor(Path(folder)), *json.loads(arguments))
