"""The GPU benchmark's dry run: what it writes, and that everyone in it is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import gpu, gpu_table


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small wait for a second thread, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_dry_run(tmp_path: Path, one_thread: None) -> None:
    path = tmp_path / "dry.json"
    assert gpu.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"date", "command", "gpu", "driver", "cuda", "torch", "triton", "seconds"} <= set(result)
    assert result["skipped"] == [] and len(result["rows"]) == 2 * len(gpu.QUICK)
    for row in result["rows"]:
        assert {"shape", "dtype", "activation", "gamma", "passes", "contestants"} == set(row)
        assert {"fused", "copy", "eager reference"} <= set(row["contestants"])
        for name, found in row["contestants"].items():
            assert found["outcome"] is None, f"{name} in {row['shape']}: {found['outcome']}"
            assert found["median_ms"] > 0 and found["repetitions"] >= 20 and found["host_us"] > 0
    text = path.with_suffix(".md").read_text()
    assert f"## {gpu_table.TRAIN}" in text and f"## {gpu_table.FORWARD}" in text


def test_budget_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    assert gpu.main(["--device", "cpu", "--quick", "--budget", "0", "--json", str(path)]) == 1
    result = json.loads(path.read_text())
    assert result["rows"] == [] and len(result["skipped"]) == len(gpu.QUICK)
