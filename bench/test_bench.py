"""The same cases under pytest-benchmark, forward + backward: `pytest bench --benchmark-enable`.

Without that option every implementation is only checked.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import measure
from .cases import CPU_CASES, Case, Problem, problem
from .cpu import implementations


@lru_cache(maxsize=1)
def prepared(case: Case) -> tuple[Problem, measure.Expected]:
    given = problem(case)
    return given, measure.expected_result(case, given)


def everyone() -> list[object]:
    """Without torch.compile, which would take longer than everything else: bench.cpu has it."""
    return [
        pytest.param(case, each.name, id=f"{each.name.replace(' ', '_')}-{case}")
        for case in CPU_CASES
        for each in implementations(case)
    ]


@pytest.mark.parametrize("case, name", everyone())
def test_bench(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    given, expected = prepared(case)
    implementation = next(each for each in implementations(case) if each.name == name)
    run = measure.CpuRun(implementation, given, train=True)
    assert measure.check(case, run, expected).outcome is None
    benchmark.group = "x".join(map(str, case.shape))
    rounds = 1000 if len(given.target) < 100 else 20
    benchmark.pedantic(run, setup=lambda: ((run.prepare(),), {}), rounds=rounds, warmup_rounds=1)
