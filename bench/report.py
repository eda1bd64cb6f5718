"""The tables that a person reads: `python -m bench.report FILE...`.

Of a CPU's FILE.json it prints the README's table, of a GPU's FILE.jsonl the report; several of the
latter become one report.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cases import ALIGNED, FORWARD, GRAPH, TRAIN, UNALIGNED
from .result_files import RESULTS, Row, read_lines

ROOFLINES = Path(__file__).parent / "machine_code" / "roofline.md"
PASSES = {TRAIN: 2, FORWARD: 1}  # over the N x C elements, at least
CPU_RIVALS = ("eager", "compile", "cross_entropy", "balanced-loss")
GPU_RIVALS = {"eager": "fused", "compile": "fused", "torchvision": "fused"}  # compared with these
GPU_RIVALS |= {"cross_entropy": "weighted", "liger": "weighted"}
CPU_NOTES = """\
Milliseconds are medians; a ratio is the rival's time divided by ours, above 1 where fused is
faster. Every number belongs to a loss and gradient that agreed with the float64 reference (fused
within 2e-5 of the row's largest gradient, the others within 1e-3; half types half a spacing more).
`wrong` and `failed` were not timed, `-` does not apply or was not tried.

- eager: the fastest of the formulas of `cbloss_fused/plain.py`, named behind the time.
- compile: torch.compile of them (fullgraph, dynamic=False): of both formulas at 256x8142 float32,
  elsewhere of the first one for the family. The reference compiles to slower code.
- F.cross_entropy(weight=w) divides by the sum of the weights: its ratio is to fused with
  reduction="weighted_mean".
- balanced-loss: the package. Its BCE times C is the same loss.
- At 4096x8142 page faults are most of eager's time: see huge pages above. With
  THP_MEM_ALLOC_ENABLE=1 torch's allocator asks for huge pages, as fused does for its gradient.
- GB/s: {passes} N x C elements in the time of fused.
- memory: peak beyond the logits during the call, in N x C tensors of the logits' dtype (fused, in
  place, eager).
