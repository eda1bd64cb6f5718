"""One line of JSON per test as it ends: `GPU_RESULTS=FOLDER pytest -p bench.pytest_lines`.

The lines go to FOLDER/tests.jsonl, where they remain if the run is cut off. With pytest-xdist only
the controller writes, which gets the report of every test.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from .result_files import append_line, start_lines

REASON_LENGTH = 400  # characters


class Lines:
    def __init__(self, path: Path) -> None:
        self.path = start_lines(path)

    def write(self, **entry: Any) -> None:
        append_line(self.path, entry)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a line for each test's call, and for a set-up or teardown that did not pass."""
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
    """The exception's message, or why the test was skipped."""
    found = report.longrepr
    if found is None:
        return {}
    crash = getattr(found, "reprcrash", None)
    text = found[2] if isinstance(found, tuple) else str(getattr(crash, "message", found))
    return {"reason": text[:REASON_LENGTH]}


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get("GPU_RESULTS")
    if folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(Path(folder) / "tests.jsonl"))
