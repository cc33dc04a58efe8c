"""Calibration statistics as an artifact on disk: collected once from the original model, used for any number of plans.

<folder>/fingerprint.json           what they were collected from: model, text, tokens, seed, dtype, folding
<folder>/stats-00012.safetensors    block 12 (the last number: the head). For every distinct input
                                    "<parameter>:hessian" float32 [in, in] and "<parameter>:absmean" float32 [in];
                                    of expert e "<parameter>#e:...". Metadata: the number of tokens, and which
                                    other parameters see the same input.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..formats.atomic import write_atomically
from ..formats.errors import FormatError
from ..quant.stats import Stats

LayerStats = Stats | list[Stats]
"""Of one weight; for stacked experts a list."""


class StatsStore:
    """Opened on a folder for one fingerprint. FormatError where the folder holds statistics of something else."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / "fingerprint.json"
        text = json.dumps(fingerprint, indent=1, sort_keys=True)
        if path.exists():
            if path.read_text() != text:
                have = json.loads(path.read_text())
                changed = [k for k in sorted(set(have) | set(fingerprint)) if have.get(k) != fingerprint.get(k)]
                raise FormatError(
                    f"{folder} holds statistics of another calibration ({', '.join(changed)} differ); "
                    "name another folder"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise FormatError(f"{folder} is not empty and holds no statistics; name a new folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())

    def path(self, part: int) -> Path:
        return self.folder / f"stats-{part:05d}.safetensors"

    def has(self, part: int) -> bool:
        return self.path(part).exists()

    def save(self, part: int, stats: dict[str, LayerStats]) -> None:
        """Keep the statistics of a part; weights that share one Stats object are stored once."""
        from safetensors.torch import save_file

        tensors, tokens, members = {}, {}, {}
        first: dict[int, str] = {}
        for name, entry in stats.items():
            members[name] = first.setdefault(id(entry), name)
            if members[name] != name:
                continue
            for key, one in _named(name, entry):
                tensors[f"{key}:hessian"], tensors[f"{key}:absmean"] = (
                    one.hessian.contiguous().cpu(),
                    one.absmean.contiguous().cpu(),
                )
                tokens[key] = one.tokens
        metadata = {"tokens": json.dumps(tokens), "members": json.dumps(members)}
        beside = self.path(part).with_suffix(".partial")
        save_file(tensors, beside, metadata=metadata)
        os.replace(beside, self.path(part))

    def load(self, part: int, device: torch.device) -> dict[str, LayerStats]:
        """What `save` kept, on `device`, shared where it was shared. FormatError for a damaged file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(part), "pt") as file:
                tokens, members = (json.loads(file.metadata()[k]) for k in ("tokens", "members"))

                def one(key: str) -> Stats:
                    hessian, absmean = (file.get_tensor(f"{key}:{name}").to(device) for name in ("hessian", "absmean"))
                    return Stats(hessian, absmean, tokens[key])

                loaded: dict[str, LayerStats] = {}
                for name, leader in members.items():
                    if leader != name:
                        loaded[name] = loaded[leader]
                    elif name in tokens:
                        loaded[name] = one(name)
                    else:
                        experts = sum(key.startswith(f"{name}#") for key in tokens)
                        loaded[name] = [one(f"{name}#{e}") for e in range(experts)]
                return loaded
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self.path(part)}: damaged statistics ({error}); delete the file") from error


def _named(name: str, entry: LayerStats) -> list[tuple[str, Stats]]:
    return [(f"{name}#{e}", s) for e, s in enumerate(entry)] if isinstance(entry, list) else [(name, entry)]
