"""Which of many combinations of parameters a run takes."""

from __future__ import annotations

import zlib
from typing import TypeVar

import pytest

from .backends import BEST, DEVICE, INTERPRETED, Backend

SHARE = 18 if INTERPRETED else 8  # see share()
CPU_SHARE = 3  # the best instruction set runs everything; others are the same source, or eager
CUDA_SHARE = 1 if DEVICE == "cuda" else 8  # nothing to compile; emulated it is slow
QUICK = 12  # a run that is not --long takes one of so many of these

Item = TypeVar("Item", bound=pytest.Item)


def select(items: list[Item], long: bool) -> tuple[list[Item], list[Item]]:
    """What runs and what does not, of tests that take a backend and of those marked `sampled`.

    By a hash of their names and parameters, not of their files: for each backend, enough to have
    every value of every parameter at least once, and one of `share` of the rest.
    """
    covered: set[tuple[object, ...]] = set()
    kept, left_out = set(), []
    for item in sorted(items, key=_hash):
        if item.get_closest_marker("long") and not long:
            left_out.append(item)
            continue
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backend = parameters.get("backend", parameters.get("gpu"))
        if not isinstance(backend, Backend) and not item.get_closest_marker("sampled"):
            kept.add(item)
            continue
        test = getattr(item, "originalname", item.name), repr(backend)
        values = {(*test, name, repr(value)) for name, value in parameters.items()}
        if values - covered or _hash(item) % share(parameters, backend, long) == 0:
            covered |= values
            kept.add(item)
        else:
            left_out.append(item)
    return [item for item in items if item in kept], left_out


def _hash(item: pytest.Item) -> int:
    return zlib.crc32(item.name.encode())


def share(parameters: dict[str, object], backend: Backend | None, long: bool) -> int:
    """One of how many combinations runs."""
    if backend is None or (long and len(parameters) < 3):
        each = 1
    elif backend.argument == "triton":  # interpreted, or compiled; long rows even less
        C = parameters.get("C", 0)
        each = SHARE * (4 if isinstance(C, int) and C >= 1000 else 1)
    elif backend.argument == "cuda":
        each = CUDA_SHARE
    else:
        each = 1 if backend is BEST else CPU_SHARE
    return each if long else each * QUICK
