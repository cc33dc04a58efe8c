"""Reading config.json, and JSON files like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import FormatError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. FormatError where it cannot be read, is no JSON or no object."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); fetch or write it again") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: holds {type(values).__name__}, not a JSON object; fetch or write it again")
    return values


def quant_method(config: dict[str, Any]) -> str | None:
    """The `quant_method` of a config's `quantization_config`; None for an unquantized checkpoint."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        return "unknown"
    method = quantization.get("quant_method")
    if isinstance(method, str):
        return method
    return "bitsandbytes" if quantization.get("load_in_4bit") or quantization.get("load_in_8bit") else "unknown"
