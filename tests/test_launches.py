"""What a call does on a GPU, recorded instead of run: launches, allocations, torch's operators.

Soft targets and weights of classes beside class indices: nothing reads a value (which would wait
for the device, and no CUDA graph could hold it), nothing of N x C is made but the gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import MARKS, gradient_arguments
from support.marks import FAMILIES, REDUCTIONS
from torch.utils._python_dispatch import TorchDispatchMode

from cbloss_fused import triton
from cbloss_fused.buffers import co_aligned, new_loss, new_saved
from cbloss_fused.inputs import Inputs
from cbloss_fused.options import Activation, ClassWeighting, Formula, Options, Reduction

pytest.importorskip("triton")
N, C = 64, 1000
ALLOCATE = {"empty_like", "new_empty", "empty", "empty_strided"}
VIEW = {"view", "detach", "as_strided", "select", "alias"}


class Recorded(TorchDispatchMode):
    """The aten operators that are called, and the elements that each makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        size = result.numel() if isinstance(result, torch.Tensor) else 0
        self.calls.append((func._opname, size))
        return result


def record(
    monkeypatch: pytest.MonkeyPatch, family: Activation, kind: str, reduction: Reduction,
    weighted: bool, sampled: bool, recompute: bool, **options: Any,
) -> tuple[list[str], list[tuple[str, int]]]:  # fmt: skip
    """Names of the kernels of a forward, or of a recomputing backward, and torch's operators."""
    launcher = triton.load()
    found: list[str] = []
    names = lambda plan: found.extend(launch.kernel.__name__ for launch in plan.launches)  # noqa: E731
    monkeypatch.setattr(launcher, "run", lambda plan, tensors, like: names(plan))
    logits = torch.zeros(N, C)
    target = {
        "soft": torch.zeros(N, C),
        "multi-hot": torch.zeros(N, C, dtype=torch.bool),
        "classes": torch.zeros(N, dtype=torch.int64),
    }[kind]
    weight = torch.ones(C) if weighted else None
    sample_weight = torch.ones(N) if sampled else None
    weighting: ClassWeighting = "class" if kind == "classes" else "sample"
    numbers = Formula.of(Options(family, class_weighting=weighting, **options))
    number = REDUCTIONS.index(reduction)
    with Recorded() as recorded:
        loss = new_loss(logits, target, number)
        grad = co_aligned(logits)
        if recompute:
            saved = new_saved(logits, family == "sigmoid")
            inputs = Inputs(target, weight)
            arguments = gradient_arguments(logits, inputs, saved, loss, numbers, grad)
            assert launcher.gradient(*arguments)
        else:
            inputs = Inputs(target, weight, sample_weight)
            assert launcher.loss(logits, *inputs, numbers, *MARKS, number, loss, grad, None)
    return found, recorded.calls


@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
@pytest.mark.parametrize("weighted", (False, True), ids=("plain", "weighted"))
@pytest.mark.parametrize("sampled", (False, True), ids=("rows-alike", "sampled"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ("soft", "multi-hot", "classes"))
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_alone(
    monkeypatch: pytest.MonkeyPatch, family: Activation, kind: str, reduction: Reduction,
    weighted: bool, sampled: bool, recompute: bool,
) -> None:  # fmt: skip
    if kind == "classes" and (family == "softmax" or reduction == "weighted_mean"):
        pytest.skip("refused before")
    options = {} if family == "sigmoid" else {"label_smoothing": 0.1, "z_loss": 1e-3}
    found, calls = record(
        monkeypatch, family, kind, reduction, weighted, sampled, recompute, **options
    )
    for name, size in calls:
        assert name in ALLOCATE | VIEW, name
        if name in ALLOCATE and size > 4 * N:
            assert size == N * C
    assert sum(size == N * C and name in ALLOCATE for name, size in calls) == 1  # the gradient
    if recompute:
        assert found == [f"{family}_soft"]
        return
    before = []
    if kind == "classes":
        before = ["prologue"]  # ignore_index
    else:
        total = reduction == "weighted_mean"
        before = ["label_weights"] * (weighted and (total or family == "sigmoid"))
        before += ["prologue"] * (total and (weighted or sampled))
    after = [] if reduction == "none" else ["epilogue"]
    assert found == [*before, f"{family}_soft", *after]
