"""Runs the CUDA kernels of an emulated library against float64, in this folder's
parent: `python -m emulator.check LIBRARY`.

A process of its own, since a kernel that is wrong may end it: every buffer lies between pages that
nobody may touch. Thread orders, the errors of special functions, options and layouts vary from case
to case. Ends with status 1 at the first result that is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from support.guard_pages import Memory
from torch import Tensor

from cbloss_fused import reference
from cbloss_fused.backends import REGISTRY, load_cuda
from cbloss_fused.inputs import Inputs, compute_dtype
from cbloss_fused.options import REDUCTIONS, Activation, Formula, Options

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Tiles, a part of a warp a row, a warp, blocks of 128 and 256 threads, loops; 70001: many blocks;
# 20003 and 25001: one kernel, with shared memory of two sizes.
CLASSES = (1, 7, 10, 64, 128, 129, 500, 1000, 2049, 4100, 8142, 8192, 12001, 20003, 25001, 70001)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 1.5)
# Multiprocessors, and shared memory per multiprocessor in bytes. With 132, long rows are split;
# with 1 they are kept in shared memory, by 384 or 512 threads, or not at all. They take turns, so
# that every class count and dtype meets each of them.
DEVICES = ((132, 228 << 10), (1, 228 << 10), (1, 100 << 10), (132, 100 << 10))
TOLERANCE = {  # relative: of the loss, of a gradient to the row's largest
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-5, 2.0**-8 + 2e-5),
    torch.float16: (2e-5, 2.0**-11 + 2e-5),
}


class Case(NamedTuple):
    """One call; what is not here is drawn from `seed`."""

    sigmoid: bool
    dtype: torch.dtype
    C: int
    gamma: float
    eps: float
    multiprocessors: int
    shared: int
    seed: int


def cases(dtypes: list[str], share: int) -> Iterator[Case]:
    """Every combination, or one of `share` of them."""
    formulas = zip(itertools.product((0.0, 0.1), GAMMAS), itertools.cycle(DEVICES), strict=False)
    combinations = itertools.product(formulas, CLASSES, dtypes, (False, True))
    for seed, (((eps, gamma), device), C, dtype, sigmoid) in enumerate(combinations):
        if seed % share == 0:
            yield Case(sigmoid, DTYPES[dtype], C, gamma, eps, *device, seed)


def family_options(sigmoid: bool, draw: random.Random) -> dict[str, Any]:
    """What one family alone has; native/cases.py draws it, too."""
    if not sigmoid:
        return {"z_loss": draw.choice((0.0, 0.0, 1e-3))}
    if draw.random() >= 0.4:
        return {}
    return {
        "gamma_neg": draw.choice((None, 0.0, 3.0)),
        "alpha": draw.choice((None, 0.25, 1.0)),
        "clip": draw.choice((0.0, 0.05)),
    }


def drawn_formula(case: Case, draw: random.Random, adjustable: bool) -> Formula:
    """The case's, with options of its family; adjustable: z may be rounded once more."""
    options: dict[str, Any] = {}
    if adjustable and draw.random() < 0.4:
        options["logit_scale"] = draw.choice((0.5, 1.25))
    options |= family_options(case.sigmoid, draw)
    activation: Activation = "sigmoid" if case.sigmoid else "softmax"
    return Formula.of(Options(activation, case.gamma, label_smoothing=case.eps, **options))


class Call(NamedTuple):
    """What is drawn for a case, in memory of no particular layout."""

    x: Tensor  # (N, C): rows are (n, k)
    target: Tensor
    vectors: list[Tensor | None]  # the others of inputs.py's Inputs
    numbers: Formula
    marks: tuple[int | None, int | None]  # ignore_index, background_index
    reduction: int
    K: int


def drawn_call(case: Case, draw: random.Random) -> Call:
    generator = torch.Generator().manual_seed(case.seed)
    N = draw.choice((3, 6)) if case.C < 20_000 else 3
    if case.C <= 64 and draw.random() < 0.5:
        N = 300  # several blocks of tiles
    K = 3 if draw.random() < 0.3 else 1
    compute = compute_dtype(case.dtype)
    spread = draw.choice((0.01, 1.0, 3.0, 30.0))
    x = torch.randn(N, case.C, generator=generator).mul(spread)
    y = torch.randint(case.C, (N,), generator=generator)
    y[0], y[1] = 0, case.C - 1
    x[0] -= 15  # a sure row: all gradients are tiny
    x[0, 0], x[1, y[1]] = 15, 4 * spread
    if not case.sigmoid and draw.random() < 0.3:
        x += 3e4  # alike but for the last digits
    numbers = drawn_formula(case, draw, bool(spread <= 3 and x.abs().max() < 100))
    ignore = draw.choice((-100, None, int(y[2])))
    if ignore == -100:
        y[2] = -100
    if ignore is not None:
        x[y == ignore] = float("nan")
    x = x.to(case.dtype)
    weight = torch.rand(case.C, generator=generator).to(compute) + 0.5
    sample = torch.rand(N, generator=generator).to(compute) + 0.5
    reduction = draw.choice(range(4))
    normalizer = torch.tensor(7, dtype=compute) if reduction == 1 and draw.random() < 0.3 else None
    vectors: list[Tensor | None] = [
        weight if draw.random() < 0.7 else None,
        sample if draw.random() < 0.5 else None,
        normalizer,
        None,
        None,
        weight.flip(0) if case.sigmoid and case.eps == 0 and draw.random() < 0.3 else None,
    ]
    if numbers.logit_scale != 1:
        for at in (3, 4):
            vector = torch.rand(case.C, generator=generator).to(compute)
            vectors[at] = vector if draw.random() < 0.7 else None
    if draw.random() < 0.2:
        x[1, draw.randrange(case.C)] = draw.choice((float("nan"), -float("inf")))
    background = draw.choice((case.C, -1, 2**32 + 1)) if case.sigmoid else None
    if background is not None and draw.random() < 0.5:
        y[draw.choice((0, 1, N - 1))] = background
    return Call(x, y, vectors, numbers, (ignore, background), reduction, K)


