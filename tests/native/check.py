"""Runs the kernels for CPUs, or Triton's in its interpreter, between guard pages, against float64.

In this folder's parent: `python -m native.check`. A process of its own, since a kernel that is
wrong may end it: then the last line that it has written names the case. Inputs and outputs, target
and weight included, end where a page without access begins, or begin where one ends. Ends with
status 1 at the first result that is wrong.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
from collections.abc import Callable

import torch
from emulator.check import DTYPES, TOLERANCE, check
from support.guard_pages import Memory
from torch import Tensor

from cbloss_fused import ops, reference
from cbloss_fused.backends import REGISTRY, set_isa
from cbloss_fused.inputs import Inputs, compute_dtype, is_soft
from cbloss_fused.options import REDUCTIONS, Formula, Options

from .cases import (
    CLASSES,
    IGNORED,
    KINDS,
    LAYOUTS,
    Call,
    Case,
    Chosen,
    by_row,
    cases,
    drawn_call,
    laid,
)

THREADS = 3  # where there are rows for several


def run(case: Case, backend: str, rows: int, tell: Callable[[str], None]) -> None:
    """Every operator on a case of so many rows at most, loss and gradient also in place; ends where
    a result is wrong."""
    draw = random.Random(case.seed)
    call = drawn_call(case, draw, rows)
    x, target, numbers, K = call.x, call.target, call.numbers, call.K
    rows, C, soft, reduced = *x.shape, is_soft(target), REDUCTIONS[call.reduction]
    # Values, as far as the kernels know them: targets are converted to what they compute in.
    compute = compute_dtype(case.dtype)
    asked = target if target.dtype in (torch.int64, torch.bool) else target.to(compute).double()
    exact = Inputs(asked, *(None if v is None else v.double() for v in call.vectors))
    losses, slope, s, _ = reference.loss_and_grad(x.double(), exact, numbers, *call.marks, reduced)
    want = losses if reduced == "none" else losses.sum()
    rtol, grad_rtol = TOLERANCE[case.dtype]
    # With smoothing eps p and eps / C may cancel, p and a soft target too: what is left is relative
    # to these.
    smallest = torch.full_like(s, max(numbers.label_smoothing, numbers.z_loss) / 100)
    if soft:
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
    upstream = torch.linspace(1, 2, max(want.numel(), 1)).view(want.shape)
    incoming, scaled = memory.copy(upstream.to(compute)), slope * upstream.double().view(-1, 1)
    grad = like_logits(nans)
    again = Inputs(guarded, *vectors).of_gradient()
    record.gradient(logits, *again, saved, incoming, numbers, *call.marks, grad)
    check(case, "recomputed gradient", by_row(grad), scaled, grad_rtol, 2 * largest)

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
    ignore, background = call.marks
    keep = torch.ones_like(call.target, dtype=torch.bool)
    for index in (ignore, background):
        if index is not None:
            keep &= call.target != index
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


def refused(message: str, call: Callable[[], object]) -> None:
    """Ends unless the call raises with this in its message."""
    try:
        call()
    except (ValueError, IndexError, RuntimeError) as error:  # the last with torch 2.15
        if message not in str(error):
            raise SystemExit(f"expected {message!r}, got: {error}") from None
    else:
        raise SystemExit(f"nothing was raised, expected {message!r}")


def check_refusals(dtype: torch.dtype, tell: Callable[[str], None]) -> None:
    """Values out of range: the first of them, wherever it lies in a row or among rows."""
    shapes = [(N, C, K) for N, C, K in itertools.product((1, 9), (7, 131), (1, 3))]
    for (N, C, K), sigmoid in itertools.product(shapes, (False, True)):
        check_refusals_of(torch.zeros((N, C, K) if K > 1 else (N, C)), sigmoid, dtype, tell)
        if K > 1:  # classes side by side
            check_refusals_of(torch.zeros(N, K, C).transpose(1, 2), sigmoid, dtype, tell)


def check_refusals_of(
    zeros: Tensor, sigmoid: bool, dtype: torch.dtype, tell: Callable[[str], None]
) -> None:
    """A row of the last sample has a value that is out of range, in its largest logit's class."""
    N, C, K = zeros.shape[0], zeros.shape[1], zeros.shape[2:].numel()
    numbers, record = Formula.of(Options("sigmoid" if sigmoid else "softmax")), REGISTRY["cpu"]
    compute = compute_dtype(dtype)
    memory, nan = Memory(at_end=True), torch.tensor(float("nan"), dtype=compute)
    x = zeros.to(dtype)
    last = (N - 1, C - 1, 0)[: x.dim()]
    x[last] = 1
    y = torch.zeros(N, K, dtype=torch.int64) if K > 1 else torch.zeros(N, dtype=torch.int64)
    of_rows = ", ".join(str(n - 1) for n in y.shape)

    def refuse(message: str, target: Tensor, *vectors: Tensor | None, partly: bool = False) -> None:
        tell(f"C = {C}, N = {N}, K = {K}, {'sigmoid' if sigmoid else 'softmax'}: {message}")
        marks, inputs = (IGNORED if partly else None, None), Inputs(memory.copy(target), *vectors)
        grad = memory.copy(x)
        for logits in (x, grad):
            call = (logits, *inputs, numbers, *marks, 1, nan.clone(), grad, None)
            refused(message, functools.partial(record.loss, *call))

    for index in (C, -1, 2**32, -(2**63), 2**63 - 1):
        wrong = y.clone()
        wrong[(-1,) * y.dim()] = index
        refuse(f"target[{of_rows}] = {index} ", wrong)
    for number, partly in itertools.product((1.5, -0.5, float("nan"), -float("inf")), (0, 1)):
        if number != 1.5 or sigmoid:
            soft = zeros.clone()
            soft[last] = number
            where = ", ".join(map(str, last))
            refuse(f"target[{where}] = ", soft, partly=bool(partly))
    vector = torch.ones(max(C, N * K), dtype=compute)
    for size, name in ((C, "weight"), (N * K, "sample_weight")):
        values = memory.copy(vector[:size])
        values[-1] = -1
        inputs = [values] if name == "weight" else [None, values.view(y.shape)]
        place = f"{C - 1}" if name == "weight" else of_rows
        refuse(f"{name}[{place}] = -1", y, *inputs)
    memory.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("cpu", "triton"), default="cpu")
    parser.add_argument(
        "--isa", nargs="*", default=[""], help="instruction sets; by default the best"
    )
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--classes", nargs="*", type=int, default=list(CLASSES))
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--targets", nargs="*", choices=KINDS[True], default=list(KINDS[True]))
    parser.add_argument("--rows", type=int, default=5000, help="at most, but for images")
    parser.add_argument("--share", type=int, default=1, help="one of so many cases")
    parser.add_argument("--draws", type=int, default=1, help="of each case's other parameters")
    arguments = parser.parse_args()
    given = arguments
    of_cases = given.classes, given.layouts, given.targets, given.share, given.draws
    chosen = Chosen(given.dtypes, *of_cases)
    ops._warned = True
    torch.set_num_threads(THREADS)
    if arguments.backend == "triton":
        from support import interpreter

        interpreter.mend()
    count = 0
    for isa in arguments.isa:

        def tell(text: str) -> None:
            print(isa, text, flush=True)  # noqa: B023

        if arguments.backend == "cpu":
            set_isa(isa)
            check_refusals(DTYPES[chosen.dtypes[0]], tell)
        for case in cases(chosen):
            run(case, arguments.backend, arguments.rows, tell)
            count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main()
