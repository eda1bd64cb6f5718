"""Calls of the loss for the fuzzer: anything that a caller may write, with and without errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from cbloss_fused.inputs import is_soft

from .marks import DTYPES, IGNORED
from .oracle import mark, option_sets, soft_targets

MODES = (
    "plain", "recompute", "stored", "inplace", "stats", "no_grad", "retain_graph", "shards",
    "linear",
)  # fmt: skip
RARE = 40  # one call in so many is compiled, which takes a second
SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 1e-30, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, 6e4, -6e4)
INFINITE = (float("inf"), -float("inf"), float("nan"))
MOST = 4000  # elements


class Call(NamedTuple):
    """The arguments of class_balanced_loss, and how it is called."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    options: dict[str, Any]
    mode: str
    extreme: bool

    def __repr__(self) -> str:  # of a failing example
        shown = {k: v for k, v in self.options.items() if v is not None}
        weight = None if self.weight is None else self.weight.tolist()
        return (
            f"{self.mode}: logits {tuple(self.logits.shape)} strides {self.logits.stride()} "
            f"{self.logits.dtype} {self.logits.tolist()}, target {self.target.dtype} "
            f"{self.target.tolist()}, weight {weight}, {shown}"
        )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(C,), (N, C) or (N, C, d1, ...), possibly without rows."""
    C = draw(st.sampled_from((1, 2, 3, 5, 8, 16, 63, 64, 65, 99, 100, 101, 131, 257, 1000, 3001)))
    if draw(st.integers(0, 9)) == 0:
        return (C,)
    rest = tuple(draw(st.lists(st.integers(0, 5), max_size=3)) if draw(st.booleans()) else ())
    room = MOST // max(1, C * int(torch.Size(rest).numel() or 1))
    return draw(st.integers(0, max(1, min(room, 40)))), C, *rest


@st.composite
def layouts(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The same numbers with other strides, and from the middle of a storage; or one's, expanded."""
    if values.numel() and draw(st.integers(0, 9)) == 0:
        return values.narrow(draw(st.integers(0, values.dim() - 1)), 0, 1).expand(values.shape)
    order = draw(st.permutations(range(values.dim())))
    step = draw(st.sampled_from((1, 1, 2, 3)))
    offset = draw(st.integers(0, 9))
    permuted = values.permute(order)
    size = permuted.numel() * step + offset + 1
    storage = torch.full((size,), float("nan"), dtype=values.dtype)
    strides, stride = [0] * values.dim(), step
    for dim, n in reversed(list(zip(order, permuted.shape, strict=True))):
        strides[dim] = stride
        stride *= max(1, n)
    return torch.as_strided(storage, values.shape, strides, offset).copy_(values)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A call that is right, or has one of the errors that depend on values or options."""
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from((0.0, 1e-3, 1.0, 5.0, 12.0)))
    extreme = draw(st.integers(0, 2)) == 0
    logits = size * torch.randn(shape, generator=g, dtype=torch.float64)
    options = draw(option_sets())
    if extreme:
        values = torch.tensor(SPECIAL + (INFINITE if draw(st.booleans()) else ()))
        chosen = torch.rand(shape, generator=g) < draw(st.sampled_from((0.02, 0.3, 1.0)))
        drawn = values[torch.randint(len(values), shape, generator=g)].double()
        logits = torch.where(chosen, drawn, logits)
        options["logit_scale"] = 1.0
    logits = draw(layouts(logits.to(dtype)))
    C = shape[0] if len(shape) == 1 else shape[1]
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])

    def vector(shape: tuple[int, ...]) -> Tensor | None:
        kind = draw(st.sampled_from(("none", "none", "plain", "zeros", "half")))
        if kind == "none":
            return None
        v = 0.2 + torch.rand(shape, generator=g)
        if kind == "zeros":
            v = v * (torch.rand(shape, generator=g) < 0.5)
        return v.bfloat16() if kind == "half" else v

    target = torch.randint(C, rows, generator=g)
    sigmoid = options["activation"] == "sigmoid"
    soft = draw(st.integers(0, 2)) == 0 and len(shape) > 1
    if soft:
        target = soft_targets(draw, logits, g)
        if not sigmoid:
            options["gamma"] = 0.0
        if target.dtype is torch.float64 and draw(st.booleans()):
            target = target.to(draw(st.sampled_from((torch.float32, torch.bfloat16))))
    else:
        options["ignore_index"] = draw(st.sampled_from((None, IGNORED, -1, 0, C - 1)))
        if options["ignore_index"] is not None:
            target[torch.rand(rows, generator=g) < 0.2] = options["ignore_index"]
    if sigmoid and len(shape) > 1:
        mark(draw, options, target, C)
        options["pos_weight"] = vector((C,))
    if not extreme:
        options["logit_bias"] = vector((C,))
        options["margin"] = None if soft else vector((C,))
    options["sample_weight"] = vector(rows)
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from((0.5, 3, torch.tensor(7), torch.tensor(0.0))))
    if draw(st.integers(0, 9)) == 0:
        _spoil(draw, options, target, C)
    modes = [
        mode for mode in MODES
        if not (mode == "stats" and (soft or options["reduction"] == "none"))
        and not (mode == "shards" and soft)
        and not (mode == "linear" and (C > 257 or not logits.isfinite().all()))
    ]  # fmt: skip
    if draw(st.integers(1, RARE)) == 1:
        modes = ["compile"]
    if not is_soft(target) and draw(st.booleans()) and C < 128:
        target = target.to(draw(st.sampled_from((torch.int32, torch.int8, torch.int16))))
    return Call(logits, target, vector((C,)), options, draw(st.sampled_from(modes)), extreme)


def _spoil(draw: st.DrawFn, options: dict[str, Any], target: Tensor, C: int) -> None:
    """One thing that must raise, the same on every backend."""
    kind = draw(st.sampled_from(("target", "option", "weight", "shape", "together")))
    if kind == "target" and target.numel() and target.dtype is not torch.bool:
        at = draw(st.integers(0, target.numel() - 1))
        bad = -3.0 if target.is_floating_point() else draw(st.sampled_from((C, -2, 100)))
        target.view(-1)[at] = bad
    elif kind == "option":
        name = draw(st.sampled_from(("gamma", "label_smoothing", "clip", "logit_scale", "alpha")))
        options[name] = draw(st.sampled_from((-1.0, float("nan"), float("inf"), "1", None)))
    elif kind == "weight":
        bad = draw(st.sampled_from((-1.0, float("nan"), float("inf"))))
        options["logit_bias"] = torch.full((C,), bad)
    elif kind == "shape":
        options["sample_weight"] = torch.ones(3, 7)
    else:
        options["z_loss"], options["clip"] = 0.1, 0.1
