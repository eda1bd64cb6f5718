"""The losses that are compared, each formula once: what people write in eager PyTorch, what other
packages compute, and this package's call that means the same.

Of several eager formulas for a loss the fastest counts, in every row of a table. Each is what a
good user would write, and is guarded so that its gradient is finite; `measure.py` compares each
with the reference in float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbloss_fused import (
    ClassBalancedLoss,
    class_balanced_loss,
    class_balanced_weights,
    ldam_margin,
    logit_adjustment,
    reference,
)
from cbloss_fused.backends import REGISTRY
from cbloss_fused.plain import ce_none, one_hot, plain_formulas

from .cases import BETA, Case, class_counts

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, target, weight
Options = dict[str, Any]
OWN_COLUMNS = ("fused", "in place", "weighted")
SIGMOID: Options = {"activation": "sigmoid"}
bce = F.binary_cross_entropy_with_logits
reference_loss: Callable[..., Tensor] = reference.loss


class Implementation(NamedTuple):
    """One way to compute the loss of a case, up to a known factor."""

    column: str  # of the table, which shows the fastest of a column
    loss: LossFunction
    variant: str = ""  # the formula or the backend
    reduction: str = "mean"
    factor: float = 1.0  # loss * factor is this package's loss
    overwrites: bool = False  # the logits: every call needs new ones that are no leaf

    @property
    def name(self) -> str:
        return f"{self.column} {self.variant}".rstrip()


def optional(module: str) -> Any:
    """A package, or None if it is not installed or does not work."""
    with suppress(ImportError, RuntimeError):
        return importlib.import_module(module)
    return None


# This package -------------------------------------------------------------------------------------


def case_options(case: Case) -> Options:
    return {"activation": case.activation, "gamma": case.gamma, "ignore_index": None}


def backends(device: torch.device) -> list[str]:
    """The backends with kernels for the device, the default first.

    "" stands for a call without `backend`; it is left out on a GPU that has kernels.
    """
    found = [
        name
        for name in ("cuda", "triton")
        if device.type in REGISTRY[name].devices + REGISTRY[name].on_request
        and REGISTRY[name].missing is None
    ]
    return found if found and device.type == "cuda" else ["", *found]


def eager_formulas(case: Case) -> dict[str, LossFunction]:
    """The formulas for a case by name; the first compiles to the fastest code."""
    found = plain_formulas(case.activation, case.gamma)
    return {formula.__name__: partial(formula, gamma=case.gamma) for formula in found}


# Other functions and packages ---------------------------------------------------------------------


def cross_entropy_float32(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Divides by the sum of the rows' weights, as F.cross_entropy does."""
    return F.cross_entropy(x.float(), y, w)


