"""What people train with today, and the same here: `python -m bench.presets` prints the table.

Their packages where they can be installed beside a CPU PyTorch, else the formula of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from cbloss_fused import (
    ClassBalancedLoss,
    class_balanced_loss,
    class_balanced_weights,
    ldam_margin,
    logit_adjustment,
)

N, C, BETA = 256, 100, 0.999
COUNTS = torch.logspace(3, 0, C, dtype=torch.float64).round()
Function = Callable[[Tensor], Tensor]


class Preset(NamedTuple):
    """Two calls that mean the same, as text and as functions of the logits."""

    theirs: str
    ours: str
    their_loss: Function
    our_loss: Function


def presets(y: Tensor, t: Tensor) -> list[Preset]:
    """y: class indices; t: multi-hot targets."""
    w = class_balanced_weights(COUNTS, BETA)
    one_hot = F.one_hot(y, C).to(t.dtype)
    p = torch.full((C,), 3.0)

    def asymmetric(x: Tensor) -> Tensor:
        prob = torch.sigmoid(x)
        shifted = (prob - 0.05).clamp(min=0)
        positive = t * (1 - prob) * -F.logsigmoid(x)
        return (positive + (1 - t) * shifted**4 * -torch.log1p(-shifted)).sum()

    def ldam(x: Tensor) -> Tensor:
        m = COUNTS**-0.25 * (0.5 / (COUNTS**-0.25).max())
        return F.cross_entropy(30 * (x - one_hot * m.to(x)[y].unsqueeze(1)), y, w.to(x))

    def focal(x: Tensor) -> Tensor:
        nll = F.binary_cross_entropy_with_logits(x, t, reduction="none")
        alpha_t = 0.25 * t + 0.75 * (1 - t)
        return (alpha_t * (1 - torch.exp(-nll)) ** 2 * nll).sum()

    cb, bce = class_balanced_loss, F.binary_cross_entropy_with_logits
    sigmoid: dict[str, Any] = {"activation": "sigmoid"}
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
               lambda x: cb(x, t, w, class_weighting="class", **sigmoid)),
        Preset("F.binary_cross_entropy_with_logits(x, t, pos_weight=[3, ..., 3]) * C / 4",
               'class_balanced_loss(x, t, activation="sigmoid", alpha=3 / 4)',
               lambda x: bce(x, t.to(x), pos_weight=p.to(x)) * C / 4,
               lambda x: cb(x, t, alpha=0.75, **sigmoid)),
        Preset("torchvision's sigmoid_focal_loss(x, t, 0.25, 2, 'sum'), its formula",
               'class_balanced_loss(x, t, activation="sigmoid", gamma=2, alpha=0.25, '
               'reduction="sum")',
               focal, lambda x: cb(x, t, gamma=2.0, alpha=0.25, reduction="sum", **sigmoid)),
        Preset("timm's AsymmetricLossMultiLabel(4, 1, 0.05), reduction sum, its formula",
               'class_balanced_loss(x, t, activation="sigmoid", gamma=1, gamma_neg=4, clip=0.05, '
               'reduction="sum")',
               asymmetric,
               lambda x: cb(x, t, gamma=1.0, gamma_neg=4.0, clip=0.05, reduction="sum",
                            **sigmoid)),
        Preset("LDAMLoss(n, 0.5, weight=w, s=30), its formula",
               "class_balanced_loss(x, y, w, margin=ldam_margin(n), logit_scale=30, "
               'reduction="weighted_mean")',
               ldam, lambda x: cb(x, y, w, margin=ldam_margin(COUNTS), logit_scale=30.0,
                                  reduction="weighted_mean")),
        Preset("F.cross_entropy(x + log(n / n.sum()), y): logit adjustment, balanced softmax",
               "class_balanced_loss(x, y, logit_bias=logit_adjustment(n))",
               lambda x: F.cross_entropy(x + (COUNTS / COUNTS.sum()).log().to(x), y),
               lambda x: cb(x, y, logit_bias=logit_adjustment(COUNTS))),
    ]  # fmt: skip
    return found + balanced_loss(y)


def balanced_loss(y: Tensor) -> list[Preset]:
    """The package balanced-loss, all three; its BCE is divided by C."""
    try:
        from balanced_loss import Loss
    except ImportError:
        return []
    options = {"samples_per_class": COUNTS.tolist(), "beta": BETA, "class_balanced": True}

    def pair(kind: str, ours: str, factor: float, **changes: float) -> Preset:
        theirs = Loss(kind, fl_gamma=0.5, **options)
        activation = "softmax" if kind == "cross_entropy" else "sigmoid"
        fused = ClassBalancedLoss(COUNTS, BETA, activation=activation, **changes)  # type: ignore[arg-type]
        text = f'balanced_loss.Loss("{kind}", …)(x, y)' + (" * C" if factor != 1 else "")
        return Preset(text, ours, lambda x: theirs(x, y) * factor, lambda x: fused(x, y))

    name = "ClassBalancedLoss(n, β"
    return [
        pair("cross_entropy", f"{name})(x, y)", 1),
        pair("binary_cross_entropy", f'{name}, activation="sigmoid")(x, y)', C),
        pair("focal_loss", f'{name}, activation="sigmoid", gamma=0.5)(x, y)', 1, gamma=0.5),
    ]


def difference(preset: Preset, x: Tensor) -> tuple[float, float]:
    """Of the losses, relative, and of the gradients, relative to the largest."""
    results = []
    for function in (preset.their_loss, preset.our_loss):
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((float(loss.detach()), leaf.grad))
    (a, g), (b, h) = results
    assert g is not None
    assert h is not None
    return abs(a - b) / abs(a), float((g - h).abs().max() / g.abs().max())


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class indices from the long-tailed counts, multi-hot targets; float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator)
    y = torch.multinomial(COUNTS, N, replacement=True, generator=generator)
    return x, y, (torch.rand(N, C, generator=generator) < 0.05).float()


def main() -> None:
    x, y, t = data()
    rows = []
    for preset in presets(y, t):
        loss, grad = difference(preset, x)
        rows.append((f"`{preset.theirs}`", f"`{preset.ours}`", f"{loss:.0e}", f"{grad:.0e}"))
    headers = ("theirs", "here", "loss differs by", "gradient by")
    print(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
