"""Checks of the values inside tensors, for the operators of eager PyTorch: the CPU's kernels have
their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from . import hints
from .inputs import Inputs, compute_dtype, known_labels
from .options import Formula

MUST = re.compile(r"(\w+)(\[[\d, ]*\])?( = \S+:)? must (be|have) ")  # how kernels' messages begin
PLACE = re.compile(r"(\w+)\[([\d, ]*)\]")
ANY_CLASS = torch.iinfo(torch.int64).max  # C where it is not known


def tracing() -> bool:
    """Whether values cannot be looked at: torch.compile, export, torch.func, FakeTensorMode."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._guards.active_fake_mode() is not None


def jit_tracing() -> bool:
    """Whether torch.jit.trace records; torch.compile cannot ask."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def check_target(
    target: Tensor, num_classes: int, ignore_index: int | None, background_index: int | None
) -> None:
    """Raise IndexError for the first out-of-range target; see `functional.check_target`."""
    target = target.long()
    bad, others = (target < 0) | (target >= num_classes), ""
    for name, index in (("ignore_index", ignore_index), ("background_index", background_index)):
        if index is not None:
            bad &= target != index
            others += f" or {name}={index}"
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        below = "" if num_classes == ANY_CLASS else f" < {num_classes}"
        raise IndexError(
            f"target{list(first)} = {int(target[first])} is out of range: expected 0 <= target"
            f"{below}{others} ({int(bad.sum())} of {target.numel()} are wrong)"
            f"{hints.of_target_values(target, bad, num_classes)}"
        )


def told_of(error: IndexError, target: Tensor, *limits: Any) -> IndexError:
    """A kernel's error as check_target says it, with a hint; limits: its further arguments."""
    try:
        check_target(target, *limits)
    except IndexError as found:
        return found
    return error


def typed(error: Exception) -> Exception:
    """PyTorch 2.15 makes a RuntimeError of what C++ throws as ValueError."""
    ours = type(error) is RuntimeError and MUST.match(str(error))
    return ValueError(str(error)) if ours else error


def in_own_shape(error: Exception, shapes: Mapping[str, tuple[Sequence[int], ...]]) -> Exception:
    """The error of a value in a reshaped tensor, told at the index of the caller's.

    shapes: by the argument's name, what it was reshaped to and its own.
    """
    text = str(error)
    place = PLACE.match(text)
    if place is None or place[1] not in shapes:
        return error
    reshaped, own = shapes[place[1]]
    position, index = 0, list[int]()
    for i, size in zip(place[2].split(","), reshaped, strict=True):
        position = position * size + int(i)
    for size in reversed(own):
        position, i = divmod(position, size)
        index.insert(0, i)
    return type(error)(f"{place[1]}{index}{text[place.end() :]}")


def check_values(
    logits: Tensor, inputs: Inputs, formula: Formula, ignore_index: int | None
) -> None:
    """Raise for values that the CPU's kernels find as they read."""
    for name in ("weight", "sample_weight", "pos_weight"):
        check_all(name, getattr(inputs, name), is_weight, "finite and >= 0")
    for name in ("logit_bias", "margin"):
        check_all(name, getattr(inputs, name), torch.isfinite, "finite")
    normalizer = inputs.normalizer
    if normalizer is not None and not 0 <= float(normalizer) < inf:
        raise ValueError(f"normalizer must be finite and >= 0, got {float(normalizer)}")
    if inputs.target.dtype.is_floating_point:
        check_soft_target(inputs.target, logits.dtype, formula, ignore_index)


def check_soft_target(
    target: Tensor, dtype: torch.dtype, formula: Formula, ignore_index: int | None, start: int = 0
) -> None:
    """Raise for a value out of range, looked at in the type that logits of dtype are computed in.

    start: the index of the first row, for the message.
    """
    known = known_labels(target, ignore_index) if formula.sigmoid else None
    target = target.to(compute_dtype(dtype))
    if formula.sigmoid:
        range_ = "in [0, 1]" if known is None else f"in [0, 1] or ignore_index={ignore_index}"
        unknown = False if known is None else ~known
        check_all("target", target, lambda t: (t >= 0) & (t <= 1) | unknown, range_, start)
    else:
        check_all("target", target, is_weight, "finite and >= 0", start)


def is_weight(v: Tensor) -> Tensor:
    return (v >= 0) & v.isfinite()


def check_all(
    name: str,
    vector: Tensor | None,
    good: Callable[[Tensor], Tensor],
    what: str,
    start: int = 0,
) -> None:
    """Raise for the first value that is not good; start: the index of the first."""
    if vector is None or vector.is_meta:
        return
    bad = ~good(vector)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        value = float(vector[first])
        at = [start + first[0], *first[1:]] if first else []
        raise ValueError(f"{name}{at} = {value}: must be {what}")
