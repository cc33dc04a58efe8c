"""The one exception of this folder for bad input."""

from __future__ import annotations


class FormatError(ValueError):
    """A file or directory is not what it should be. One line: what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # messages of other libraries may hold line breaks
