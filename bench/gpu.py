"""Time this package's losses and their rivals on one NVIDIA GPU: `python -m bench.gpu`.

Every backend that the machine has takes part in every case. Each row becomes a line in
FOLDER/GPU-DATE.jsonl as soon as it is measured. At the end, after an interrupt or if the GPU is
lost, all rows become a report, in .json and .md; --skip continues the same file. `measure.py` says
how it is timed. `--device cpu --quick` is a dry run without events, graphs and memory.
"""

from __future__ import annotations

import argparse
import gc
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
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cbloss_fused
from cbloss_fused import class_balanced_loss

from . import losses, measure, result_files
from .cases import (
    FORWARD,
    GPU_COMPILED_CASES,
    GPU_QUICK_CASES,
    GRAPH,
    TRAIN,
    Case,
    Problem,
    gpu_cases,
    problem,
)
from .losses import OWN_COLUMNS, Implementation, case_options
from .measure import Expected, GpuRun, Verdict
from .report import by_backend, gpu_report
from .result_files import Journal, Row, interruptible

CASE_BYTES, EAGER_BYTES = 32, 48  # per element: all that a case keeps, what eager needs besides
HOST_MAX_ELEMENTS = 2**22  # with more the launch queue fills up: the host waits for the GPU
GRAPH_EAGER_MAX_ELEMENTS = 2**26  # with more, a graph of eager PyTorch would keep too much memory
COMPILED_FORMULAS = 2  # the reference, and the formula that compiles to the fastest code
SYNCHRONISE = ("eager reference", "liger")  # so a graph cannot contain them


class LostGpuError(Exception):
    """The GPU's context is lost: nothing works any more in this process."""


def main(argv: list[str]) -> int:
    """The exit status: 1 if fused is wrong or fails, or if the run was stopped."""
    arguments, start = parse(argv), time.perf_counter()
    device, cases = torch.device(arguments.device), chosen(arguments)
    command = shlex.join(["python", "-m", "bench.gpu", *argv])
    facts = {"command": command, **environment(device)}
    journal = Journal(arguments.out, facts, resume=arguments.skip > 0)
    more: Row = {}
    try:
        with interruptible():
            if device.type == "cuda" and arguments.workers:
                compile_all(cases, arguments.workers, arguments.budget / 3)
                more["compiled beforehand in"] = f"{time.perf_counter() - start:.0f} s"
            measure_cases(cases, device, start + arguments.budget, journal)
    except (KeyboardInterrupt, LostGpuError) as error:
        more["stopped"] = str(error)
    result = journal.result(**more, seconds=round(time.perf_counter() - start, 1))
    text = gpu_report(result)
    result_files.save(journal.path.with_suffix(".json"), result, text)
    print(text)
    rows = journal.rows
    wrong = sum(any(each["outcome"] for each in by_backend(row).values()) for row in rows)
    print(f"fused is wrong or fails in {wrong} of {len(rows)} rows", file=sys.stderr)
    return 1 if wrong or not rows or "stopped" in more else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes")
    parser.add_argument("--first", type=int, metavar="K", help="only the first K cases")
    parser.add_argument("--skip", type=int, default=0, metavar="K", help="not the first K cases")
    parser.add_argument("--budget", type=float, default=480, help="seconds, with compilation")
    parser.add_argument(
        "--workers", type=int, default=8, help="processes that compile beforehand; 0: none"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=result_files.FOLDER,
        metavar="FOLDER",
        help="default: %(default)s",
    )
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> list[Case]:
    cases = GPU_QUICK_CASES if arguments.quick else gpu_cases()
    return cases[arguments.skip :][: arguments.first]


def environment(device: torch.device) -> Row:
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else "none (dry run)",
        "driver": driver() if cuda else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": getattr(losses.optional("triton"), "__version__", "none"),
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


# Who takes part -----------------------------------------------------------------------------------


