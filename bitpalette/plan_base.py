"""Resident memory of a process that can run packed models, before a real one is in it.

Measured on a tiny model, in processes of its own: one writes it, one loads it and generates, so that every library a
real model would touch is in memory. Once for a machine and version, kept in the user's cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ._version import __version__
from .calibrate.plan import PlanError
from .formats.atomic import write_atomically
from .kernels.cache_folder import cache_folder, device_slug
from .provenance import processor

_WRITE = """
import sys, torch, transformers, bitpalette
from bitpalette.plan_step import random_model
from bitpalette.quant.scheme import Scheme
config = transformers.LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
config.architectures = ["LlamaForCausalLM"]
kinds = [{"codec": "int", "bits": 4, "group_size": 64, "transforms": ["rotate"]},
         {"codec": "trellis", "rate": 2.5, "transforms": ["rotate"]}]
names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
schemes = {f"model.layers.{i}.{n}.weight": Scheme.from_dict(kinds[i]) for i in range(2) for n in names}
schemes["model.embed_tokens.weight"] = Scheme.from_dict({"codec": "int", "bits": 8})
bitpalette.save_pretrained(random_model(config, schemes), sys.argv[1])
"""

_LOAD = """
import sys, torch, bitpalette
from bitpalette.plan_base import peak_after
model = bitpalette.load(sys.argv[1], dtype=torch.bfloat16, kv=sys.argv[2])
print(peak_after(lambda: bitpalette.generate(model, torch.arange(2, 66)[None], max_new_tokens=8, min_new_tokens=8)))
"""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bitpalette_version: str
    processor: str
    dense: Annotated[int, Field(gt=0)]
    packed: Annotated[int, Field(gt=0)]
    """Bytes, with transformers' cache and with a packed one."""


def base_bytes(packed_cache: bool, *, again: bool = False) -> int:
    """Bytes resident, with the cache of transformers or a packed one. again: measure anew.

    PlanError where the system does not tell what is resident (no /proc), or a process fails.
    """
    path = cache_folder() / f"memory-{device_slug(processor())}.json"
    file = None if again else _read(path)
    if file is None:
        file = _measured()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (file.model_dump_json(indent=1) + "\n").encode())
    return file.packed if packed_cache else file.dense


def peak_after(run: Callable[[], object]) -> int:
    """Bytes of the largest resident set while `run()`, not counting what was before. PlanError without /proc."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (man 5 proc)
        run()
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise PlanError(f"resident memory is read from /proc, which is not here: {error.strerror}") from error
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _read(path: Path) -> _File | None:
    """None where there is no file, or one of another version or processor; a line on stderr where it is damaged."""
    if not path.exists():
        return None
    try:
        file = _File.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        print(f"bitpalette: measured again, {path} is unreadable: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return file if (file.bitpalette_version, file.processor) == (__version__, processor()) else None


def _measured() -> _File:
    with tempfile.TemporaryDirectory() as folder:
        _child(_WRITE, folder)
        dense, packed = (int(_child(_LOAD, folder, kv).split()[-1]) for kv in ("16", "k4v4"))
    return _File(bitpalette_version=__version__, processor=processor(), dense=dense, packed=packed)


def _child(code: str, *arguments: str) -> str:
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PlanError(f"the memory of a process could not be measured: {last}")
    return done.stdout
