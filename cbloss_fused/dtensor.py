"""DTensor logits: replicated, or with their rows or their classes sharded.

A replicated DTensor is computed by every rank as a plain tensor is. Where rows are sharded the only
communication is that of a mean's denominator and, on CPUs, of errors, so that all ranks raise them;
where classes are, that of sharded.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .arguments import Given, check_inputs
from .dispatch import dispatch
from .groups import agreed
from .inputs import Inputs, compute_dtype, is_soft, sum_dtype
from .options import MEAN, MEANS, LossSpec
from .row_weights import denominator_of
from .sharded import sharded_loss
from .shards import ClassShards
from .stats import ClassStats
from .values import check_target, check_values, tracing


def is_dtensor(tensor: Any) -> bool:
    """Nothing is imported for it: who has a DTensor has its module."""
    if type(tensor) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def loss_of_dtensor(
    input: Any, given: Given, spec: LossSpec, return_stats: bool
) -> Tensor | tuple[Tensor, ClassStats]:
    """`class_balanced_loss` of a DTensor.

    Raises:
        NotImplementedError: another placement, as rows and classes sharded together.
        ValueError: inplace=True, or another argument that is sharded otherwise than input.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard  # input's own module
    from torch.distributed.tensor.placement_types import Partial

    if spec.inplace:
        raise ValueError("inplace=True needs plain logits, got a DTensor")
    mesh, placements = input.device_mesh, tuple(input.placements)
    class_dim = 1 if input.dim() > 1 else 0
    of_classes = [dim for dim, p in enumerate(placements) if p == Shard(class_dim)]
    others = [p for p in placements if p != Shard(class_dim)]
    if len(of_classes) == 1 and all(p.is_replicate() for p in others):
        return _loss_of_classes(input, given, spec, return_stats, of_classes[0])
    of_rows = _row_sharded(input)
    everywhere = (Replicate(),) * mesh.ndim
    # of what has no dimension of classes
    of_each_row = tuple(Shard(p.dim - (p.dim > 1)) if p.is_shard() else p for p in placements)
    soft = isinstance(given[0], Tensor) and is_soft(given[0])
    as_input = {"target": placements if soft else of_each_row, "sample_weight": of_each_row}
    own = Inputs(*(
        _own(name, tensor, as_input.get(name, everywhere))
        for name, tensor in zip(Inputs._fields, given, strict=True)
    ))  # fmt: skip
    logits = input.to_local()
    inputs = _checked(logits, own, spec, return_stats, mesh, of_rows)
    if of_rows and spec.reduction in MEANS:
        spec = spec._replace(reduction=MEAN)
    result = dispatch(logits, inputs, spec, return_stats)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    kept: list[Any]
    if spec.reduction:
        kept = [Partial("sum") if dim in of_rows else Replicate() for dim in range(mesh.ndim)]
        loss = DTensor.from_local(loss, mesh, kept, run_check=False)
    else:
        shape = torch.Size([n for dim, n in enumerate(input.shape) if dim != 1])
        strides = torch.empty(shape, device="meta").stride()
        loss = DTensor.from_local(
            loss, mesh, of_each_row, run_check=False, shape=shape, stride=strides
        )
    return loss if stats is None else (loss, _summed(stats, mesh, of_rows))


def _loss_of_classes(
    input: Any, given: Given, spec: LossSpec, return_stats: bool, over: int
) -> Tensor | tuple[Tensor, ClassStats]:
    """Of classes sharded over a dimension of the mesh: the loss is replicated."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, C = input.device_mesh, input.shape[1 if input.dim() > 1 else 0]
    ranks = mesh.size(over)
    most = -(-C // ranks)  # as torch.chunk divides them
    sizes = [min(max(C - rank * most, 0), most) for rank in range(ranks)]
    shards = ClassShards.of(sizes, mesh.get_group(over))
    everywhere = (Replicate(),) * mesh.ndim
    own: Any = tuple(
        _own(name, tensor, everywhere) for name, tensor in zip(Inputs._fields, given, strict=True)
    )
    result = sharded_loss(input.to_local(), own, spec, return_stats, shards)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    placed: Tensor = DTensor.from_local(loss, mesh, everywhere, run_check=False)
    return placed if stats is None else (placed, stats)


def _row_sharded(input: Any) -> list[int]:
    """The dimensions of the mesh over which rows are sharded."""
    found = []
    for dim, placement in enumerate(input.placements):
        if type(placement).__name__ == "Shard" and input.dim() > 1 and placement.dim != 1:
            found.append(dim)
        elif not placement.is_replicate():
            raise NotImplementedError(
                "input must be a DTensor that is replicated, or has its rows or its classes "
                f"sharded, got {placement} of shape {tuple(input.shape)}: "
                "input.redistribute(placements=...)"
            )
    return found


def _own(name: str, tensor: Any, placements: tuple[Any, ...]) -> Any:
    """A rank's own part."""
    if not is_dtensor(tensor):
        return tensor
    if tuple(tensor.placements) != placements:
        raise ValueError(f"{name} must be placed as {placements}, got {tuple(tensor.placements)}")
    return tensor.to_local()


def _checked(
    logits: Tensor, own: Inputs, spec: LossSpec, return_stats: bool, mesh: Any, of_rows: list[int]
) -> Inputs:
    """What the operators take, with a mean's denominator of all ranks' rows.

    On the CPU all ranks raise what one finds wrong with its rows.
    """
    inputs: Any = None
    needed = bool(of_rows) and spec.reduction in MEANS and own.normalizer is None
    agree = bool(of_rows) and logits.is_cpu and not tracing()  # a graph has no errors to agree on

    def check() -> Tensor:
        nonlocal inputs
        inputs, C = check_inputs(logits, *own, spec, return_stats), logits.shape[1]
        if agree:
            check_values(logits, inputs, spec.formula, spec.ignore_index)
        if needed:  # it looks at class indices
            return denominator_of(inputs, C, spec, sum_dtype(logits.device))
        if agree and not is_soft(inputs.target):
            check_target(inputs.target, C, spec.ignore_index, spec.background_index)
        return torch.zeros((), device=logits.device)

    make: Callable[[], Tensor] = check
    for dim in of_rows if agree else ():
        make = partial(agreed, make, 1, mesh.get_group(dim), logits.device)
    total = make()
    if not needed:
        return cast(Inputs, inputs)
    if not agree:
        _add_up(total, mesh, of_rows)
    return cast(Inputs, inputs)._replace(normalizer=total.to(compute_dtype(logits.dtype)).view(()))


def _summed(stats: ClassStats, mesh: Any, of_rows: list[int]) -> ClassStats:
    """Those of all ranks' rows."""
    rows, loss, gradient, probability = stats
    sums = torch.stack([loss, gradient, torch.where(rows > 0, probability * rows, 0.0)])
    _add_up(rows, mesh, of_rows)
    _add_up(sums, mesh, of_rows)
    return ClassStats(rows, sums[0], sums[1], sums[2] / rows)


def _add_up(tensor: Tensor, mesh: Any, dims: list[int]) -> None:
    """In place, over dimensions of the mesh."""
    for dim in dims:
        torch.distributed.all_reduce(tensor, group=mesh.get_group(dim))
