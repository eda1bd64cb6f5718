"""A detector's focal loss, most rows background: the table of `python -m bench.cpu detection`."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cbloss_fused import class_balanced_loss

from . import measure
from .cases import Problem
from .losses import Implementation, LossFunction, bce
from .measure import CpuRun

SHAPE = (100_000, 80)  # anchors of an image or two, COCO's classes
BACKGROUND = SHAPE[1]  # the label of 95 % of the rows
OPTIONS: dict[str, Any] = {"activation": "sigmoid", "gamma": 2.0, "alpha": 0.25}


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    rows, C = SHAPE
    target = torch.randint(C, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.95] = BACKGROUND
    logits = torch.randn(SHAPE, generator=generator).mul_(2)
    return Problem(logits.requires_grad_(), target, torch.ones(C))


def one_hot(target: Tensor) -> Tensor:
    """bool, all False in the rows of background."""
    return F.one_hot(target, BACKGROUND + 1)[:, :BACKGROUND].bool()


def focal(x: Tensor, t: Tensor, positives: Tensor) -> Tensor:
    """torchvision's formula, sigmoid_focal_loss(x, t, 0.25, 2, "sum") / positives."""
    p, nll = torch.sigmoid(x), bce(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((0.25 * t + 0.75 * (1 - t)) * nll * (1 - p_t) ** 2).sum() / positives


def lines(budget: float) -> list[dict[str, str]]:
    """One line for each way to give the targets; times relative to no background rows at all."""
    given = problem()
    labelled = given.target.remainder(BACKGROUND)  # the same call with a class in every row
    labels = one_hot(given.target)
    ready, positives = labels.float(), labels.sum()

    def fused(target: Tensor, **more: Any) -> LossFunction:
        def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return class_balanced_loss(x, target, normalizer=positives, **OPTIONS, **more)

        return loss

    functions: dict[str, LossFunction] = {
        "class indices, no background row": fused(labelled),
        "class indices, background_index": fused(given.target, background_index=BACKGROUND),
        "bool targets, made before": fused(labels),
        "float targets, made before": fused(ready),
        "one_hot, then bool targets": lambda x, y, w: fused(one_hot(y))(x, y, w),
        "torchvision's formula, float targets made before": lambda x, y, w: focal(
            x, ready, positives
        ),
        "torchvision's formula, one_hot": lambda x, y, w: focal(x, one_hot(y).float(), positives),
    }
    runs = [CpuRun(Implementation(name, loss), given, True) for name, loss in functions.items()]
    check(runs[1:])
    plain, *_ = times = measure.times(runs, 1, budget)
    return [
        {
            "targets": name,
            "ms": f"{median(ms):.1f}",
            "ratio of medians": f"{median(ms) / median(plain):.2f}",
            "of minima": f"{min(ms) / min(plain):.2f}",
        }
        for name, ms in zip(functions, times, strict=True)
    ]


def check(runs: list[CpuRun]) -> None:
    """All of them compute the same gradient."""
    grads = []
    for run in runs:
        run(run.prepare())
        assert run.given.logits.grad is not None
        grads.append(run.given.logits.grad.clone())
    for run, grad in zip(runs, grads, strict=True):
        worst = (grad - grads[0]).abs().max() / grads[0].abs().max()
        assert worst < 1e-5, f"{run.implementation.name} differs by {worst:.1e}"
