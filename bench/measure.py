"""How it is measured: equal results first, then times in turns, then memory.

On a GPU, logits smaller than twice the L2 cache come in enough copies (at most MAX_COPIES) that a
round through them exceeds the cache, and each copy keeps its gradient until its next turn: calls
follow each other as in training, yet find nothing in the cache. Flushing the cache before each call
instead would hide the launches behind the flush. Below SMALL_BYTES a few copies suffice, since the
launches take all of such a call's time. A sample is a pair of events around many calls that are
queued behind a pause for as long as the host takes to queue them, so that the GPU does not wait for
it. A CUDA graph holds one call on every copy.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import FORWARD, GRAPH, Case, Problem
from .losses import OWN_COLUMNS, Implementation, case_options, reference_loss

LOSS_TOLERANCE = 2e-5  # relative
GRADIENT_TOLERANCE = 2e-5  # relative to the row's largest
OTHERS_GRADIENT_TOLERANCE = 1e-3  # others' p - 1 cancels in rows that are nearly certain
HALF_SPACING = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
CHUNK = 2**21  # elements that the reference takes at a time

MEMORY_COLUMNS = ("fused", "in place", "eager")  # whose memory is measured
MEMORY_MIN_BYTES = 2**22  # of the logits: smaller ones say little
SLOW_MS = 60  # one call per turn is enough for what takes longer

GPU_TURNS = (20, 100)  # samples of everyone: at least, at most within GPU_SECONDS
GPU_SECONDS = {"cuda": 0.1, "cpu": 0.0}
SAMPLE_MS = {"cuda": 1.0, "cpu": 0.1}  # of a sample, unless one round takes longer
CYCLES_PER_MS = 2_000_000  # at most, of a GPU's clock
HOST_MS = 3.0  # of the host per sample, unless one round takes longer
PAUSE_MS = 0.3  # of a pause, at least
MAX_COPIES, SMALL_BYTES = 48, 2**20
HOST_CALLS = 20  # as many fit into the launch queue


# Equal results ------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """The sum of the weighted row losses in float64, its gradient, and what means divide by."""

    loss: float
    grad: Tensor
    denominators: dict[str, float]


def expected_result(case: Case, given: Problem) -> Expected:
    """The float64 reference, computed a few rows at a time."""
    weight, total = given.weight.double(), 0.0
    grad = torch.empty(case.shape, dtype=torch.float64)
    for rows in _chunks(case):
        logits = given.logits.detach()[rows].double().requires_grad_()
        target = given.target[rows]
        loss = reference_loss(logits, target, weight, reduction="sum", **case_options(case))
        total += loss.item()
        grad[rows] = torch.autograd.grad(loss, logits)[0]
    weights = weight[given.target].sum().item()
    return Expected(total, grad, {"mean": float(given.target.numel()), "weighted_mean": weights})


class Verdict(NamedTuple):
    """What is wrong with an implementation (None: nothing), and its gradient's largest error."""

    outcome: str | None = None
    gradient_error: float | None = None  # relative to the row's largest


def compare(
    case: Case,
    implementation: Implementation,
    loss: float,
    grad: Tensor | None,
    expected: Expected,
    loss_tolerance: float = LOSS_TOLERANCE,
) -> Verdict:
    """Compare a loss, and a gradient if there is one, with the reference."""
    scale = expected.denominators[implementation.reduction] * implementation.factor
    if not abs(loss * scale - expected.loss) <= loss_tolerance * abs(expected.loss):
        return Verdict(f"wrong loss: {loss} is not {expected.loss / scale}")
    if grad is None:
        return Verdict()
    worst = max(_worst_row(grad[rows], scale, expected.grad[rows]) for rows in _chunks(case))
    own = implementation.column in OWN_COLUMNS
    allowed = GRADIENT_TOLERANCE if own else OTHERS_GRADIENT_TOLERANCE
    allowed += HALF_SPACING[case.dtype]
    return Verdict(None if worst <= allowed else "wrong gradient", worst)


def _worst_row(grad: Tensor, scale: float, expected: Tensor) -> float:
    error = (grad.double() * scale - expected).abs().amax(1) / expected.abs().amax(1)
    return error.nan_to_num(nan=torch.inf).max().item()


