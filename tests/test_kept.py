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
from support.backends import INTERPRETED, gradient_arguments
from support.marks import DTYPES, FAMILIES

from cbloss_fused import triton as kernels
from cbloss_fused.buffers import new_loss, new_saved
from cbloss_fused.inputs import Inputs, compute_dtype
from cbloss_fused.options import Activation, Formula, Options

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps nothing")

N, C = 6, 24


def form(launch: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a kernel's code depends on: the pointers' dtypes, the constants."""
    pointers = arguments[: len(launch.pointers)]
    types = tuple(None if p is None else p.dtype for p in pointers)
    return launch.kernel.__name__, types, launch.constants, launch.warps, launch.registers


def forget(launcher: Any) -> None:
    launcher._kept.clear()
    for cached in ("plan", "scaling"):
        if hasattr(launcher, cached):
            getattr(launcher, cached).cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, Any]]]:
    """Pairs of what a launch needs and what its kernel was compiled for."""
    launcher, pairs = kernels.load(), []
    forget(launcher)
    monkeypatch.setattr(launcher, "_driver", lambda: (lambda: 0, lambda device: 0))

    def compile_launch(launch: Any, pointers: tuple[Any, ...], device: int) -> Any:
        with monkeypatch.context() as patch:
            made = SimpleNamespace(form=form(launch, pointers), run=None)
            patch.setattr(triton.JITFunction, "warmup", lambda *_, **__: made)
            return original(launch, pointers, device)

    original = launcher._compile
    monkeypatch.setattr(launcher, "_compile", compile_launch)
    monkeypatch.setattr(
        launcher,
        "_launch",
        lambda each, arguments, _: pairs.append((form(each, arguments), each.compiled[0].form)),
    )
    yield pairs
    forget(launcher)


def call_everything(
    logits_dtype: torch.dtype, target_dtype: torch.dtype, family: Activation
) -> None:
    """A loss and a recomputed gradient of one shape, each reduction."""
    launcher = kernels.load()
    logits = torch.zeros(N, C, dtype=logits_dtype)
    soft = target_dtype is not torch.int64
    target = torch.zeros((N, C) if soft else (N,), dtype=target_dtype)
    compute = compute_dtype(logits_dtype)
    weight, numbers = torch.ones(C, dtype=compute), Formula.of(Options(family))
    for reduction in range(4):
        loss = new_loss(logits, target, reduction)
        saved = new_saved(logits, family == "sigmoid").zero_()
        inputs = Inputs(target, weight)
        arguments = logits, *inputs, numbers, None, None, reduction
        assert launcher.loss(*arguments, loss, torch.empty_like(logits), None)
        assert launcher.loss(*arguments, loss, None, saved)
        grad = torch.empty_like(logits)
        assert launcher.gradient(*gradient_arguments(logits, inputs, saved, loss, numbers, grad))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_loss(launched: list[tuple[Any, Any]], family: Activation) -> None:
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
            factor = torch.ones((), dtype=compute_dtype(dtype))
            kernels.load().scale_gradient(grad, factor, 100)
    assert len(launched) == 2 * len(DTYPES)
    for needed, compiled_for in launched:
        assert needed == compiled_for
