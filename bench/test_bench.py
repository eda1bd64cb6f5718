"""The same cases under pytest-benchmark, forward + backward: `pytest bench --benchmark-enable`.

Without that option every contestant is only checked.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import measure
from .cases import CASES, Case, Problem, contestants, problem


@lru_cache(maxsize=1)
def prepared(case: Case) -> tuple[Problem, measure.Wanted]:
    given = problem(case)
    return given, measure.wanted(case, given)


def everyone() -> list[object]:
    """Compilation is left to bench.run: it would take longer than everything else."""
    return [
        pytest.param(case, contestant.name, id=f"{contestant.name.replace(' ', '_')}-{case}")
        for case in CASES
        for contestant in contestants(case)
    ]


@pytest.mark.parametrize("case, name", everyone())
def test_bench(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    given, want = prepared(case)
    contestant = next(contestant for contestant in contestants(case) if contestant.name == name)
    run = measure.Run(contestant, given, train=True)
    assert measure.check(case, run, want).outcome is None
    benchmark.group = "x".join(map(str, case.shape))
    rounds = 1000 if len(given.target) < 100 else 20
    benchmark.pedantic(run, setup=lambda: ((run.prepare(),), {}), rounds=rounds, warmup_rounds=1)
