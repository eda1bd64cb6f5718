"""The Triton kernels; nothing imports Triton, which takes half a second, before the first use."""

from __future__ import annotations

import importlib.util
from typing import Any

available = importlib.util.find_spec("triton") is not None
_launch: Any = None


def load() -> Any:
    """The module that launches them."""
    global _launch
    if _launch is None:
        _launch = importlib.import_module("cbloss_fused.kernels.launch")
    return _launch
