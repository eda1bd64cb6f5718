"""What ClassBalancedLoss takes and keeps: keywords, vectors, deferred weights."""

from __future__ import annotations

import warnings

from torch import Tensor

from .arguments import check_class_vector
from .arrays import Vector, class_vector, device, reals
from .groups import ProcessGroup
from .options import LossOptions, Options
from .weights import Empty, beta_from_prototypes, class_balanced_weights


class ModuleOptions(LossOptions, total=False):
    """All keywords of `ClassBalancedLoss`, for type checkers."""

    empty: Empty
    logit_bias: Vector | None
    margin: Vector | None
    pos_weight: Vector | None
    group: ProcessGroup | None


def no_classes(options: ModuleOptions) -> dict[str, int | None]:
    """The labels that are no class."""
    defaults = Options()
    return {
        "ignore_index": options.get("ignore_index", defaults.ignore_index),
        "background_index": options.get("background_index", defaults.background_index),
    }


def kept_vector(name: str, values: Vector, C: int) -> Tensor:
    """A checked copy of (C,) numbers in any form; float32 unless they are a tensor."""
    if not isinstance(values, Tensor):
        values = class_vector(values, name).float().to(device(values))
    if values.is_meta:
        raise TypeError(f"{name} is a meta tensor: it has no values to keep, expected (C,) numbers")
    return check_class_vector(name, values, C).detach().clone()


def further_samples(new: Vector, counts: Tensor) -> Tensor:
    """(C,) of a checked form, to be added to counts."""
    more = class_vector(new, "new", least=len(counts))
    if more.shape != counts.shape:
        raise ValueError(f"new must have shape {tuple(counts.shape)}, got {tuple(more.shape)}")
    if not (more >= 0).all():
        raise ValueError(f"new must be >= 0, got {more.min().item()}")
    return more


def weights_on_the_way(counts: Tensor, beta: Tensor, empty: Empty, share: float) -> Tensor:
    """Weights on the way from those of beta = 0, at share 0, to those of beta, at 1.

    N = 1/(1 - beta) grows from 1 by a power: N**share.
    """
    if share == 1:
        return class_balanced_weights(counts, beta, empty=empty)
    if share and bool((beta == 1).any()):
        raise ValueError("anneal_epochs needs beta < 1: N = 1/(1 - beta) is infinite")
    between = reals(beta_from_prototypes((1 - beta) ** -share), "beta")
    with warnings.catch_warnings():  # of a beta that moves no weight yet: it grows
        warnings.simplefilter("ignore")
        return class_balanced_weights(counts, between, empty=empty)
