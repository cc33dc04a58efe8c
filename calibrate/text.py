"""Calibration text -> token sequences."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CalibrationError(ValueError):
    """The calibration text cannot serve. One line."""


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on: text is a file's path, "builtin" (English prose that comes with Python: the topics of
    pydoc) or "self" (the model writes its own); `tokens` in sequences of `seq_len`."""

    text: str = "builtin"
    tokens: int = 16384
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seq_len < 8:
            raise CalibrationError(f"a sequence length of {self.seq_len} is too short to calibrate on; at least 8")
        if self.tokens < self.seq_len:
            raise CalibrationError(f"{self.tokens} calibration tokens are less than one sequence of {self.seq_len}")

    @property
    def sequences(self) -> int:
        return self.tokens // self.seq_len

    def fingerprint(self) -> str:
        """Changes with the text's bytes, the number of tokens, the sequence length and the seed."""
        if self.text in ("builtin", "self"):
            content = builtin_text().encode() if self.text == "builtin" else b"self"
        else:
            content = read_text(self.text).encode()
        digest = hashlib.sha256(content)
        digest.update(f"{self.tokens}/{self.seq_len}/{self.seed}".encode())
        return digest.hexdigest()


def builtin_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    """The file's text (UTF-8). CalibrationError where it is missing, empty or not text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as text: {error}") from None
    if not text.strip():
        raise CalibrationError(f"{path}: the text is empty; give one with some thousand words")
    return text


def check_length(seq_len: int, positions: Any, path: Path) -> None:
    """CalibrationError where sequences are longer than the positions (None: not known) of the model at `path`."""
    if isinstance(positions, int) and seq_len > positions:
        raise CalibrationError(
            f"sequences of {seq_len} tokens are longer than the {positions} positions of {path}; give "
            f"--seq-len {positions}"
        )


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids, int64 [n], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def sequences(calibration: Calibration, tokenizer: Any) -> Tensor:
    """int64 [sequences, seq_len]: evenly spaced over the whole text. Not for "self", see `self_written`."""
    text = builtin_text() if calibration.text == "builtin" else read_text(calibration.text)
    ids = tokenize(tokenizer, text)
    n, length = calibration.sequences, calibration.seq_len
    if len(ids) < n * length:
        raise CalibrationError(
            f"{calibration.text}: the text has {len(ids)} tokens, {n * length} were asked for; "
            f"give a longer text or --calib-tokens {max(len(ids) // length * length, 8)}"
            + (f" --seq-len {max(len(ids) // 2, 8)}" if len(ids) < length else "")
        )
    starts = torch.arange(n, device="cpu") * ((len(ids) - length) // max(n - 1, 1) if n > 1 else 0)
    return torch.stack([ids[s : s + length] for s in starts.tolist()])


def held_out_sequences(calibration: Calibration, tokenizer: Any, count: int) -> Tensor:
    """int64 [count, seq_len] of the calibration text, centred between the places that `sequences` takes; where the text
    is shorter than twice what those take, they overlap with them. "self" is held out on the builtin text."""
    text = read_text(calibration.text) if calibration.text not in ("builtin", "self") else builtin_text()
    ids = tokenize(tokenizer, text)
    n, length = calibration.sequences, calibration.seq_len
    if len(ids) < 2 * length:
        raise CalibrationError(
            f"{calibration.text}: the text has {len(ids)} tokens, too few to hold {count} sequences of {length} out; "
            "give a longer text or --refine 0"
        )
    step = (len(ids) - length) / max(n - 1, 1)
    gaps = torch.linspace(0, max(n - 2, 0), min(count, max(n - 1, 1)), device="cpu").round().unique()
    starts = ((gaps + 0.5) * step).long().clamp(max=len(ids) - length)
    return torch.stack([ids[s : s + length] for s in starts.tolist()])


def self_written(calibration: Calibration, model: Any) -> Tensor:
    """int64 [sequences, seq_len] sampled from the whole model, where it is, at temperature 1, each begun with a random
    token; on the CPU. Another device draws other tokens."""
    if not model.can_generate():
        raise CalibrationError(f"{type(model).__name__} does not write text; give a text file or builtin (--calib)")
    generator = torch.Generator("cpu").manual_seed(calibration.seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = torch.randint(vocabulary, (calibration.sequences, 1), generator=generator, device="cpu")
    torch.manual_seed(calibration.seed)
    parts = []
    for batch in first.to(model.device).split(16):
        parts.append(
            model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=calibration.seq_len - 1,
                max_new_tokens=calibration.seq_len - 1,
                pad_token_id=0,
            )
        )
    return torch.cat(parts).cpu()
