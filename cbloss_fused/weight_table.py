"""A table of class weights, as text and as files, for the command line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import NamedTuple

from .count_files import Counts, numpy
from .weights import Empty, class_balanced_weights, effective_number

LONG = 1000  # classes: a longer table is printed as CSV


class WeightTable(NamedTuple):
    """One entry for each class; floats have the digits that tell their float32 or float64 apart."""

    classes: list[str]
    counts: list[int]
    effective_numbers: list[float]
    weights: list[float]
    beta: float


def weight_table(found: Counts, beta: float, empty: Empty) -> WeightTable:
    """Weights by `class_balanced_weights`, with its errors and warnings."""
    weights = class_balanced_weights(found.counts, beta, empty=empty).tolist()
    counted = [n or 1 for n in found.counts] if empty == "one" else found.counts
    E = effective_number(counted, beta).tolist()
    return WeightTable(found.names, found.counts, E, [float(f"{w:.9g}") for w in weights], beta)


def as_csv(table: WeightTable) -> bytes:
    """A row for each class, after a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "count", "effective_number", "weight"])
    writer.writerows(zip(*table[:4], strict=True))
    return _encoded(text.getvalue())


def as_json(table: WeightTable) -> bytes:
    """An object with the fields of the table."""
    return _encoded(json.dumps(table._asdict(), indent=1, ensure_ascii=False) + "\n")


def as_npy(table: WeightTable) -> bytes:
    """The weights alone, (C,) float32."""
    np, data = numpy(), io.BytesIO()
    np.save(data, np.array(table.weights, np.float32), allow_pickle=False)
    return data.getvalue()


def as_text(table: WeightTable) -> str:
    """Columns for a terminal; CSV of many classes, or without tabulate."""
    try:
        from tabulate import tabulate
    except ImportError:
        return as_csv(table).decode()
    if len(table.classes) > LONG:
        return as_csv(table).decode()
    E, weights = ([f"{x:.5g}" for x in column] for column in table[2:4])
    columns = {"class": table.classes, "count": map(str, table.counts)}
    return (
        tabulate(
            columns | {"effective number": E, "weight": weights},
            headers="keys",
            colalign=("left", "right", "decimal", "decimal"),
            disable_numparse=True,  # a class may be named 007
        )
        + "\n"
    )


WRITERS: dict[str, Callable[[WeightTable], bytes]] = {
    ".csv": as_csv,
    ".json": as_json,
    ".npy": as_npy,
}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # names of folders may not be Unicode
