"""The Triton kernels; nothing imports Triton, which takes half a second, before the first use."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

available = importlib.util.find_spec("triton") is not None
_launch: Any = None


def interpreted() -> bool:
    """Whether Triton's interpreter will run the kernels, on the CPU."""
    value = os.environ.get("TRITON_INTERPRET", "")
    return available and value.lower() in ("1", "true", "yes", "on", "y")


def load() -> Any:
    """The module that launches them."""
    global _launch
    if _launch is None:
        _launch = importlib.import_module(".launch", __package__)
    return _launch
