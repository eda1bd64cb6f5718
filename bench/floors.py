"""What bench/roofline.md predicts, to be held beside what a GPU measures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("roofline.md")
Key = tuple[str, str, str]  # "(4096, 8142)", "bfloat16", "softmax 0"


class Floor(NamedTuple):
    """Microseconds."""

    memory: float
    issue: float
    special: float


def key(shape: tuple[int, ...], dtype: str, loss: str) -> Key:
    """Classes in the second dimension, all after it in one."""
    rest = [1]
    for length in shape[2:]:
        rest[0] *= length
    dims = [*shape[:2], *(rest if len(shape) > 2 else [])]
    return f"({', '.join(map(str, dims))})", dtype, loss


def floors(page: Path = PAGE) -> dict[Key, Floor]:
    """Of every row of the page's table."""
    found = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0].startswith("("):
            found[cells[0], cells[1], cells[2]] = Floor(*map(float, cells[4:7]))
    return found
