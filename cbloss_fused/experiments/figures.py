"""What all figures share: a style that is readable in black and white, SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot it draws by Agg and needs no display

# Okabe and Ito's safe colours, each with a line style and a marker of its own.
STYLES: list[dict[str, Any]] = [
    {"markerfacecolor": "white", **style}
    for style in (
        {"color": "#000000", "linestyle": "-", "marker": "o"},
        {"color": "#0072B2", "linestyle": "--", "marker": "s"},
        {"color": "#D55E00", "linestyle": "-.", "marker": "D"},
        {"color": "#009E73", "linestyle": ":", "marker": "^"},
        {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
        {"color": "#56B4E9", "linestyle": (0, (8, 2)), "marker": "P"},
    )
]
RC: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "cbloss_fused",  # the same figure is the same file
    "svg.fonttype": "none",  # text stays text
}


def panels(columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side."""
    with rc_context(RC):
        figure = Figure(figsize=(columns * width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def save(figure: Figure, path: Path) -> None:
    """Write path.svg and path.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(RC):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=120)
