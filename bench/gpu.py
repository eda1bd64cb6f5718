"""Time the fused losses on one NVIDIA GPU beside everyone else: `python -m bench.gpu`.

Logits smaller than twice the L2 cache come in enough copies (at most SLOTS of gpu_cases.py) that a
round through them exceeds it, each with a gradient that lives until its next turn: calls follow
each other as in training, and yet find nothing cached. A flush before each would hide launches
behind its own time. Below SMALL bytes a few copies do: a call on them is all launches. A sample is
a pair of events around many calls, queued behind a pause, so that the GPU does not wait for the
first of them. A graph holds one call on every copy. torch.compile takes seconds a formula: see
COMPILED there, and no forward alone. Of our own, every backend that the machine has takes part in
every case. `--device cpu --quick` is a dry run, without events, graphs and memory.

A row is a line in FOLDER/GPU-DATE.jsonl as soon as it is measured; at the end, at an interrupt or
where the GPU is lost they are a report, in .json and .md. --skip goes on in the same file.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import cbloss_fused.cuda

from . import measure
from .cases import OURS, Case, Contestant, Problem
from .gpu_cases import (
    COMPILED,
    QUICK,
    all_cases,
    contestants,
    copies,
    fused,
    lineup,
    optional,
    problem,
)
from .gpu_table import FORWARD, GRAPH, TRAIN, Row, by_backend
from .journal import Journal, interruptible
from .measure import Verdict, Wanted

TURNS = (20, 100)  # samples of everyone in a row: at the least, at the most within ROW_SECONDS
ROW_SECONDS = {"cuda": 0.1, "cpu": 0.0}
SAMPLE_MS = {"cuda": 1.0, "cpu": 0.1}  # where a round is not longer
PAUSE = 500_000  # cycles: 0.3 ms
HOST_CALLS, HOST_NUMEL = 20, 2**22  # calls that the launch queue holds, logits that it outruns
CASE_BYTES, EAGER_BYTES = 32, 48  # per element: all that a case keeps, what eager adds


class LostGpuError(Exception):
    """The GPU's context: nothing works any more in this process."""


def main(argv: list[str]) -> int:
    """The exit status: 1 where fused is wrong or fails, or the run was stopped."""
    arguments, start = parse(argv), time.perf_counter()
    device, cases = torch.device(arguments.device), chosen(arguments)
    command = shlex.join(["python", "-m", "bench.gpu", *argv])
    facts = {"command": command, **environment(device)}
    journal, more = Journal(arguments.out, facts, arguments.skip > 0), {}
    try:
        with interruptible():
            if device.type == "cuda" and arguments.workers:
                compile_all(cases, arguments.workers, arguments.budget / 3)
                more["compiled beforehand in"] = f"{time.perf_counter() - start:.0f} s"
            measure_cases(cases, device, start + arguments.budget, journal)
    except (KeyboardInterrupt, LostGpuError) as error:
        more["stopped"] = str(error)
    print(journal.report(**more, seconds=round(time.perf_counter() - start, 1)))
    rows = journal.rows
    wrong = sum(any(result["outcome"] for result in by_backend(row).values()) for row in rows)
    print(f"fused is wrong or fails in {wrong} of {len(rows)} rows", file=sys.stderr)
    return 1 if wrong or not rows or "stopped" in more else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes")
    parser.add_argument("--first", type=int, metavar="K", help="only so many cases")
    parser.add_argument("--skip", type=int, default=0, metavar="K", help="not the first so many")
    parser.add_argument("--budget", type=float, default=480, help="seconds, compilation included")
    parser.add_argument("--workers", type=int, default=8, help="compile before; 0: on the way")
    parser.add_argument("--out", type=Path, default=results, metavar="FOLDER", help="%(default)s")
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> list[Case]:
    cases = QUICK if arguments.quick else all_cases()
    return cases[arguments.skip :][: arguments.first]


def environment(device: torch.device) -> Row:
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else "none (dry run)",
        "driver": driver() if cuda else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": getattr(optional("triton"), "__version__", "none"),
        "python": platform.python_version(),
        "cbloss_fused": cbloss_fused.__version__,
        "kernels": cbloss_fused.backends()[device.type],
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip()
    return "unknown"


# Calling, checking, timing ------------------------------------------------------------------------


