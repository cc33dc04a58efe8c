"""The model card of a written checkpoint: README.md, from what lies beside the weights."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..formats.atomic import write_atomically
from ..formats.base import Source
from ..formats.config_json import read_json
from ..formats.errors import FormatError
from ..formats.plan_file import StoredPlan, plan_beside
from ..formats.shards import INDEX_NAME
from .reproduction import REPORT, calibration_text, reproduction
from .weight_kinds import PARTS, kinds_of, part_of

CARD_NAME = "README.md"

KL_IN_WORDS = (
    "KL divergence says how far the model's next-token probabilities are from the original's, in nats a token, on "
    "average over a text: 0 is the same model."
)

_HUB_FOLDER = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([\w.-]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(folder: Path) -> None:
    """Write `folder`/README.md. To be called again, before the manifest, where measurements came on top. FormatError:
    no report, a plan file that cannot be read, a full disk."""
    write_atomically(folder / CARD_NAME, model_card(folder).encode())


def model_card(folder: Path) -> str:
    """Markdown with front matter, from `quantization_report.json`, `quantization_plan.json` where there is one, and the
    sizes of the weight files. FormatError where one cannot be read."""
    report = read_json(folder / REPORT)
    layers = report.get("layers", [])
    if not layers:
        return "# Model\n\nWritten by bitpalette without quantization.\n"
    job, source = report.get("job", {}), report.get("source", {})
    plan = plan_beside(folder)
    try:
        bits = _average_bits(layers)
        kinds = _bits_by_kind(layers)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{folder / REPORT}: layers: no record of a weight ({error!r}); write it again") from None
    base = source.get("name") if isinstance(source, Mapping) else None
    pieces = [
        _front_matter(base),
        f"# {base.rpartition('/')[2] if base else 'Model'}, {bits:.2f} bits a weight (bitpalette)",
        _LOADING,
        _figures(plan, bits, _weight_bytes(folder), source.get("bytes"), len(layers)),
        KL_IN_WORDS if plan is not None else _NOT_MEASURED,
        "## Bits by kind of weight",
        kinds,
        "## How it was made",
        _how(job, plan),
        "## License",
        "That of the original model; state it here.",
    ]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def base_model(source: Source) -> str | None:
    """The hub id of the checkpoint that `source` is, where its folder or config tells; never a path."""
    found = _HUB_FOLDER.search(str(source.path))
    if found is not None:
        return f"{found[1]}/{found[2]}"
    name = source.config.get("_name_or_path")
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


_LOADING = """Needs the package: `pip install bitpalette`, then `import bitpalette` before

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this folder")
```"""

_NOT_MEASURED = 'KL divergence and perplexity: `quantize eval "this folder" --against MODEL` measures them.'


def _front_matter(base: str | None) -> str:
    lines = ["---", "library_name: transformers"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", "- bitpalette", "- quantized", "---"])


def _figures(plan: StoredPlan | None, bits: float, nbytes: int, source_bytes: Any, count: int) -> str:
    size = f"{nbytes / 1e6:,.1f} MB" + (f", from {source_bytes / 1e6:,.1f} MB" if isinstance(source_bytes, int) else "")
    rows = [
        ("weight files", size),
        ("bits a weight", f"{bits:.3f}, average of {count} quantized weights, scales counted"),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    if plan is None:
        return "\n".join(table)
    predicted, measured = plan.predicted, plan.measured
    table += ["", "| | original | predicted | measured |", "|---|---|---|---|"]
    kl = (plus_minus(predicted.kl, predicted.kl_se), plus_minus(measured.kl, measured.kl_se) if measured else "")
    table.append(f"| KL, nats a token | 0 | {kl[0]} | {kl[1]} |")
    perplexities = (predicted.reference_perplexity, predicted.perplexity, measured and measured.perplexity)
    table.append("| perplexity | " + " | ".join("" if v is None else f"{v:.2f}" for v in perplexities) + " |")
    if measured is None:
        return "\n".join([*table, "", "Not measured yet."])
    text = measured.text_name or "the text that was measured on"
    tokens = "" if measured.tokens is None else f", {measured.tokens:,} tokens"
    agreement = "" if measured.top1 is None else f" Same most likely token: {measured.top1:.1%}."
    return "\n".join([*table, "", f"Measured on {text}{tokens}; ± is one standard error.{agreement}"])


def plus_minus(value: float, error: float | None) -> str:
    """ "0.1120 ± 0.0020": a value and its standard error, in the digits that the value needs."""
    digits = 4 if value == 0 else max(0, min(8, 3 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _bits_by_kind(layers: Sequence[Mapping[str, Any]]) -> str:
    named = kinds_of(layer["parameter"] for layer in layers)
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        part = PARTS.index(part_of(layer["parameter"]))
        groups[part, named[layer["parameter"]]].append(layer)
    lines = ["| weights | count | bits, average | lowest | highest | schemes |", "|---|---|---|---|---|---|"]
    for (_, kind), members in sorted(groups.items(), key=lambda item: item[0][0]):
        each = [float(m["bits_per_weight"]) for m in members]
        schemes = list(dict.fromkeys(f"`{m['scheme']}`" for m in members))
        shown = ", ".join(schemes[:3]) + (f" and {len(schemes) - 3} more" if len(schemes) > 3 else "")
        lines.append(
            f"| {kind} | {len(members)} | {_average_bits(members):.3f} | {min(each):.3f} | {max(each):.3f} | {shown} |"
        )
    return "\n".join(lines)


def _average_bits(layers: Sequence[Mapping[str, Any]]) -> float:
    """Bits a weight over all of `layers`, each counted by its number of weights."""
    counts = [math.prod(layer["shape"]) for layer in layers]
    return sum(n * float(layer["bits_per_weight"]) for n, layer in zip(counts, layers, strict=True)) / sum(counts)


def _how(job: Mapping[str, Any], plan: StoredPlan | None) -> str:
    rounding = job.get("plan", {})
    lines = [
        f"- solver `{rounding.get('solver', 'unknown')}`" + (", then tuned" if rounding.get("tune") else ""),
        f"- calibration: {calibration_text(job.get('calibration'))}",
        f"- bitpalette {job.get('bitpalette_version') or 'of unknown version'}",
    ]
    if plan is not None and plan.command:
        lines.append(f"- planned by `{plan.command}`")
    return "\n".join(lines) + f"\n\nTo make it again:\n\n```python\n{reproduction(job)}\n```"


def _weight_bytes(folder: Path) -> int:
    """Of the weight files and their index."""
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    if single.exists():
        return single.stat().st_size
    names = set(read_json(index).get("weight_map", {}).values())
    return index.stat().st_size + sum((folder / name).stat().st_size for name in names)
