"""What a step takes on a GPU, by formulas: memory, wire and time; bench/scaling.py shows them.

tests/test_scaling.py counts what processes pass to each other and what a chunk's buffer holds, and
compares the functions below with it.
"""

from __future__ import annotations

from math import ceil, log2
from typing import Literal, NamedTuple

import torch

from cbloss_fused.chunks import chunk_rows
from cbloss_fused.groups import KINDS

LOGIT, COMPUTE, NUMBER = 2, 4, 8  # bytes: bfloat16, its float32 compute type, float64
LONG = 16_384  # classes of a row that a softmax kernel reads twice
Family = Literal["softmax", "sigmoid"]
Way = Literal["a", "b", "c", "d"]

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