class Run:
    """One contestant in one pass, over a ring of logits that it may share."""

    def __init__(self, contestant: Contestant, given: Problem, ring: list[Tensor], title: str):
        self.contestant, self.given, self.title = contestant, given, title
        self.train = title != FORWARD and contestant.column != "copy"
        self.ring = ring if self.train else [logits.detach() for logits in ring]
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, index: int) -> Tensor:
        """The loss of a call; its gradient stays until the ring comes round."""
        logits = self.ring[index % len(self.ring)]
        logits.grad = None
        with torch.set_grad_enabled(self.train):
            loss = self.contestant.loss(logits, *self.given[1:])
            if self.train:
                loss.backward()
        return loss.detach()

    def first(self) -> Tensor:
        """The loss of the first call; in a graph, of a replay that has to write its results."""
        if self.title != GRAPH:
            return self.step(0)
        loss = self.capture()
        for poisoned in (loss, *(x.grad for x in self.ring if x.grad is not None)):
            poisoned.fill_(torch.nan)
        self(len(self.ring))
        return loss

    def capture(self) -> Tensor:
        """Hold a round in a graph; what synchronises raises before it can spoil the capture."""
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
        """So many calls: in a graph, replays that hold as many."""
        if self.graph is None:
            for index in range(calls):
                self.step(index)
        else:
            for _ in range(calls // len(self.ring)):
                self.graph.replay()

    def time(self, calls: int) -> float:
        """Milliseconds of a call: the GPU's, where the host keeps ahead of it."""
        if not self.given.logits.is_cuda:
            start = time.perf_counter()
            self(calls)
            return (time.perf_counter() - start) / calls * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE)
        begin.record()
        self(calls)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    def calls(self) -> int:
        """How many make a sample: whole rounds. It warms up, too."""
        n, sample = len(self.ring), SAMPLE_MS[self.given.logits.device.type]
        self.time(n)
        return n * math.ceil(sample / max(n * self.time(n), sample / 100))

    def host_us(self) -> float:
        """Microseconds that a call keeps the host, without waiting for the GPU."""
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


def too_large(case: Case, bytes_each: int, device: torch.device) -> bool:
    """Whether new tensors may not fit; torch's allocator would give back what it keeps."""
    if device.type != "cuda":
        return False
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return bytes_each * torch.Size(case.shape).numel() > torch.cuda.mem_get_info()[0] + kept


def failed(error: Exception, who: str, device: torch.device) -> Verdict:
    """The others go on, unless the GPU answers nobody any more."""
    told = f"failed: {type(error).__name__}: {f'{error} '.splitlines()[0]}"
    if not usable(device):
        raise LostGpuError(f"the GPU's context is lost: {who} {told}") from error
    return Verdict(told)


def usable(device: torch.device) -> bool:
    """Whether the GPU still answers. A graph whose capture failed is no more than that."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return "captur" in str(error)
    return True


def check(case: Case, run: Run, want: Wanted, deadline: float) -> Verdict:
    """Hold a contestant's loss and gradient, all of it, to the float64 reference."""
    contestant = run.contestant
    if contestant.column != "fused" and time.perf_counter() > deadline:
        return Verdict("skipped: out of time")
    if contestant.column == "eager" and too_large(case, EAGER_BYTES, want.grad.device):
        return Verdict("skipped: may need more memory than is free")
    try:
        loss = run.first()
        if contestant.column == "copy":
            return Verdict()
        value = loss.item()
    except Exception as error:  # a compiler's, of memory: it does not stop the others
        return failed(error, f"{case}: {contestant.name}, {run.title}", want.grad.device)
    ours, rounding = contestant.column in OURS, measure.ROUNDING[case.dtype]
    times = want.denominators[contestant.reduction]
    allowed = measure.LOSS_TOLERANCE + (0 if ours else rounding)
    if not abs(value * times - want.loss) <= allowed * abs(want.loss):
        return Verdict(f"wrong loss: {value} is not {want.loss / times}")
    grad, chunks = run.ring[0].grad, measure._chunks(case)
    if not run.train or grad is None:
        return Verdict("failed: no gradient" if run.train else None)
    worst = max(measure._worst_row(grad[rows], times, want.grad[rows]) for rows in chunks)
    allowed = measure.GRADIENT_TOLERANCE * (1 if ours else measure.LENIENCE) + rounding
    return Verdict(None if worst <= allowed else "wrong gradient", worst)


