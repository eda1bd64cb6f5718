"""Process groups of torch.distributed: sums over ranks, and errors that all ranks raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:

    class ProcessGroup:
        """Where torch has none: nothing is one."""


KINDS = (IndexError, TypeError, ValueError, NotImplementedError, RuntimeError)  # the last: others


class Kept:
    """A group inside of what is copied or pickled: copies share it, a pickle has None."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __copy__(self) -> Kept:
        return self

    def __deepcopy__(self, memo: Any) -> Kept:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def check_group(group: Any) -> None:
    """Raise for what is no group of this rank's."""
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(
            "group must be None or a torch.distributed.ProcessGroup that this rank is in, got "
            f"{type(group).__name__}"
        )


def number_of_ranks(group: ProcessGroup | None) -> int:
    """Of a group, or of all; 1 without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(group)
    return 1


def device_of(group: ProcessGroup | None) -> torch.device:
    """Where what is communicated lies: the CPU, unless the group is one of GPUs alone."""
    if number_of_ranks(group) > 1 and "cpu:" not in torch.distributed.get_backend_config(group):
        found = torch.accelerator.current_accelerator()
        if found is not None:
            return torch.device(found.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def add_up(tensor: Tensor, group: ProcessGroup | None, largest: bool = False) -> None:
    """The sum over ranks, or the largest of each number, in place; no value is looked at."""
    if number_of_ranks(group) > 1:
        op = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(tensor, op, group)


def agreed(
    make: Callable[[], Tensor],
    size: int,
    group: ProcessGroup | None,
    device: torch.device,
    largest: bool = False,
) -> Tensor:
    """(size,) float64: the sum over ranks of what each makes, or the largest of each number.

    What one rank raises all raise, the others an error of the same kind: none waits for a rank that
    is gone. This looks at values, and so synchronises where they are on a GPU.
    """
    if is_compiling():  # a graph has no values and no errors: it breaks here
        return torch.compiler.disable(_agreed)(make, size, group, device, largest)
    return _agreed(make, size, group, device, largest)


def _agreed(
    make: Callable[[], Tensor],
    size: int,
    group: ProcessGroup | None,
    device: torch.device,
    largest: bool,
) -> Tensor:
    numbers = torch.zeros(size + len(KINDS), dtype=torch.float64, device=device)
    try:
        numbers[:size] = make()
    except Exception as error:
        which = (i for i, kind in enumerate(KINDS) if isinstance(error, kind))
        numbers[size + next(which, len(KINDS) - 1)] = 1
        add_up(numbers, group, largest)
        raise
    add_up(numbers, group, largest)
    failed = numbers[size:].tolist()
    for kind, of_ranks in zip(KINDS, failed, strict=True):
        if of_ranks:
            raise kind(f"another rank of the group raised {kind.__name__}: see its message")
    return numbers[:size]


def gathered(numbers: Tensor, group: ProcessGroup | None) -> Tensor:
    """(ranks, *shape): those of every rank, of one shape, in the order of the ranks."""
    ranks = number_of_ranks(group)
    if ranks == 1:
        return numbers.unsqueeze(0)
    found = numbers.new_empty(ranks, numbers.numel())
    torch.distributed.all_gather(list(found.unbind()), numbers.flatten(), group)
    return found.view(ranks, *numbers.shape)
