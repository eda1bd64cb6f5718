"""The GPU benchmark's results as a table that a person reads."""

from __future__ import annotations

from typing import Any

import torch

Row = dict[str, Any]
FORWARD, TRAIN, GRAPH = "forward only", "forward + backward", "forward + backward, CUDA graph"
ODD, EVEN = (4096, 8142), (4096, 8192)  # rows that are not 16-byte aligned, and rows that are
RIVALS = {"eager": "fused", "compile": "fused", "torchvision": "fused"}  # whom they are held to
RIVALS |= {"cross_entropy": "weighted", "liger": "weighted"}
NOTES = """\
Milliseconds are medians of a call; a ratio is the rival's time by ours, above 1 where fused is
faster: of eager and compile the fastest formula's, named behind. Every number stands for a loss and
gradient that agreed with the float64 reference (fused within 2e-5 of the row's largest gradient,
the others within 1e-3; half types half a spacing more). `wrong`, `failed` and `skipped` were not
timed, `-` does not apply or was not tried: torch.compile in a few cases only, eager under a graph
where it does not synchronise and its memory is small.

- cross_entropy (F.cross_entropy, of half types in float32 or as they are) and liger divide by the
  weights' sum: held to fused with reduction="weighted_mean". liger overwrites the logits.
- torchvision: sigmoid_focal_loss on a one-hot, its rows weighted and summed.
- % of copy: the bandwidth of 2 N x C elements in the time of fused, by that of a copy of them.
- memory: peak beyond the logits in a call, in N x C tensors of their dtype (fused, eager).
- host µs: what a call keeps the host, not waiting for the GPU (fused, eager).
"""


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
    fused, copy, train = best(row, "fused"), best(row, "copy"), row["passes"] == TRAIN
    line = {"shape": "x".join(map(str, row["shape"])), "dtype": row["dtype"], "loss": loss_of(row)}
    line["fused ms"] = shown(fused)
    for title, name in ((FORWARD, "forward ms"), (GRAPH, "graph ms")) if train else ():
        line[name] = shown(best(sibling(row, rows, passes=title), "fused"))
    for column, ours in RIVALS.items():
        rival = best(row, column)
        timed = f"{ratio(rival, best(row, ours))}{rival.get('formula', '')}"
        line[f"{column} / fused"] = timed if "median_ms" in rival else shown(rival)
    line["copy ms"], line["% of copy"] = shown(copy), ratio(copy, fused, 100, 0)
    extras = (("host_us", "host µs"), ("peak_extra", "memory"))
    for key, name in extras if train else extras[:1]:
        pair = [result.get(key) for result in (fused, best(row, "eager"))]
        line[name] = ", ".join("-" if value is None else f"{value:.3g}" for value in pair)
    return line


def loss_of(row: Row) -> str:
    return f"{row['activation']} {row['gamma']:g}"


def sibling(row: Row, rows: list[Row], **other: Any) -> Row:
    """The row that differs in this, or {}."""
    sought = {**row, **other, "contestants": None}
    return next((r for r in rows if {**r, "contestants": None} == sought), {})


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
    pairs = [(row, best(sibling(row, rows, shape=EVEN), "fused")) for row in odd]
    line = [f"{r['dtype']} {loss_of(r)}: {ratio(best(r, 'fused'), even)}" for r, even in pairs]
    return [f"Fused at C = 8142 by C = 8192, 4096 rows: {'; '.join(line)}"] if line else []
