"""The long-tail family and soft targets beside eager PyTorch and torch.compile of it, on this CPU.

Forward and backward in turns, written to bench/results/family-cpu.md: `python -m bench.family`.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cbloss_fused import class_balanced_loss, ldam_margin, logit_adjustment

from . import measure
from .cases import CLASSES, Case, Contestant, LossFunction, Problem, counts, problem
from .run import RESULTS, save

THREADS, BUDGET = 2, 2.0  # seconds a row
SHAPES = (CLASSES, (1_000_000, 10), (8, 19, 256, 256))
AGREE = 1e-3  # of the largest gradient
bce = F.binary_cross_entropy_with_logits


class Member(NamedTuple):
    """A loss: our options, and what people write for (logits, target, weight), a mean over rows."""

    name: str
    options: dict[str, Any]
    eager: LossFunction
    target: str = "index"


def members(n_c: Tensor) -> list[Member]:
    """All of them, for classes of so many samples; eager PyTorch has its constants ready too."""
    bias, margin = logit_adjustment(n_c), ldam_margin(n_c)
    sigmoid: dict[str, Any] = {"activation": "sigmoid"}
    focal = {"gamma": 2.0, "alpha": 0.25, **sigmoid}
    asymmetric = {"gamma": 1.0, "gamma_neg": 4.0, "clip": 0.05, **sigmoid}
    return [
        Member("label smoothing 0.1", {"label_smoothing": 0.1},
               lambda x, y, w: (w[y] * F.cross_entropy(
                   x, y, label_smoothing=0.1, reduction="none")).mean()),
        Member("logit adjustment", {"logit_bias": bias},
               lambda x, y, w: ce(x + of_classes(bias, x), y, w)),
        Member("LDAM, scale 30", {"margin": margin, "logit_scale": 30.0},
               lambda x, y, w: ce(30 * (x - one_hot(x, y) * of_classes(margin, x)), y, w)),
        Member("z-loss 1e-4", {"z_loss": 1e-4}, z_loss),
        Member("soft targets", {}, lambda x, t, w: F.cross_entropy(x, t), "soft"),
        Member("BCE", sigmoid, lambda x, t, w: bce(x, t, reduction="sum") / rows(x), "multi-hot"),
        Member("BCE", sigmoid,
               lambda x, t, w: bce(x, t.float(), reduction="sum") / rows(x), "multi-hot, bool"),
        Member("focal loss, gamma 2, alpha 1/4", focal, focal_loss, "multi-hot"),
        Member("asymmetric loss 4, 1, 0.05", asymmetric, asymmetric_loss, "multi-hot"),
    ]  # fmt: skip


def ce(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w[y] * F.cross_entropy(z, y, reduction="none")).mean()


def z_loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    lse = torch.logsumexp(x, 1)
    nll = lse - x.gather(1, y.unsqueeze(1)).squeeze(1)
    return (w[y] * (nll + 1e-4 * lse**2)).mean()


def focal_loss(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    p_t, alpha_t = p * t + (1 - p) * (1 - t), 0.25 * t + 0.75 * (1 - t)
    return (alpha_t * (1 - p_t) ** 2 * bce(x, t, reduction="none")).sum() / rows(x)


def asymmetric_loss(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    shifted = (p - 0.05).clamp(min=0)
    positive = t * (1 - p) * torch.log(p.clamp(min=1e-8))
    negative = (1 - t) * shifted**4 * torch.log((1 - shifted).clamp(min=1e-8))
    return -(positive + negative).sum() / rows(x)


def rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def of_classes(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (x.dim() - 2))


def one_hot(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter_(1, y.unsqueeze(1), 1.0)


def targets(kind: str, given: Problem) -> Problem:
    """The same with targets of a kind."""
    if kind == "index":
        return given
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(given.logits.shape, generator=generator)
    if kind == "soft":
        return given._replace(target=u / u.sum(1, keepdim=True))
    labels = (u < 0.05) | (one_hot(u, given.target) > 0)
    return given._replace(target=labels if kind == "multi-hot, bool" else labels.float())


def measured(member: Member, case: Case, given: Problem) -> dict[str, str]:
    """A line of the table."""
    torch.compiler.reset()
    given = targets(member.target, given)
    weighted = member.target == "index"  # soft targets have no place for weights in eager PyTorch
    options = member.options

    def fused(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        loss: Tensor = class_balanced_loss(
            x, y, w if weighted else None, ignore_index=None if weighted else -100, **options
        )
        return loss

    compiled: Callable[..., Tensor] = torch.compile(member.eager, fullgraph=True, dynamic=False)
    contestants = (
        Contestant("fused", fused),
        Contestant("eager", member.eager),
        Contestant("compile", compiled),
    )
    runs = [measure.Run(contestant, given, train=True) for contestant in contestants]
    grads = [gradient(run) for run in runs]
    for run, grad in zip(runs[1:], grads[1:], strict=True):
        worst = (grad - grads[0]).abs().max() / grads[0].abs().max()
        assert worst < AGREE, f"{member.name}: {run.contestant.name} differs by {worst:.1e}"
    ours, eager, compile_ = (median(ms) for ms in measure.times(runs, 1, BUDGET))
    return {
        "logits": str(case.shape),
        "loss": member.name,
        "target": member.target,
        "fused ms": f"{ours:.2f}",
        "eager": f"{eager / ours:.2f}",
        "compile": f"{compile_ / ours:.2f}",
    }


def gradient(run: measure.Run) -> Tensor:
    run(run.prepare())
    grad = run.given.logits.grad
    assert grad is not None
    return grad.clone()


def main() -> None:
    torch.set_num_threads(THREADS)
    lines = []
    for shape in tqdm(SHAPES, unit="shape"):
        case = Case(shape, torch.float32, "softmax", 0.0)
        given = problem(case)
        lines += [measured(member, case, given) for member in members(counts(case).float())]
    title = "The long-tail family, float32, forward and backward"
    note = "Medians of calls in turns; eager and compile: their time divided by ours."
    save(RESULTS / "family-cpu.md", title, "python -m bench.family", lines, note)


if __name__ == "__main__":
    main()