def compile_all(cases: list[Case], workers: int, seconds: float) -> None:
    """Fill the compilers' caches on disk from many processes: one would outlast the budget."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    ignore = (signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all of its processes
    pool = multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore)
    with pool, suppress(multiprocessing.TimeoutError):
        pool.map_async(compile_case, cases, chunksize=1).get(seconds)


def compile_case(case: Case) -> None:
    """One call of all that is compiled; what fails is reported when it is measured."""
    torch.compiler.reset()
    with suppress(Exception):
        logits = torch.zeros(case.shape, dtype=case.dtype, device="cuda").requires_grad_()
        target = logits.detach().select(1, 0).long()
        given = Problem(logits, target, torch.ones(case.shape[1], device="cuda"))
        field = contestants(case, [logits])
        for title in (FORWARD, TRAIN):
            for contestant in lineup(case, field, title):
                if contestant.column in (*OURS, "compile", "liger"):
                    Run(contestant, given, [logits], title).step(0)
    torch.cuda.empty_cache()


def measure_cases(
    cases: list[Case], device: torch.device, deadline: float, journal: Journal
) -> None:
    """Write down the rows, and which cases were left out and why."""
    for case in cases:
        try:
            if time.perf_counter() > deadline:
                journal.skip(f"{case}: out of time")
            elif too_large(case, CASE_BYTES, device):
                journal.skip(f"{case}: may need more memory than is free")
            else:
                for row in measure_case(case, device, deadline):
                    journal.row(row)
        except LostGpuError:
            raise
        except Exception as error:  # of memory, of the GPU: the next case may work
            verdict = failed(error, str(case), device)._asdict()
            journal.row(as_row(case, TRAIN, {c.name: verdict for c in fused(case, device)}))
        gc.collect()
        with suppress(Exception):
            torch.cuda.empty_cache()


def measure_case(case: Case, device: torch.device, deadline: float) -> Iterator[Row]:
    """Check everyone, then, without the float64 gradient, time them: a row for each pass."""
    if case in COMPILED:
        torch.compiler.reset()  # its limit of recompilations counts every case before
    given = problem(case, device)
    ring = copies(given.logits)
    field = contestants(case, ring)
    own = [x.detach().clone().requires_grad_() for x in ring if any(c.overwrites for c in field)]
    with device:
        want = measure.wanted(case, given)
    checked: dict[str, list[tuple[Run, Verdict]]] = {}
    for title in (FORWARD, TRAIN, GRAPH) if device.type == "cuda" else (FORWARD, TRAIN):
        line = lineup(case, field, title)
        runs = [Run(c, given, own if c.overwrites else ring, title) for c in line]
        checked[title] = [(run, check(case, run, want, deadline)) for run in runs]
    del want
    for title, pairs in checked.items():
        yield measure_row(case, title, pairs)


def measure_row(case: Case, title: str, checked: list[tuple[Run, Verdict]]) -> Row:
    results: Row = {run.contestant.name: verdict._asdict() for run, verdict in checked}
    right = [run for run, verdict in checked if verdict.outcome is None]
    if not any(run.contestant.column == "fused" for run in right):
        return as_row(case, title, results)
    for run, ms in zip(right, times(right), strict=True):
        result, logits = results[run.contestant.name], run.given.logits
        result |= measure.summary(ms)
        if logits.numel() < HOST_NUMEL:
            result["host_us"] = run.host_us()
        if title == TRAIN and logits.is_cuda and logits.nbytes >= measure.COUNTED:
            result["peak_extra"] = run.peak_extra()
    return as_row(case, title, results)


def as_row(case: Case, title: str, results: Row) -> Row:
    facts = {**case._asdict(), "dtype": str(case.dtype)[6:]}
    return {**facts, "passes": title, "contestants": results}


def times(runs: list[Run]) -> list[list[float]]:
    """Milliseconds of a call of every run, in turns."""
    calls = [run.calls() for run in runs]
    spent: list[list[float]] = [[] for _ in runs]
    start, seconds = time.perf_counter(), ROW_SECONDS[runs[0].given.logits.device.type]
    for turn in range(TURNS[1]):
        if turn >= TURNS[0] and time.perf_counter() - start > seconds:
            break
        for run, n, ms in zip(runs, calls, spent, strict=True):
            ms.append(run.time(n))
    return spent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
