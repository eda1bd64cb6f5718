"""Numbers of any form that PyTorch, NumPy or Python has, as tensors on the CPU; their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor


class Array(Protocol):
    """What NumPy, pandas and JAX arrays have in common; NumPy itself is not needed."""

    def __array__(self) -> Any: ...


Vector: TypeAlias = Tensor | Array | Sequence[float] | Mapping[int, float]


def require(ok: Tensor, values: Tensor, name: str, expected: str, start: int = 0) -> None:
    """Raise for the first value that is not ok; start is the index of values[0]."""
    bad = (~ok).nonzero()
    if len(bad):
        first = tuple(bad[0].tolist())
        index = "".join(f"[{start + i}]" for i in first)
        many = f" ({len(bad)} of {start + len(values)} are wrong)" if first else ""
        raise ValueError(f"{name}{index} = {values[first].item()}: expected {expected}{many}")


def reals(values: float | Vector, name: str) -> Tensor:
    t = tensor(values, f"{name} must be real numbers", torch.float64)
    if t.is_complex():
        raise TypeError(f"{name} must be real numbers, got {t.dtype}")
    return t.double()


def class_vector(values: Vector, name: str = "counts") -> Tensor:
    """A number per class as float64 on the CPU, in memory of its own.

    Of a mapping class -> number, absent classes have 0; what pandas indexes by class is put in the
    order of its index.
    """
    if isinstance(values, Mapping):
        numbers = _by_class(list(values), list(values.values()), name)
    elif hasattr(values, "index") and not callable(values.index):  # a pandas.Series
        series: Any = values
        numbers = _by_class(list(series.index), list(series), name)
    else:
        return copied(reals(values, name))
    return reals(numbers, name)


def _by_class(classes: list[Any], values: list[Any], name: str) -> list[Any]:
    if any(not hasattr(c, "__index__") or c < 0 for c in classes) or len(set(classes)) < len(
        classes
    ):
        raise ValueError(
            f"{name} is indexed by {classes[:5]}: expected class indices, each once and >= 0"
        )
    numbers = [0] * (max(map(int, classes), default=-1) + 1)
    for c, value in zip(classes, values, strict=True):
        numbers[int(c)] = value
    return numbers


def copied(values: Tensor) -> Tensor:
    """float64 on the CPU, in memory of its own."""
    return values.detach().to(device="cpu", dtype=torch.float64, copy=True)


def tensor(values: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """values on the CPU; dtype is for Python numbers, tensors and arrays keep theirs."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        if hasattr(values, "__array__"):  # copied: it may be read-only, or reversed
            return torch.as_tensor(values.__array__().copy(), device="cpu")
        return torch.as_tensor(values, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}, got {type(values).__name__}: {error}") from error


def device(values: Any) -> torch.device:
    return values.device if isinstance(values, Tensor) else torch.get_default_device()
