"""Runs the kernels for CPUs, or Triton's in its interpreter, between guard pages, against float64.

In this folder's parent: `python -m native.check`. A process of its own, since a kernel that is
wrong may end it: then the last line that it has written names the case. Inputs and outputs, target
and weight included, end where a page without access begins, or begin where one ends. Ends with
status 1 at the first result that is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from emulator.check import DTYPES, TOLERANCE, check
from support.guard_pages import Memory
from torch import Tensor

from cbloss_fused import ops, reference
from cbloss_fused.backends import REGISTRY, set_isa
from cbloss_fused.inputs import Inputs, compute_dtype, is_soft
from cbloss_fused.options import REDUCTIONS, Activation, Formula, Options

CLASSES = (1, 7, 10, 99, 100, 101, 131, 1000)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 1.5, 4.0)
LAYOUTS = ("rows", "padded", "apart", "image", "channels-last")
KINDS = {False: ("index", "soft", "bool"), True: ("index", "background", "soft", "bool", "unknown")}
MANY = 3  # threads, where there are many rows
IGNORED = -100


class Case(NamedTuple):
    """A call; what is not here is drawn from `seed`."""

    sigmoid: bool
    dtype: torch.dtype
    C: int
    layout: str
    target: str
    seed: int


def cases(dtypes: list[str], classes: list[int], share: int) -> Iterator[Case]:
    """Every combination, or one of `share` of them."""
    kinds = [(sigmoid, kind) for sigmoid, several in KINDS.items() for kind in several]
    combinations = itertools.product(classes, LAYOUTS, dtypes, kinds)
    for seed, (C, layout, dtype, (sigmoid, kind)) in enumerate(combinations):
        if seed % share == 0:
            yield Case(sigmoid, DTYPES[dtype], C, layout, kind, seed)


def laid(values: Tensor, layout: str, K: int) -> Tensor:
    """(rows, C) in that layout, as (N, C) or (N, C, K)."""
    rows, C = values.shape
    if layout == "padded":
        return values.new_zeros(rows, C + 3)[:, :C].copy_(values)
    if layout == "apart":
        return values.t().contiguous().t()
    if layout == "rows":
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


def drawn_rows(case: Case, draw: random.Random) -> tuple[int, int]:
    """rows, K: parts of a vector of rows, several of them, groups of them, and several chunks."""
    few = case.C < 100
    if case.layout not in ("image", "channels-last"):
        many = 2500 if few else 40
        return draw.choice((1, 3, 7, 8, 9, 21, 67, many) if few else (1, 3, 5, many)), 1
    K = draw.choice((1, 5, 16, 35, 67, 131) if few else (1, 5, 17))
    return K * draw.choice((1, 2, 3)), K


def drawn_formula(case: Case, draw: random.Random) -> Formula:
    activation: Activation = "sigmoid" if case.sigmoid else "softmax"
    options: dict[str, Any] = {"label_smoothing": draw.choice((0.0, 0.0, 0.1))}
    if case.sigmoid or case.target == "index":
        options["gamma"] = draw.choice(GAMMAS)
    if draw.random() < 0.3:
        options["logit_scale"] = draw.choice((0.5, 1.25))
    if not case.sigmoid:
        options["z_loss"] = draw.choice((0.0, 0.0, 1e-3))
    elif draw.random() < 0.4:
        options["gamma_neg"] = draw.choice((None, 0.0, 3.0))
        options["alpha"] = draw.choice((None, 0.25, 1.0))
        options["clip"] = draw.choice((0.0, 0.05))
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
        t = torch.where(t < 0.3, float(IGNORED), torch.where(t > 0.7, t, 0.0))
    elif not case.sigmoid:
        t = t / t.sum(1, keepdim=True)
    return t.to(draw.choice(tuple(DTYPES.values())))


def drawn_call(case: Case, draw: random.Random) -> Call:
    generator = torch.Generator().manual_seed(case.seed)
    rows, K = drawn_rows(case, draw)
    compute, C = compute_dtype(case.dtype), case.C
    spread = torch.logspace(-2, 0.7, rows)[torch.randperm(rows, generator=generator)]
    x = torch.randn(rows, C, generator=generator) * spread[:, None]
    target = drawn_target(case, draw, x, generator)
    numbers = drawn_formula(case, draw)
    ignore, background = IGNORED, None
    if not is_soft(target):
        x[0, target[0]] += 12  # a sure row: all gradients are tiny
        if rows > 2:
            target[draw.randrange(1, rows)] = IGNORED
            x[target == IGNORED] = float("nan")
        if case.target == "background":
            background = draw.choice((C, -1, 2**32 + 1))
            target[draw.choice((0, rows // 2))] = background

    def vector(size: int, chance: float) -> Tensor | None:
        values = torch.rand(size, generator=generator).to(compute) + 0.5
        return values if draw.random() < chance else None

    reductions = range(4)
    if numbers.per_class:
        reductions = (0, 1, 3)  # no weight belongs to a row
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


def run(case: Case, backend: str, tell: Callable[[str], None]) -> None:
    """Every operator on a case, loss and gradient also in place; raises where one is wrong."""
    draw = random.Random(case.seed)
    call = drawn_call(case, draw)
    x, target, numbers, K = call.x, call.target, call.numbers, call.K
    rows, C, soft, reduced = *x.shape, is_soft(target), REDUCTIONS[call.reduction]
    # Values, as far as the kernels know them: targets are converted to what they compute in.
    compute = compute_dtype(case.dtype)
    asked = target if target.dtype in (torch.int64, torch.bool) else target.to(compute).double()
    exact = Inputs(asked, *(None if v is None else v.double() for v in call.vectors))
    losses, slope, s, _ = reference.loss_and_grad(x.double(), exact, numbers, *call.marks, reduced)
    want = losses if reduced == "none" else losses.sum()
    rtol, grad_rtol = TOLERANCE[case.dtype]
    # With smoothing eps p and eps / C may cancel, in softmax p and a soft target: what is left is
    # relative to these.
    smallest = torch.full_like(s, max(numbers.label_smoothing, numbers.z_loss) / 100)
    if soft and not case.sigmoid:
        smallest += s / 20
    largest = slope.abs().amax(1, keepdim=True).maximum(smallest[:, None])

    memory = Memory(draw.random() < 0.6, draw.choice((0, 0, 1, 3, 5)))

    def like_logits(values: Tensor) -> Tensor:
        return memory.copy(laid(values, case.layout, K))

    vectors = [None if v is None else memory.copy(v) for v in call.vectors]
    given = laid(target, call.target_layout, K) if soft else target.view(-1, K)
    guarded = memory.copy(given if K > 1 or soft else target)
    if K == 1 and soft and case.layout in ("image", "channels-last"):
        guarded = guarded.unsqueeze(2)
    logits, nans = like_logits(x), torch.full_like(x, float("nan"))
    nan = torch.full((), float("nan"), dtype=compute)
    loss = memory.copy(nan.expand(want.shape).contiguous())
    record = REGISTRY[backend]

    def forward(source: Tensor, grad: Tensor | None, saved: Tensor | None) -> None:
        loss.fill_(float("nan"))
        record.loss(
            source, guarded, *vectors, numbers, *call.marks, call.reduction, loss, grad, saved
        )  # fmt: skip

    tell(f"{case}: loss and gradient")
    grad = like_logits(nans)
    forward(logits, grad, None)
    check(case, "loss", loss, want, rtol, want.abs())
    check(case, "gradient", by_row(grad), slope, grad_rtol, largest)

    tell(f"{case}: in place")
    grad = like_logits(x)
    forward(grad, grad, None)
    check(case, "loss in place", loss, want, rtol, want.abs())
    check(case, "gradient in place", by_row(grad), slope, grad_rtol, largest)

    tell(f"{case}: loss alone")
    saved = memory.copy(nan.expand(1 if case.sigmoid else 3, rows).contiguous())
    forward(logits, None, saved)
    check(case, "loss alone", loss, want, rtol, want.abs())

    tell(f"{case}: recomputed gradient")
    incoming = memory.copy(torch.full(want.shape, 2.0, dtype=compute))
    grad = like_logits(nans)
    again = Inputs(guarded, *vectors).of_gradient()
    record.gradient(logits, *again, saved, incoming, numbers, *call.marks, grad)
    check(case, "recomputed gradient", by_row(grad), 2 * slope, grad_rtol, 2 * largest)

    if record.loss_and_stats is not None and not soft:
        tell(f"{case}: statistics")
        stats = memory.copy(torch.full((4, C), float("nan"), dtype=torch.float64))
        grad = like_logits(nans)
        record.loss_and_stats(
            logits, guarded, *vectors, numbers, *call.marks, call.reduction, loss, grad, stats
        )  # fmt: skip
        check(case, "loss with statistics", loss, want, rtol, want.abs())
        check(case, "gradient with statistics", by_row(grad), slope, grad_rtol, largest)
        check_statistics(case, call, losses, by_row(grad), stats)
    assert torch.equal(by_row(logits).nan_to_num(), x.nan_to_num()), f"{case}: logits were changed"
    memory.free()


def check_statistics(case: Case, call: Call, losses: Tensor, grad: Tensor, got: Tensor) -> None:
    """Rows, losses, |gradients at the target|, as they were stored, and probabilities by class."""
    bias, margin = (None if v is None else v.double() for v in call.vectors[3:5])
    keep = (call.target != IGNORED) & (call.target != call.marks[1])
    y, rows = call.target[keep], torch.arange(int(keep.sum()))
    z = call.x[keep].double()
    z = z if bias is None else z + bias
    if margin is not None:
        z[rows, y] -= margin[y]
    z = z * call.numbers.logit_scale
    p = (z.sigmoid() if case.sigmoid else z.softmax(1))[rows, y]
    want = torch.zeros(4, case.C, dtype=torch.float64)
    summands = torch.ones_like(p), losses[keep], grad[keep][rows, y].double().abs(), p
    for into, values in zip(want, summands, strict=True):
        into.index_add_(0, y, values)
    rtol = TOLERANCE[case.dtype][1]
    check(case, "rows", got[0], want[0], 0, want[0])
    check(case, "losses by class", got[1], want[1], rtol, want[1].abs())
    check(case, "gradients by class", got[2], want[2], 1e-9, want[2])
    check(case, "probabilities", got[3], want[3] / want[0], rtol, torch.ones(case.C))


def refused(case: str, message: str, call: Callable[[], object]) -> None:
    """Ends unless the call raises with this in its message."""
    try:
        call()
    except (ValueError, IndexError) as error:
        if message not in str(error):
            raise SystemExit(f"{case}: expected {message!r}, got: {error}") from None
    else:
        raise SystemExit(f"{case}: nothing was raised")


def check_refusals(tell: Callable[[str], None]) -> None:
    """Values out of range: the first of them, wherever it lies in a row or among rows."""
    nan, record = torch.tensor(float("nan")), REGISTRY["cpu"]
    for C, rows, sigmoid in itertools.product((7, 131), (1, 9), (False, True)):
        numbers = Formula.of(Options("sigmoid" if sigmoid else "softmax"))
        memory, x = Memory(at_end=True), torch.zeros(rows, C)

        def call(target: Tensor, *vectors: Tensor | None, partly: bool = False) -> None:
            inputs = Inputs(target, *vectors)
            marks = IGNORED if partly else None, None
            grad = memory.copy(x)  # noqa: B023
            for logits in (x, grad):  # noqa: B023
                record.loss(logits, *inputs, numbers, *marks, 1, nan.clone(), grad, None)  # noqa: B023

        place = rows - 1, C - 1
        for bad in (C, -1, 2**32, -(2**63), 2**63 - 1):
            y = torch.zeros(rows, dtype=torch.int64)
            y[-1] = bad
            case = f"target {bad} of {C} classes"
            tell(case)
            refused(case, f"target[{rows - 1}] = {bad} ", lambda: call(memory.copy(y)))  # noqa: B023
        for wrong, partly in itertools.product((1.5, -0.5, float("nan"), -float("inf")), (0, 1)):
            if wrong == 1.5 and not sigmoid:
                continue
            t = torch.zeros(rows, C)
            t[place] = wrong
            case = f"soft target {wrong} of {C} classes, {'sigmoid' if sigmoid else 'softmax'}"
            tell(case)
            where = f"target[{place[0]}, {place[1]}] = "
            refused(case, where, lambda: call(memory.copy(t), partly=bool(partly)))  # noqa: B023
        y = torch.zeros(rows, dtype=torch.int64)
        for at, (size, name) in enumerate(((C, "weight"), (rows, "sample_weight"))):
            vector = torch.ones(size)
            vector[-1] = -1
            vectors = [None] * at + [memory.copy(vector)]
            tell(name)
            refused(name, f"{name}[{size - 1}] = -1", lambda: call(y, *vectors))  # noqa: B023
        memory.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("cpu", "triton"), default="cpu")
    parser.add_argument(
        "--isa", nargs="*", default=[""], help="instruction sets; by default the best"
    )
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--classes", nargs="*", type=int, default=list(CLASSES))
    parser.add_argument("--share", type=int, default=1, help="one of so many cases")
    arguments = parser.parse_args()
    ops._warned = True
    torch.set_num_threads(MANY)
    if arguments.backend == "triton":
        from support import interpreter

        interpreter.mend()
    count = 0
    for isa in arguments.isa:

        def tell(text: str) -> None:
            print(isa, text, flush=True)  # noqa: B023

        if arguments.backend == "cpu":
            set_isa(isa)
            check_refusals(tell)
        for case in cases(arguments.dtypes, arguments.classes, arguments.share):
            run(case, arguments.backend, tell)
            count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main()
