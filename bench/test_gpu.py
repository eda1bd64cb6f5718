"""The GPU benchmark's dry run: what it writes, and that everyone in it is right."""

from __future__ import annotations

import json
from pathlib import Path

from . import gpu


def test_dry_run(tmp_path: Path) -> None:
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
    assert f"## {gpu.TRAIN}" in text and f"## {gpu.FORWARD}" in text
