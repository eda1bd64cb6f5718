"""Memory, wire and time from 10^4 to 10^8 classes on 1 to 1024 GPUs: `python -m bench.scaling`.

Into scaling.md. All of it is computed. tests/test_scaling.py counts what processes pass to each
other and what a chunk's buffer holds, and compares the functions below with it.
"""

from __future__ import annotations

import argparse
from math import ceil, log2
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cbloss_fused.chunks import LEAST_ROWS, chunk_rows
from cbloss_fused.groups import KINDS

from .report import markdown_table

PAGE = Path(__file__).with_suffix(".md")
CLASSES = (10**4, 10**5, 10**6, 10**7, 10**8)
RANKS = (1, 8, 64, 1024)
LOGIT, COMPUTE, NUMBER = 2, 4, 8  # bytes: bfloat16, its float32 compute type, float64
LONG = 16_384  # classes of a row that a softmax kernel reads twice
Family = Literal["softmax", "sigmoid"]
Way = Literal["a", "b", "c", "d"]
WAYS: dict[Way, str] = {
    "a": "(a) rows", "b": "(b) classes", "c": "(c) rows, chunks", "d": "(d) classes, chunks",
}  # fmt: skip


# On the wire --------------------------------------------------------------------------------------


class Collective(NamedTuple):
    kind: Literal["all_reduce", "all_gather"]
    nbytes: int  # that each rank passes in

    def held(self, ranks: int) -> int:
        """Bytes of the result on each rank."""
        return self.nbytes * (ranks if self.kind == "all_gather" else 1)

    def moved(self, ranks: int) -> float:
        """Bytes that each rank sends, and as many that it receives, in a ring."""
        if self.kind == "all_gather":
            return (ranks - 1) * self.nbytes
        return 2 * (ranks - 1) / ranks * self.nbytes


def normalizer() -> Collective:
    """Of `global_normalizer` and of a loss with a group."""
    return Collective("all_reduce", NUMBER)


def softmax_rows(rows: int, smoothing: bool = False, itemsize: int = COMPUTE) -> Collective:
    """Of classes over ranks: the forward's; the backward has none."""
    return Collective("all_gather", (3 + smoothing) * rows * itemsize)


def sigmoid_rows(rows: int, per_row: bool = False, itemsize: int = COMPUTE) -> Collective:
    """As softmax_rows; per_row: for reduction="none" and return_stats."""
    return Collective("all_reduce", rows * itemsize if per_row else NUMBER)


def own_weight(rows: int, itemsize: int = COMPUTE) -> Collective:
    """In addition, where `weight` has this rank's classes only."""
    return Collective("all_reduce", rows * itemsize)


def agreement(numbers: int) -> Collective:
    """On CPUs only: so many numbers and which errors were found."""
    return Collective("all_reduce", (numbers + len(KINDS)) * NUMBER)


def head_gradient(classes: int, features: int) -> Collective:
    """By DistributedDataParallel, float32."""
    return Collective("all_reduce", classes * features * 4)


def input_gradient(rows: int, features: int, itemsize: int = LOGIT) -> Collective:
    """Of a head whose classes lie over ranks: each has a term of the sum."""
    return Collective("all_reduce", rows * features * itemsize)


# In memory ----------------------------------------------------------------------------------------


def head_state(classes: int, features: int) -> int:
    """Bytes: parameters, gradient and Adam's two moments, float32."""
    return 16 * classes * features


def logits_and_gradient(rows: int, classes: int) -> int:
    return 2 * LOGIT * rows * classes


def chunk_buffer(
    rows: int, classes: int, dtype: torch.dtype = torch.bfloat16, device_type: str = "cuda"
) -> int:
    """Bytes of the one buffer of linear_class_balanced_loss; its rows begin at 64 bytes."""
    at_once = min(chunk_rows(rows, classes, dtype, device_type), rows)
    return at_once * ceil(classes * dtype.itemsize / 64) * 64


def chunk_count(
    rows: int, classes: int, dtype: torch.dtype = torch.bfloat16, device_type: str = "cuda"
) -> int:
    return ceil(rows / chunk_rows(rows, classes, dtype, device_type))


# A step -------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What is assumed: the defaults and where they come from."""

    rows: int = 65_536
    features: int = 1024
    hbm: float = 4.0e12
    within: float = 4.5e11
    between: float = 4.0e11
    flops: float = 6.0e14
    memory: float = 1.41e11
    node: int = 8
    latency: float = 5e-6


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


