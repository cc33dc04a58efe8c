"""A checkpoint in, a packed checkpoint out: block by block, resumable, with bounded memory.

The sizes of all files follow from the schemes and shapes, so they are laid out before anything is computed and each
tensor is written to its place as soon as it exists. A part (a block, or all that stands outside the blocks) is entered
in the journal once its tensors are in place; a killed run goes on with the next part. In between, the hidden states are
those that the already written, quantized blocks give: whether they come from memory or from the files, they are the
same, and so is the result, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..formats.atomic import PARTIAL, write_atomically
from ..formats.base import Source
from ..formats.config_json import read_json
from ..formats.errors import FormatError
from ..formats.manifest import is_complete, write_manifest
from ..formats.native import FORMAT_VERSION, NativeSource, stored_name
from ..formats.shards import ShardPlan, ShardWriter, plan_shards
from ..quant.scheme import Scheme, SchemeError
from ..quant.solver import plan_solver
from ..quant.tensor import field_specs
from .card import base_model, write_card
from .device import choose_device
from .fold import find_fold
from .journal import JOB, PARTS, Journal
from .plan import Plan, PlanError
from .report import Events, Record, Sizes
from .reproduction import REPORT
from .run import Run
from .skeleton import DTYPES, Skeleton
from .structure import quantizable, skipped
from .text import Calibration, CalibrationError, check_length
from .undo import Created

WORK = ".bitpalette"
"""Folder inside the output that holds the journal while a run is unfinished."""


class Compilation:
    """One run of the compiler. Building it reads headers only, checks all that can be checked and writes nothing.

    source: the checkpoint. plan: what to do. out: the folder to write. calibration: None for solvers without
    statistics. dtype: that hidden states are computed in. stats: a folder of statistics of the original model,
    collected there where it has none yet, and used by any later plan; without it every block's statistics are taken
    behind the quantized blocks before it. tune_seconds: time box of a plan's tuning. device: where to compute; parts of
    the model come to it one at a time, and the result depends on its type in the last bits. beside: other
    files of the result, by name. Raises FormatError, PlanError, CalibrationError.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        out: Path,
        *,
        calibration: Calibration | None = None,
        dtype: str = "float32",
        max_shard_bytes: int = 5_000_000_000,
        work: Path | None = None,
        stats: Path | None = None,
        tune_seconds: float | None = None,
        device: torch.device | str = "cpu",
        version: str = "",
        beside: Mapping[str, bytes] = MappingProxyType({}),
        events: Events | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise PlanError(f"hidden states are computed in one of {list(DTYPES)}; got {dtype!r}")
        self.source, self.plan, self.out, self.tune_seconds = source, plan, out, tune_seconds
        self.beside = beside
        self.device = choose_device(str(device))
        self.dtype, self.version, self.events = DTYPES[dtype], version, events or Events()
        self.skeleton = Skeleton(source)
        tied = self.skeleton.tied
        self.weights = {k: w for k, w in quantizable(self.skeleton.model).items() if k not in tied}
        inside = {k for k in self.weights if self.skeleton.block_of(k) is not None}
        self.skipped = {k: v for k, v in skipped(self.skeleton.model).items() if "3-D" in v}
        resolved = plan.resolve(self.weights, inside, tied=tied, only_kept=self.skipped)
        self.schemes: dict[str, Scheme] = {}
        self.by_fisher: set[str] = set()
        needs_stats = False
        for name, scheme in resolved.items():
            if scheme is not None:
                stored, rounding = plan_solver(scheme, self.solver(name, scheme))
                self.schemes[name] = stored
                needs_stats |= rounding.needs_stats or "scale" in stored.transforms
                if rounding.needs_fisher:
                    self.by_fisher.add(name)
        if self.schemes and isinstance(source, NativeSource):
            raise FormatError(f"{source.path}: already quantized with 'bitpalette'; give the unquantized checkpoint")
        if needs_stats and calibration is None:
            raise PlanError(f"solver {plan.solver} needs a calibration text (--calib)")
        if plan.tune and calibration is None:
            raise PlanError("tuning (--effort best) needs a calibration text (--calib)")
        self.needs_stats = needs_stats
        self.calibration = calibration if needs_stats or plan.tune else None
        if self.calibration is not None:
            positions = getattr(self.skeleton.model.config, "max_position_embeddings", None)
            check_length(self.calibration.seq_len, positions, source.path)
        self.stats = stats if needs_stats else None
        if self.schemes:
            for name, reason in self.skipped.items():
                if not any(rule.matches(name) for rule in plan.rules):
                    raise PlanError(f"{name} cannot be quantized: {reason}; --keep {name} leaves it at 16 bits")
        self.rotated_norms: list[str] = []
        self.not_folded = self._fold()
        self.entries = self._entries()
        self.shards: ShardPlan = plan_shards(self.entries, max_shard_bytes)
        self.work = work or out / WORK
        self.job = self._job(max_shard_bytes, dtype)

    def _fold(self) -> str:
        """Fold the rotation of the residual stream where schemes ask for one: those of weights whose inputs are then
        rotated lose the transform. Returns why it cannot be folded, "" where it is or need not be."""
        rotating = [name for name, scheme in self.schemes.items() if "rotate" in scheme.transforms]
        if not self.plan.fold or not rotating:
            return ""
        scaled = [name for name in rotating if "scale" in self.schemes[name].transforms]
        if scaled:
            return f"solver {self.plan.solver} scales the inputs of {scaled[0]} before they are rotated"
        fold = find_fold(self.skeleton, self.plan.seed)
        if isinstance(fold, str):
            return fold
        spared = fold.rotated_weights.intersection(rotating)
        if not spared:
            return ""
        for name in spared:
            scheme = self.schemes[name]
            self.schemes[name] = scheme.replace(transforms=tuple(t for t in scheme.transforms if t != "rotate"))
        if fold.rotated_norm is not None:
            self.rotated_norms = [fold.rotated_norm]
        self.skeleton.fold_in(fold)
        return ""

    def solver(self, name: str, scheme: Scheme) -> str:
        return self.plan.solver_for(self.weights[name], scheme, self.skeleton.block_of(name) is not None)

    def _entries(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        entries: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, value in self.skeleton.parameters.items():
            if name in self.schemes:
                specs = field_specs(self.schemes[name], self.weights[name].shape)
                entries += [(stored_name(name, field), shape, dtype) for field, (shape, dtype) in specs.items()]
            else:
                entries.append((name, tuple(value.shape), value.dtype))
        return entries

    def sizes(self) -> Sizes:
        """What the run will write, to the byte."""
        quantized = {k: field_specs(s, self.weights[k].shape) for k, s in self.schemes.items()}
        return Sizes(
            file_bytes=sum(self.shards.files.values()),
            source_bytes=self.source.size_bytes,
            quantized_weights=sum(_numel(self.weights[k].shape) for k in quantized),
            quantized_bytes=sum(_numel(s) * d.itemsize for specs in quantized.values() for s, d in specs.values()),
            all_weights=sum(v.numel() for v in self.skeleton.parameters.values()),
            files=dict(self.shards.files),
        )

    def _job(self, max_shard_bytes: int, dtype: str) -> dict[str, Any]:
        calibration = None
        if self.calibration is not None:  # the text by its bytes: where it lies does not matter
            calibration = {**asdict(self.calibration), "text": self.calibration.fingerprint()}
        return {
            "model": self.source.fingerprint(),
            "plan": self.plan.to_dict(),
            "calibration": calibration,
            "stats": "of the original model" if self.stats is not None else "behind the quantized blocks",
            "dtype": dtype,
            "device": self.device.type,
            "tune_seconds": self.tune_seconds,
            "max_shard_bytes": max_shard_bytes,
            "format_version": FORMAT_VERSION,
            "bitpalette_version": self.version,
        }

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self) -> list[Record]:
        """Compile, or go on where a killed run stopped. Returns the records of all quantized weights.

        Where the input turns out to be bad, everything that this run created is taken back. What is kept: the state of
        a run that was interrupted, and of one that had finished parts when the disk failed or filled up.
        """
        if is_complete(self.out):
            return self._finished()
        self._check_output()
        if (self.work / JOB).exists():
            return self._compile()
        self.skeleton.check_finite()
        created = Created(self.out, self.work)
        try:
            return self._compile()
        except (FormatError, PlanError, CalibrationError, SchemeError) as error:
            worth_keeping = isinstance(error.__cause__, OSError) and (self.work / PARTS).exists()
            if not worth_keeping:
                created.remove()
            raise

    def _compile(self) -> list[Record]:
        journal = Journal(self.work, self._work_job())
        written = self._stored(range(min(len(journal.parts), len(self.skeleton.blocks) + 1)))
        for name in sorted({self.shards.shards[self.shards.slots[n].shard].file_name for n in written}):
            if not (self.out / name).exists() and not (self.out / (name + PARTIAL)).exists():
                raise FormatError(f"{self.out}: {name} of an unfinished run is gone; delete {self.work} to start anew")
        with ShardWriter(self.out, self.shards, resume=journal.resumed, written=written) as writer:
            if journal.parts:
                self.events.note(f"going on after {len(journal.parts)} finished parts")
            if self.not_folded:
                self.events.note(f"rotating while the model runs, not folded into its weights: {self.not_folded}")
            Run(self, journal, writer).all()
            writer.finish()
        records = [_record(r) for part in journal.parts for r in part["layers"]]
        self._finish(records, next((part["tuning"] for part in journal.parts if "tuning" in part), None))
        journal.remove()
        return records

    def _finished(self) -> list[Record]:
        path = self.out / REPORT
        report = read_json(path) if path.exists() else {}
        if report.get("job") != self.job:
            raise FormatError(f"{self.out} holds a finished checkpoint of other settings; name another output folder")
        if (self.work / JOB).exists():  # killed between its last steps
            Journal(self.work, self._work_job()).remove()
        elif self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()
        self.events.note(f"{self.out} is complete already")
        return [_record(r) for r in report["layers"]]

    def _work_job(self) -> dict[str, Any]:
        """Of a work folder elsewhere, the output folder is part: it may be that of another run."""
        return self.job if self.work == self.out / WORK else self.job | {"out": str(self.out.resolve())}

    def _stored(self, parts: Iterable[int]) -> list[str]:
        """Names in the files of what finished parts have written."""
        blocks = len(self.skeleton.blocks)
        names = [n for part in parts for n in self.skeleton.parameters_of(part if part < blocks else None)]
        return [stored for name in names for stored in self._stored_names(name)]

    def _stored_names(self, name: str) -> list[str]:
        if name not in self.schemes:
            return [name]
        return [stored_name(name, key) for key in field_specs(self.schemes[name], self.weights[name].shape)]

    def _check_output(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise FormatError(f"{self.out} is a file; name a folder to write to")
        if self.work != self.out / WORK:
            work, out = self.work.resolve(), self.out.resolve()
            if work.is_relative_to(out) or out.is_relative_to(work):
                raise FormatError(f"--work {self.work} and the output folder {self.out} hold one another; name another")
            if work.exists() and not work.is_dir():
                raise FormatError(f"--work {self.work} is a file; name a folder")
        if (self.work / JOB).exists():
            return
        present = [p for p in sorted(self.out.iterdir()) if p != self.work] if self.out.exists() else []
        # a run may be killed before job.json has its name
        present += [p for p in sorted(self.work.iterdir()) if p.suffix != PARTIAL] if self.work.exists() else []
        if present:
            raise FormatError(
                f"{present[0].parent} is not empty (it holds {present[0].name}); name a new folder, nothing is "
                "overwritten"
            )

    def _finish(self, records: list[Record], tuning: dict[str, Any] | None) -> None:
        config = {k: v for k, v in self.source.config.items() if k not in ("quantization_config", "torch_dtype")}
        config["dtype"] = str(self.skeleton.model.dtype).removeprefix("torch.")
        if self.schemes:
            config["quantization_config"] = self.quantization_config()
        self.source.write_sidecar(self.out)
        origin = {"name": base_model(self.source), "bytes": self.source.size_bytes}
        report = {"job": self.job, "source": origin, "layers": [asdict(r) for r in records]}
        if tuning is not None:
            report["tuning"] = tuning
        write_atomically(self.out / REPORT, json.dumps(report, indent=1).encode())
        for name, content in self.beside.items():
            write_atomically(self.out / name, content)
        write_card(self.out)
        write_atomically(self.out / "config.json", json.dumps(config, indent=2).encode())
        write_manifest(self.out)

    def quantization_config(self) -> dict[str, Any]:
        distinct: list[dict[str, Any]] = []
        tensors = {}
        for name, scheme in self.schemes.items():
            values = scheme.to_dict()
            if values not in distinct:
                distinct.append(values)
            tensors[name] = {"scheme": distinct.index(values), "shape": list(self.weights[name].shape)}
        return {
            "quant_method": "bitpalette",
            "format_version": FORMAT_VERSION,
            "bitpalette_version": self.version,
            "schemes": distinct,
            "tensors": tensors,
            **({"rotated_norms": self.rotated_norms} if self.rotated_norms else {}),
            "seed": self.plan.seed,
        }


def _record(values: dict[str, Any]) -> Record:
    return Record(**{**values, "shape": tuple(values["shape"])})


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