def cross_entropy_own_dtype(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(x, y, w.to(x.dtype))


def torchvision_focal(gamma: float) -> LossFunction | None:
    """torchvision's sigmoid_focal_loss without alpha, weighted; None without torchvision.

    In float32, since its 1 - p_t cancels.
    """
    torchvision = optional("torchvision.ops")
    if torchvision is None:
        return None
    focal = partial(torchvision.sigmoid_focal_loss, alpha=-1, gamma=gamma, reduction="none")
    return lambda x, y, w: (w[y] * focal(x.float(), one_hot(x, y)).sum(1)).mean()


def liger_cross_entropy() -> LossFunction | None:
    """Liger-Kernel's, which overwrites the logits; None if it is not installed."""
    liger = optional("liger_kernel.transformers.functional")
    return None if liger is None else liger.liger_cross_entropy


def balanced_loss(kind: str, counts: Tensor, gamma: float) -> LossFunction | None:
    """The package balanced-loss; None if it is not installed. Its BCE is divided by the classes."""
    package = optional("balanced_loss")
    if package is None:
        return None
    loss = package.Loss(
        kind, fl_gamma=gamma, samples_per_class=counts.numpy(), beta=BETA, class_balanced=True
    )
    return lambda x, y, w: loss(x, y)


# The long-tail family -----------------------------------------------------------------------------


def per_class(vector: Tensor, x: Tensor) -> Tensor:
    """A vector of the classes, shaped so that it broadcasts to logits (N, C, ...)."""
    return vector.reshape(-1, *[1] * (x.dim() - 2))


def number_of_rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def label_smoothing(x: Tensor, y: Tensor, w: Tensor, smoothing: float = 0.1) -> Tensor:
    nll = F.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
    return (w[y] * nll).mean()


def adjusted_logits(x: Tensor, bias: Tensor) -> Tensor:
    """Menon et al., equation 10: softmax(f + tau log pi); balanced softmax is tau = 1."""
    return x + per_class(bias, x)


def ldam_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """Cao et al.: n_c^(-1/4), scaled so that the largest is max_margin."""
    return counts**-0.25 * (max_margin / (counts**-0.25).max())


def ldam_logits(x: Tensor, y: Tensor, margin: Tensor, scale: float = 30.0) -> Tensor:
    """Cao et al.: s (z_y - Delta_y), s z_c for the other classes."""
    return scale * (x - one_hot(x, y) * per_class(margin, x))


def z_loss(x: Tensor, y: Tensor, w: Tensor, factor: float = 1e-4) -> Tensor:
    lse = torch.logsumexp(x, 1)
    nll = lse - x.gather(1, y.unsqueeze(1)).squeeze(1)
    return (w[y] * (nll + factor * lse**2)).mean()


def sigmoid_focal(x: Tensor, t: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Lin et al., equation 5, summed; as in torchvision."""
    p = torch.sigmoid(x)
    p_t, alpha_t = p * t + (1 - p) * (1 - t), alpha * t + (1 - alpha) * (1 - t)
    return (alpha_t * (1 - p_t) ** gamma * bce(x, t, reduction="none")).sum()


def asymmetric(
    x: Tensor, t: Tensor, gamma: float = 1.0, gamma_neg: float = 4.0, clip: float = 0.05
) -> Tensor:
    """Ridnik et al., equations 4 to 7, summed; as timm's AsymmetricLossMultiLabel."""
    p = torch.sigmoid(x)
    shifted = (p - clip).clamp(min=0)
    focus = 1 - p if gamma == 1 else (1 - p) ** gamma
    positive = t * focus * torch.log(p.clamp(min=1e-8))
    negative = (1 - t) * shifted**gamma_neg * torch.log((1 - shifted).clamp(min=1e-8))
    return -(positive + negative).sum()


class LongTailLoss(NamedTuple):
    """Options of class_balanced_loss, and an eager formula of the same loss: a mean over rows."""

    name: str
    options: Options
    eager: LossFunction
    target: str = "index"


def long_tail_losses(counts: Tensor) -> list[LongTailLoss]:
    """Both sides get what depends on the counts alone as ready tensors."""
    bias, margin = logit_adjustment(counts), ldam_margin(counts)
    focal = {"gamma": 2.0, "alpha": 0.25, **SIGMOID}
    asymmetric_options = {"gamma": 1.0, "gamma_neg": 4.0, "clip": 0.05, **SIGMOID}

    def mean_bce(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return bce(x, t, reduction="sum") / number_of_rows(x)

    return [
        LongTailLoss("label smoothing 0.1", {"label_smoothing": 0.1}, label_smoothing),
        LongTailLoss("logit adjustment", {"logit_bias": bias},
                     lambda x, y, w: ce_none(adjusted_logits(x, bias), y, w)),
        LongTailLoss("LDAM, scale 30", {"margin": margin, "logit_scale": 30.0},
                     lambda x, y, w: ce_none(ldam_logits(x, y, margin), y, w)),
        LongTailLoss("z-loss 1e-4", {"z_loss": 1e-4}, z_loss),
        LongTailLoss("soft targets", {}, lambda x, t, w: F.cross_entropy(x, t), "soft"),
        LongTailLoss("BCE", SIGMOID, mean_bce, "multi-hot"),
        LongTailLoss("BCE", SIGMOID, lambda x, t, w: mean_bce(x, t.float(), w), "multi-hot, bool"),
        LongTailLoss("focal loss, gamma 2, alpha 1/4", focal,
                     lambda x, t, w: sigmoid_focal(x, t) / number_of_rows(x), "multi-hot"),
        LongTailLoss("asymmetric loss 4, 1, 0.05", asymmetric_options,
                     lambda x, t, w: asymmetric(x, t) / number_of_rows(x), "multi-hot"),
    ]  # fmt: skip


# What people train with today, and the same call here ---------------------------------------------


class Preset(NamedTuple):
    """Two calls that mean the same, as text and as functions of the logits."""

    theirs: str
    ours: str
    their_loss: Callable[[Tensor], Tensor]
    our_loss: Callable[[Tensor], Tensor]


def presets(y: Tensor, t: Tensor) -> list[Preset]:
    """The lines of docs/migration.md. y: class indices; t: multi-hot targets (N, C)."""
    C, cb = t.shape[1], class_balanced_loss
    counts = class_counts(C)
    w, prior = class_balanced_weights(counts, BETA), (counts / counts.sum()).log()
    found = [
        Preset("F.cross_entropy(x, y, w)",
               'class_balanced_loss(x, y, w, reduction="weighted_mean")',
               lambda x: F.cross_entropy(x, y, w.to(x)),
               lambda x: cb(x, y, w, reduction="weighted_mean")),
        Preset("F.cross_entropy(x, y, label_smoothing=0.1)",
               "class_balanced_loss(x, y, label_smoothing=0.1)",
               lambda x: F.cross_entropy(x, y, label_smoothing=0.1),
               lambda x: cb(x, y, label_smoothing=0.1)),
        Preset("F.cross_entropy(x, t)", "class_balanced_loss(x, t)",
               lambda x: F.cross_entropy(x, t.to(x)), lambda x: cb(x, t)),
        Preset("F.binary_cross_entropy_with_logits(x, t, w) * C",
               'class_balanced_loss(x, t, w, activation="sigmoid", class_weighting="class")',
               lambda x: bce(x, t.to(x), w.to(x)) * C,
               lambda x: cb(x, t, w, class_weighting="class", **SIGMOID)),
        Preset("F.binary_cross_entropy_with_logits(x, t, pos_weight=[3, ..., 3]) * C / 4",
               'class_balanced_loss(x, t, activation="sigmoid", alpha=3 / 4)',
               lambda x: bce(x, t.to(x), pos_weight=x.new_full((C,), 3.0)) * C / 4,
               lambda x: cb(x, t, alpha=0.75, **SIGMOID)),
        Preset("torchvision's sigmoid_focal_loss(x, t, 0.25, 2, 'sum'), its formula",
               'class_balanced_loss(x, t, activation="sigmoid", gamma=2, alpha=0.25, '
               'reduction="sum")',
               lambda x: sigmoid_focal(x, t),
               lambda x: cb(x, t, gamma=2.0, alpha=0.25, reduction="sum", **SIGMOID)),
        Preset("timm's AsymmetricLossMultiLabel(4, 1, 0.05), reduction sum, its formula",
               'class_balanced_loss(x, t, activation="sigmoid", gamma=1, gamma_neg=4, clip=0.05, '
               'reduction="sum")',
               lambda x: asymmetric(x, t),
               lambda x: cb(x, t, gamma=1.0, gamma_neg=4.0, clip=0.05, reduction="sum",
                            **SIGMOID)),
        Preset("LDAMLoss(n, 0.5, weight=w, s=30), its formula",
               "class_balanced_loss(x, y, w, margin=ldam_margin(n), logit_scale=30, "
               'reduction="weighted_mean")',
               lambda x: F.cross_entropy(ldam_logits(x, y, ldam_margins(counts).to(x)), y, w.to(x)),
               lambda x: cb(x, y, w, margin=ldam_margin(counts), logit_scale=30.0,
                            reduction="weighted_mean")),
        Preset("F.cross_entropy(x + log(n / n.sum()), y): logit adjustment, balanced softmax",
               "class_balanced_loss(x, y, logit_bias=logit_adjustment(n))",
               lambda x: F.cross_entropy(adjusted_logits(x, prior.to(x)), y),
               lambda x: cb(x, y, logit_bias=logit_adjustment(counts))),
    ]  # fmt: skip
    return found + balanced_loss_presets(y, counts, w)


def balanced_loss_presets(y: Tensor, counts: Tensor, w: Tensor) -> list[Preset]:
    """The package balanced-loss, if it is installed."""

    def preset(kind: str, ours: str, factor: float, **options: Any) -> list[Preset]:
        theirs = balanced_loss(kind, counts, gamma=0.5)
        if theirs is None:
            return []
        fused = ClassBalancedLoss(counts, BETA, **options)
        text = f'balanced_loss.Loss("{kind}", …)(x, y)' + (" * C" if factor != 1 else "")
        return [Preset(text, ours, lambda x: theirs(x, y, w) * factor, lambda x: fused(x, y))]

    name, C = "ClassBalancedLoss(n, β", len(counts)
    return [
        *preset("cross_entropy", f"{name})(x, y)", 1),
        *preset("binary_cross_entropy", f'{name}, activation="sigmoid")(x, y)', C, **SIGMOID),
        *preset("focal_loss", f'{name}, activation="sigmoid", gamma=0.5)(x, y)', 1, gamma=0.5,
                **SIGMOID),
    ]  # fmt: skip


def difference(preset: Preset, x: Tensor) -> tuple[float, float]:
    """Of the losses, relative, and of the gradients, relative to the largest element."""
    results = []
    for function in (preset.their_loss, preset.our_loss):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((float(loss.detach()), leaf.grad))
    (a, g), (b, h) = results
    assert g is not None and h is not None
    return abs(a - b) / abs(a), float((g - h).abs().max() / g.abs().max())
