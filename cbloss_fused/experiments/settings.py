"""The losses that are compared, each with the same schedule, optimiser and budget."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import (
    ClassBalancedLoss,
    DeferredReweighting,
    init_head_bias_,
    ldam_margin,
    logit_adjustment,
)

DEFERRED_FROM = 0.7  # of the epochs: where the learning rate falls first
COSINE_SCALE = 30.0  # of cosine logits, as Cao et al. have it


class Setting(NamedTuple):
    """A loss, whose weights apply from the start or from DEFERRED_FROM on."""

    title: str
    options: dict[str, Any]  # of ClassBalancedLoss
    deferred: bool = False
    adjusted: bool = False  # balanced softmax, which is logit adjustment with tau = 1
    cosine: bool = False  # logits are COSINE_SCALE times cosines
    margins: bool = False  # label-distribution-aware

    def make_loss(
        self, counts: Tensor, epochs: int
    ) -> tuple[ClassBalancedLoss, DeferredReweighting | None]:
        """The loss, and the schedule to step after each epoch, if any."""
        vectors: dict[str, Any] = {}
        if self.adjusted:
            vectors["logit_bias"] = logit_adjustment(counts)
        if self.margins:
            vectors["margin"] = ldam_margin(counts)
        if self.cosine:
            vectors["logit_scale"] = COSINE_SCALE
        loss_fn = ClassBalancedLoss(counts, **self.options, **vectors)
        start = int(DEFERRED_FROM * epochs)
        return loss_fn, DeferredReweighting(loss_fn, start) if self.deferred else None

    def make_head(self, features: int, C: int) -> nn.Module:
        """The last layer; with a sigmoid every class starts at p = 1 / C."""
        if self.cosine:
            return CosineHead(features, C)
        head = nn.Linear(features, C)
        return init_head_bias_(head) if "activation" in self.options else head


class CosineHead(nn.Module):
    """Cosines of the angles between features and class vectors: logits in [-1, 1]."""

    def __init__(self, features: int, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(Tensor(C, features)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, features) to (N, C)."""
        return nn.functional.linear(
            nn.functional.normalize(x), nn.functional.normalize(self.weight)
        )


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cb-softmax": ("CB softmax", {}),
    "cb-sigmoid": ("CB sigmoid", {"activation": "sigmoid"}),
    "cb-focal": ("CB focal, γ = 0.5", {"activation": "sigmoid", "gamma": 0.5}),
}


def class_balanced_settings(betas: tuple[float, ...]) -> dict[str, Setting]:
    """Every family with every beta, from the start and deferred."""
    return {
        f"{name}-{beta}{suffix}": Setting(
            f"{title}, β = {beta}{', deferred' if suffix else ''}",
            options | {"beta": beta},
            deferred=bool(suffix),
        )
        for name, (title, options) in FAMILIES.items()
        for beta in betas
        for suffix in ("", "-drw")
    }


SETTINGS: dict[str, Setting] = {
    "cross-entropy": Setting("cross entropy", {"beta": 0.0}),
    **class_balanced_settings((0.99, 0.9999)),
    "logit-adjustment": Setting("logit adjustment, τ = 1", {"beta": 0.0}, adjusted=True),
    "ldam-drw": Setting(
        "LDAM, β = 0.9999, deferred", {"beta": 0.9999}, deferred=True, cosine=True, margins=True
    ),
}
# Beside those: what sigmoids and cosines do without weights, and more of CB softmax's curve.
MORE_SETTINGS: dict[str, Setting] = {
    "sigmoid": Setting("sigmoid", {"beta": 0.0, "activation": "sigmoid"}),
    "focal": Setting("focal, γ = 0.5", {"beta": 0.0, "activation": "sigmoid", "gamma": 0.5}),
    "cosine": Setting("cross entropy of cosines", {"beta": 0.0}, cosine=True),
    **{
        name: setting
        for name, setting in class_balanced_settings((0.9, 0.999)).items()
        if name.startswith("cb-softmax") and setting.deferred
    },
}
ALL_SETTINGS = SETTINGS | MORE_SETTINGS
