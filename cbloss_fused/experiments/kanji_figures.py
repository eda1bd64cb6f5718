"""The figures of the kanji experiment, from its runs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .evaluation import BIN_EDGES
from .figures import STYLES, panels, save
from .runs import Record
from .settings import ALL_SETTINGS, DEFERRED_FROM

BASELINE = "cross-entropy"
SHOWN = (
    BASELINE,
    "cb-softmax-0.9999",
    "cb-softmax-0.9999-drw",
    "cb-focal-0.9999-drw",
    "logit-adjustment",
    "ldam-drw",
)
BETAS = (0.0, 0.9, 0.99, 0.999, 0.9999)
FROM_THE_START = {b: f"cb-softmax-{b}" for b in BETAS} | {0.0: BASELINE}
DEFERRED = {b: f"cb-softmax-{b}-drw" for b in BETAS} | {0.0: BASELINE}
DRIVERS = (BASELINE, "cb-softmax-0.9999", "cb-softmax-0.9999-drw", "logit-adjustment")
BINS = [
    str(first) if last == first else f"{first}-{last}" if last else f"{first}+"
    for first, last in zip(BIN_EDGES, [e - 1 for e in BIN_EDGES[1:]] + [0], strict=True)
]


def runs_of(records: list[Record], loss: str) -> list[Record]:
    """One for each seed; maybe none."""
    return [record for record in records if record["loss"] == loss]


def shown(records: list[Record], losses: tuple[str, ...]) -> list[str]:
    """Those of the losses that were run, or, if none was, the first that was."""
    return [loss for loss in losses if runs_of(records, loss)] or [records[0]["loss"]]


def accuracy_of_bins(runs: list[Record]) -> np.ndarray:
    """The mean over the runs; NaN where there is no class."""
    return np.mean(np.array([run["bins"] for run in runs], dtype=float), axis=0)


def accuracy_by_frequency(records: list[Record]) -> Figure:
    """Accuracy over a class's number of training images, and what a loss gains or costs."""
    figure, (left, right) = panels(2, width=6)
    baseline = runs_of(records, BASELINE)
    for loss, style in zip(shown(records, SHOWN), STYLES, strict=False):
        accuracy = accuracy_of_bins(runs_of(records, loss))
        left.plot(BINS, accuracy, label=ALL_SETTINGS[loss].title, **style)
        if baseline:
            right.plot(BINS, accuracy - accuracy_of_bins(baseline), **style)
    left.set(title="Test accuracy, %", xlabel="training images of the class")
    right.set(title="Points above cross entropy", xlabel="training images of the class")
    left.legend(loc="lower right", fontsize=9)
    return figure


def beta_curve(records: list[Record]) -> Figure:
    """Accuracy over beta, CB softmax; beta = 0 is cross entropy."""
    figure, (ax,) = panels(1, width=6)
    groups = ("all", "many", "medium", "few", "one")
    lines = [(f"{group}, deferred", DEFERRED, group) for group in groups]
    lines.append(("all, from the start", FROM_THE_START, "all"))
    for (label, curve, group), style in zip(lines, STYLES, strict=True):
        points = []
        for beta, loss in curve.items():
            accuracy = [run["groups"][group] for run in runs_of(records, loss)]
            if accuracy and accuracy[0] is not None:
                deviation = np.std(accuracy, ddof=1) if len(accuracy) > 1 else 0.0
                points.append((beta, np.mean(accuracy), deviation))
        for_beta = [BETAS.index(beta) for beta, _, _ in points]
        means, deviations = [p[1] for p in points], [p[2] for p in points]
        ax.errorbar(for_beta, means, deviations, label=label, capsize=3, **style)
    ax.set(title="CB softmax: test accuracy, %", xlabel="β (0: cross entropy)", ylim=(0, 105))
    ax.set_xticks(range(len(BETAS)), map(str, BETAS))
    ax.legend(ncols=2, fontsize=9, loc="center", bbox_to_anchor=(0.5, 0.3))
    return figure


def drivers(records: list[Record]) -> Figure:
    """Which classes drive the loss: shares of the gradient at the targets, epoch by epoch."""
    losses = shown(records, DRIVERS)
    figure, axes = panels(len(losses), width=3.6)
    groups = {"1 to 5 images": (0, 3), "6 to 20": (3, 5), "21 to 100": (5, 7), "more": (7, 9)}
    fills = [("#D55E00", ""), ("#F0B090", "//"), ("#A0C8E8", ".."), ("#0072B2", "")]
    for ax, loss in zip(axes, losses, strict=True):
        runs = [run["history"] for run in runs_of(records, loss)]
        shares = 100 * np.mean([[epoch["gradient"] for epoch in run] for run in runs], axis=0)
        epochs, base = np.arange(1, len(shares) + 1), np.zeros(len(shares))
        for (name, (first, end)), (color, hatch) in zip(groups.items(), fills, strict=True):
            top = base + shares[:, first:end].sum(1)
            ax.fill_between(
                epochs, base, top, label=name, color=color, hatch=hatch, edgecolor="white"
            )
            base = top
        ax.set(title=ALL_SETTINGS[loss].title, xlabel="epoch", ylim=(0, 100))
        ax.set_xlim(1, len(shares))
        if ALL_SETTINGS[loss].deferred:
            ax.axvline(int(DEFERRED_FROM * len(shares)) + 0.5, color="black", linestyle=":")
    axes[0].set_ylabel("share of the gradient at the targets, %")
    axes[0].legend(fontsize=8, loc="upper left", frameon=True, framealpha=0.9)
    return figure


FIGURES: dict[str, Callable[[list[Record]], Figure]] = {
    "accuracy": accuracy_by_frequency,
    "beta": beta_curve,
    "drivers": drivers,
}


def draw_figures(records: list[Record], folder: Path) -> None:
    """All of them, as SVG and PNG."""
    for name, draw in FIGURES.items():
        save(draw(records), folder / name)
