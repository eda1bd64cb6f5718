"""How a row kernel comes by r_i and the denominator: what runs before it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .call import Call

SHARE = 1024  # rows that a prologue's program reads at a time
MEAN, WEIGHTED_MEAN = 1, 2  # of options.REDUCTIONS


class RowScales(NamedTuple):
    """How a row kernel comes by r_i and the denominator, and the prologue that leaves them."""

    prologue: tuple[Any, Any, Any] | None  # pointers, scalars, constants
    denominator: float
    fold: bool  # the denominator is the sum of the prologue's parts
    labels: bool = False  # before, a kernel leaves r_i of soft targets in parts


def row_scales(call: Call, rows: int) -> RowScales:
    if call.soft is not None:
        return _soft_row_scales(call, rows)
    ignore = call.ignore_index is not None
    mean = call.reduction in (MEAN, WEIGHTED_MEAN)
    weight = call.weight and not call.formula.per_class
    needed = weight or call.sample_weight or ignore
    fold = needed and call.reduction == WEIGHTED_MEAN
    fold |= ignore and call.reduction == MEAN and not call.normalizer
    denominator = float(rows) if mean and not fold else 1.0
    if not needed:
        return RowScales(None, denominator, False)
    pointers = (
        "target",
        "weight" if weight else None,
        "sample_weight" if call.sample_weight else None,
        "scale",
    )
    scalars = (rows, call.shape[1], call.ignore_index if ignore else 0, call.background_index or 0)
    background = call.background_index is not None
    constants = (ignore, call.reduction == WEIGHTED_MEAN, SHARE, background)
    return RowScales((pointers, scalars, constants), denominator, fold)


def _soft_row_scales(call: Call, rows: int) -> RowScales:
    """No row is ignored. Sigmoid's gradient needs the labels' mean weight first, a mean its sum."""
    total = call.reduction == WEIGHTED_MEAN
    labels = call.weight and not call.formula.per_class and (call.formula.sigmoid or total)
    if not total or not (call.weight or call.sample_weight):
        mean = call.reduction in (MEAN, WEIGHTED_MEAN)
        return RowScales(None, float(rows) if mean else 1.0, False, labels)
    pointers = (None, None, "parts" if labels else "sample_weight", "scale")
    scalars, constants = (rows, call.shape[1], 0, 0), (False, True, SHARE, False)
    return RowScales((pointers, scalars, constants), 1.0, True, labels)
