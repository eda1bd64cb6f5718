"""Data parallel training: the denominator of a mean over the rows of all ranks.

DDP and FSDP average the gradients of ranks that hold different numbers of rows: in the last batch,
with ignored rows, with sampled weights. The mean of their means is not the mean of all rows. With
one denominator for all ranks it is; the ranks communicate that one number and no logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import INTEGERS, Given, check_inputs, check_vector
from .dispatch import dispatch
from .dtensor import is_dtensor
from .groups import ProcessGroup, add_up, agreed, check_group, number_of_ranks
from .inputs import Inputs, compute_dtype, is_soft, sum_dtype
from .options import MEAN, LossSpec, spec_of
from .row_weights import denominator_of
from .stats import ClassStats
from .values import ANY_CLASS, check_all, check_values, is_weight, tracing


def global_normalizer(
    target: Tensor,
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    background_index: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """What the mean over all ranks' rows divides by, over the number of ranks.

    Given as `normalizer` to every rank's loss, it makes the gradient that
    DistributedDataParallel and FSDP average the one that a single process has of all rows, and the
    average of the ranks' losses that process's loss. Without weights it is the number of rows that
    are not ignored, the denominator of "mean"; with them the sum of these rows'
    r = weight[target] * sample_weight, that of "weighted_mean". To accumulate gradients, pass the
    targets of all parts: `global_normalizer(torch.cat(targets))`.

    Every rank of the group calls it; a rank may have no rows. In training
    `ClassBalancedLoss(counts, group=...)` does so by itself.

    Args:
        target: class indices in [0, C), ignore_index or background_index; any shape and integer
            type. Or soft or multi-hot labels as in `class_balanced_loss`, (C,), (N, C) or
            (N, C, d1, ..., dk).
        weight: (C,) of any floating type, finite and >= 0, on target's device; None: every class
            weighs 1.
        sample_weight: one number per row, in the shape of class indices; finite and >= 0. Leave
            both out for "mean", whose denominator has no weights.
        ignore_index: rows with this target do not count; None: all do. Negative ones mark elements
            of multi-hot targets, which take no part in r.
        background_index: rows with this target have no class: their r is their sample_weight.
        group: the ranks over which gradients are averaged: that of DistributedDataParallel, or the
            mesh's of `fully_shard`. None: all ranks, or this process alone where
            torch.distributed is not initialised.

    Returns:
        0-d float64 (float32 on Apple's GPUs) on target's device. Never 0: 1 where no rank has
        anything to average, so that the loss is 0. On a GPU nothing synchronises.

    Raises:
        IndexError: a target that is negative, or with weight >= C, and not marked; on the CPU only.
        ValueError, TypeError: a shape, device, type or, on the CPU, value that does not fit.
    On the CPU all ranks raise what one finds wrong.

    >>> import torch
    >>> from cbloss_fused import class_balanced_loss, global_normalizer
    >>> target = torch.tensor([0, 2, -100])
    >>> normalizer = global_normalizer(target)
    >>> normalizer
    tensor(2., dtype=torch.float64)
    >>> global_normalizer(target, torch.tensor([0.5, 1.0, 1.5]))
    tensor(2., dtype=torch.float64)
    >>> loss = class_balanced_loss(torch.zeros(3, 3), target, normalizer=normalizer)
    """
    check_group(group)

    def own() -> Tensor:
        inputs, C, spec = _checked(target, weight, sample_weight, ignore_index, background_index)
        if target.device.type == "cpu" and not tracing():
            check_all("weight", inputs.weight, is_weight, "finite and >= 0")
            check_all("sample_weight", inputs.sample_weight, is_weight, "finite and >= 0")
        return denominator_of(inputs, C, spec, sum_dtype(target.device))

    return over_ranks(own, target, group)


def loss_over_ranks(
    input: Tensor,
    given: Given,
    spec: LossSpec,
    return_stats: bool,
    group: ProcessGroup,
) -> Tensor | tuple[Tensor, ClassStats]:
    """`class_balanced_loss` with the denominator of all ranks' rows; the reduction is a mean.

    given: its normalizer is None.
    """
    inputs = None

    def own() -> Tensor:
        nonlocal inputs
        if is_dtensor(input):
            raise ValueError(
                "a loss with a group needs plain logits, got a DTensor, whose mean is that of its "
                "own mesh: pass group=None, or input.to_local()"
            )
        inputs = check_inputs(input, *given, spec, return_stats)
        C = input.shape[min(1, input.dim() - 1)]
        if input.device.type == "cpu" and not tracing():
            check_values(input, inputs, spec.formula, spec.ignore_index)
        return denominator_of(inputs, C, spec, sum_dtype(input.device))

    shared = over_ranks(own, input, group).to(compute_dtype(input.dtype))
    assert inputs is not None  # own() has made them
    inputs = inputs._replace(normalizer=shared)
    return dispatch(input, inputs, spec._replace(reduction=MEAN), return_stats)


def over_ranks(own: Callable[[], Tensor], given: Any, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks of what each has, over their number; 1 where it is 0.

    It is communicated from the device of the tensor that is given.
    """
    device = _device(given)
    if device.type == "cpu":
        total = agreed(own, 1, group, device)[0]
    else:
        total = own()
        add_up(total, group)
    return torch.where(total == 0, 1.0, total / number_of_ranks(group))


def _device(given: Any) -> torch.device:
    """Where the number lies that is communicated, even where own() will raise."""
    return given.device if isinstance(given, Tensor) else torch.device("cpu")


def _checked(
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int | None,
    background_index: int | None,
) -> tuple[Inputs, int, LossSpec]:
    """The tensors, C, or ANY_CLASS where nothing says it, and the options of a denominator."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    soft = is_soft(target)
    if not soft and target.dtype not in INTEGERS:
        raise TypeError(f"target must hold integers, floats or bools, got {target.dtype}")
    if soft and target.dim() == 0:
        raise ValueError("soft targets must be (C,), (N, C) or (N, C, d1, ..., dk), got a 0-d one")
    C, rows = ANY_CLASS, target.shape
    if soft:
        dim = min(1, target.dim() - 1)
        C, rows = target.shape[dim], target.shape[:dim] + target.shape[dim + 1 :]
    elif isinstance(weight, Tensor):
        if weight.dim() != 1 or not len(weight):
            raise ValueError(f"weight must have shape (C,), got {tuple(weight.shape)}")
        C = len(weight)
    if weight is not None:
        check_vector("weight", weight, (C,), target.device, "target")
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, rows, target.device, "target")
    weighs = weight is not None or sample_weight is not None
    spec = spec_of(
        "global_normalizer",
        {
            "activation": "sigmoid",  # which has background rows
            "ignore_index": ignore_index,
            "background_index": background_index,
            "reduction": "weighted_mean" if weighs else "mean",
        },
    )
    return Inputs(target, weight, sample_weight), C, spec
