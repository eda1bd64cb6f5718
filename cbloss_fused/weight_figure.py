"""Counts, effective numbers and weights of all classes as a figure, for the command line."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from .weights import class_balanced_weights, effective_number

MISSING = ""
try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # without pyplot it draws by Agg and needs no display
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
except ImportError as error:
    MISSING = f'a figure needs Matplotlib ({error}): pip install "cbloss_fused[demo]"'

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito's safe colours
LINES = ("-", "--", "-.", ":")  # and markers: without colours the lines differ, too
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKED = 8  # markers of a line of many classes


def weight_figure(counts: Sequence[int], betas: Sequence[float], suffix: str) -> bytes:
    """Three panels over the classes, most frequent first, as .png or .svg.

    Classes without samples are left out.
    """
    present = sorted((n for n in counts if n), reverse=True)
    n = torch.tensor(present, dtype=torch.float64, device="cpu")
    look = rc_context(
        {
            "font.size": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "counts",  # the same figure has the same bytes
        }
    )
    with look, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a beta re-weights nothing is what one sees
        figure = Figure(figsize=(15, 4.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _draw(left, n, 0, "k", "-", "o")
        left.set(title="Samples", ylabel="samples $n$")
        styles = zip(cycle(COLORS), cycle(LINES), cycle(MARKERS), strict=False)
        for i, (beta, style) in enumerate(zip(betas, styles, strict=False)):
            _draw(middle, effective_number(n, beta), i / len(betas), *style)
            _draw(right, class_balanced_weights(n, beta), i / len(betas), *style, f"β = {beta}")
        middle.set(title="Effective number of samples", ylabel="$(1 - β^n) / (1 - β)$")
        right.set(title="Weight in the loss", ylabel="weight, 1 on average")
        right.axhline(1, color="0.8", lw=1, zorder=0)
        for ax in (left, middle, right):
            _label_axes(ax, len(n))
        figure.suptitle(_title(counts, n))
        figure.legend(loc="outside right center", frameon=False)
        data = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(data, dpi=120, format=suffix[1:], metadata=metadata)
    return data.getvalue()


def _draw(
    ax: Axes, values: Tensor, shift: float, color: str, line: str, marker: str, label: str = ""
) -> None:
    C = len(values)
    every = max(1, C // MARKED)
    marked = range(int(shift * every), C, every)  # shifted: lines that meet show their markers
    ax.semilogy(
        range(1, C + 1), values, color=color, ls=line, marker=marker, markevery=marked,
        mfc="w", ms=6, label=label,
    )  # fmt: skip


def _label_axes(ax: Axes, C: int) -> None:
    ax.set_xlabel("class, most frequent first")
    ax.xaxis.set_major_locator(MaxNLocator(10 if C <= 10 else 5, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom, top = ax.get_ylim()
    decades = math.log10(top / bottom)
    few, many = LogLocator(subs=(1, 2, 5)), LogLocator()
    ax.yaxis.set_major_locator(MaxNLocator(5) if decades < 0.7 else few if decades < 2.5 else many)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _title(counts: Sequence[int], n: Tensor) -> str:
    ratio = float(n[0] / n[-1])
    imbalance = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    title = f"Classes: {len(n):,}; samples: {sum(counts):,}; imbalance factor: {imbalance}"
    empty = len(counts) - len(n)
    return title + (f"; classes without samples, left out: {empty:,}" if empty else "")
