"""Expected errors of candidate schemes, kept in the folder of statistics: `expected_errors.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ._version import __version__
from .calibrate.expected_error import Expected
from .formats.atomic import write_atomically
from .formats.errors import FormatError
from .quant.scheme import Scheme

NAME = "expected_errors.json"
VERSION = 1


class _Kept(BaseModel):
    """errors: {parameter: [[scheme, output, standard_error, table], ..]}."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    bitpalette_version: str
    seed: int
    errors: dict[str, list[tuple[dict[str, Any], float, float, float]]]


def read_errors(folder: Path, seed: int) -> dict[str, dict[Scheme, Expected]]:
    """{parameter: {scheme: its error}}; nothing where none were kept, or by another version
    or seed of rotations. FormatError for
    a damaged file."""
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        kept = _Kept.model_validate_json(path.read_bytes())
        if (kept.version, kept.bitpalette_version, kept.seed) != (VERSION, __version__, seed):
            return {}
        return {
            name: {Scheme.from_dict(s): Expected(output, error, table) for s, output, error, table in rows}
            for name, rows in kept.errors.items()
        }
    except (ValidationError, ValueError) as problem:
        raise FormatError(f"{path}: damaged ({str(problem).splitlines()[0]}); delete the file") from problem


def write_errors(folder: Path, seed: int, errors: dict[str, dict[Scheme, Expected]]) -> None:
    rows = {name: [(s.to_dict(), *asdict(e).values()) for s, e in found.items()] for name, found in errors.items()}
    kept = _Kept.model_validate({"version": VERSION, "bitpalette_version": __version__, "seed": seed, "errors": rows})
    write_atomically(folder / NAME, kept.model_dump_json().encode())