def fused(
    case: Case, device: torch.device, column: str = "fused", **options: Any
) -> list[Implementation]:
    """This package's, one for each backend."""
    loss = partial(class_balanced_loss, **case_options(case), **options)
    reduction = options.get("reduction", "mean")
    return [
        Implementation(column, partial(loss, backend=name or None), name, reduction)
        for name in losses.backends(device)
    ]


def implementations(case: Case, ring: list[Tensor]) -> list[Implementation]:
    """All that compute the case, fused first. The copy uses as many buffers as there are logits."""
    device = ring[0].device
    found = fused(case, device)
    if (case.activation, case.gamma) == ("softmax", 0):
        found += fused(case, device, "weighted", reduction="weighted_mean")
        found += cross_entropies(case, device)
    focal = losses.torchvision_focal(case.gamma) if case.activation == "sigmoid" else None
    if focal is not None:
        found.append(Implementation("torchvision", focal))
    eager: dict[str, losses.LossFunction] = {
        "reference": partial(losses.reference_loss, **case_options(case)),
        **losses.eager_formulas(case),
    }
    found += [Implementation("eager", loss, name) for name, loss in eager.items()]
    if case in GPU_COMPILED_CASES:
        for name, loss in list(eager.items())[:COMPILED_FORMULAS]:
            code = torch.compile(loss, fullgraph=True, dynamic=False)
            found.append(Implementation("compile", code, name))
    buffers = cycle([torch.empty_like(logits, requires_grad=False) for logits in ring])
    return [*found, Implementation("copy", lambda x, y, w: next(buffers).copy_(x))]


def cross_entropies(case: Case, device: torch.device) -> list[Implementation]:
    """F.cross_entropy, half types in float32 and in their own dtype, and Liger-Kernel's."""
    cuda, reduction = device.type == "cuda", "weighted_mean"
    rivals = {"": losses.cross_entropy_float32}
    if cuda and case.dtype != torch.float32:
        rivals["as is"] = losses.cross_entropy_own_dtype
    found = [
        Implementation("cross_entropy", loss, name, reduction) for name, loss in rivals.items()
    ]
    liger = losses.liger_cross_entropy() if cuda and len(case.shape) == 2 else None
    if liger is not None:
        found.append(Implementation("liger", liger, reduction=reduction, overwrites=True))
    return found


def participants(case: Case, found: list[Implementation], title: str) -> list[Implementation]:
    """Those of the implementations that take part in a pass."""
    if title == FORWARD:
        return [each for each in found if each.column != "compile"]
    if title == GRAPH:
        left_out = "eager" if case.numel > GRAPH_EAGER_MAX_ELEMENTS else None
        return [each for each in found if each.name not in SYNCHRONISE and each.column != left_out]
    return found


# Checking and timing ------------------------------------------------------------------------------


def too_large(case: Case, bytes_per_element: int, device: torch.device) -> bool:
    """Whether new tensors may not fit; torch's allocator would give back what it caches."""
    if device.type != "cuda":
        return False
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return bytes_per_element * case.numel > torch.cuda.mem_get_info()[0] + cached


def failed(error: Exception, who: str, device: torch.device) -> Verdict:
    """The others go on, unless the GPU no longer responds."""
    message = f"failed: {type(error).__name__}: {f'{error} '.splitlines()[0]}"
    if not measure.device_usable(device):
        raise LostGpuError(f"the GPU's context is lost: {who} {message}") from error
    return Verdict(message)


def check(case: Case, run: GpuRun, expected: Expected, deadline: float) -> Verdict:
    """Compare an implementation's loss and gradient with the float64 reference."""
    implementation, device = run.implementation, expected.grad.device
    if implementation.column != "fused" and time.perf_counter() > deadline:
        return Verdict("skipped: out of time")
    if implementation.column == "eager" and too_large(case, EAGER_BYTES, device):
        return Verdict("skipped: may need more memory than is free")
    try:
        loss = run.first()
        if implementation.column == "copy":
            return Verdict()
        value = loss.item()
    except Exception as error:  # a compiler's, out of memory: the others go on
        return failed(error, f"{case}: {implementation.name}, {run.title}", device)
    grad = run.ring[0].grad if run.train else None
    if run.train and grad is None:
        return Verdict("failed: no gradient")
    # Others may return the loss in the logits' dtype.
    own = implementation.column in OWN_COLUMNS
    tolerance = measure.LOSS_TOLERANCE + (0 if own else measure.HALF_SPACING[case.dtype])
    return measure.compare(case, implementation, value, grad, expected, tolerance)


