"""What ClassBalancedLoss takes and keeps: keywords, vectors, deferred weights, states that fit."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .arguments import check_class_vector
from .arrays import Vector, class_vector, copied, device, reals
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


def packed(counts: Tensor, beta: Tensor, epoch: int, share: float) -> Tensor:
    """What a loss keeps besides its vectors, in one tensor: nn.Module's extra state.

    No move or cast of a model touches an extra state, and torch.distributed.checkpoint and
    transformers hand it to its module as they do parameters and buffers.

    Returns: (3 + C,), or (2 + 2C,) for a beta per class, float64 on the CPU: epoch, share, beta,
        counts.
    """
    schedule = torch.tensor([epoch, share], dtype=torch.float64, device="cpu")
    return torch.cat([schedule, beta.reshape(-1), counts])


def unpacked(extra: Any, C: int, beta: Tensor) -> dict[str, Any]:
    """Counts, beta and schedule of an extra state, or, if it is none, itself for `misfits`.

    beta: the loss's own, whose shape tells one number from one per class where C is 1.
    """
    if isinstance(extra, dict):  # of 0.1
        return extra
    if not isinstance(extra, Tensor) or tuple(extra.shape) not in extra_shapes(C):
        return {"_extra_state": extra}
    schedule, betas, counts = copied(extra).split([2, len(extra) - 2 - C, C])
    one = len(betas) == 1 and (C > 1 or beta.dim() == 0)
    return {"counts": counts, "beta": betas[0] if one else betas, "schedule": schedule}


def extra_shapes(C: int) -> list[tuple[int, ...]]:
    return [(3 + C,), (2 + 2 * C,)]


def misfits(state: dict[str, Any], prefix: str, C: int) -> list[str]:
    """What of a state cannot be loaded into a loss of C classes."""
    shapes: dict[str, list[Any]] = {"beta": [(), (C,)], "schedule": [(2,)]}
    shapes["_extra_state"] = extra_shapes(C)
    found = []
    for name, value in state.items():
        allowed = shapes.get(name, [(C,)])
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape not in allowed:
            found.append(
                f"size mismatch for {prefix}{name}: the checkpoint has {shape}, expected "
                f"{' or '.join(map(str, allowed))}"
            )
    if ("counts" in state) != ("beta" in state):
        found.append(f"{prefix}counts and {prefix}beta come together, got one of them")
    largest = torch.finfo(torch.float64).max
    for name, most in (("counts", largest), ("beta", 1), ("schedule", largest)):
        values = state.get(name)
        if values is not None and not found and not ((values >= 0) & (values <= most)).all():
            found.append(f"{prefix}{name} has values outside [0, {most:g}]")
    return found
