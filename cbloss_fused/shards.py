"""Which rank has which classes, and what a rank computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arrays import integer_or_none
from .groups import Kept, ProcessGroup, agreed, check_group, device_of, gathered, number_of_ranks
from .inputs import Inputs, compute_dtype
from .options import LossSpec

IGNORED, ELSEWHERE, INVALID = -1, -2, -3  # a part's own targets that are none of its columns


class ClassShards:
    """Classes over ranks: each has the logits of consecutive classes, in the order of the ranks.

    Every rank of the group makes one, together: they exchange how many classes they have.

    Args:
        num_local_classes: how many this rank has, >= 0; other ranks may have more or fewer.
        group: the ranks; None: all, or this process alone where torch.distributed is not
            initialised.

    Attributes: sizes, the number of classes of every rank; num_classes, their sum C; start and
        stop: this rank has the classes in [start, stop); group. Copies share the group; what is
        unpickled has none, and is of use for its numbers alone.
    Raises: TypeError or ValueError for what is no number of classes, on every rank.

    >>> shards = ClassShards(3)
    >>> shards.sizes, shards.num_classes, shards.stop
    ((3,), 3, 3)
    """

    sizes: tuple[int, ...]
    num_classes: int
    start: int
    stop: int

    def __init__(self, num_local_classes: int, group: ProcessGroup | None = None) -> None:
        check_group(group)
        where = device_of(group)

        def own() -> Tensor:
            size = integer_or_none("num_local_classes", num_local_classes)
            if size is None or size < 0:
                raise ValueError(f"num_local_classes must be >= 0, got {num_local_classes}")
            return torch.tensor(size, device=where)

        total = int(agreed(own, 1, group, where))
        if total < 1:
            raise ValueError("num_local_classes is 0 on every rank: expected a class on one")
        self._set([int(size) for size in gathered(own(), group).tolist()], group)

    @classmethod
    def of(cls, sizes: list[int], group: ProcessGroup | None) -> ClassShards:
        """Of sizes that every rank knows: no communication."""
        shards = cls.__new__(cls)
        shards._set(sizes, group)
        return shards

    def _set(self, sizes: list[int], group: ProcessGroup | None) -> None:
        rank = torch.distributed.get_rank(group) if number_of_ranks(group) > 1 else 0
        self.sizes, self.num_classes = tuple(sizes), sum(sizes)
        self.start = sum(sizes[:rank])
        self.stop = self.start + sizes[rank]
        self._group = None if group is None else Kept(group)

    @property
    def group(self) -> ProcessGroup | None:
        return None if self._group is None else self._group.group

    @property
    def num_local_classes(self) -> int:
        return self.stop - self.start

    def is_own(self, vector: Tensor | None) -> bool:
        """Whether a vector is of this rank's classes alone."""
        return vector is not None and len(vector) != self.num_classes

    def own(self, vector: Tensor | None) -> Tensor | None:
        """This rank's part of a vector that is whole, or its own already."""
        if vector is None or self.is_own(vector):
            return vector
        return vector[self.start : self.stop]

    def __repr__(self) -> str:
        return f"ClassShards({self.start}:{self.stop} of {self.num_classes} classes)"


class Part(NamedTuple):
    """What a rank computes with, of all rows in a row and of its own columns."""

    y: Tensor  # a column, or one of the marks above
    here: Tensor  # bool: the target is a column
    inputs: Inputs  # y, and the vectors of the columns; its weight is None but for per_class
    spec: LossSpec  # of the call
    shards: ClassShards

    @classmethod
    def of(cls, inputs: Inputs, spec: LossSpec, shards: ClassShards) -> Part:
        """inputs: targets of all classes, vectors whole or the rank's own."""
        y = inputs.target.flatten()
        here = (y >= shards.start) & (y < shards.stop)
        known = (y >= 0) & (y < shards.num_classes)
        if spec.background_index is not None:
            known |= y == spec.background_index
        local = torch.where(known, ELSEWHERE, INVALID)
        local = torch.where(here, y - shards.start, local)
        if spec.ignore_index is not None:
            ignored = y == spec.ignore_index
            local, here = torch.where(ignored, IGNORED, local), here & ~ignored
        weight, bias, margin, pos_weight = (
            shards.own(v)
            for v in (inputs.weight, inputs.logit_bias, inputs.margin, inputs.pos_weight)
        )
        weight = weight if spec.formula.per_class else None
        own = Inputs(local, weight, None, None, bias, margin, pos_weight)
        return cls(local, here, own, spec, shards)

    def columns(self) -> int:
        return self.shards.num_local_classes

    def rows(self, part: slice) -> Part:
        """Of some rows."""
        y = self.y[part]
        return self._replace(y=y, here=self.here[part], inputs=self.inputs._replace(target=y))

    def column(self) -> Tensor:
        """The target's column, or the first where it is elsewhere."""
        return torch.where(self.here, self.y, 0)

    def kept(self) -> tuple[Tensor | None, ...]:
        """What autograd keeps of it: who changes a vector in place is told so by the backward."""
        return self.inputs.of_gradient()

    def again(self, saved: Sequence[Tensor | None]) -> tuple[Part, list[Any]]:
        """In the backward, of what was kept, and what was saved after it."""
        target, weight, logit_bias, margin, pos_weight, *rest = saved
        assert target is not None
        inputs = Inputs(target, weight, None, None, logit_bias, margin, pos_weight)
        return self._replace(inputs=inputs), rest


def at(values: Tensor, column: Tensor) -> Tensor:
    """(rows,) of (N, C) or (N, C, K) values at a column of each row."""
    index = column.view(values.shape[:1] + values.shape[2:]).unsqueeze(1)
    return values.gather(1, index).flatten()


def put(values: Tensor, column: Tensor, at_column: Tensor) -> None:
    """Write (rows,) values at a column of each row."""
    index = column.view(values.shape[:1] + values.shape[2:]).unsqueeze(1)
    values.scatter_(1, index, at_column.to(values.dtype).view(index.shape))


def target_logit(logits: Tensor, part: Part, column: Tensor, margin: bool = True) -> Tensor:
    """logit_scale (x_j + bias_j - margin_j) of a column j of each row; margin: with it."""
    z = at(logits, column).to(compute_dtype(logits.dtype))
    if part.inputs.logit_bias is not None:
        z = z + part.inputs.logit_bias[column]
    if margin and part.inputs.margin is not None:
        z = z - part.inputs.margin[column]
    return part.spec.formula.logit_scale * z
