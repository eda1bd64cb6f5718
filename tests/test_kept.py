"""Kernels that are kept: each launch gets the one that was compiled for its dtypes.

Launches go to a driver that does nothing, and compilation only notes what it was for: no GPU is
needed, and every combination is cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.backends import INTERPRETED
from support.marks import DTYPES, FAMILIES

from cbloss_fused import kernels, ops, reference
from cbloss_fused.call import Inputs, formula

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps nothing")

N, C = 6, 24


def form(step: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a kernel's code depends on: the pointers' dtypes, the constants."""
    pointers = arguments[: len(step.pointers)]
    types = tuple(None if p is None else p.dtype for p in pointers)
    return step.kernel.__name__, types, step.constants, step.warps, step.registers


def forget(launch: Any) -> None:
    launch._kept.clear()
    for cached in ("plan", "dense", "scaling"):
        if hasattr(launch, cached):
            getattr(launch, cached).cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, Any]]]:
    """Pairs of what a launch needs and what its kernel was compiled for."""
    launch, pairs = kernels.load(), []
    forget(launch)
    monkeypatch.setattr(launch, "_driver", lambda: (lambda: 0, lambda device: 0))

    def compile_step(step: Any, pointers: tuple[Any, ...], device: int) -> Any:
        with monkeypatch.context() as patch:
            made = SimpleNamespace(form=form(step, pointers), run=None)
            patch.setattr(triton.JITFunction, "warmup", lambda *_, **__: made)
            return original(step, pointers, device)

    original = launch._compile
    monkeypatch.setattr(launch, "_compile", compile_step)
    monkeypatch.setattr(
        launch,
        "_launch",
        lambda step, arguments, _: pairs.append((form(step, arguments), step.compiled[0].form)),
    )
    yield pairs
    forget(launch)


def call_everything(logits_dtype: torch.dtype, target_dtype: torch.dtype, family: str) -> None:
    """A loss and a recomputed gradient of one shape, each reduction."""
    launch = kernels.load()
    logits = torch.zeros(N, C, dtype=logits_dtype)
    dense = target_dtype is not torch.int64
    target = torch.zeros((N, C) if dense else (N,), dtype=target_dtype)
    compute = reference.compute_dtype(logits_dtype)
    weight, numbers = torch.ones(C, dtype=compute), formula(family)
    for reduction in range(4):
        loss = ops.new_loss(logits, target, reduction)
        saved = ops.new_saved(logits, family == "sigmoid").zero_()
        inputs = Inputs(target, weight)
        arguments = logits, *inputs, numbers, None, reduction
        assert launch.loss(*arguments, loss, torch.empty_like(logits), None)
        assert launch.loss(*arguments, loss, None, saved)
        assert launch.gradient(
            logits, target, weight, None, None, saved, loss, numbers, torch.empty_like(logits)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_loss(launched: list[tuple[Any, Any]], family: str) -> None:
    """All dtypes in a row: a kernel that is kept by too little serves the wrong one."""
    targets = (torch.int64, *DTYPES, torch.bool)
    for _ in range(2):
        for logits_dtype in DTYPES:
            for target_dtype in targets:
                call_everything(logits_dtype, target_dtype, family)
    assert len(launched) >= 2 * len(DTYPES) * len(targets) * 4 * 3
    for needed, compiled_for in launched:
        assert needed == compiled_for


def test_of_the_scaling_of_a_stored_gradient(launched: list[tuple[Any, Any]]) -> None:
    for _ in range(2):
        for dtype in DTYPES:
            grad = torch.zeros(100, dtype=dtype)
            factor = torch.ones((), dtype=reference.compute_dtype(dtype))
            kernels.load().scale_gradient(grad, factor, 100)
    assert len(launched) == 2 * len(DTYPES)
    for needed, compiled_for in launched:
        assert needed == compiled_for
