"""Import this first where pydantic is missing: bitpalette's parts that need none of it can then be imported.

`import bitpalette` registers its checkpoints with transformers, for which formats/ parses files with pydantic. A GPU
machine that is lent for tests may have neither that nor a way to install it, and kernels/, quant/ and calibrate/ do
without. With pydantic this changes nothing. As a plugin: `pytest -p bench.parts_alone`.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bitpalette"


def pydantic_is_missing() -> bool:
    try:
        return importlib.util.find_spec("pydantic") is None
    except ModuleNotFoundError:
        return True


if pydantic_is_missing() and "bitpalette" not in sys.modules:
    package = types.ModuleType("bitpalette", "The package without its __init__.py: pydantic is missing.")
    package.__path__ = [str(PACKAGE)]
    sys.modules["bitpalette"] = package
