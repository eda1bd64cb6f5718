"""The calls that native/check.py makes: every combination of some parameters, the others drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from emulator.check import DTYPES, family_options
from torch import Tensor

from cbloss_fused.inputs import Inputs, compute_dtype, is_soft
from cbloss_fused.options import Activation, Formula, Options

# Ends of vectors and of four vectors; with 2100, sums that must be flushed on the way.
CLASSES = (1, 7, 10, 99, 100, 101, 127, 131, 1000, 2100)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 1.5, 4.0)
LAYOUTS = ("rows", "padded", "apart", "image", "channels-last")
KINDS = {False: ("index", "soft", "bool"), True: ("index", "background", "soft", "bool", "unknown")}
IGNORED = -100


class Case(NamedTuple):
    """A call; what is not here is drawn from `seed`."""

    sigmoid: bool
    dtype: torch.dtype
    C: int
    layout: str
    target: str
    seed: int


class Chosen(NamedTuple):
    """Of which values cases() makes all combinations, or one of `share` of them; how often each."""

    dtypes: list[str]
    classes: list[int]
    layouts: list[str]
    targets: list[str]
    share: int
    draws: int


def cases(chosen: Chosen) -> Iterator[Case]:
    kinds = [(sigmoid, kind) for sigmoid, several in KINDS.items() for kind in several]
    kinds = [(sigmoid, kind) for sigmoid, kind in kinds if kind in chosen.targets]
    combinations = itertools.product(chosen.classes, chosen.layouts, chosen.dtypes, kinds)
    drawn = itertools.chain.from_iterable(itertools.repeat(list(combinations), chosen.draws))
    for seed, (C, layout, dtype, (sigmoid, kind)) in enumerate(drawn):
        # Every so many would skip kinds. Of text, since numbers seed what is drawn for a case.
        if random.Random(str(seed)).randrange(chosen.share) == 0:
            yield Case(sigmoid, DTYPES[dtype], C, layout, kind, seed)


def laid(values: Tensor, layout: str, K: int) -> Tensor:
    """(rows, C) in that layout, as (N, C) or (N, C, K)."""
    rows, C = values.shape
    if layout == "padded" and rows > 1:
        return values.new_zeros(rows, C + 3)[:, :C].copy_(values)
    if layout == "apart":
        return values.t().contiguous().t()
    if layout in ("rows", "padded"):
        return values.contiguous()
    image = values.view(rows // K, K, C).transpose(1, 2)
    return image if layout == "channels-last" else image.contiguous()


def by_row(values: Tensor) -> Tensor:
    """(rows, C) of what is laid out as logits."""
    return values if values.dim() == 2 else values.transpose(1, 2).flatten(0, 1)


class Call(NamedTuple):
    """What is drawn for a case, in memory of no particular place."""

    x: Tensor  # (rows, C), as the target if it is soft
    target: Tensor
    vectors: list[Tensor | None]  # the others of inputs.py's Inputs
    numbers: Formula
    marks: tuple[int | None, int | None]  # ignore_index, background_index
    reduction: int
    K: int
    target_layout: str


def drawn_rows(case: Case, draw: random.Random, most: int) -> tuple[int, int]:
    """rows, K: parts of a vector of rows, several of them, groups of them, and several chunks."""
    few = case.C < 100
    if case.layout not in ("image", "channels-last"):
        many = min(most, 5000 if few else 40)
        return draw.choice((1, 3, 7, 8, 9, 21, 67, many) if few else (1, 3, 5, many)), 1
    K = draw.choice((1, 5, 16, 35, 67, 131) if few else (1, 5, 17))
    return K * draw.choice((1, 2, 3)), K


def drawn_formula(case: Case, draw: random.Random) -> Formula:
    activation: Activation = "sigmoid" if case.sigmoid else "softmax"
    options: dict[str, Any] = {"label_smoothing": draw.choice((0.0, 0.1))}
    if case.sigmoid or case.target == "index":
        options["gamma"] = draw.choice((0.0, draw.choice(GAMMAS)))
    if draw.random() < 0.3:
        options["logit_scale"] = draw.choice((0.5, 1.25))
    options |= family_options(case.sigmoid, draw)
    if case.sigmoid and draw.random() < 0.3:
        options["class_weighting"] = "class"
    return Formula.of(Options(activation, **options))


def drawn_target(case: Case, draw: random.Random, x: Tensor, generator: torch.Generator) -> Tensor:
    rows, C = x.shape
    if case.target in ("index", "background"):
        y = torch.randint(C, (rows,), generator=generator)
        y[0], y[-1] = C - 1, draw.choice((0, C - 1))
        return y
    t = torch.rand(rows, C, generator=generator, dtype=torch.float64)
    if case.target == "bool":
        return t > (0.8 if case.sigmoid else 1 - 2 / C)
    if case.target == "unknown":
        known = t >= 0.3
        known[: rows - 1] |= draw.random() < 0.3  # then only the last row has unknown labels
        t = torch.where(known, torch.where(t > 0.7, t, 0.0), float(IGNORED))
    elif not case.sigmoid:
        t = t / t.sum(1, keepdim=True)
    return t.to(draw.choice(tuple(DTYPES.values())))


def drawn_call(case: Case, draw: random.Random, most: int) -> Call:
    """most: rows at most."""
    generator = torch.Generator().manual_seed(case.seed)
    rows, K = drawn_rows(case, draw, most)
    compute, C = compute_dtype(case.dtype), case.C
    spread = torch.logspace(-2, 0.7, rows)[torch.randperm(rows, generator=generator)]
    x = torch.randn(rows, C, generator=generator) * spread[:, None]
    if draw.random() < 0.3:
        x[-1] *= 30
    if draw.random() < 0.3:
        x[rows // 3, -1] += 200  # e^z is infinite unless this maximum is found
    target = drawn_target(case, draw, x, generator)
    numbers = drawn_formula(case, draw)
    ignore, background = IGNORED, None
    if not is_soft(target):
        x[0, target[0]] += 12  # a sure row: all gradients are tiny
        if draw.random() < 0.3 and C > 1:
            ignore = int(target[rows // 2])
        elif rows > 2:
            target[draw.randrange(1, rows)] = IGNORED
        x[target == ignore] = float("nan")
        if case.target == "background":
            background = draw.choice((C, -1, 2**32 + 1))
            target[draw.choice((0, rows - 1))] = background

    def vector(size: int, chance: float) -> Tensor | None:
        values = torch.rand(size, generator=generator).to(compute) + 0.5
        return values if draw.random() < chance else None

    # With class_weighting="class" no weight belongs to a row.
    reductions = (0, 1, 3) if numbers.per_class else (0, 1, 2, 3)
    reduction = draw.choice(reductions)
    adjusted = numbers.logit_scale != 1
    inputs = Inputs(
        target,
        vector(C, 1.0 if numbers.per_class else 0.6),
        vector(rows, 0.5),
        torch.tensor(7, dtype=compute) if reduction == 1 and draw.random() < 0.3 else None,
        vector(C, 0.7 if adjusted else 0),
        vector(C, 0.7 if adjusted and not is_soft(target) else 0),
        vector(C, 0.3 if case.sigmoid else 0),
    )
    return Call(
        x.to(case.dtype), target, list(inputs[1:]), numbers, (ignore, background), reduction, K,
        draw.choice(("rows", "padded", "apart") if K == 1 else ("image", "channels-last")),
    )  # fmt: skip
