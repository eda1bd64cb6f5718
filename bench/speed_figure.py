"""How many times as long others take, on a CPU and on a GPU: a figure of what is in results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbloss_fused.experiments.figures import STYLES, panels

RESULTS = Path(__file__).parent / "results"
OURS, THEIRS = STYLES[2]["color"], STYLES[1]["color"]
# What the names of contestants begin with, and those of ours that compute the same; of several the
# fastest counts.
OTHERS = {
    "plain PyTorch": ("eager", "fused"),
    "torch.compile": ("compile", "fused"),
    "F.cross_entropy": ("cross_entropy", "weighted"),
    "torchvision": ("torchvision", "fused"),
}


class Panel(NamedTuple):
    """Which of a file's rows are drawn."""

    file: str
    shape: list[int]
    dtype: str
    passes: str
    title: str


PANELS = (
    Panel("cpu-2026-11-28.json", [256, 8142], "float32", "forward + backward", "{cpu}, 2 threads"),
    Panel(
        "nvidia-h200-2026-11-27.json", [4096, 8142], "bfloat16",
        "forward + backward, CUDA graph", "{gpu}",
    ),
)  # fmt: skip
LOSSES = (("softmax", 0.0, "softmax"), ("sigmoid", 0.5, "sigmoid, γ = ½"))


def fastest(row: dict[str, Any], prefix: str) -> float | None:
    """The least median time; the reference is there to be right."""
    times = [
        contestant["median_ms"]
        for name, contestant in row["contestants"].items()
        if name.startswith(prefix) and "reference" not in name and contestant["outcome"] is None
    ]
    return min(times, default=None)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Times divided by ours, the shortest first."""
    found = {"cbloss_fused": 1.0}
    for name, (theirs, ours) in OTHERS.items():
        times = fastest(row, theirs), fastest(row, ours)
        if times[0] is not None and times[1] is not None:
            found[name] = times[0] / times[1]
    return dict(sorted(found.items(), key=lambda item: item[1]))


def rows_of(measured: dict[str, Any], panel: Panel) -> list[dict[str, float]]:
    """The ratios of each of LOSSES."""
    found = []
    for activation, gamma, _ in LOSSES:
        wanted = [panel.shape, panel.dtype, activation, gamma, panel.passes]
        keys = ("shape", "dtype", "activation", "gamma", "passes")
        (row,) = [row for row in measured["rows"] if [row[key] for key in keys] == wanted]
        found.append(ratios(row))
    return found


def draw(ax: Axes, panel: Panel) -> None:
    measured = json.loads((RESULTS / panel.file).read_text())
    ticks, names, place = [], [], 0.0
    for (_, _, loss), found in zip(LOSSES, rows_of(measured, panel), strict=True):
        ax.annotate(loss, (0, place), fontweight="bold", va="center")
        for name, ratio in found.items():
            place += 1
            ax.barh(place, ratio, color=OURS if name == "cbloss_fused" else THEIRS)
            ax.annotate(f" {ratio:.1f}", (ratio, place), va="center")
            ticks.append(place)
            names.append(name)
        place += 1.4
    ax.set_yticks(ticks, names)
    ax.set_ylim(place - 0.6, -0.6)
    ax.margins(x=0.12)
    ax.set_xlabel("time of forward + backward, divided by ours")
    shape = " × ".join(map(str, panel.shape))
    ax.set_title(f"{panel.title.format(**measured)}\n{shape} logits, {panel.dtype}")


def speed() -> Figure:
    figure, axes = panels(len(PANELS), width=5.4, height=4.2)
    for ax, panel in zip(axes, PANELS, strict=True):
        draw(ax, panel)
    return figure
