"""Runs of an experiment, kept as JSON lines: what the file has is not run again."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

Record: TypeAlias = dict[str, Any]  # of JSON values


def read_runs(path: Path) -> list[Record]:
    """All records of the file, [] if there is none; a line that was cut off is left out.

    Raises: ValueError: a line, other than a last one without its end, is no JSON object.
    """
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
        records.append(record)
    return records


def find_run(records: Iterable[Record], job: Record) -> Record | None:
    """The first record that has every value of the job."""
    wanted = json.loads(json.dumps(job)).items()  # as the file has it: tuples are lists
    return next((r for r in records if wanted <= r.items()), None)


def run_missing(
    path: Path, jobs: list[Record], run: Callable[[Record], Record], workers: int = 1
) -> list[Record]:
    """The records of all jobs, in their order; those not in the file are run and appended.

    Killed and started again, it goes on with the runs that were cut off.

    Args:
        jobs: parameters, by which a record is found again.
        run: takes a job and returns what is to be kept beside its parameters.
        workers: processes, for 2 and more of which `run` must be importable (pickled).
    """
    done = read_runs(path)
    found = [find_run(done, job) for job in jobs]
    missing = [i for i, record in enumerate(found) if record is None]
    _end_last_line(path)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="run", smoothing=0)
    with bar, path.open("a", encoding="utf-8") as file:
        for i, result in _results(run, {i: jobs[i] for i in missing}, workers):
            found[i] = record = jobs[i] | result
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
    return [record for record in found if record is not None]


def _results(
    run: Callable[[Record], Record], jobs: dict[int, Record], workers: int
) -> Iterator[tuple[int, Record]]:
    """The result of each job, as it is known."""
    if min(workers, len(jobs)) <= 1:
        for i, job in jobs.items():
            yield i, run(job)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_leave_with_parent) as pool:
        of_future = {pool.submit(run, job): i for i, job in jobs.items()}
        try:
            for future in as_completed(of_future):
                yield of_future[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _leave_with_parent() -> None:
    """A worker must not outlive a parent that was killed."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _end_last_line(path: Path) -> None:
    """Cut off what a killed run left of its line."""
    if path.exists():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            path.write_bytes(data[:end])