"""
GPU_NOTES = """\
Milliseconds are medians per call; a ratio is the rival's time divided by ours, above 1 where fused
is faster; for eager and compile it is that of the fastest formula, named behind. cuda and triton
are our backends, requested by name; fused is the first of them, which a call uses by default. Every
number belongs to a loss and gradient that agreed with the float64 reference (fused within 2e-5 of
the row's largest gradient, the others within 1e-3; half types half a spacing more). `wrong`,
`failed` and `skipped` were not timed, `-` does not apply or was not tried: torch.compile takes part
in a few cases only, eager under a graph where it does not synchronise and its memory is small.

- triton: where cuda is available, the backward of triton too multiplies the stored gradient by
  cuda's kernel.
- forward ms, graph ms, % of copy: of each of our backends, in the order of their columns.
- cross_entropy (F.cross_entropy, half types in float32 or in their own dtype: as is) and liger
  divide by the sum of the weights: compared with fused with reduction="weighted_mean". liger
  overwrites the logits.
- torchvision: sigmoid_focal_loss of one-hot targets, its rows weighted and summed.
- % of copy: the bandwidth of 2 N x C elements in our time, relative to that of a copy of them.
- floor ms: what bench/machine_code/roofline.md predicts: the time of the copy or, where longer, of
  the kernel's instructions or special functions (132 multiprocessors). % of floor: that divided by
  our time.
- memory: peak beyond the logits in a call, in N x C tensors of their dtype (our backends, eager).
- Outside of a graph every call's launches are queued while the GPU pauses, as far as its queue
  holds them: the times are the GPU's, with the gaps between small kernels.
- host µs: how long a call occupies the host, without waiting for the GPU (our backends, eager).
"""


def markdown_table(lines: list[dict[str, str]], padded: bool = False) -> str:
    """Rows with the same keys, which are the heads; padded as by tabulate's format "github"."""
    cells = [list(lines[0]), *(list(line.values()) for line in lines)]
    columns = zip(*cells, strict=True)
    widths = [max(len(c[0]) + 2, *map(len, c)) if padded else 0 for c in columns]
    rule = ["-" * (width + 2) if padded else " --- " for width in widths]
    text = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join([f"| {text[0]} |", f"|{'|'.join(rule)}|", *(f"| {row} |" for row in text[1:])])


def facts(result: Row) -> str:
    """The machine and the versions, as a list."""
    left_out = ("rows", "skipped")
    return "\n".join(f"- {key}: {value}" for key, value in result.items() if key not in left_out)


def best(row: Row, column: str) -> Row:
    """The fastest correct result of a column, else a wrong one, else {}."""
    found = [
        {**result, "variant": name[len(column) :]}
        for name, result in row.get(RESULTS, {}).items()
        if f"{name} ".startswith(f"{column} ")
    ]
    return min(found, key=lambda result: result.get("median_ms", torch.inf), default={})


def shown(result: Row) -> str:
    """The time, or the first word of what is wrong."""
    if "median_ms" in result:
        return f"{result['median_ms']:.3g}"
    return (result.get("outcome") or "-").split()[0].rstrip(":")


def ratio(numerator: Row, denominator: Row, factor: int = 1, digits: int = 2) -> str:
    if "median_ms" not in numerator or "median_ms" not in denominator:
        return "-"
    return f"{factor * numerator['median_ms'] / denominator['median_ms']:.{digits}f}"


def loss_of(row: Row) -> str:
    return f"{row['activation']} {row['gamma']:g}"


# On the CPU ---------------------------------------------------------------------------------------


def cpu_report(result: Row) -> str:
    """A table for each pass, with the machine above and the notes below."""
    parts = ["# Benchmarks", facts(result)]
    for title in PASSES:
        table = [cpu_cells(row) for row in result["rows"] if row["passes"] == title]
        parts += [f"## {title}", markdown_table(table, padded=True)]
    passes = ", ".join(f"{n} ({title})" for title, n in PASSES.items())
    return "\n\n".join([*parts, CPU_NOTES.format(passes=passes)])


def cpu_cells(row: Row) -> dict[str, str]:
    dims = "x".join(map(str, row["shape"]))
    fused, inplace, copy = (best(row, column) for column in ("fused", "in place", "copy"))
    line = {"shape": dims, "dtype": row["dtype"], "loss": loss_of(row)}
    line |= {"fused ms": shown(fused), "in place ms": shown(inplace)}
    for column in CPU_RIVALS:
        rival = best(row, column)
        ours = best(row, "weighted") if column == "cross_entropy" else fused
        variant = rival["variant"] if "median_ms" in rival else ""
        line |= {f"{column} ms": shown(rival) + variant, f"{column} / fused": ratio(rival, ours)}
    line |= {"copy ms": shown(copy), "fused / copy": ratio(fused, copy), "GB/s": bandwidth(row)}
    peaks = [result.get("peak_extra") for result in (fused, inplace, best(row, "eager"))]
    line["memory"] = ", ".join("-" if peak is None else f"{peak:.2f}" for peak in peaks)
    return line


def bandwidth(row: Row) -> str:
    fused = best(row, "fused")
    if "median_ms" not in fused:
        return "-"
    dtype: torch.dtype = getattr(torch, row["dtype"])
    size = torch.Size(row["shape"]).numel() * dtype.itemsize
    return f"{PASSES[row['passes']] * size / fused['median_ms'] / 1e6:.1f}"


def readme_table(result: Row) -> str:
    """Forward + backward, the time of each rival divided by ours."""
    lines = []
    for row in result["rows"]:
        if row["passes"] != TRAIN:
            continue
        line = cpu_cells(row)
        lines.append({
            "logits": f"({', '.join(map(str, row['shape']))})",
            "dtype": line["dtype"],
            "loss": f"{row['activation']}, γ = {row['gamma']:g}",
            "fused ms": line["fused ms"],
            "in place ms": line["in place ms"],
            **{column: line[f"{column} / fused"] for column in CPU_RIVALS},
            "fused / copy": line["fused / copy"],
        })  # fmt: skip
    return markdown_table(lines, padded=True)


# On a GPU -----------------------------------------------------------------------------------------


def gpu_report(result: Row) -> str:
    """A table for each pass, with the machine above and the notes below."""
    rows, skipped = result["rows"], [f"- not measured: {note}" for note in result["skipped"]]
    parts = ["# Benchmarks on a GPU", facts(result)]
    for title in (TRAIN, GRAPH, FORWARD):
        lines = [gpu_cells(row, rows) for row in rows if row["passes"] == title]
        if lines:
            parts += [f"## {title}", markdown_table(lines), *cost_of_alignment(rows, title)]
    return "\n\n".join([*parts, *(["\n".join(skipped)] if skipped else []), GPU_NOTES])


def gpu_cells(row: Row, rows: list[Row]) -> dict[str, str]:
    ours, copy, train = by_backend(row), best(row, "copy"), row["passes"] == TRAIN
    line = {"shape": "x".join(map(str, row["shape"])), "dtype": row["dtype"], "loss": loss_of(row)}
    line |= {f"{name} ms": shown(result) for name, result in ours.items()}
    if {"cuda", "triton"} <= ours.keys():
        line["triton / cuda"] = ratio(ours["triton"], ours["cuda"])
    for title, name in ((FORWARD, "forward ms"), (GRAPH, "graph ms")) if train else ():
        other = by_backend(sibling(row, rows, passes=title))
        line[name] = ", ".join(shown(other.get(backend, {})) for backend in ours)
    for column, own_column in GPU_RIVALS.items():
        rival = best(row, column)
        default = next(iter(by_backend(row, own_column).values()), {})
        timed = f"{ratio(rival, default)}{rival.get('variant', '')}"
        line[f"{column} / fused"] = timed if "median_ms" in rival else shown(rival)
    line["copy ms"] = shown(copy)
    line["% of copy"] = ", ".join(ratio(copy, result, 100, 0) for result in ours.values())
    if row["passes"] != FORWARD:
        least = predicted(row, copy)
        line["floor ms"] = shown(least)
        line["% of floor"] = ", ".join(ratio(least, result, 100, 0) for result in ours.values())
    extras = (("host_us", "host µs"), ("peak_extra", "memory"))
    for key, name in extras if train else extras[:1]:
        values = [result.get(key) for result in (*ours.values(), best(row, "eager"))]
        line[name] = ", ".join("-" if value is None else f"{value:.3g}" for value in values)
    return line


def sibling(row: Row, rows: list[Row], **other: Any) -> Row:
    """The row that differs from this one in what is given, or {}."""
    sought = {**row, **other, RESULTS: None}
    return next((r for r in rows if {**r, RESULTS: None} == sought), {})


def by_backend(row: Row, column: str = "fused") -> dict[str, Row]:
    """Our own results by backend, the default first; under the column's name if none was given."""
    found = [(name.split(" "), result) for name, result in row.get(RESULTS, {}).items()]
    return {name[-1]: result for name, result in found if name[0] == column}


def cost_of_alignment(rows: list[Row], title: str) -> list[str]:
    """How much longer rows take that are not 16-byte aligned: a line, or none."""
    ratios = []
    for row in rows:
        if row["shape"] == UNALIGNED and row["passes"] == title:
            aligned, ours = by_backend(sibling(row, rows, shape=ALIGNED)), by_backend(row)
            times = [f"{name} {ratio(ours[name], aligned.get(name, {}))}" for name in ours]
            ratios.append(f"{row['dtype']} {loss_of(row)}: {', '.join(times)}")
    if not ratios:
        return []
    return [f"Our time at C = 8142 divided by C = 8192, 4096 rows: {'; '.join(ratios)}"]


# What machine_code/roofline.py predicts -----------------------------------------------------------

FloorKey = tuple[str, str, str]  # "(4096, 8142)", "bfloat16", "softmax 0"


class Floor(NamedTuple):
    """Microseconds."""

    memory: float
    issue: float
    special: float


def floor_key(shape: tuple[int, ...], dtype: str, loss: str) -> FloorKey:
    """The first cells of a row of roofline.md, where the dimensions behind the classes are one."""
    dims = [*shape[:2], *([torch.Size(shape[2:]).numel()] if len(shape) > 2 else [])]
    return f"({', '.join(map(str, dims))})", dtype, loss


@cache
def floors(page: Path = ROOFLINES) -> dict[FloorKey, Floor]:
    """The rows of roofline.md."""
    found = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0].startswith("("):
            found[cells[0], cells[1], cells[2]] = Floor(*map(float, cells[4:7]))
    return found


def predicted(row: Row, copy: Row) -> Row:
    """The least time of the row's kernel, with memory at the copy's rate; {} if not known."""
    found = floors().get(floor_key(tuple(row["shape"]), row["dtype"], loss_of(row)))
    if found is None or "median_ms" not in copy:
        return {}
    return {"median_ms": max(copy["median_ms"], found.issue / 1e3, found.special / 1e3)}


def main(paths: list[Path]) -> None:
    if paths[0].suffix == ".json":
        print(readme_table(json.loads(paths[0].read_text())))
    else:
        print(gpu_report(read_lines(*paths)))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
