"""The GPU benchmark's dry run: what it writes, and that all implementations in it are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import setup
from cbloss_fused import class_balanced_loss
from cbloss_fused.backends import REGISTRY, load_cuda

from . import gpu, gpu_smoke, measure, report
from .cases import (
    ALIGNED,
    ALIGNMENT_SHAPES,
    FIRST_SHAPES,
    FORWARD,
    GPU_COMPILED_CASES,
    GPU_QUICK_CASES,
    GRAPH,
    TRAIN,
    Case,
    SmokeCase,
    gpu_cases,
    smoke_cases,
)
from .launch_cost import emulated
from .result_files import RESULTS, Row, read_lines


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With tensors this small a second thread costs more than it saves on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=("fused", "fused cuda"))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who takes part in a dry run: what the CPU has, or also the CUDA C++ kernels, emulated."""
    monkeypatch.setitem(REGISTRY, "cuda", REGISTRY["cuda"])
    if request.param == "fused cuda":
        real = REGISTRY["cuda"].missing is None and REGISTRY["cuda"].devices == ("cuda",)
        library = None if real else emulated()
        if library is None:
            pytest.skip("needs g++, and no GPU")
        load_cuda(library, "cpu")
    return request.param


def test_dry_run(tmp_path: Path, one_thread: None, name: str) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {"date", "command", "gpu", "driver", "cuda", "torch", "triton", "seconds"} <= set(result)
    assert result["skipped"] == [] and len(result["rows"]) == 2 * len(GPU_QUICK_CASES)
    for row in result["rows"]:
        assert {"shape", "dtype", "activation", "gamma", "passes", RESULTS} == set(row)
        assert {"fused", name, "copy", "eager reference"} <= set(row[RESULTS])
        for each, found in row[RESULTS].items():
            assert found["outcome"] is None, f"{each} in {row['shape']}: {found['outcome']}"
            assert found["median_ms"] > 0 and found["repetitions"] >= 20 and found["host_us"] > 0
    text = path.with_suffix(".md").read_text()
    assert f"## {TRAIN}" in text and f"## {FORWARD}" in text
    assert f"| {name.split()[-1]} ms |" in text


