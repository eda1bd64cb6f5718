"""Runs kept as JSON lines: resumed, and never mistaken for others."""

import os

import pytest

pytest.importorskip("tqdm")
from cbloss_fused.experiments.runs import find_run, read_runs, run_missing

JOBS = [{"loss": loss, "seed": seed} for loss in ("a", "β") for seed in (0, 1)]


def accuracy(job):
    return 10 * job["seed"] + len(job["loss"])


def test_runs_are_kept_and_not_repeated(tmp_path):
    path, ran = tmp_path / "runs.jsonl", []

    def run(job):
        ran.append(job)
        return {"accuracy": accuracy(job)}

    records = run_missing(path, JOBS, run)
    assert records == [job | {"accuracy": accuracy(job)} for job in JOBS]
    assert ran == JOBS
    assert run_missing(path, JOBS[::-1], run) == records[::-1]
    assert ran == JOBS
    assert read_runs(path) == records


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_killed_while_writing(tmp_path, cut):
    path = tmp_path / "runs.jsonl"
    run_missing(path, JOBS[:2], lambda job: {"accuracy": accuracy(job)})
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_runs(path)) == 1
    ran = []

    def run(job):
        ran.append(job)
        return {"x": 1}

    records = run_missing(path, JOBS, run)
    assert ran == JOBS[1:]
    assert read_runs(path) == records


def test_killed_in_a_run(tmp_path):
    path = tmp_path / "runs.jsonl"

    def run(job):
        if job["seed"] == 1:
            raise KeyboardInterrupt
        return {"accuracy": 1}

    with pytest.raises(KeyboardInterrupt):
        run_missing(path, JOBS, run)
    assert read_runs(path) == [JOBS[0] | {"accuracy": 1}]


def in_process(job):
    return {"process": os.getpid(), "accuracy": accuracy(job)}


@pytest.mark.long
def test_workers(tmp_path):
    path = tmp_path / "runs.jsonl"
    records = run_missing(path, JOBS, in_process, workers=2)
    assert [r["accuracy"] for r in records] == [accuracy(job) for job in JOBS]
    assert os.getpid() not in {r["process"] for r in records}
    assert sorted(map(str, read_runs(path))) == sorted(map(str, records))


def test_another_parameter_is_another_run():
    records = [{"loss": "a", "betas": [0.9, 0.99], "seed": 0, "accuracy": 5}]
    assert find_run(records, {"loss": "a", "betas": (0.9, 0.99)}) == records[0]
    assert find_run(records, {"loss": "a", "epochs": 3}) is None
    assert find_run(records, {"loss": "b"}) is None


@pytest.mark.parametrize("line", ["{", "3", "[]", ""])
def test_other_files_are_refused(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2: expected a JSON object"):
        read_runs(path)
