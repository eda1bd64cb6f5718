"""Results on disk: lines of JSON as soon as they are known, and a report at the end.

PyTorch is not imported here, so that pytest can load pytest_lines.py before everything else.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]
RESULTS = "contestants"  # the key, in the files, of a row's results by implementation


def start_lines(path: Path) -> Path:
    """Create an empty file, and its folder if need be, or empty the existing one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


def append_line(path: Path, entry: Row) -> None:
    """Append a line of JSON and wait for the disk: a crash must not lose the lines so far."""
    with path.open("a") as file:
        file.write(json.dumps(entry, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(*paths: Path) -> Row:
    """What files of lines contain. Of two rows for the same case and pass the later counts."""
    facts: Row = {}
    rows: dict[str, Row] = {}
    skipped: list[str] = []
    for line in (line for path in paths for line in path.read_text().splitlines()):
        entry = json.loads(line)
        if "facts" in entry:
            facts |= entry["facts"]
        elif "skipped" in entry:
            skipped.append(entry["skipped"])
        else:
            entry["shape"] = tuple(entry["shape"])
            rows[str({**entry, RESULTS: None})] = entry
    return {**facts, "skipped": skipped, "rows": list(rows.values())}


def save(path: Path, result: Row, text: str) -> None:
    """Write the result as JSON, and its report beside it as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)


class Journal:
    """The rows of a run on a GPU, each written to a file of lines as soon as it is measured."""

    def __init__(self, folder: Path, facts: Row, resume: bool) -> None:
        """`resume` appends to the file of an earlier run on the same GPU and day."""
        slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
        self.path, self.facts = folder / f"{slug}-{facts['date']}.jsonl", facts
        resume = resume and self.path.exists()
        self.earlier_rows = read_lines(self.path)["rows"] if resume else []
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        if not resume:
            start_lines(self.path)
        append_line(self.path, {"facts": facts})

    def row(self, row: Row) -> None:
        self.rows.append(row)
        append_line(self.path, row)

    def skip(self, note: str) -> None:
        """Note a case that is not measured, and why."""
        self.skipped.append(note)
        append_line(self.path, {"skipped": note})

    def result(self, **facts: Any) -> Row:
        """Everything, with the rows of the run that was resumed and facts known only at the end."""
        append_line(self.path, {"facts": facts})
        rows = self.earlier_rows + self.rows
        return {**self.facts, **facts, "skipped": self.skipped, "rows": rows}


@contextmanager
def interruptible() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM raise KeyboardInterrupt, even if they were ignored.

    A shell lets commands in the background ignore SIGINT.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:  # a second signal must not interrupt the report
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
