"""Results as lines of JSON, on the disk as soon as they are known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def start(path: Path) -> Path:
    """An empty file, whatever was there, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


def append(path: Path, entry: dict[str, Any]) -> None:
    """A line; a hung or lost machine does not take those before it along."""
    with path.open("a") as file:
        file.write(json.dumps(entry, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
