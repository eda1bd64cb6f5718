"""The figures of the README, docs/choosing.md and the experiments' results: python -m bench.figures

They are drawn from what is committed: runs of bench/results/kanji, and formulas.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cbloss_fused import class_balanced_weights, effective_number
from cbloss_fused.experiments.figures import STYLES, panels, save
from cbloss_fused.experiments.kanji_figures import draw_figures
from cbloss_fused.experiments.long_tail import long_tailed_counts
from cbloss_fused.experiments.runs import read_runs

from .speed_figure import speed

KANJI = Path(__file__).parent / "results" / "kanji"
DOCS = Path(__file__).parents[1] / "docs" / "figures"
BETAS = (0.9, 0.99, 0.999, 0.9999)  # the paper's


def kanji_counts() -> list[int]:
    """Of the experiment's training set."""
    with (KANJI / "counts.csv").open(encoding="utf-8") as file:
        return [int(row["count"]) for row in csv.DictReader(file)]


def count_vectors() -> dict[str, list[int]]:
    """Of real datasets, or by the rule that made them; iNaturalist's by the same rule."""
    return {
        "digits of the demo, 1/50": long_tailed_counts(120, 50, 10),
        "CIFAR-100-LT, 1/100": long_tailed_counts(500, 100, 100),
        "kanji": kanji_counts(),
        "as iNaturalist 2018: 1000 to 2": long_tailed_counts(1000, 500, 8142),
    }


def effective_numbers() -> Figure:
    """E_n over n: it follows n up to about N = 1 / (1 - beta), where it ends."""
    figure, (ax,) = panels(1, width=6, height=4.2)
    n = torch.logspace(0, 5, 200, dtype=torch.float64)
    ax.loglog(n, n, color="0.6", lw=1, label="n")
    for beta, style in zip(BETAS, STYLES, strict=False):
        E = effective_number(n, beta)
        ax.loglog(n, E, label=f"β = {beta}, N = {1 / (1 - beta):,.0f}", markevery=40, **style)
    ax.set(title="Effective number of samples", xlabel="samples of the class, n", ylim=(0.8, 3e4))
    ax.legend(fontsize=9)
    return figure


def weights() -> Figure:
    """Weights over the classes of four datasets, most frequent first."""
    vectors = count_vectors()
    figure, axes = panels(len(vectors), width=3.7, height=3.8)
    for ax, (name, counts) in zip(axes, vectors.items(), strict=True):
        n = torch.tensor(counts)
        rank = torch.arange(1, len(n) + 1)
        for beta, style in zip(BETAS, STYLES, strict=False):
            w = class_balanced_weights(n, beta)
            ax.plot(rank, w, label=f"β = {beta}", markevery=max(1, len(n) // 6), **style)
        ax.set(
            title=f"{name}\n{len(n)} classes, {max(n)} to {min(n)}", xlabel="class", yscale="log"
        )
        ax.axhline(1, color="0.8", lw=1, zorder=0)
    axes[0].set_ylabel("weight, 1 on average")
    axes[0].legend(fontsize=8)
    return figure


def ratio(counts: list[int], beta: float) -> float:
    """How much more a sample of the rarest class weighs than one of the most frequent class."""
    w: Tensor = class_balanced_weights(torch.tensor([max(counts), min(counts)]), beta)
    return float(w[1] / w[0])


def main() -> None:
    """Draw, and print the ratios that docs/choosing.md tells."""
    if runs := read_runs(KANJI / "runs.jsonl"):
        draw_figures(runs, KANJI)
    for draw in (effective_numbers, weights, speed):
        save(draw(), DOCS / draw.__name__.replace("_", "-"))
    for name, counts in count_vectors().items():
        print(name, *(f"{ratio(counts, beta):.1f}" for beta in BETAS))


if __name__ == "__main__":
    main()
