"""What a benchmark on a GPU leaves, also where it ends before its time."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from . import lines
from .gpu_table import Row, read, report


class Journal:
    """The rows, each a line in the file as soon as it is known."""

    def __init__(self, folder: Path, facts: Row, goes_on: bool) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
        self.path, self.facts = folder / f"{slug}-{facts['date']}.jsonl", facts
        self.before = read(self.path)["rows"] if goes_on and self.path.exists() else []
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        if not (goes_on and self.path.exists()):
            lines.start(self.path)
        self.line({"facts": facts})

    def line(self, entry: Row) -> None:
        lines.append(self.path, entry)

    def row(self, row: Row) -> None:
        self.rows.append(row)
        self.line(row)

    def skip(self, note: str) -> None:
        self.skipped.append(note)
        self.line({"skipped": note})

    def report(self, **more: Any) -> str:
        """Also written, beside the lines; with the rows of the run that this one goes on with."""
        self.line({"facts": more})
        rows = self.before + self.rows
        result = {**self.facts, **more, "skipped": self.skipped, "rows": rows}
        text = report(result)
        self.path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(text)
        return text


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise KeyboardInterrupt, even where a shell has them ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:  # the report is not interrupted
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
