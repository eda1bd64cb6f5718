"""A line of JSON a test, as they end: `GPU_RESULTS=FOLDER pytest -p bench.pytest_lines`.

Into FOLDER/tests.jsonl: what a run leaves that is cut off. Of pytest-xdist's processes the
controller alone writes, which hears of every test.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from . import lines

REASON = 400  # characters


class Lines:
    def __init__(self, path: Path) -> None:
        self.path = lines.start(path)

    def write(self, **entry: Any) -> None:
        lines.append(self.path, entry)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The call; of what is around it, only what did not pass."""
        if report.when != "call" and report.passed:
            return
        facts = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
        self.write(test=report.nodeid, when=report.when, **facts, **reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, when="collect", outcome="failed", **reason(report))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write(end=int(exitstatus))


def reason(report: pytest.TestReport | pytest.CollectReport) -> dict[str, str]:
    """The exception's message; why it was skipped."""
    found = report.longrepr
    if found is None:
        return {}
    crash = getattr(found, "reprcrash", None)
    text = found[2] if isinstance(found, tuple) else str(getattr(crash, "message", found))
    return {"reason": text[:REASON]}


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get("GPU_RESULTS")
    if folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(Path(folder) / "tests.jsonl"))
