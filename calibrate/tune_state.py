"""Files in which a killed tuning is gone on with: tensors and JSON values in one safetensors file, whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.atomic import PARTIAL
from ..formats.errors import FormatError

_KEY = "tuning"


def save_state(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write both to `path`, replacing what was there at once. FormatError where the system refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={_KEY: json.dumps(values)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # the library wraps what the system says
        partial.unlink(missing_ok=True)
        raise FormatError(f"{path}: cannot be written: {error}; free space, or choose another folder by --work") from (
            error if isinstance(error, OSError) else OSError(str(error))
        )


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What was saved; None where nothing was. FormatError for another kind of file."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            # in fresh memory: mapped from the file they lie at odd addresses, for which sums may be rounded otherwise
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict
            return tensors, json.loads((file.metadata() or {})[_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: not the state of a tuning: {error}; delete it to start tuning anew") from error
