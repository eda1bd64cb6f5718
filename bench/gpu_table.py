"""The GPU benchmark's results as a table that a person reads.

`python -m bench.gpu_table FILE.jsonl ...` makes one of what several runs left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import floors

Row = dict[str, Any]
FORWARD, TRAIN, GRAPH = "forward only", "forward + backward", "forward + backward, CUDA graph"
ODD, EVEN = (4096, 8142), (4096, 8192)  # rows that are not 16-byte aligned, and rows that are
RIVALS = {"eager": "fused", "compile": "fused", "torchvision": "fused"}  # whom they are held to
RIVALS |= {"cross_entropy": "weighted", "liger": "weighted"}
NOTES = """\
Milliseconds are medians of a call; a ratio is the rival's time by ours, above 1 where fused is
faster: of eager and compile the fastest formula's, named behind. cuda and triton are our backends,
asked for by name; fused is the first of them, which a call gets that asks for none. Every number
stands for a loss and gradient that agreed with the float64 reference (fused within 2e-5 of the
row's largest gradient, the others within 1e-3; half types half a spacing more). `wrong`, `failed`
and `skipped` were not timed, `-` does not apply or was not tried: torch.compile in a few cases
only, eager under a graph where it does not synchronise and its memory is small.

- triton: where cuda is there, its kernel multiplies the stored gradient in triton's backward too.
- forward ms, graph ms, % of copy: of each of our backends, in the order of their columns.
- cross_entropy (F.cross_entropy, of half types in float32 or as they are) and liger divide by the
  weights' sum: held to fused with reduction="weighted_mean". liger overwrites the logits.
- torchvision: sigmoid_focal_loss on a one-hot, its rows weighted and summed.
- % of copy: the bandwidth of 2 N x C elements in our time, by that of a copy of them.
- floor ms: what bench/roofline.md predicts: the copy's time, or, where longer, what the kernel's
  instructions or special functions take (132 multiprocessors). % of floor: that by our time.
- memory: peak beyond the logits in a call, in N x C tensors of their dtype (our backends, eager).
- host µs: what a call keeps the host, not waiting for the GPU (our backends, eager).
"""


def read(*paths: Path) -> Row:
    """The result that files of lines hold, the later row of two that are of the same case."""
    facts: Row = {}
    rows: dict[str, Row] = {}
    skipped: list[str] = []
    for line in (line for path in paths for line in path.read_text().splitlines()):
        entry = json.loads(line)
        if "facts" in entry:
            facts |= entry["facts"]
        elif "skipped" in entry:
            skipped.append(entry["skipped"])
        else:
            entry["shape"] = tuple(entry["shape"])
            rows[str({**entry, "contestants": None})] = entry
    return {**facts, "skipped": skipped, "rows": list(rows.values())}


def report(result: Row) -> str:
    """A section for each pass, with the machine above and the notes below."""
    rows, skipped = result["rows"], [f"- not measured: {note}" for note in result["skipped"]]
    facts = [f"- {key}: {value}" for key, value in result.items() if key not in ("rows", "skipped")]
    parts = ["# Benchmarks on a GPU", "\n".join(facts)]
    for title in (TRAIN, GRAPH, FORWARD):
        lines = [list(cells(row, rows).items()) for row in rows if row["passes"] == title]
        if lines:
            table = [[key for key, _ in lines[0]], ["---"] * len(lines[0])]
            table += [[value for _, value in line] for line in lines]
            parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in table)]
            parts += misaligned(rows, title)
    return "\n\n".join([*parts, *(["\n".join(skipped)] if skipped else []), NOTES])


def cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """A line of the table."""
    mine, copy, train = by_backend(row), best(row, "copy"), row["passes"] == TRAIN
    line = {"shape": "x".join(map(str, row["shape"])), "dtype": row["dtype"], "loss": loss_of(row)}
    line |= {f"{name} ms": shown(result) for name, result in mine.items()}
    if {"cuda", "triton"} <= mine.keys():
        line["triton / cuda"] = ratio(mine["triton"], mine["cuda"])
    for title, name in ((FORWARD, "forward ms"), (GRAPH, "graph ms")) if train else ():
        other = by_backend(sibling(row, rows, passes=title))
        line[name] = ", ".join(shown(other.get(backend, {})) for backend in mine)
    for column, held_to in RIVALS.items():
        rival, default = best(row, column), next(iter(by_backend(row, held_to).values()), {})
        timed = f"{ratio(rival, default)}{rival.get('formula', '')}"
        line[f"{column} / fused"] = timed if "median_ms" in rival else shown(rival)
    line["copy ms"] = shown(copy)
    line["% of copy"] = ", ".join(ratio(copy, result, 100, 0) for result in mine.values())
    if row["passes"] != FORWARD:
        least = predicted(row, copy)
        line["floor ms"] = shown(least)
        line["% of floor"] = ", ".join(ratio(least, result, 100, 0) for result in mine.values())
    extras = (("host_us", "host µs"), ("peak_extra", "memory"))
    for key, name in extras if train else extras[:1]:
        each = [result.get(key) for result in (*mine.values(), best(row, "eager"))]
        line[name] = ", ".join("-" if value is None else f"{value:.3g}" for value in each)
    return line


def predicted(row: Row, copy: Row) -> Row:
    """The least time of the row's kernel, its memory at the rate of the copy; {} if not known."""
    found = floors.floors().get(floors.key(tuple(row["shape"]), row["dtype"], loss_of(row)))
    if found is None or "median_ms" not in copy:
        return {}
    return {"median_ms": max(copy["median_ms"], found.issue / 1e3, found.special / 1e3)}


def loss_of(row: Row) -> str:
    return f"{row['activation']} {row['gamma']:g}"


def sibling(row: Row, rows: list[Row], **other: Any) -> Row:
    """The row that differs in this, or {}."""
    sought = {**row, **other, "contestants": None}
    return next((r for r in rows if {**r, "contestants": None} == sought), {})


def by_backend(row: Row, column: str = "fused") -> dict[str, Row]:
    """Our own results by backend, the default's first; one that nobody asked for by the column."""
    found = [(name.split(" "), each) for name, each in row.get("contestants", {}).items()]
    return {name[-1]: each for name, each in found if name[0] == column}


def best(row: Row, column: str) -> Row:
    """The fastest right contestant of a column, else a wrong one, else {}."""
    found = [
        {**result, "formula": name[len(column) :]}
        for name, result in row.get("contestants", {}).items()
        if name.split(" ")[0] == column
    ]
    return min(found, key=lambda result: result.get("median_ms", torch.inf), default={})


def shown(result: Row) -> str:
    if "median_ms" in result:
        return f"{result['median_ms']:.3g}"
    return (result.get("outcome") or "-").split()[0].rstrip(":")


def ratio(numerator: Row, denominator: Row, times: int = 1, digits: int = 2) -> str:
    if "median_ms" not in numerator or "median_ms" not in denominator:
        return "-"
    return f"{times * numerator['median_ms'] / denominator['median_ms']:.{digits}f}"


def misaligned(rows: list[Row], title: str) -> list[str]:
    """What rows cost that are not 16-byte aligned: a line, or none."""
    odd = [row for row in rows if row["shape"] == ODD and row["passes"] == title]
    line = []
    for row in odd:
        even, mine = by_backend(sibling(row, rows, shape=EVEN)), by_backend(row)
        times = [f"{name} {ratio(mine[name], even.get(name, {}))}" for name in mine]
        line.append(f"{row['dtype']} {loss_of(row)}: {', '.join(times)}")
    return [f"Ours at C = 8142 by C = 8192, 4096 rows: {'; '.join(line)}"] if line else []


if __name__ == "__main__":
    print(report(read(*map(Path, sys.argv[1:]))))
