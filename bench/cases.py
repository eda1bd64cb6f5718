"""The cases as data, and everyone who computes the same loss as a function.

Of the eager formulas the fastest counts, row by row. Each is what a good user would write, guarded
so that its gradient is finite; `measure.check` holds each to the float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbloss_fused import class_balanced_loss, class_balanced_weights, reference

try:
    from balanced_loss import Loss as BalancedLoss
except ImportError:  # its column stays empty
    BalancedLoss = None

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, target, weight
Options = dict[str, Any]
BETA = 0.999
OURS = ("fused", "in place", "weighted")  # columns


class Case(NamedTuple):
    """One row of the table."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    activation: str
    gamma: float

    def __str__(self) -> str:
        dims = "x".join(map(str, self.shape))
        return f"{self.activation}-g{self.gamma:g}-{str(self.dtype)[6:]}-{dims}"


class Problem(NamedTuple):
    """The tensors of a case."""

    logits: Tensor  # a leaf that requires grad
    target: Tensor
    weight: Tensor


class Contestant(NamedTuple):
    """Someone who computes the loss of a case, up to a known factor."""

    column: str
    loss: LossFunction
    formula: str = ""
    reduction: str = "mean"
    factor: float = 1.0  # loss * factor is ours
    overwrites: bool = False  # its logits: it needs new ones, no leaf, at every call

    @property
    def name(self) -> str:
        return f"{self.column} {self.formula}".rstrip()


FAMILIES = [("softmax", 0.0), ("softmax", 0.5), ("sigmoid", 0.0), ("sigmoid", 0.5)]
CLASSES = (256, 8142)  # iNaturalist 2018: rows that are not 16-byte aligned
LARGE = (4096, 8142)  # 133 MB in float32: beyond every cache
SHAPES = [(32, 10), (256, 1000), CLASSES, LARGE, (1_000_000, 10), (8, 19, 256, 256)]
CASES = [Case(s, torch.float32, *f) for s, f in product(SHAPES, FAMILIES)]
CASES += [Case(s, torch.bfloat16, *f) for s, f in product([CLASSES, LARGE], FAMILIES)]
CASES += [Case(CLASSES, d, "sigmoid", 2.0) for d in (torch.float32, torch.bfloat16)]
CASES.sort(key=lambda c: (SHAPES.index(c.shape), c.dtype != torch.float32))
QUICK = [c for c in CASES if c.shape in ((32, 10), CLASSES) and c.dtype == torch.float32]


def counts(case: Case) -> Tensor:
    """Samples per class, from 1000 down to 1."""
    return torch.logspace(3, 0, case.shape[1], dtype=torch.float64).round()


def problem(case: Case) -> Problem:
    """Normal logits; targets drawn from the long-tailed counts."""
    generator = torch.Generator().manual_seed(0)
    n_c = counts(case)
    logits = torch.randn(case.shape, generator=generator).mul_(2).to(case.dtype)
    rows = torch.Size(case.shape[:1] + case.shape[2:])
    target = torch.multinomial(n_c, rows.numel(), replacement=True, generator=generator)
    weight = class_balanced_weights(n_c, BETA)
    return Problem(logits.requires_grad_(), target.reshape(rows), weight)


# The formulas that people write, for (logits, target, weight, gamma) ------------------------------


