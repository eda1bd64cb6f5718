"""Numbers of any form that PyTorch, NumPy or Python has, as tensors on the CPU; their checks."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
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
        index = str([start + i for i in first]) if first else ""
        many = f" ({len(bad)} of {start + values.numel()} are wrong)" if first else ""
        raise ValueError(f"{name}{index} = {values[first].item()}: expected {expected}{many}")


def reals(values: float | Vector, name: str) -> Tensor:
    t = tensor(values, f"{name} must be real numbers", torch.float64)
    if t.is_complex():
        raise TypeError(f"{name} must be real numbers, got {t.dtype}")
    return t.double()


def class_vector(values: Vector, name: str = "counts", least: int = 0) -> Tensor:
    """A number per class as float64 on the CPU, in memory of its own.

    Of a mapping class -> number, absent classes have 0, up to at least so many classes; what pandas
    indexes by class is put in the order of its index.
    """
    if isinstance(values, Mapping):
        numbers = _by_class(list(values), list(values.values()), name, least)
    elif hasattr(values, "index") and not callable(values.index):  # of pandas
        series: Any = values
        if hasattr(values, "columns"):
            raise TypeError(f"{name} must be a Series, got a DataFrame: pass one of its columns")
        numbers = _by_class(list(series.index), list(series), name, least)
    else:
        return copied(reals(values, name))
    return reals(numbers, name)


def _by_class(keys: list[Any], values: list[Any], name: str, least: int) -> list[Any]:
    try:
        classes = list(map(operator.index, keys))
    except TypeError:
        classes = [-1]
    if min(classes, default=0) < 0:
        raise ValueError(f"{name} is indexed by {keys[:5]}: expected class indices >= 0")
    numbers = [0] * max(least, max(classes, default=-1) + 1)
    for c, value in zip(classes, values, strict=True):
        numbers[c] += value  # tensors are keys by identity: a Counter of them has many of a class
    return numbers


def copied(values: Tensor) -> Tensor:
    """float64 on the CPU, in memory of its own."""
    return values.detach().to(device="cpu", dtype=torch.float64, copy=True)


def tensor(values: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """values on the CPU; dtype is for Python numbers, tensors and arrays keep theirs."""
    if isinstance(values, Tensor):
        if values.is_meta:
            raise TypeError(f"{what}, got a meta tensor, which has no values")
        return values.detach().cpu()
    if hasattr(values, "compressed") and values.mask.any():
        raise TypeError(
            f"{what}, got a masked array: pass its .compressed(), or .filled() with a number"
        )
    try:
        if hasattr(values, "__array__"):  # copied: it may be read-only, or reversed
            return torch.as_tensor(values.__array__().copy(), device="cpu")
        return torch.as_tensor(values, dtype=dtype, device="cpu")
    except OverflowError as error:  # beyond the largest float
        raise ValueError(f"{what}, got {type(values).__name__}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        if values is None or isinstance(values, str) or "'str'" in str(error):
            raise TypeError(f"{what}, got {reprlib.repr(values)}") from None
        if isinstance(values, Iterable) and not isinstance(values, Sequence):
            raise TypeError(f"{what}, got {type(values).__name__}: pass a list of them") from None
        raise TypeError(f"{what}, got {type(values).__name__}: {error}") from error


def device(values: Any) -> torch.device:
    """Where results go: to a tensor's device, else the default one unless it keeps no values."""
    if isinstance(values, Tensor):
        return values.device
    default = torch.get_default_device()
    return torch.device("cpu") if default.type == "meta" else default


def integer_or_none(name: str, value: Any) -> int | None:
    """An argument of any integer type, as Python's; of 64 bits, as class indices are."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int or None, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits or None, got {number}")
    return number
