"""Time this package's losses and their rivals on this CPU: `python -m bench.cpu`.

The tables, by argument:

- losses: the class-balanced losses; the README's table. Into results/cpu-DATE.json and .md.
- family: the long-tail family and soft targets. Into results/family-cpu.md.
- detection: a detector's focal loss, most rows background. Into results/detection-cpu.md.
- stats: what return_stats=True costs. Into results/stats-cpu.md.
- presets: docs/migration.md, differences instead of times. Printed only.

Compare times only within a row: its implementations take turns, but the machine's speed may change
from row to row.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shlex
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import cbloss_fused
from cbloss_fused import class_balanced_loss

from . import detection, losses, measure, result_files
from .cases import (
    CLASSES,
    CPU_CASES,
    CPU_QUICK_CASES,
    LARGE,
    LONG_TAIL_SHAPES,
    Case,
    Problem,
    class_counts,
    preset_data,
    problem,
    with_soft_targets,
)
from .losses import Implementation, LongTailLoss, case_options
from .measure import CpuRun, Verdict
from .report import PASSES, cpu_report, markdown_table
from .result_files import RESULTS, Row

LONG_TAIL_TOLERANCE = 1e-3  # relative to the largest gradient
SECONDS_PER_ROW = {"losses": 1.0, "family": 2.0, "stats": 4.0, "detection": 20.0}


def main(argv: list[str]) -> int:
    """The exit status: 1 if this package is wrong or fails."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    return TABLES[arguments.table](arguments)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=tuple(TABLES), default="losses")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, in a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for the timing of one row")
    parser.add_argument("--no-compile", action="store_true", help="losses: leave torch.compile out")
    parser.add_argument(
        "--out",
        type=Path,
        default=result_files.FOLDER,
        metavar="FOLDER",
        help="default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "bench.cpu", *argv])
    if arguments.budget is None:
        quick = 0.5 if arguments.quick else 1.0
        arguments.budget = quick * SECONDS_PER_ROW.get(arguments.table, 1.0)
    return arguments


def environment(command: str) -> Row:
    return {
        "date": date.today().isoformat(),
        "command": command,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge pages": huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cbloss_fused": cbloss_fused.__version__,
        "backends": cbloss_fused.backends(),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def huge_pages() -> str:
    """The setting of the system and of torch's allocator: large new tensors depend on it."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    system = setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "unknown"
    return f"{system}, THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}"


def save_table(
    name: str, title: str, lines: list[dict[str, str]], note: str, arguments: argparse.Namespace
) -> int:
    """Print a table with the machine above, and write both to a file."""
    facts = [f"- {key}: {value}" for key, value in environment(arguments.command).items()]
    table = markdown_table(lines, padded=True)
    text = "\n".join([f"# {title}\n", *facts, "", table, "", note])
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / name).write_text(text + "\n")
    return 0


# The class-balanced losses ------------------------------------------------------------------------


def implementations(case: Case, compiled: int = 0) -> list[Implementation]:
    """All that compute the case; the first `compiled` formulas through torch.compile, too."""
    fused = partial(class_balanced_loss, **case_options(case))
    found = [Implementation("fused", fused)]
    if case.shape == LARGE:
        found.append(Implementation("in place", partial(fused, inplace=True), overwrites=True))
    eager = losses.eager_formulas(case)
    if case.shape != LARGE:  # one call takes a second there, and it is never the fastest
        eager["reference"] = partial(losses.reference_loss, **case_options(case))
    found += [Implementation("eager", loss, name) for name, loss in eager.items()]
    for name, loss in list(eager.items())[:compiled]:
        code = torch.compile(loss, fullgraph=True, dynamic=False)
        found.append(Implementation("compile", code, name))
    if (case.activation, case.gamma) == ("softmax", 0):
        reduction = "weighted_mean"
        ours, theirs = partial(fused, reduction=reduction), losses.cross_entropy_float32
        found.append(Implementation("weighted", ours, reduction=reduction))
        found.append(Implementation("cross_entropy", theirs, reduction=reduction))
    found += balanced_loss(case)
    ready = torch.ones(case.shape, dtype=case.dtype)  # touched, unlike empty memory
    return [*found, Implementation("copy", lambda x, y, w: ready.copy_(x))]


def balanced_loss(case: Case) -> list[Implementation]:
    """The package: only (N, C) and float32, and no softmax focal loss."""
    kinds = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy"}
    kind = kinds[case.activation] if not case.gamma else "focal_loss"
    fits = len(case.shape) == 2 and case.dtype == torch.float32
    if not fits or (case.activation, kind) == ("softmax", "focal_loss"):
        return []
    loss = losses.balanced_loss(kind, class_counts(case.shape[1]), case.gamma)
    factor = float(case.shape[1]) if kind == "binary_cross_entropy" else 1.0
    return [] if loss is None else [Implementation("balanced-loss", loss, factor=factor)]


def losses_table(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    rows: list[Row] = []
    cases = CPU_QUICK_CASES if arguments.quick else CPU_CASES
    for case in tqdm(cases, file=sys.stderr, unit="case"):
        rows += measure_case(case, number_to_compile(case, arguments), arguments.budget)
        gc.collect()
    seconds = round(time.perf_counter() - start, 1)
    result = {**environment(arguments.command), "seconds": seconds, "rows": rows}
    text = cpu_report(result)
    print(text)
    result_files.save(arguments.out / f"cpu-{date.today().isoformat()}.json", result, text)
    wrong = sum(row[RESULTS]["fused"]["outcome"] is not None for row in rows)
    if wrong:
        print(f"fused is wrong or fails in {wrong} of {len(rows)} rows", file=sys.stderr)
    return 1 if wrong else 0


def number_to_compile(case: Case, arguments: argparse.Namespace) -> int:
    """How many formulas to compile, which takes a few seconds each."""
    if arguments.no_compile:
        return 0
    return 2 if (case.shape, case.dtype) == (CLASSES, torch.float32) and not arguments.quick else 1


def measure_case(case: Case, compiled: int, budget: float) -> list[Row]:
    """Check and measure everyone at a case: a row for each of PASSES."""
    torch.compiler.reset()  # its limit of recompilations would count all cases so far
    given = problem(case)
    expected = measure.expected_result(case, given)
    found = implementations(case, compiled)
    rows = []
    for title in PASSES:
        runs = [CpuRun(each, given, train=PASSES[title] == 2) for each in found]
        verdicts = [measure.check(case, run, expected) for run in runs]
        rows.append(case.row(title, measure_runs(case, runs, verdicts, budget)))
    return rows


def measure_runs(case: Case, runs: list[CpuRun], verdicts: list[Verdict], budget: float) -> Row:
    """The results by implementation."""
    found: Row = {
        run.implementation.name: verdict._asdict()
        for run, verdict in zip(runs, verdicts, strict=True)
    }
    if found["fused"]["outcome"] is None:
        right = [run for run in runs if found[run.implementation.name]["outcome"] is None]
        calls = 200 if case.numel < 1000 else 1
        for run, ms in zip(right, measure.times(right, calls, budget), strict=True):
            found[run.implementation.name] |= measure.summary(ms)
        for run in measure.fastest_by_column(right, found):
            found[run.implementation.name]["peak_extra"] = measure.peak_extra(run)
    return found


# The long-tail family -----------------------------------------------------------------------------


def family_table(arguments: argparse.Namespace) -> int:
    lines = []
    for shape in tqdm(LONG_TAIL_SHAPES[: 1 if arguments.quick else None], unit="shape"):
        case = Case(shape, torch.float32, "softmax", 0.0)
        given = problem(case)
        for each in losses.long_tail_losses(class_counts(shape[1]).float()):
            lines.append(family_line(each, case, given, arguments.budget))
    title = "The long-tail family, float32, forward and backward"
    note = "Medians of calls in turns; eager and compile: their time divided by ours."
    return save_table("family-cpu.md", title, lines, note, arguments)


def family_line(each: LongTailLoss, case: Case, given: Problem, budget: float) -> dict[str, str]:
    torch.compiler.reset()
    weighted = each.target == "index"  # eager PyTorch takes no weights with soft targets
    if not weighted:
        given = with_soft_targets(each.target, given)

    def fused(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        loss: Tensor = class_balanced_loss(
            x, y, w if weighted else None, ignore_index=None if weighted else -100, **each.options
        )
        return loss

    compiled: losses.LossFunction = torch.compile(each.eager, fullgraph=True, dynamic=False)
    functions = {"fused": fused, "eager": each.eager, "compile": compiled}
    runs = [CpuRun(Implementation(name, loss), given, True) for name, loss in functions.items()]
    grads = [gradient(run) for run in runs]
    for run, grad in zip(runs[1:], grads[1:], strict=True):
        worst = (grad - grads[0]).abs().max() / grads[0].abs().max()
        assert worst < LONG_TAIL_TOLERANCE, (
            f"{each.name}: {run.implementation.name} differs by {worst:.1e}"
        )
    ours, eager, compile_ = (median(ms) for ms in measure.times(runs, 1, budget))
    return {
        "logits": str(case.shape),
        "loss": each.name,
        "target": each.target,
        "fused ms": f"{ours:.2f}",
        "eager": f"{eager / ours:.2f}",
        "compile": f"{compile_ / ours:.2f}",
    }


def gradient(run: CpuRun) -> Tensor:
    run(run.prepare())
    grad = run.given.logits.grad
    assert grad is not None
    return grad.clone()


# return_stats=True --------------------------------------------------------------------------------


def stats_table(arguments: argparse.Namespace) -> int:
    cases = CPU_QUICK_CASES if arguments.quick else CPU_CASES
    lines = [stats_line(case, arguments.budget) for case in cases if case.shape == CLASSES]
    title = "return_stats=True, forward and backward"
    note = "Ratios of medians and of minima, of calls in turns."
    return save_table("stats-cpu.md", title, lines, note, arguments)


def stats_line(case: Case, budget: float) -> dict[str, str]:
    given = problem(case)
    options: dict[str, Any] = {"activation": case.activation, "gamma": case.gamma}

    def with_stats(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        loss: Tensor = class_balanced_loss(x, y, w, return_stats=True, **options)[0]
        return loss

    plain_loss: losses.LossFunction = partial(class_balanced_loss, **options)
    functions = {"fused": plain_loss, "with stats": with_stats}
    runs = [CpuRun(Implementation(name, loss), given, True) for name, loss in functions.items()]
    for run in runs:
        run(run.prepare())
    plain, stats = measure.times(runs, calls=1, budget=budget)
    return {
        "case": str(case),
        "plain ms": f"{median(plain):.3f}",
        "with stats ms": f"{median(stats):.3f}",
        "ratio of medians": f"{median(stats) / median(plain):.2f}",
        "of minima": f"{min(stats) / min(plain):.2f}",
    }


# A detector's targets -----------------------------------------------------------------------------


def detection_table(arguments: argparse.Namespace) -> int:
    title = f"Sigmoid focal loss of {detection.SHAPE} float32 logits, forward and backward"
    note = (
        "Ratios of medians and of minima, of calls in turns. 95 % of the rows are background, but "
        "of the first line."
    )
    lines = detection.lines(arguments.budget)
    return save_table("detection-cpu.md", title, lines, note, arguments)


# docs/migration.md --------------------------------------------------------------------------------


def presets_table(arguments: argparse.Namespace) -> int:
    x, y, t = preset_data()
    lines = []
    for preset in losses.presets(y, t):
        loss, grad = losses.difference(preset, x)
        lines.append({
            "theirs": f"`{preset.theirs}`",
            "here": f"`{preset.ours}`",
            "loss differs by": f"{loss:.0e}" if loss else "0",
            "gradient by": f"{grad:.0e}" if grad else "0",
        })  # fmt: skip
    print(markdown_table(lines, padded=True))
    return 0


TABLES = {
    "losses": losses_table,
    "family": family_table,
    "stats": stats_table,
    "detection": detection_table,
    "presets": presets_table,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
