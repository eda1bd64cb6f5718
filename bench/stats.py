"""What return_stats=True costs on this CPU, in turns with the plain loss: `python -m bench.stats`.

Forward and backward at (256, 8142), written to bench/results/stats-cpu.md.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cbloss_fused import class_balanced_loss

from . import measure
from .cases import CASES, CLASSES, Case, Contestant, problem
from .run import RESULTS, save

THREADS, BUDGET = 2, 4.0  # seconds a case


def main() -> None:
    torch.set_num_threads(THREADS)
    lines = [measured(case) for case in CASES if case.shape == CLASSES]
    title = "return_stats=True, forward and backward"
    note = "Ratios of medians and of minima, of calls in turns."
    save(RESULTS / "stats-cpu.md", title, "python -m bench.stats", lines, note)


def measured(case: Case) -> dict[str, str]:
    """A line of the table."""
    given = problem(case)
    options: dict[str, Any] = {"activation": case.activation, "gamma": case.gamma}
    plain = Contestant("fused", partial(class_balanced_loss, **options))
    stats = Contestant("with stats", partial(with_stats, options))
    runs = [measure.Run(contestant, given, train=True) for contestant in (plain, stats)]
    for run in runs:
        run(run.prepare())
    a, b = measure.times(runs, calls=1, budget=BUDGET)
    return {
        "case": str(case),
        "plain ms": f"{median(a):.3f}",
        "with stats ms": f"{median(b):.3f}",
        "ratio of medians": f"{median(b) / median(a):.2f}",
        "of minima": f"{min(b) / min(a):.2f}",
    }


def with_stats(options: dict[str, Any], x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss: Tensor = class_balanced_loss(x, y, w, return_stats=True, **options)[0]
    return loss


if __name__ == "__main__":
    main()
