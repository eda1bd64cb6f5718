"""What ClassBalancedLoss takes and keeps: keywords, vectors, deferred weights."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from . import hints
from .arguments import check_class_vector
from .arrays import Vector, class_vector, device, reals, require
from .groups import ProcessGroup
from .options import LossOptions, Options
from .weights import Empty, beta_from_prototypes, class_balanced_weights, warn_of_frequencies


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


def check_fit(counts: Tensor, weight: Tensor | None, input: Any) -> None:
    """Raise for logits of other classes, or on another device, than the loss was made for."""
    if not isinstance(input, Tensor) or input.dim() == 0:
        return
    shape, C = tuple(input.shape), len(counts)
    dim = min(1, len(shape) - 1)
    if shape[dim] != C and (dim == 0 or C not in shape[2:]):  # else dimensions are in disorder
        raise ValueError(
            f"counts has {C} classes, but input of shape {shape} has {shape[dim]} in dimension "
            f"{dim}{hints.of_counts(counts, shape[dim])}"
        ) from None
    if weight is not None and weight.device != input.device:
        raise ValueError(
            f"the loss, its weight, is on {weight.device}, but input on {input.device}: call "
            f"loss_fn.to({str(input.device)!r})"
        ) from None


def further_samples(new: Vector, counts: Tensor, beta: Tensor) -> Tensor:
    """(C,) of a checked form, to be added to counts, which are weighted by beta."""
    C = len(counts)
    more = class_vector(new, "new", least=C)
    if more.shape != (C,):
        raise ValueError(
            f"new must have one number for each of the {C} classes of counts, shape ({C},), got "
            f"{tuple(more.shape)}; labels are counted by class_counts(labels, {C})"
        )
    require((more >= 0) & more.isfinite(), more, "new", "a finite number of samples >= 0")
    warn_of_frequencies(more, beta)
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
