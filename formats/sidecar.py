"""The files beside the weights: tokenizer, generation config, chat templates, preprocessor, custom code, licence, and
the plan of the KV cache."""

from __future__ import annotations

from pathlib import Path

from .atomic import PARTIAL, copy_atomically
from .kv_plan_file import KV_PLAN_NAME

LEFT_OUT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack",
    ".onnx", ".ckpt", ".npz", PARTIAL, ".reserving",
)  # fmt: skip
"""Weights of any framework, their indexes, and our unfinished files."""

LEFT_OUT_NAMES = frozenset({"config.json", "manifest.json", "readme.md"})
"""Written anew (config, manifest), or about another set of weights (the model card)."""

CARRIED_DIRECTORIES = ("additional_chat_templates",)


def sidecar_files(directory: Path) -> list[Path]:
    """Paths relative to `directory` of the files to carry over, sorted. Hidden files and other folders stay behind."""
    found = [path for path in directory.iterdir() if path.is_file()]
    for name in CARRIED_DIRECTORIES:
        if (directory / name).is_dir():
            found += [path for path in (directory / name).iterdir() if path.is_file()]
    return sorted(path.relative_to(directory) for path in found if not _left_out(path.name))


def copy_sidecar(source: Path, directory: Path) -> list[str]:
    """Copy them into `directory`, which is created if need be; the names relative to it."""
    names = sidecar_files(source)
    for name in names:
        copy_atomically(source / name, directory / name)
    return [str(name) for name in names]


def sidecar_size(source: Path) -> int:
    return sum((source / name).stat().st_size for name in sidecar_files(source))


def _left_out(name: str) -> bool:
    if name == KV_PLAN_NAME:
        return False
    lower = name.lower()
    return lower.startswith(".") or lower in LEFT_OUT_NAMES or lower.endswith(LEFT_OUT_SUFFIXES)
