"""Times of the CPU kernels as shares of a copy: `python -m bench.limits`.

Into results/limits-cpu.md.

What is timed is the operator's call, into memory that is ready: no page is new, nothing is
allocated. "copy" is torch's copy of the logits into such memory, in the same run. Small logits are
computed on many times for one sample; in place, all but the first are gradients. --against names
another checkout of this repository with its extension built: its calls and this one's take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import result_files
from .cases import CPU_CASES, IMAGES, LARGE, Case
from .cpu import save_table

WORKER = Path(__file__).with_name("limits_worker.py")
ROOT = Path(__file__).parents[1]
COLUMNS = ("loss", "loss + gradient", "in place")
ROUNDS, MIN_MS = 9, 2.0  # of all calls of a case, per build; a sample takes at least so long


class Limit(NamedTuple):
    """A case, and how its tensors lie."""

    case: Case
    soft: bool = False  # targets of all classes, float32
    channels_last: bool = False

    def __str__(self) -> str:
        shape, dtype, activation, gamma = self.case
        words = [f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {activation} {gamma:g}"]
        words += ["soft targets"] * self.soft + ["channels last"] * self.channels_last
        return ", ".join(words)

    def message(self, threads: int) -> dict[str, Any]:
        shape, dtype, activation, gamma = self.case
        repeat = max(1, int(MIN_MS * 1e6 / 2 / self.case.numel))  # some 2 ns an element
        return {
            "shape": shape, "dtype": str(dtype)[6:],
            "numbers": [float(activation == "sigmoid"), gamma, 0.0, 0.0],
            "soft": self.soft, "channels_last": self.channels_last,
            "threads": threads, "repeat": repeat,
        }  # fmt: skip


def limits() -> list[Limit]:
    found = [Limit(case) for case in CPU_CASES]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found += [Limit(Case(LARGE, dtype, "sigmoid", 1.5))]
    for activation in ("softmax", "sigmoid"):
        found += [Limit(Case(LARGE, torch.float16, activation, 0.0))]
        found += [Limit(Case(LARGE, torch.float32, activation, 0.0), soft=True)]
        found += [Limit(Case(IMAGES, torch.float32, activation, 0.0), channels_last=True)]
    return found


class Worker:
    """A process that has loaded one checkout's extension."""

    def __init__(self, tree: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )  # fmt: skip

    def ask(self, message: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(message, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def line(limit: Limit, threads: int, workers: dict[str, Worker], rounds: int) -> dict[str, str]:
    """Medians over rounds in which the builds take turns; the copy's over all of them."""
    samples: dict[str, list[dict[str, float]]] = {build: [] for build in workers}
    for worker in workers.values():
        worker.ask(json.dumps(limit.message(threads)))
        worker.ask("go")
    for _ in range(rounds):
        for build, worker in workers.items():
            samples[build].append(worker.ask("go"))
    copy = median(sample["copy"] for found in samples.values() for sample in found)
    cells = {"logits, loss": str(limit), "threads": str(threads), "copy ms": f"{copy:.3g}"}
    for column in COLUMNS:
        shares = [median(s[column] for s in samples[build]) / copy for build in workers]
        cells[column] = " → ".join(f"{share:.2f}" for share in shares)
    return cells


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    trees = {"before": arguments.against.resolve()} if arguments.against else {}
    workers = {build: Worker(tree) for build, tree in {**trees, "after": ROOT}.items()}
    found = [limit for limit in limits() if arguments.only in str(limit)]
    cases = list(product(arguments.threads, found))
    lines = [
        line(limit, threads, workers, arguments.rounds)
        for threads, limit in tqdm(cases, file=sys.stderr)
    ]
    for worker in workers.values():
        worker.close()
    note = "Times of the call divided by those of the copy, medians"
    note += "; before → after, in turns." if trees else "."
    return save_table("limits-cpu.md", "CPU kernels, relative to a copy", lines, note, arguments)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.limits", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="before → after")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--only", default="", help="a part of the first column")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=result_files.FOLDER, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    words = ["CHECKOUT" if word == str(arguments.against) else word for word in argv]
    arguments.command = shlex.join(["python", "-m", "bench.limits", *words])
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
