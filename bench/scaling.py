"""Memory, wire and time from 10^4 to 10^8 classes on 1 to 1024 GPUs: `python -m bench.scaling`.

Into scaling.md. All of it is computed, by the formulas of step.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cbloss_fused.chunks import LEAST_ROWS
from cbloss_fused.sharded import AGREED

from .report import markdown_table
from .step import (
    COMPUTE,
    LONG,
    Collective,
    Family,
    Setting,
    Way,
    agreement,
    chunk_buffer,
    head_gradient,
    head_step,
    input_gradient,
    loss_seconds,
    normalizer,
    own_weight,
    sigmoid_rows,
    softmax_rows,
)

PAGE = Path(__file__).with_suffix(".md")
CLASSES = (10**4, 10**5, 10**6, 10**7, 10**8)
RANKS = (1, 8, 64, 1024)
WAYS: dict[Way, str] = {
    "a": "(a) rows", "b": "(b) classes", "c": "(c) rows, chunks", "d": "(d) classes, chunks",
}  # fmt: skip
SOURCES = {
    "rows": "N of a step, on all GPUs together",
    "features": "D of a row, the head's input",
    "hbm": "bytes/s of a GPU's memory, reads and writes: the measured copies of an H200, 3.9e12 "
    "to 4.2e12 for 130 MB and more (`copy ms` of results/nvidia-h200-2026-11-27.md)",
    "within": "bytes/s that a GPU sends within a node, assumed: NVLink of an H200, one direction",
    "between": "bytes/s that a whole node sends, assumed: eight adapters of 400 Gbit/s; a ring "
    "leaves a node once",
    "flops": "products of bfloat16, FLOP/s, assumed: 60 % of an H200's data sheet",
    "memory": "bytes of a GPU, data sheet of an H200",
    "node": "GPUs of a node, assumed",
    "latency": "seconds of a collective, times log2 of the GPUs, assumed",
}

INTRO = """\
# Classes and GPUs: memory, wire, time

Written by `{command}`.
**No figure on this page was measured on GPUs: all are computed**, by the formulas of
`bench/step.py`. `tests/test_scaling.py` counts the bytes that processes pass to each other and
those of the buffer and of Adam's state, and compares the formulas with them. Nothing checks the
times.

A step has N = {rows:,} rows on all GPUs together, D = {features:,} features, logits in bfloat16 by
autocast, parameters in float32, Adam. Four ways:

- (a) rows over ranks: each GPU has N / GPUs rows and the whole head, whose gradient
  DistributedDataParallel adds up; the loss adds up one float64, its denominator.
- (b) classes over ranks (`ClassShards`): each GPU has all N rows and C / GPUs classes. Softmax
  gathers 3 numbers of each row (4 with label smoothing), sigmoid adds up one number; the backward
  of the loss exchanges nothing. The gradient of the head's input, N x D, is added up too.
  The rows' features are taken to be on every GPU: where data parallel training makes them, their
  all-gather and a reduce-scatter, in place of the all-reduce, together move as much as it does.
- (c) as (a), by `linear_class_balanced_loss`: of the logits a buffer of some rows is in memory.
- (d) as (b), by `linear_class_balanced_loss` with shards: chunk by chunk, each with its gather.

How to read it: where a step does not fit into a GPU, the tables name the part that is too large:
the head, if it is that alone, else the largest of the others. Where all fits they name, in
brackets, what takes longest.
Times are added up as if nothing overlapped, and as if each rate were reached: a step takes about
so long at best. Activations below the head, buckets of DistributedDataParallel and temporaries are
not counted.