def ce_none(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Softmax: the row losses of F.cross_entropy, q = 1 - p from them."""
    nll = F.cross_entropy(x.float(), y, reduction="none")
    return (w[y] * (_focus(nll, gamma) * nll if gamma else nll)).mean()


def ce_sum(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Softmax, gamma = 0: F.cross_entropy weighs and sums."""
    return F.cross_entropy(x.float(), y, weight=w, reduction="sum") / y.numel()


def log_softmax(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Softmax: log p of the target out of all."""
    nll = -F.log_softmax(x.float(), 1).gather(1, y.unsqueeze(1)).squeeze(1)
    return (w[y] * (_focus(nll, gamma) * nll)).mean()


def bce_none(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Sigmoid: F.binary_cross_entropy_with_logits on a one-hot, 1 - p_t from it."""
    nll = F.binary_cross_entropy_with_logits(x.float(), _one_hot(x, y), reduction="none")
    return (w[y] * (_focus(nll, gamma) * nll).sum(1)).mean()


def bce_sum(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Sigmoid, gamma = 0: F.binary_cross_entropy_with_logits weighs and sums."""
    t, row = _one_hot(x, y), w[y].unsqueeze(1)
    return F.binary_cross_entropy_with_logits(x.float(), t, row, reduction="sum") / y.numel()


def softplus(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Sigmoid without a one-hot: every class as a negative, the target's own term exchanged.

    The fewest passes that eager PyTorch gives; it cancels for logits beyond some 1000.
    """

    def term(z: Tensor) -> Tensor:
        nll = F.softplus(z)
        return torch.exp(gamma * (z - nll)) * nll if gamma else nll

    z = x.float()
    z_y = z.gather(1, y.unsqueeze(1)).squeeze(1)
    return (w[y] * (term(z).sum(1) + term(-z_y) - term(z_y))).mean()


def _focus(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma from -log p; away from 0, where the power has no finite derivative."""
    return torch.pow((-torch.expm1(-nll)).clamp_min(1e-30), gamma)


def _one_hot(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.float32).scatter_(1, y.unsqueeze(1), 1.0)


def formulas(case: Case) -> dict[str, LossFunction]:
    """The eager candidates of a case, the one that compiles to the fastest code first."""
    plain = {
        ("softmax", False): (ce_none, ce_sum),
        ("softmax", True): (log_softmax, ce_none),
        ("sigmoid", False): (softplus, bce_sum),
        ("sigmoid", True): (softplus, bce_none),
    }[case.activation, case.gamma > 0]
    options: Options = {"activation": case.activation, "gamma": case.gamma, "ignore_index": None}
    named: dict[str, LossFunction] = {f.__name__: partial(f, gamma=case.gamma) for f in plain}
    if case.shape != LARGE:  # a second a call there, and never the fastest
        named["reference"] = partial(reference.loss, **options)
    return named


# The contestants ----------------------------------------------------------------------------------


def contestants(case: Case, compiled: int = 0) -> list[Contestant]:
    """Everyone who can compute the case; the first so many formulas through torch.compile too."""
    options: Options = {"activation": case.activation, "gamma": case.gamma, "ignore_index": None}
    fused = partial(class_balanced_loss, **options)
    field = [Contestant("fused", fused)]
    if case.shape == LARGE:
        field.append(Contestant("in place", partial(fused, inplace=True), overwrites=True))
    plain = formulas(case)
    field += [Contestant("eager", loss, name) for name, loss in plain.items()]
    for name, loss in list(plain.items())[:compiled]:
        code = torch.compile(loss, fullgraph=True, dynamic=False)
        field.append(Contestant("compile", code, name))
    if (case.activation, case.gamma) == ("softmax", 0):
        by_weight = partial(fused, reduction="weighted_mean")
        field.append(Contestant("weighted", by_weight, reduction="weighted_mean"))
        field.append(Contestant("cross_entropy", _cross_entropy, reduction="weighted_mean"))
    field += _balanced_loss(case)
    return [*field, Contestant("clone", lambda x, y, w: x.clone())]


def _cross_entropy(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), y, weight=w)


def _balanced_loss(case: Case) -> list[Contestant]:
    """The package of this name: (N, C), float32, no softmax focal loss; BCE divided by N * C."""
    kinds = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy"}
    kind = kinds[case.activation] if not case.gamma else "focal_loss"
    fits = len(case.shape) == 2 and case.dtype == torch.float32
    if BalancedLoss is None or not fits or (case.activation, kind) == ("softmax", "focal_loss"):
        return []
    numbers = {"beta": BETA, "fl_gamma": case.gamma, "samples_per_class": counts(case).numpy()}
    loss = BalancedLoss(kind, class_balanced=True, **numbers)
    factor = float(case.shape[1]) if kind == "binary_cross_entropy" else 1.0
    return [Contestant("balanced-loss", lambda x, y, w: loss(x, y), factor=factor)]