class Step(NamedTuple):
    """Of one GPU."""

    memory: dict[str, int]  # bytes
    seconds: dict[str, float]

    def total(self) -> int:
        return sum(self.memory.values())

    def limit(self, setting: Setting) -> str:
        """What does not fit or, in brackets, takes longest."""
        if self.memory["head"] > setting.memory:
            return "head"
        if self.total() > setting.memory:
            others = [name for name in self.memory if name != "head"]
            return max(others, key=lambda name: self.memory[name])
        return f"({max(self.seconds, key=lambda name: self.seconds[name])})"


def wire(collectives: list[Collective], ranks: int, setting: Setting) -> float:
    """Seconds."""
    if ranks == 1:
        return 0.0
    one = ranks <= setting.node
    rate = setting.within if one else min(setting.within, setting.between)
    return sum(c.moved(ranks) / rate + setting.latency * log2(ranks) for c in collectives)


def loss_bytes(family: Family, over_classes: bool, classes: int) -> int:
    """What the loss and its gradient read and write for each logit."""
    if not over_classes:
        return LOGIT * (3 if family == "softmax" and classes > LONG else 2)
    return LOGIT * (3 if family == "softmax" else 2)


def loss_seconds(
    family: Family, over_classes: bool, classes: int, ranks: int, setting: Setting
) -> tuple[float, float]:
    """(in memory, on the wire), of logits that are given."""
    rows = setting.rows
    traffic = loss_bytes(family, over_classes, classes) * rows * classes / ranks
    exchanged = normalizer()
    if over_classes:
        exchanged = softmax_rows(rows) if family == "softmax" else sigmoid_rows(rows)
    return traffic / setting.hbm, wire([exchanged], ranks, setting)


def head_step(way: Way, classes: int, ranks: int, setting: Setting) -> Step:
    """Softmax: the head's products, the loss, Adam."""
    N, D = setting.rows, setting.features
    over_classes = way in ("b", "d")
    rows = N if over_classes else ceil(N / ranks)
    own = ceil(classes / ranks) if over_classes else classes
    cast = LOGIT * own * D
    memory = {"head": head_state(own, D) + cast, "input": 2 * LOGIT * rows * D}
    chunks = 1
    exchanged = [normalizer(), head_gradient(classes, D)]
    if way in ("c", "d"):
        memory["buffer"], chunks = chunk_buffer(rows, own), chunk_count(rows, own)
    else:
        memory["logits"] = logits_and_gradient(rows, own)
    if over_classes:
        gather = softmax_rows(ceil(N / chunks))  # of a chunk
        exchanged = [*[gather] * chunks, input_gradient(N, D)]
        memory["gathered rows"] = gather.held(ranks) if ranks > 1 else 0
    # A logit is written, and its gradient read by two products. A parameter: Adam reads 16 bytes
    # and writes 12, its copy in bfloat16 costs 6 and is read by two products of each chunk, its
    # gradient is written by the first and read and written by others.
    per_logit = 3 * LOGIT + loss_bytes("softmax", over_classes, own)
    per_parameter = 28 + 6 + (2 * LOGIT + 8) * chunks - 4
    traffic = per_logit * rows * own + per_parameter * own * D
    return Step(memory, {
        "products": 6 * rows * own * D / setting.flops,
        "memory rate": traffic / setting.hbm,
        "wire": wire(exchanged, ranks, setting),
    })  # fmt: skip


# The page -----------------------------------------------------------------------------------------

INTRO = """\
# Classes and GPUs: memory, wire, time

Written by `{command}`.
**No figure on this page was measured on GPUs: all are computed**, by the formulas of
`bench/scaling.py`. `tests/test_scaling.py` counts the bytes that processes pass to each other and
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

How to read it: of a step's parts that do not fit into a GPU the tables name the head, if it is too
large alone, else the largest of the others; in brackets stands what takes longest where all fits.
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
        "The limit of a step of the head with its softmax loss: of so many GPUs what does not fit "
        "or, in\nbrackets, takes longest.",
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
        f"{agreement(2).nbytes} bytes for (b); for the denominator {agreement(1).nbytes} bytes, "
        "of which\nthe denominator is 8.",
        wire_table(setting),
        f"The gather of softmax moves {number(gathered / 1e6)} MB on {most} GPUs. Two all-reduces, "
        f"of M and then of what\nis relative to it, would move {number(reduced / 1e6)} MB, and "
        "less than the gather from three GPUs on;\nthey are not what the package does.",
        "## Loss and gradient of given logits, ms",
        "In memory + on the wire. Softmax (b) reads logits twice and writes once; with label "
        "smoothing it\ntakes twice as long. "
        f"Softmax (a) of more than {LONG:,} classes is counted so too, unless the second\nread "
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