def run(case: Case, library: ctypes.CDLL) -> None:
    """Loss with gradient, loss alone and recomputed gradient; raises where one is wrong."""
    draw = random.Random(case.seed)
    settings = {
        "order": draw.randrange(4),
        "error": draw.randrange(4),
        "multiprocessors": case.multiprocessors,
        "shared": case.shared,
    }
    for name, value in settings.items():
        ctypes.c_int.in_dll(library, f"emulated_{name}").value = value
    call = drawn_call(case, draw)
    x, numbers, (N, C), K = call.x, call.numbers, call.x.shape, call.K
    reduced = REDUCTIONS[call.reduction]
    exact = Inputs(call.target, *(None if v is None else v.double() for v in call.vectors))
    losses, slope, *_ = reference.loss_and_grad(x.double(), exact, numbers, *call.marks, reduced)
    want = losses if reduced == "none" else losses.sum()
    loss_rtol, grad_rtol = TOLERANCE[case.dtype]
    # With smoothing eps p and eps / C may cancel, with a z-loss lse may be nearly 0 because logits
    # and bias cancel: what is left is relative to these.
    largest = slope.abs().amax(1, keepdim=True).clamp(min=max(case.eps, numbers.z_loss) / 100)

    def inner(t: Tensor) -> Tensor:  # (N / K, C, K), classes side by side
        return t if K == 1 else t.view(N // K, K, C).transpose(1, 2)

    memory = Memory(draw.random() < 0.5, draw.choice((0, 1, 3, 5)))
    logits, target = memory.copy(x), memory.copy(call.target)
    vectors = [None if v is None else memory.copy(v) for v in call.vectors]
    nan = torch.full((), float("nan"), dtype=compute_dtype(case.dtype))
    loss = memory.copy(nan.expand(want.shape).contiguous())
    in_place = draw.random() < 0.3
    grad = memory.copy(x if in_place else torch.full_like(x, float("nan")))
    operator, again = REGISTRY["cuda"].loss, REGISTRY["cuda"].gradient

    def forward(source: Tensor, grad: Tensor | None, saved: Tensor | None) -> None:
        loss.fill_(float("nan"))
        operator(
            inner(source), target, *vectors, numbers, *call.marks, call.reduction, loss, grad, saved
        )  # fmt: skip

    forward(grad if in_place else logits, inner(grad), None)
    check(case, "loss", loss, want, loss_rtol, want.abs())
    check(case, "gradient", grad, slope, grad_rtol, largest)
    saved = memory.copy(nan.expand(1 if case.sigmoid else 3, N).contiguous())
    forward(logits, None, saved)
    check(case, "loss alone", loss, want, loss_rtol, want.abs())
    incoming = memory.copy(torch.full(want.shape, 2.0, dtype=nan.dtype))
    source = memory.copy(x)
    grad = source if in_place else memory.copy(torch.full_like(x, float("nan")))
    given = Inputs(target, *vectors)._replace(weight=None).of_gradient()
    again(inner(source), *given, saved, incoming, numbers, *call.marks, inner(grad))
    check(case, "recomputed", grad, 2 * slope, grad_rtol, 2 * largest)
    assert torch.equal(logits.nan_to_num(), x.nan_to_num()), f"{case}: the logits were changed"
    memory.free()


class OfType(Protocol):
    """A case, as far as check() looks at it."""

    @property
    def dtype(self) -> torch.dtype: ...


def check(case: OfType, what: str, got: Tensor, want: Tensor, rtol: float, scale: Tensor) -> None:
    smallest = 2.0**-24 if case.dtype == torch.float16 and got.dtype == case.dtype else 1e-37
    wrong = (got.double() - want).abs() > rtol * scale + smallest
    wrong |= got.isnan() != want.isnan()
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        sys.exit(f"{case}: {what}{list(where)} is {got[where]:.9g}, expected {want[where]:.9g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--share", type=int, default=1, help="one of so many cases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_cuda(arguments.library.resolve(), "cpu")
    library = ctypes.CDLL(str(arguments.library.resolve()))
    count = 0
    for case in cases(arguments.dtypes, arguments.share):
        run(case, library)
        count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main()