"""


def number(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"


def milliseconds(seconds: float) -> str:
    return number(1e3 * seconds)


def power(classes: int) -> str:
    return f"10^{len(str(classes)) - 1}"


def setting_table(setting: Setting) -> str:
    return markdown_table([
        {"option": f"--{name}", "value": f"{value:g}", "what": SOURCES[name]}
        for name, value in setting._asdict().items()
    ])  # fmt: skip


def summary(setting: Setting) -> str:
    """What limits a step: GPUs with the same limit together."""
    lines = []
    for classes in CLASSES:
        line = {"classes": power(classes)}
        for way, name in WAYS.items():
            limits: dict[str, list[str]] = {}
            for ranks in RANKS:
                found = head_step(way, classes, ranks, setting).limit(setting)
                limits.setdefault(found, []).append(str(ranks))
            line[name] = "; ".join(f"{', '.join(r)}: {limit}" for limit, r in limits.items())
        lines.append(line)
    return markdown_table(lines)


def memory_table(setting: Setting) -> str:
    lines = []
    for classes in CLASSES:
        for ranks in RANKS:
            a, b, c, d = (head_step(way, classes, ranks, setting) for way in WAYS)
            line = {"classes": power(classes), "GPUs": str(ranks)}
            values = {
                "head (a, c)": a.memory["head"], "head (b, d)": b.memory["head"],
                "logits (a, b)": a.memory["logits"], "buffer (c)": c.memory["buffer"],
                "buffer (d)": d.memory["buffer"], "gathered (b)": b.memory["gathered rows"],
                "all (a)": a.total(), "all (b)": b.total(), "all (c)": c.total(),
                "all (d)": d.total(),
            }  # fmt: skip
            lines.append(line | {name: number(value / 1e9) for name, value in values.items()})
    return markdown_table(lines)


def wire_table(setting: Setting) -> str:
    N, D = setting.rows, setting.features
    collectives = {
        "denominator (a, c)": normalizer(),
        "softmax (b, d)": softmax_rows(N),
        "softmax, smoothing (b, d)": softmax_rows(N, smoothing=True),
        "sigmoid (b, d)": sigmoid_rows(N),
        'sigmoid, "none" or statistics (b, d)': sigmoid_rows(N, per_row=True),
        "weight of own classes (b, d)": own_weight(N),
        "input's gradient (b, d)": input_gradient(N, D),
    }
    collectives |= {
        f"head's gradient, {power(classes)} classes (a, c)": head_gradient(classes, D)
        for classes in CLASSES
    }
    return markdown_table([
        {"exchange": name, "collective": c.kind, "each passes in": number(c.nbytes / 1e6)}
        | {f"{ranks} GPUs": number(c.moved(ranks) / 1e6) for ranks in RANKS[1:]}
        for name, c in collectives.items()
    ])  # fmt: skip


def loss_table(setting: Setting) -> str:
    columns: dict[str, tuple[Family, bool]] = {
        "softmax (a)": ("softmax", False), "softmax (b)": ("softmax", True),
        "sigmoid (a)": ("sigmoid", False), "sigmoid (b)": ("sigmoid", True),
    }  # fmt: skip
    lines = []
    for classes in CLASSES:
        for ranks in RANKS:
            line = {"classes": power(classes), "GPUs": str(ranks)}
            for name, (family, over_classes) in columns.items():
                found = loss_seconds(family, over_classes, classes, ranks, setting)
                line[name] = " + ".join(map(milliseconds, found))
            lines.append(line)
    return markdown_table(lines)


def step_table(setting: Setting) -> str:
    lines = []
    for classes in CLASSES:
        for ranks in RANKS:
            line = {"classes": power(classes), "GPUs": str(ranks)}
            for way, name in WAYS.items():
                step = head_step(way, classes, ranks, setting)
                line[name] = " + ".join(map(milliseconds, step.seconds.values()))
                line[f"limit ({way})"] = step.limit(setting)
            lines.append(line)
    return markdown_table(lines)


def page(setting: Setting) -> str:
    changed = (
        f" --{name} {value:g}"
        for name, value in setting._asdict().items()
        if value != Setting._field_defaults[name]
    )
    intro = INTRO.format(command="python -m bench.scaling" + "".join(changed), **setting._asdict())
    N, most, least = setting.rows, RANKS[-1], LEAST_ROWS["other"]
    gathered = softmax_rows(N).moved(most)
    reduced = Collective("all_reduce", 3 * N * COMPUTE).moved(most)
    parts = [
        intro + setting_table(setting),
        "## What breaks first",
        "The limit of a step of the head with its softmax loss, by the number of GPUs: what does "
        "not fit or,\nin brackets, takes longest.",
        summary(setting),
        "- (a) fails by the head: its parameters, gradient, Adam's moments and copy take 18 bytes "
        "a\n  parameter on every GPU, however many there are.\n"
        "- (b) divides the head, but has no chunks: its logits are as many as in (a), N x C / "
        "GPUs, and fail\n  next. What grows with the GPUs is the gather, by 12 N bytes each.\n"
        f"- (c) has logits of at least {least:,} rows in its buffer, or of all its rows if they "
        f"are fewer: of\n  {power(CLASSES[-1])} classes "
        f"{number(chunk_buffer(least, CLASSES[-1]) / 1e9)} GB. A smaller chunk_size needs less "
        "and reads the head more often.\n"
        "- (d) divides the head and has chunks; its gathers are as large in all as that of (b).",
        "## Memory of a GPU, GB",
        memory_table(setting),
        "## Wire, MB",
        "What each rank passes in, and what it sends (and receives as much) in a ring. On CPUs one "
        "more\nall-reduce finds errors of single ranks: "
        f"{agreement(AGREED).nbytes} bytes for (b); for the denominator {agreement(1).nbytes} "
        "bytes, of which\nthe denominator is 8.",
        wire_table(setting),
        f"The gather of softmax moves {number(gathered / 1e6)} MB on {most} GPUs. Two all-reduces, "
        f"of M and then of what\nis relative to it, would move {number(reduced / 1e6)} MB, and "
        "less than the gather from three GPUs on;\nthey are not what the package does.",
        "## Loss and gradient of given logits, ms",
        "In memory + on the wire. Softmax (b) reads logits twice and writes once; with label "
        "smoothing it\ntakes twice as long. "
        f"Softmax (a) of more than {LONG:,} classes is counted so too, unless the second\nread "
        "comes from L2.",
        loss_table(setting),
        "## Head, softmax loss and Adam, ms",
        "Products + memory + wire. Where the limit has no brackets the step does not fit: the time "
        "is what\nit would take.",
        step_table(setting),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="default: bench/scaling.md")
    for name, value in Setting._field_defaults.items():
        help = SOURCES[name].replace("%", "%%")
        parser.add_argument(f"--{name}", type=type(value), default=value, help=help)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    out.write_text(page(Setting(**arguments)))


if __name__ == "__main__":
    main()
