"""The GPU benchmark's dry run: what it writes, and that everyone in it is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cbloss_fused import cuda, kernels, ops

from . import gpu, gpu_cases, gpu_table
from .launch_cost import emulated


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small wait for a second thread, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=("fused", "fused cuda"))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who takes part in a dry run: what the CPU has; beside it the CUDA C++ kernels, emulated."""
    monkeypatch.setattr(cuda, "device", cuda.device)
    monkeypatch.setattr(cuda, "missing", cuda.missing)
    if request.param == "fused cuda":
        library = None if cuda.device == "cuda" else emulated()
        if library is None:
            pytest.skip("needs g++, and no GPU")
        cuda.load_from(library, "cpu")
    return request.param


def test_dry_run(tmp_path: Path, one_thread: None, name: str) -> None:
    path = tmp_path / "dry.json"
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads(path.read_text())
    assert {"date", "command", "gpu", "driver", "cuda", "torch", "triton", "seconds"} <= set(result)
    assert result["skipped"] == [] and len(result["rows"]) == 2 * len(gpu_cases.QUICK)
    for row in result["rows"]:
        assert {"shape", "dtype", "activation", "gamma", "passes", "contestants"} == set(row)
        assert {"fused", name, "copy", "eager reference"} <= set(row["contestants"])
        for each, found in row["contestants"].items():
            assert found["outcome"] is None, f"{each} in {row['shape']}: {found['outcome']}"
            assert found["median_ms"] > 0 and found["repetitions"] >= 20 and found["host_us"] > 0
    text = path.with_suffix(".md").read_text()
    assert f"## {gpu_table.TRAIN}" in text and f"## {gpu_table.FORWARD}" in text
    assert f"| {name.split()[-1]} ms |" in text


def test_budget_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    assert gpu.main(["--device", "cpu", "--quick", "--budget", "0", "--out", str(tmp_path)]) == 1
    result = json.loads(path.read_text())
    assert result["rows"] == [] and len(result["skipped"]) == len(gpu_cases.QUICK)


@pytest.mark.parametrize("preferred, other", [("cuda", "triton"), ("triton", "cuda")])
def test_who_takes_part(monkeypatch: pytest.MonkeyPatch, preferred: str, other: str) -> None:
    """On a GPU every backend that is there, the default's first."""
    case, device = gpu_cases.COMPILED[0], torch.device("cuda")
    monkeypatch.setattr(ops, "PREFERRED", preferred)
    monkeypatch.setattr(cuda, "device", "cuda")
    monkeypatch.setattr(kernels, "available", True)
    assert [c.name for c in gpu_cases.fused(case, device)] == [
        f"fused {preferred}",
        f"fused {other}",
    ]
    monkeypatch.setattr(cuda, "device", None)
    assert [c.name for c in gpu_cases.fused(case, device)] == ["fused triton"]
    monkeypatch.setattr(kernels, "available", False)
    assert [c.name for c in gpu_cases.fused(case, device)] == ["fused"]


def test_table_of_two_backends() -> None:
    """Each has a column, rivals are held to the default's, which comes first."""
    ms = {"fused cuda": 2.0, "fused triton": 3.0, "eager ce_none": 8.0, "copy": 1.0}
    weighted = {"weighted cuda": 4.0, "weighted triton": 1.0, "cross_entropy": 6.0}
    results = {
        name: {"outcome": None, "median_ms": each, "host_us": each}
        for name, each in (ms | weighted).items()
    }
    case = gpu_cases.COMPILED[0]
    rows = [gpu.as_row(case, title, results) for title in (gpu_table.TRAIN, gpu_table.GRAPH)]
    even = gpu.as_row(case._replace(shape=gpu_table.EVEN), gpu_table.TRAIN, results)
    line = gpu_table.cells(rows[0], rows)
    want = {"cuda ms": "2", "triton ms": "3", "triton / cuda": "1.50", "graph ms": "2, 3"}
    want |= {"forward ms": "-, -", "eager / fused": "4.00 ce_none", "cross_entropy / fused": "1.50"}
    want |= {"% of copy": "50, 33", "host µs": "2, 3, 8"}
    assert {key: line[key] for key in want} == want
    (found,) = gpu_table.misaligned([*rows, even], gpu_table.TRAIN)
    assert found.endswith(": float32 softmax 0: cuda 1.00, triton 1.00")