def compile_all(cases: list[Case], workers: int, seconds: float) -> None:
    """Fill the compilers' caches on disk from many processes: one would exceed the budget."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    ignore = (signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all of its processes
    pool = multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore)
    with pool, suppress(multiprocessing.TimeoutError):
        pool.map_async(compile_case, cases, chunksize=1).get(seconds)


def compile_case(case: Case) -> None:
    """Call once all that is compiled. What fails is reported later, when it is measured."""
    torch.compiler.reset()
    with suppress(Exception):
        logits = torch.zeros(case.shape, dtype=case.dtype, device="cuda").requires_grad_()
        target = logits.detach().select(1, 0).long()
        given = Problem(logits, target, torch.ones(case.shape[1], device="cuda"))
        found = implementations(case, [logits])
        for title in (FORWARD, TRAIN):
            for each in participants(case, found, title):
                if each.column in (*OWN_COLUMNS, "compile", "liger"):
                    GpuRun(each, given, [logits], title).step(0)
    torch.cuda.empty_cache()


def measure_cases(
    cases: list[Case], device: torch.device, deadline: float, journal: Journal
) -> None:
    """Write the rows to the journal, and which cases were left out and why."""
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
        except Exception as error:  # out of memory, of the GPU: the next case may work
            verdict = failed(error, str(case), device)._asdict()
            journal.row(case.row(TRAIN, {each.name: verdict for each in fused(case, device)}))
        gc.collect()
        with suppress(Exception):
            torch.cuda.empty_cache()


def measure_case(case: Case, device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each pass. All are checked before any is timed, to free the float64 gradient."""
    if case in GPU_COMPILED_CASES:
        torch.compiler.reset()  # its limit of recompilations would count all cases so far
    given = problem(case, device)
    ring = measure.copies(given.logits)
    found = implementations(case, ring)
    # What overwrites its logits gets a ring of its own.
    own = [
        x.detach().clone().requires_grad_() for x in ring if any(each.overwrites for each in found)
    ]
    with device:
        expected = measure.expected_result(case, given)
    checked: dict[str, list[tuple[GpuRun, Verdict]]] = {}
    for title in (FORWARD, TRAIN, GRAPH) if device.type == "cuda" else (FORWARD, TRAIN):
        runs = [
            GpuRun(each, given, own if each.overwrites else ring, title)
            for each in participants(case, found, title)
        ]
        checked[title] = [(run, check(case, run, expected, deadline)) for run in runs]
    del expected
    for title, pairs in checked.items():
        yield case.row(title, measure_runs(title, pairs))


def measure_runs(title: str, checked: list[tuple[GpuRun, Verdict]]) -> Row:
    """The results by implementation; nothing is timed if none of ours is right."""
    found: Row = {run.implementation.name: verdict._asdict() for run, verdict in checked}
    right = [run for run, verdict in checked if verdict.outcome is None]
    if not any(run.implementation.column == "fused" for run in right):
        return found
    for run, ms in zip(right, measure.gpu_times(right), strict=True):
        result, logits = found[run.implementation.name], run.given.logits
        result |= measure.summary(ms)
        if logits.numel() < HOST_MAX_ELEMENTS:
            result["host_us"] = run.host_us()
        if title == TRAIN and logits.is_cuda and logits.nbytes >= measure.MEMORY_MIN_BYTES:
            result["peak_extra"] = run.peak_extra()
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
