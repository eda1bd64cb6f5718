"""Warnings that name the caller's line: the first that is neither this package's nor PyTorch's."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

PACKAGES = (__package__, "torch")


def warn(message: str) -> None:
    """Issue a UserWarning at the caller's line.

    No frames are counted, as `stacklevel` asks for: their number differs between a function, a
    module, autograd and torch.compile; skip_file_prefixes needs Python 3.12.
    """
    frame = sys._getframe(1)
    while _is_inside(frame) and frame.f_back is not None:
        frame = frame.f_back
    file, line, names = frame.f_code.co_filename, frame.f_lineno, frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, file, line, str(names.get("__name__")), registry)


def _is_inside(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    if name is None:  # what torch.compile has written
        return True
    return any(name == package or name.startswith(f"{package}.") for package in PACKAGES)
