"""Taking back what a run has created, where it turns out that its input is bad."""

from __future__ import annotations

import shutil
from pathlib import Path


class Created:
    """Remembers which of some folders were not there, and `remove`s them as they were before: absent or empty.

    For folders that are to be filled by one run alone: absent, or holding nothing worth keeping.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = [folder.absolute() for folder in folders]
        self.absent = [path for folder in self.folders for path in (folder, *folder.parents) if not path.exists()]

    def remove(self) -> None:
        for folder in self.folders:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        for path in self.absent:  # innermost first
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