def test_budget_ends_the_run(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--budget", "0", "--out", str(tmp_path)]) == 1
    result = written(tmp_path)
    assert result["rows"] == [] and len(result["skipped"]) == len(GPU_QUICK_CASES)


def written(folder: Path) -> Row:
    """What a run wrote: the lines and the report contain the same."""
    (lines,), (report,) = folder.glob("*.jsonl"), folder.glob("*.json")
    result = json.loads(report.read_text())
    assert json.loads(json.dumps(read_lines(lines)["rows"])) == result["rows"]
    assert next(folder.glob("*.md")).read_text().startswith("# Benchmarks on a GPU")
    return result


def no_measurement(case: Case, *others: object) -> Iterator[Row]:
    yield case.row(TRAIN, {"fused": {"outcome": None, "median_ms": 1.0}})


def test_a_run_continues_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measure_case", no_measurement)
    command = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert gpu.main([*command, "--first", "3"]) == 0
    assert len(written(tmp_path)["rows"]) == 3
    assert gpu.main([*command, "--skip", "3"]) == 0
    names = [(tuple(row["shape"]), row["dtype"]) for row in written(tmp_path)["rows"]]
    assert names == [(case.shape, str(case.dtype)[6:]) for case in GPU_QUICK_CASES]
    assert gpu.main([*command, "--first", "1"]) == 0  # begins anew
    assert len(written(tmp_path)["rows"]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(case: Case, *others: object) -> Iterator[Row]:
        yield from no_measurement(case)
        if case == GPU_QUICK_CASES[1]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(gpu, "measure_case", interrupted)
    before = signal.getsignal(number)
    try:
        assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    finally:
        signal.signal(number, before)
    result = written(tmp_path)
    assert len(result["rows"]) == 2 and result["stopped"] == number.name


def test_a_lost_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error does not, as long as the device responds."""
    answers = iter([True, False])

    def fails(*arguments: object) -> Iterator[Row]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield {}

    monkeypatch.setattr(gpu, "measure_case", fails)
    monkeypatch.setattr(measure, "device_usable", lambda device: next(answers))
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    result = written(tmp_path)
    assert len(result["rows"]) == 1 and "context is lost" in result["stopped"]


def test_first_cases() -> None:
    cases = gpu_cases()
    assert len(set(cases)) == len(cases)
    shapes = {case.shape for case in cases[:24]}
    assert shapes == {*ALIGNMENT_SHAPES, *FIRST_SHAPES}


def test_smoke(tmp_path: Path, one_thread: None, name: str) -> None:
    assert gpu_smoke.main([str(tmp_path), "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    checked = [line for line in lines if line["step"] == "case"]
    assert name.split()[-1].replace("fused", "") in {line["backend"] for line in checked}
    assert lines[-1]["wrong"] == 0
    assert len(checked) % len(smoke_cases()) == 0


def test_smoke_finds_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = class_balanced_loss

    def wrong(x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        return right(x, *others, **options) + 1e-3 * (x - x.detach()).sum()

    monkeypatch.setattr(gpu_smoke, "class_balanced_loss", wrong)
    monkeypatch.setattr(gpu_smoke, "smoke_cases", lambda: [SmokeCase((8, 10), torch.float32, {})])
    assert gpu_smoke.main([str(tmp_path), "--device", "cpu"]) == 1


def test_gpu_run_without_a_gpu() -> None:
    done = subprocess.run(
        ["bench/gpu_run.sh"], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ("bench/gpu_run.sh: no GPU here: torch.cuda.is_available() is False\n")


def test_kernel_tests_draw_on_their_device() -> None:
    """On a GPU, which is the default device there, a generator of the CPU raises."""
    root = Path(__file__).parent.parent
    for name in (root / "bench/gpu_tests.txt").read_text().split():
        assert "torch.Generator()" not in (root / name).read_text(), name


def test_a_line_for_each_test(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='why')\ndef test_left(): pass\n"
    )
    root = Path(__file__).parent.parent
    plugins = ["-p", "bench.pytest_lines", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "-c", os.devnull, str(tests)], cwd=root,
        env={**os.environ, "GPU_RESULTS": str(tmp_path / "out"), "PYTHONPATH": str(root)},
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    text = (tmp_path / "out" / "tests.jsonl").read_text()
    good, bad, left, end = (json.loads(line) for line in text.splitlines())
    assert [entry["outcome"] for entry in (good, bad, left)] == ["passed", "failed", "skipped"]
    assert "1 == 2" in bad["reason"] and "why" in left["reason"] and end == {"end": 1}


def test_what_makes_a_library_stale(tmp_path: Path) -> None:
    library, path = tmp_path / "_C.so", tmp_path / "_C.stamp"
    library.write_bytes(b"code")
    stamp = setup.Stamp(path, library, "sources")
    assert not stamp.current(lambda: "tools", keep=False)
    assert stamp.current(lambda: "tools", keep=True)  # its origin is unknown
    stamp.write("tools")
    assert stamp.current(lambda: "tools", keep=False)
    assert not stamp.current(lambda: "others", keep=False)
    assert stamp.current(lambda: "others", keep=True)
    for keep in (False, True):
        assert not setup.Stamp(path, library, "changed").current(lambda: "tools", keep)
    library.write_bytes(b"other code")
    assert not stamp.current(lambda: "tools", keep=True)
    library.unlink()
    assert not stamp.current(lambda: "tools", keep=True)


def test_digest_of_sources(tmp_path: Path) -> None:
    """A header's contents count, its time does not; nor does the other library's folder."""
    for name in ("csrc/ops.h", "csrc/cpu/kernels.h", "csrc/cuda/dispatch.cu", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = setup.digest_of_sources("cuda", tmp_path)
    os.utime(tmp_path / "csrc/ops.h", (0, 0))
    (tmp_path / "csrc/cuda/dispatch.cu").write_text("changed")
    assert setup.digest_of_sources("cuda", tmp_path) == before
    (tmp_path / "csrc/ops.h").write_text("changed")
    assert setup.digest_of_sources("cuda", tmp_path) != before


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every backend that is available, the default first."""
    case, device = GPU_COMPILED_CASES[0], torch.device("cuda")

    def names(**missing: str | None) -> list[str]:
        for name, why in missing.items():
            monkeypatch.setitem(REGISTRY, name, REGISTRY[name]._replace(missing=why))
        return [each.name for each in gpu.fused(case, device)]

    monkeypatch.setitem(REGISTRY, "cuda", REGISTRY["cuda"]._replace(devices=("cuda",)))
    assert names(cuda=None, triton=None) == ["fused cuda", "fused triton"]
    assert names(cuda="not built") == ["fused triton"]
    assert names(triton="not installed") == ["fused"]


def test_table_of_two_backends() -> None:
    """Each has a column; rivals are compared with the default, which comes first."""
    ms = {"fused cuda": 2.0, "fused triton": 3.0, "eager ce_none": 8.0, "copy": 1.0}
    weighted = {"weighted cuda": 4.0, "weighted triton": 1.0, "cross_entropy": 6.0}
    results = {
        name: {"outcome": None, "median_ms": each, "host_us": each}
        for name, each in (ms | weighted).items()
    }
    case = GPU_COMPILED_CASES[0]
    rows = [case.row(title, results) for title in (TRAIN, GRAPH)]
    even = case._replace(shape=ALIGNED).row(TRAIN, results)
    line = report.gpu_cells(rows[0], rows)
    expected = {"cuda ms": "2", "triton ms": "3", "triton / cuda": "1.50", "graph ms": "2, 3"}
    expected |= {
        "forward ms": "-, -",
        "eager / fused": "4.00 ce_none",
        "cross_entropy / fused": "1.50",
    }
    expected |= {
        "% of copy": "50, 33",
        "floor ms": "1",
        "% of floor": "50, 33",
        "host µs": "2, 3, 8",
    }
    assert {key: line[key] for key in expected} == expected
    (found,) = report.cost_of_alignment([*rows, even], TRAIN)
    assert found.endswith(": float32 softmax 0: cuda 1.00, triton 1.00")


def test_floors_of_the_page() -> None:
    found = report.floors()
    assert found[report.floor_key((4096, 8142), "bfloat16", "softmax 0")].memory == 44.5
    assert report.floor_key((8, 19, 512, 512), "float32", "sigmoid 0.5") in found
