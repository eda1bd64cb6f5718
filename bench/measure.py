"""How it is measured: equal results first, then interleaved times, then peak memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbloss_fused import reference

from .cases import OURS, Case, Contestant, Problem

CHUNK = 2**21  # elements that the reference takes at a time
WEIGHED = ("fused", "in place", "eager")  # whose memory is measured
COUNTED = 2**22  # bytes of a tensor whose peak memory is worth a measurement
SLOW = 60  # ms: one measurement is enough a turn
LOSS_TOLERANCE = 2e-5  # relative
GRADIENT_TOLERANCE = 2e-5  # of the row's largest
LENIENCE = 50  # for others' gradients: p - 1 cancels in rows that are nearly certain
ROUNDING = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}


class Run:
    """One contestant at one case: `prepare` is not timed, the call is."""

    def __init__(self, contestant: Contestant, given: Problem, train: bool) -> None:
        self.contestant, self.given, self.train = contestant, given, train
        self.backward = train and contestant.column != "clone"

    def prepare(self) -> Tensor:
        """The logits of the next call; no gradient is left from the last."""
        self.given.logits.grad = None
        if not self.contestant.overwrites:
            return self.given.logits
        with torch.set_grad_enabled(self.train):
            return self.given.logits.clone()

    def __call__(self, logits: Tensor, calls: int = 1) -> Tensor:
        """The last of so many losses, with its gradient in the leaf's grad when training."""
        leaf, target, weight = self.given
        compute, backward = self.contestant.loss, self.backward
        with torch.set_grad_enabled(backward):
            for _ in range(calls):
                leaf.grad = None
                loss = compute(logits, target, weight)
                if backward:
                    loss.backward()
        return loss

    def time(self, calls: int) -> float:
        """Milliseconds of a call, over so many in a row; what the last leaves is freed untimed."""
        logits = self.prepare()
        start = time.perf_counter_ns()
        _kept = self(logits, calls)
        return (time.perf_counter_ns() - start) / calls / 1e6


class Wanted(NamedTuple):
    """The sum of the weighted row losses in float64, its gradient, and what means divide by."""

    loss: float
    grad: Tensor
    denominators: dict[str, float]


def wanted(case: Case, given: Problem) -> Wanted:
    """The float64 reference, a few rows at a time."""
    weight, total = given.weight.double(), 0.0
    grad = torch.empty(case.shape, dtype=torch.float64)
    for rows in _chunks(case):
        logits = given.logits.detach()[rows].double().requires_grad_()
        loss = reference.loss(
            logits,
            given.target[rows],
            weight,
            activation=case.activation,
            gamma=case.gamma,
            ignore_index=None,
            reduction="sum",
        )
        total += loss.item()
        grad[rows] = torch.autograd.grad(loss, logits)[0]
    r = weight[given.target].sum().item()
    return Wanted(total, grad, {"mean": float(given.target.numel()), "weighted_mean": r})


class Verdict(NamedTuple):
    """What is wrong with a contestant (None: nothing), and its gradient's worst relative error."""

    outcome: str | None = None
    gradient_error: float | None = None


def check(case: Case, run: Run, want: Wanted) -> Verdict:
    """Hold a contestant's loss and gradient to the reference."""
    contestant = run.contestant
    if contestant.column == "clone":
        return Verdict()
    try:
        loss = run(run.prepare()).item()
    except RuntimeError as error:  # out of memory, no compiler: it does not stop the others
        return Verdict(f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    times = want.denominators[contestant.reduction] * contestant.factor
    if not abs(loss * times - want.loss) <= LOSS_TOLERANCE * abs(want.loss):
        return Verdict(f"wrong loss: {loss} is not {want.loss / times}")
    if not run.train:
        return Verdict()
    grad = run.given.logits.grad
    assert grad is not None
    worst = max(_worst_row(grad[rows], times, want.grad[rows]) for rows in _chunks(case))
    allowed = GRADIENT_TOLERANCE * (1 if contestant.column in OURS else LENIENCE)
    allowed += ROUNDING[case.dtype]
    return Verdict(None if worst <= allowed else "wrong gradient", worst)


def _worst_row(grad: Tensor, times: float, want: Tensor) -> float:
    error = (grad.double() * times - want).abs().amax(1) / want.abs().amax(1)
    return error.nan_to_num(nan=torch.inf).max().item()


def _chunks(case: Case) -> Iterator[slice]:
    rows = max(1, CHUNK // torch.Size(case.shape[1:]).numel())
    return (slice(i, i + rows) for i in range(0, case.shape[0], rows))


def times(runs: list[Run], calls: int, budget: float) -> list[list[float]]:
    """Milliseconds of every run, in turns, until the budget in seconds is spent.

    `check` has warmed them up. A turn is up to three calls on end, as in a training loop: a virtual
    machine may take freed huge pages back within seconds, and refill them slowly. A formula that
    is twice as slow as the fastest of its column leaves after two turns.
    """
    spent: list[list[float]] = [[] for _ in runs]
    left = list(range(len(runs)))
    gc.collect()
    gc.disable()
    start, turn = time.perf_counter(), 0
    while turn < 3 or (turn < 100 and time.perf_counter() - start < budget):
        for i in left:
            for _ in range(3):
                spent[i].append(runs[i].time(calls))
                if spent[i][-1] * calls > SLOW:
                    break
        turn += 1
        if turn == 2:
            left = _leaders(runs, spent)
    gc.enable()
    return spent


def _leaders(runs: list[Run], spent: list[list[float]]) -> list[int]:
    best: dict[str, float] = {}
    for run, ms in zip(runs, spent, strict=True):
        column = run.contestant.column
        best[column] = min(best.get(column, torch.inf), *ms)
    return [i for i, run in enumerate(runs) if min(spent[i]) < 2 * best[run.contestant.column]]


def winners(runs: list[Run], results: dict[str, Any]) -> list[Run]:
    """The fastest of each column whose memory is measured."""
    columns = [[run for run in runs if run.contestant.column == column] for column in WEIGHED]
    key = "median_ms"
    return [min(c, key=lambda run: results[run.contestant.name][key]) for c in columns if c]


def peak_extra(run: Run) -> float | None:
    """Peak memory of a call beyond what it was given, in N x C tensors of the logits' dtype.

    The operating system's high-water mark of resident memory, reset before the call: it sees every
    buffer, torch's or not, and writing over memory that is there costs nothing, as it should for
    inplace. Free memory that malloc keeps is given back first, or new tensors would hide in it.
    None for tensors that the counter's steps are too coarse for, and where it is missing.
    """
    size = run.given.logits.nbytes
    reset, trim = Path("/proc/self/clear_refs"), getattr(ctypes.CDLL(None), "malloc_trim", None)
    if size < COUNTED or not reset.exists() or not trim:
        return None
    logits = run.prepare()
    gc.collect()
    trim(0)
    reset.write_text("5")
    before = _status("VmRSS")
    _kept = run(logits)
    return (_status("VmHWM") - before) / size


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def summary(ms: list[float]) -> dict[str, float | int]:
    return {"median_ms": median(ms), "min_ms": min(ms), "repetitions": len(ms)}
