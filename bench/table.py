"""The results as a table that a person reads; `python -m bench.table FILE.json`: the README's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

Row = dict[str, Any]
PASSES = {"forward + backward": 2, "forward only": 1}  # over the N x C elements, at the least
RIVALS = ["eager", "compile", "cross_entropy", "balanced-loss"]
NOTES = """\
Milliseconds are medians; a ratio is the rival's time by ours, above 1 where fused is faster. Every
number that is shown stands for a loss and gradient that agreed with the float64 reference (fused
within 2e-5 of the row's largest gradient, the others within 1e-3; half types half a spacing more);
`wrong` and `failed` were not timed, `-` does not apply or was not tried.

- eager: the fastest of the formulas of `bench/cases.py`, named behind the time.
- compile: torch.compile of them (fullgraph, dynamic=False): of both at 256x8142 float32,
  elsewhere of the one that is listed first for its family. The reference compiles to slower code.
- F.cross_entropy(weight=w) divides by the weights' sum: its ratio is to fused with
  reduction="weighted_mean".
- balanced-loss: the package; its BCE times C is the same loss.
- At 4096x8142 page faults are most of eager's time: see huge pages above. With
  THP_MEM_ALLOC_ENABLE=1 torch's allocator asks for huge pages, as fused does for its gradient.
- GB/s: {passes} N x C elements in the time of fused.
- memory: peak beyond the logits during the call, in N x C tensors of the logits' dtype (fused, in
  place, eager).
"""


def report(result: dict[str, Any]) -> str:
    """Both sections with the machine above and the notes below."""
    facts = [f"- {key}: {value}" for key, value in result.items() if key != "rows"]
    parts = ["# Benchmarks", "\n".join(facts)]
    for title in PASSES:
        table = [cells(row) for row in result["rows"] if row["passes"] == title]
        parts += [
            f"## {title}",
            tabulate(table, headers="keys", tablefmt="github", disable_numparse=True),
        ]
    passes = ", ".join(f"{n} ({title})" for title, n in PASSES.items())
    return "\n\n".join([*parts, NOTES.format(passes=passes)])


def cells(row: Row) -> dict[str, str]:
    """A line of the table."""
    dims = "x".join(map(str, row["shape"]))
    line = {"shape": dims, "dtype": row["dtype"], "loss": f"{row['activation']} {row['gamma']:g}"}
    fused, inplace = best(row, "fused"), best(row, "in place")
    line |= {"fused ms": shown(fused), "in place ms": shown(inplace)}
    for column in RIVALS:
        rival, ours = (
            best(row, column),
            best(row, "weighted" if column == "cross_entropy" else "fused"),
        )
        line |= {f"{column} ms": shown(rival), f"{column} / fused": ratio(rival, ours)}
    clone = best(row, "clone")
    line |= {"clone ms": shown(clone), "fused / clone": ratio(fused, clone), "GB/s": bandwidth(row)}
    peaks = [contestant.get("peak_extra") for contestant in (fused, inplace, best(row, "eager"))]
    line["memory"] = ", ".join("-" if peak is None else f"{peak:.2f}" for peak in peaks)
    return line


def best(row: Row, column: str) -> Row:
    """The fastest right contestant of a column, else a wrong one, else {}."""
    found = [
        {**result, "formula": name[len(column) :]}
        for name, result in row["contestants"].items()
        if name.startswith(column)
    ]
    return min(found, key=lambda result: result.get("median_ms", torch.inf), default={})


def shown(result: Row) -> str:
    if "median_ms" in result:
        return f"{result['median_ms']:.3g}{result['formula']}"
    return (result.get("outcome") or "-").split()[0].rstrip(":")


def ratio(numerator: Row, denominator: Row) -> str:
    if "median_ms" not in numerator or "median_ms" not in denominator:
        return "-"
    return f"{numerator['median_ms'] / denominator['median_ms']:.2f}"


def bandwidth(row: Row) -> str:
    fused = row["contestants"]["fused"]
    if "median_ms" not in fused:
        return "-"
    dtype: torch.dtype = getattr(torch, row["dtype"])
    size = torch.Size(row["shape"]).numel() * dtype.itemsize
    return f"{PASSES[row['passes']] * size / fused['median_ms'] / 1e6:.1f}"


def readme(result: dict[str, Any]) -> str:
    """The README's table: forward + backward, each rival's time by ours."""
    lines = []
    for row in result["rows"]:
        if PASSES[row["passes"]] != 2:
            continue
        line = cells(row)
        shown_columns = {
            "logits": f"({', '.join(map(str, row['shape']))})",
            "dtype": line["dtype"],
            "loss": f"{row['activation']}, γ = {row['gamma']:g}",
            "fused ms": line["fused ms"],
            "in place ms": line["in place ms"],
        }
        rivals = {column: line[f"{column} / fused"] for column in RIVALS}
        lines.append(shown_columns | rivals | {"fused / clone": line["fused / clone"]})
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(readme(json.loads(Path(sys.argv[1]).read_text())))
