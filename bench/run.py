"""Time the fused losses beside everyone else who computes the same: `python -m bench.run`.

Only ratios within a row count: its contestants take turns, on a machine that has moods.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import cbloss_fused

from . import measure
from .cases import CASES, CLASSES, QUICK, Case, contestants, problem
from .measure import Run, Verdict
from .table import PASSES, Row, report

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    rows: list[Row] = []
    cases = QUICK if arguments.quick else CASES
    for case in tqdm(cases, file=sys.stderr, unit="case"):
        rows += measure_case(case, compiled(case, arguments), arguments.budget)
        gc.collect()
    seconds = time.perf_counter() - start
    result = {**environment(), "seconds": round(seconds, 1), "rows": rows}
    text = report(result)
    print(text)
    path = arguments.json or default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    wrong = [row for row in rows if row["contestants"]["fused"]["outcome"] is not None]
    sys.exit(f"fused is wrong or fails in {len(wrong)} of {len(rows)} rows" if wrong else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, in a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, help="seconds to spend on a row's timing")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--json", type=Path, help="default: bench/results/cpu-DATE.json; .md beside"
    )
    arguments = parser.parse_args()
    if arguments.budget is None:
        arguments.budget = 0.5 if arguments.quick else 1.0
    return arguments


def default_path() -> Path:
    return RESULTS / f"cpu-{date.today().isoformat()}.json"


def compiled(case: Case, arguments: argparse.Namespace) -> int:
    """How many formulas to compile: a few seconds each."""
    if arguments.no_compile:
        return 0
    return 2 if (case.shape, case.dtype) == (CLASSES, torch.float32) and not arguments.quick else 1


def environment() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.run", *sys.argv[1:]]),
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


def save(path: Path, title: str, command: str, lines: list[dict[str, str]], note: str) -> None:
    """Print a table and where it comes from, and write both to a file."""
    facts = environment() | {"command": command}
    table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    where = [f"- {key}: {value}" for key, value in facts.items()]
    text = "\n".join([f"# {title}\n", *where, "", table, "", note])
    print(text)
    path.write_text(text + "\n")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def huge_pages() -> str:
    """They make or break large new tensors: the system's setting, and that of torch's allocator."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    system = setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "unknown"
    return f"{system}, THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}"


def measure_case(case: Case, compiled: int, budget: float) -> list[Row]:
    """Check, time and weigh every contestant of a case: a row for each of PASSES."""
    torch.compiler.reset()  # its limit of recompilations counts every case before
    given = problem(case)
    want = measure.wanted(case, given)
    field = contestants(case, compiled)
    rows = []
    for title in PASSES:
        runs = [Run(contestant, given, train=PASSES[title] == 2) for contestant in field]
        verdicts = [measure.check(case, run, want) for run in runs]
        rows.append(measure_row(case, title, runs, verdicts, budget))
    return rows


def measure_row(
    case: Case, title: str, runs: list[Run], verdicts: list[Verdict], budget: float
) -> Row:
    results: Row = {
        run.contestant.name: verdict._asdict() for run, verdict in zip(runs, verdicts, strict=True)
    }
    if results["fused"]["outcome"] is None:
        right = [run for run in runs if results[run.contestant.name]["outcome"] is None]
        calls = 200 if torch.Size(case.shape).numel() < 1000 else 1
        for run, ms in zip(right, measure.times(right, calls, budget), strict=True):
            results[run.contestant.name] |= measure.summary(ms)
        for run in measure.winners(right, results):
            results[run.contestant.name]["peak_extra"] = measure.peak_extra(run)
    return {
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "activation": case.activation,
        "gamma": case.gamma,
        "passes": title,
        "contestants": results,
    }


if __name__ == "__main__":
    main()
