"""Triton's interpreter as the tests need it: rounds and aligns like a GPU, twice as fast."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Once, before the first kernel."""
    interpreter._convert_float = _rounding(interpreter._convert_float)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    builder = interpreter.InterpreterBuilder
    builder.create_splat = _of_one_type(builder.create_splat)


def _rounding(convert: Any) -> Any:
    """It cuts float32 off to bfloat16; GPUs round to nearest (test_codegen.py sees cvt.rn)."""

    def rounded(data: Any, source: Any, result: Any, rounding_mode: Any) -> Any:
        if str(source) == "fp32" and str(result) == "bf16":
            values = torch.from_numpy(data.view("float32").copy()).to(torch.bfloat16)
            return values.view(torch.uint16).numpy()
        return convert(data, source, result, rounding_mode)

    return rounded


def _of_one_type(splat: Any) -> Any:
    """Triton 3.9's makes integers of a truth value, which it then refuses as a mask."""

    def same(builder: Any, result: Any, scalar: Any) -> Any:
        found = splat(builder, result, scalar)
        found.data = found.data.astype(scalar.data.dtype, copy=False)
        return found

    return same


def _multiple_of(tensor: Any, values: Any) -> Any:
    """It takes this on trust; on a GPU a 16-byte access that is not aligned is an error.

    Of a tile what lies side by side, along its last axis, counts from the first.
    """
    data = tensor.handle.data
    if isinstance(values, (tuple, tl.tuple)):
        values, data = values[-1], data[..., 0]
    divisor = getattr(values, "value", values)
    assert (data % divisor == 0).all(), f"not a multiple of {divisor}"
    return tensor


def _max_constancy(tensor: Any, values: Any) -> Any:
    """Taken on trust too; on a GPU the first element's value would count for all."""
    size = getattr(values[-1], "value", values[-1])
    groups = tensor.handle.data.reshape(-1, size)
    assert (groups == groups[:, :1]).all(), f"not constant over {size} elements"
    return tensor


def _patch_once(patch: Any) -> Any:
    """It patches triton.language anew for every call of one jit function by another."""
    active: dict[Any, Any] = {}  # the languages that a function sees -> their patches

    def patched(function: Any) -> Any:
        names = function.__globals__.values()
        key = tuple(any(value is language for value in names) for language in (tl, tl.core))
        if key in active:
            return active[key]
        outermost = not active
        scope = active[key] = patch(function)
        scope.set_attr(tl, "multiple_of", _multiple_of)
        scope.set_attr(tl, "max_constancy", _max_constancy)
        if outermost:
            restore = scope.restore

            def restored() -> None:
                for other in list(active.values())[:0:-1]:
                    other.restore()
                active.clear()
                restore()

            scope.restore = restored
        return scope

    return patched