def _chunks(case: Case) -> Iterator[slice]:
    rows = max(1, CHUNK // torch.Size(case.shape[1:]).numel())
    return (slice(i, i + rows) for i in range(0, case.shape[0], rows))


def summary(ms: list[float]) -> dict[str, float | int]:
    return {"median_ms": median(ms), "min_ms": min(ms), "repetitions": len(ms)}


# On the CPU ---------------------------------------------------------------------------------------


class CpuRun:
    """An implementation at a case. The time of `prepare` is not measured, that of the call is."""

    def __init__(self, implementation: Implementation, given: Problem, train: bool) -> None:
        self.implementation, self.given, self.train = implementation, given, train
        self.backward = train and implementation.column != "copy"

    def prepare(self) -> Tensor:
        """The logits of the next call; removes the gradient of the last one."""
        self.given.logits.grad = None
        if not self.implementation.overwrites:
            return self.given.logits
        with torch.set_grad_enabled(self.train):
            return self.given.logits.clone()

    def __call__(self, logits: Tensor, calls: int = 1) -> Tensor:
        """Compute the loss so many times, in training with the gradient; return the last loss."""
        leaf, target, weight = self.given
        compute, backward = self.implementation.loss, self.backward
        with torch.set_grad_enabled(backward):
            for _ in range(calls):
                leaf.grad = None
                loss = compute(logits, target, weight)
                if backward:
                    loss.backward()
        return loss

    def time(self, calls: int) -> float:
        """Milliseconds per call, of so many in a row. The last result is freed after that."""
        logits = self.prepare()
        start = time.perf_counter_ns()
        _kept = self(logits, calls)
        return (time.perf_counter_ns() - start) / calls / 1e6


def check(case: Case, run: CpuRun, expected: Expected) -> Verdict:
    """Compare an implementation's loss and gradient with the reference."""
    if run.implementation.column == "copy":
        return Verdict()
    try:
        loss = run(run.prepare()).item()
    except RuntimeError as error:  # out of memory, no compiler: the others go on
        return Verdict(f"failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    grad = run.given.logits.grad
    assert grad is not None or not run.train
    return compare(case, run.implementation, loss, grad if run.train else None, expected)


def times(runs: list[CpuRun], calls: int, budget: float) -> list[list[float]]:
    """Milliseconds of every run, measured in turns until the budget in seconds is spent.

    The runs must have been called once. A turn is up to three calls in a row, as in a training
    loop: a virtual machine may take freed huge pages back within seconds and be slow to return
    them. After two turns, formulas that are twice as slow as the fastest of their column drop out.
    """
    spent: list[list[float]] = [[] for _ in runs]
    remaining = list(range(len(runs)))
    gc.collect()
    gc.disable()
    start, turn = time.perf_counter(), 0
    while turn < 3 or (turn < 100 and time.perf_counter() - start < budget):
        for i in remaining:
            for _ in range(3):
                spent[i].append(runs[i].time(calls))
                if spent[i][-1] * calls > SLOW_MS:
                    break
        turn += 1
        if turn == 2:
            remaining = _nearly_fastest(runs, spent)
    gc.enable()
    return spent


def _nearly_fastest(runs: list[CpuRun], spent: list[list[float]]) -> list[int]:
    best: dict[str, float] = {}
    for run, ms in zip(runs, spent, strict=True):
        column = run.implementation.column
        best[column] = min(best.get(column, torch.inf), *ms)
    limits = [2 * best[run.implementation.column] for run in runs]
    return [i for i, limit in enumerate(limits) if min(spent[i]) < limit]


def fastest_by_column(runs: list[CpuRun], results: dict[str, Any]) -> list[CpuRun]:
    """The fastest of each column whose memory is measured."""
    columns = [[r for r in runs if r.implementation.column == name] for name in MEMORY_COLUMNS]
    return [
        min(column, key=lambda run: results[run.implementation.name]["median_ms"])
        for column in columns
        if column
    ]


def peak_extra(run: CpuRun) -> float | None:
    """Peak memory of a call beyond what it was given, in N x C tensors of the logits' dtype.

    This is the operating system's high-water mark of resident memory, reset before the call: it
    includes every buffer, of torch or not, and overwriting existing memory costs nothing, as it
    should for inplace. malloc's free memory is returned first, since new tensors could hide in it.
    None if the logits are too small for the counter's steps or the counter is missing.
    """
    size, logits = run.given.logits.nbytes, run.prepare()
    if size < MEMORY_MIN_BYTES:
        return None
    peak = peak_of(lambda: run(logits))
    return None if peak is None else peak / size


def peak_of(call: Callable[[], object]) -> int | None:
    """Bytes of peak memory of a call beyond what there was before; None without the counter."""
    reset, trim = Path("/proc/self/clear_refs"), getattr(ctypes.CDLL(None), "malloc_trim", None)
    if not reset.exists() or not trim:
        return None
    gc.collect()
    trim(0)
    reset.write_text("5")
    before = _process_status("VmRSS")
    _kept = call()
    return _process_status("VmHWM") - before


def _process_status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


# On a GPU, and in its benchmark's dry run on the CPU ----------------------------------------------


def copies(logits: Tensor) -> list[Tensor]:
    """The logits and as many copies as the module's docstring says."""
    count = 2
    if logits.is_cuda:
        cache = torch.cuda.get_device_properties(logits.device).L2_cache_size
        enough = min(math.ceil(2 * cache / logits.nbytes), MAX_COPIES)
        count = enough if logits.nbytes >= SMALL_BYTES else 4
    return [logits, *(logits.detach().clone().requires_grad_() for _ in range(count - 1))]


class GpuRun:
    """An implementation in one pass of a case, over a ring of logits that runs may share."""

    def __init__(
        self, implementation: Implementation, given: Problem, ring: list[Tensor], title: str
    ) -> None:
        self.implementation, self.given, self.title = implementation, given, title
        self.train = title != FORWARD and implementation.column != "copy"
        self.ring = ring if self.train else [logits.detach() for logits in ring]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pause_ms = PAUSE_MS

    def step(self, index: int) -> Tensor:
        """The loss of a call. Its gradient stays until these logits have their next turn."""
        logits = self.ring[index % len(self.ring)]
        logits.grad = None
        with torch.set_grad_enabled(self.train):
            loss = self.implementation.loss(logits, *self.given[1:])
            if self.train:
                loss.backward()
        return loss.detach()

    def first(self) -> Tensor:
        """The loss of the first call; with a graph, of a replay that must overwrite NaNs."""
        if self.title != GRAPH:
            return self.step(0)
        loss = self.capture()
        for result in (loss, *(x.grad for x in self.ring if x.grad is not None)):
            result.fill_(torch.nan)
        self(len(self.ring))
        return loss

    def capture(self) -> Tensor:
        """Capture a round in a graph. What would synchronise raises before, in the warm-up."""
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(side):
                for index in range(3):
                    self.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        main.wait_stream(side)
        for logits in self.ring:
            logits.grad = None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                losses = [self.step(index) for index in range(len(self.ring))]
        finally:
            torch.cuda.set_stream(main)  # a capture that fails leaves the side stream current
        self.graph = graph
        return losses[0]

    def __call__(self, calls: int) -> None:
        """Make so many calls; with a graph, replays that contain as many."""
        if self.graph is None:
            for index in range(calls):
                self.step(index)
        else:
            for _ in range(calls // len(self.ring)):
                self.graph.replay()

    def time(self, calls: int) -> float:
        """Milliseconds per call: the GPU's, if pause_ms are enough for the host to queue them."""
        if not self.given.logits.is_cuda:
            start = time.perf_counter()
            self(calls)
            return (time.perf_counter() - start) / calls * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(self.pause_ms * CYCLES_PER_MS))
        begin.record()
        self(calls)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    def calls_per_sample(self) -> int:
        """Whole rounds, for SAMPLE_MS. Warms up and sets the pause, too."""
        n, sample = len(self.ring), SAMPLE_MS[self.given.logits.device.type]
        self.time(n)
        host_ms = 1.3 * n * self.host_us() / 1e3  # of a round
        self.pause_ms = max(host_ms, PAUSE_MS)
        rounds = math.ceil(sample / max(n * self.time(n), sample / 100))
        rounds = min(rounds, max(1, int(HOST_MS / host_ms)))
        self.pause_ms = max(rounds * host_ms, PAUSE_MS)
        return n * rounds

    def host_us(self) -> float:
        """Microseconds of the host per call, without waiting for the GPU."""
        calls, spent = len(self.ring) * math.ceil(HOST_CALLS / len(self.ring)), []
        for _ in range(5):
            if self.given.logits.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            self(calls)
            spent.append((time.perf_counter() - start) / calls * 1e6)
        return median(spent)

    def peak_extra(self) -> float:
        """Peak memory of a call beyond what it was given, in N x C tensors of the logits' dtype."""
        for logits in self.ring:
            logits.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(0)
        return (torch.cuda.max_memory_allocated() - before) / self.given.logits.nbytes


def gpu_times(runs: list[GpuRun]) -> list[list[float]]:
    """Milliseconds per call of every run, a list of samples each, measured in turns."""
    calls = [run.calls_per_sample() for run in runs]
    spent: list[list[float]] = [[] for _ in runs]
    start, seconds = time.perf_counter(), GPU_SECONDS[runs[0].given.logits.device.type]
    for turn in range(GPU_TURNS[1]):
        if turn >= GPU_TURNS[0] and time.perf_counter() - start > seconds:
            break
        for run, n, ms in zip(runs, calls, spent, strict=True):
            ms.append(run.time(n))
    return spent


def device_usable(device: torch.device) -> bool:
    """Whether the GPU still responds. The failed capture of a graph does not make it unusable."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return "captur" in str(error)
    return True
