"""What is measured, as data: the cases of the CPU, of the GPU and of its smoke test."""

from __future__ import annotations

from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbloss_fused import class_balanced_weights

from .result_files import RESULTS, Row

Shape = tuple[int, ...]
Family = tuple[str, float]  # activation, gamma
BETA = 0.999
CPU = torch.device("cpu")
# The passes of a case: each has a row of its own in the results.
FORWARD, TRAIN, GRAPH = "forward only", "forward + backward", "forward + backward, CUDA graph"


class Case(NamedTuple):
    """Logits and a loss of them. Each pass of a case is a row of the results."""

    shape: Shape
    dtype: torch.dtype
    activation: str
    gamma: float

    def __str__(self) -> str:
        dims = "x".join(map(str, self.shape))
        return f"{self.activation}-g{self.gamma:g}-{str(self.dtype)[6:]}-{dims}"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def row(self, title: str, results: Row) -> Row:
        """The row of a pass in a file of results, with the results by implementation."""
        facts = {**self._asdict(), "dtype": str(self.dtype)[6:]}
        return {**facts, "passes": title, RESULTS: results}


class Problem(NamedTuple):
    """The tensors of a case."""

    logits: Tensor  # a leaf that requires grad
    target: Tensor
    weight: Tensor


# On the CPU ---------------------------------------------------------------------------------------

FAMILIES: list[Family] = [("softmax", 0.0), ("softmax", 0.5), ("sigmoid", 0.0), ("sigmoid", 0.5)]
CLASSES = (256, 8142)  # the classes of iNaturalist 2018: rows that are not 16-byte aligned
LARGE = (4096, 8142)  # 133 MB in float32: larger than every cache
IMAGES = (8, 19, 256, 256)
CPU_SHAPES: list[Shape] = [
    *((32, 10), (256, 1000), CLASSES, LARGE, (1_000_000, 10), IMAGES),
]
CPU_CASES = [Case(s, torch.float32, *f) for s, f in product(CPU_SHAPES, FAMILIES)]
CPU_CASES += [Case(s, torch.bfloat16, *f) for s, f in product([CLASSES, LARGE], FAMILIES)]
CPU_CASES += [Case(CLASSES, d, "sigmoid", 2.0) for d in (torch.float32, torch.bfloat16)]
CPU_CASES.sort(key=lambda c: (CPU_SHAPES.index(c.shape), c.dtype != torch.float32))
CPU_QUICK_CASES = [
    case for case in CPU_CASES if case.shape in ((32, 10), CLASSES) and case.dtype == torch.float32
]
LONG_TAIL_SHAPES: list[Shape] = [CLASSES, (1_000_000, 10), IMAGES]

# On a GPU -----------------------------------------------------------------------------------------

UNALIGNED, ALIGNED = (4096, 8142), (4096, 8192)  # rows that are not 16-byte aligned; that are
ALIGNMENT_SHAPES: list[Shape] = [UNALIGNED, ALIGNED]
FIRST_SHAPES: list[Shape] = [
    *((16384, 8142), (256, 8142)),  # much data; a CUDA graph makes a difference
    *((4096, 32768), (4, 131072), (8, 131072)),  # rows that are read twice; that are split
    *((1_000_000, 10), (262144, 100), (32, 1000)),  # few classes; the host's time counts
]
LATER_SHAPES: list[Shape] = [
    *((1_000_000, 19), (1024, 8142), (32, 10)),
    *((4096, 131072), (64, 1048576), (8, 19, 512, 512)),
]
GPU_SHAPES = ALIGNMENT_SHAPES + FIRST_SHAPES + LATER_SHAPES
FIRST_FAMILIES: list[Family] = [("softmax", 0.0), ("sigmoid", 0.5)]
LATER_FAMILIES: list[Family] = [
    *(("softmax", 0.5), ("sigmoid", 0.0), ("softmax", 2.0), ("sigmoid", 2.0)),
]
GPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_QUICK_CASES = [
    Case(shape, dtype, *family)
    for shape, dtype, family in product(
        [(32, 10), (4, 300)], GPU_DTYPES, FIRST_FAMILIES + LATER_FAMILIES
    )
]
# torch.compile takes seconds per formula: these cases only.
GPU_COMPILED_CASES = [
    Case(shape, dtype, *family)
    for shape, dtype, family in product([UNALIGNED, (256, 8142)], GPU_DTYPES, FIRST_FAMILIES)
]


def gpu_cases() -> list[Case]:
    """The most important 24 first: the time may not suffice for the others."""
    half, single = (torch.bfloat16,), (torch.float32,)
    groups: list[tuple[list[Shape], list[Family], tuple[torch.dtype, ...]]] = [
        (ALIGNMENT_SHAPES, FIRST_FAMILIES, GPU_DTYPES[::-1]),
        (FIRST_SHAPES, FIRST_FAMILIES, half),
        (FIRST_SHAPES, FIRST_FAMILIES, single),
        (LATER_SHAPES, FIRST_FAMILIES, GPU_DTYPES),
        (GPU_SHAPES, LATER_FAMILIES, GPU_DTYPES),
    ]
    ordered = chain(*(product(*group) for group in groups))
    return [Case(shape, dtype, *family) for shape, family, dtype in ordered]


class SmokeCase(NamedTuple):
    """A call. target: "index"; "background", which half of the rows are; "soft", of the logits'
    dtype; "multi-hot", of bool; "partial", of floats with unknown labels. An option "weight" is the
    class weights."""

    shape: Shape
    dtype: torch.dtype
    options: dict[str, Any]
    target: str = "index"


def smoke_cases() -> list[SmokeCase]:
    """At least one call for each kernel, the most important ones first."""
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    sigmoid, weighted = {"activation": "sigmoid"}, {"pos_weight": "weight"}
    focal = {**sigmoid, "gamma": 2.0, "alpha": 0.25}
    return [
        SmokeCase((64, 8142), bf16, {}),
        SmokeCase((64, 8142), bf16, {**sigmoid, "gamma": 0.5}),
        SmokeCase((64, 8142), f32, sigmoid),
        SmokeCase((64, 1000), f32, {"gamma": 2.0}),
        SmokeCase((64, 1000), f16, {"recompute": True}),
        SmokeCase((300, 10), f32, {"gamma": 0.5}),
        SmokeCase((300, 10), bf16, {**sigmoid, "gamma": 1.0}),
        SmokeCase((300, 100), f32, {}),
        SmokeCase((300, 100), bf16, {**sigmoid, "gamma": 2.0}),
        SmokeCase((4, 131072), f32, {}),
        SmokeCase((4, 131072), bf16, {**sigmoid, "gamma": 2.0}),
        SmokeCase((600, 20000), bf16, {}),
        SmokeCase((64, 8142), bf16, {}, "soft"),
        SmokeCase((64, 8142), f32, sigmoid, "soft"),
        SmokeCase((64, 8142), f32, sigmoid, "multi-hot"),  # bool targets: another compiled kernel
        SmokeCase((2, 19, 40, 33), f32, {}),
        SmokeCase((2, 300, 5), bf16, sigmoid),
        SmokeCase((65, 12001), f32, {"label_smoothing": 0.1, "z_loss": 1e-3}),
        SmokeCase((65, 3001), f64, {"gamma": 0.5}),
        SmokeCase((65, 3001), f32, {**sigmoid, "gamma": 1.0, "gamma_neg": 4.0, "clip": 0.05}),
        SmokeCase((65, 3001), bf16, {"reduction": "none"}),
        SmokeCase((65, 3001), f32, {**sigmoid, "reduction": "weighted_mean", "logit_scale": 2.0}),
        SmokeCase((65, 8143), f32, {"inplace": True}),
        SmokeCase((65, 301), bf16, {**sigmoid, "inplace": True}),
        SmokeCase((9, 50001), f32, {"recompute": True, "gamma": 0.5}),
        SmokeCase((65, 301), f32, {**sigmoid, "class_weighting": "class"}),
        SmokeCase((65, 3001), bf16, {**focal, "background_index": 3001}, "background"),
        SmokeCase((300, 10), f32, {**focal, "background_index": -1, **weighted}, "background"),
        SmokeCase((64, 1000), bf16, {**sigmoid, "ignore_index": -1, **weighted}, "partial"),
        SmokeCase((64, 1000), f32, {**sigmoid, "label_smoothing": 0.1, **weighted}),
    ]


# Tensors ------------------------------------------------------------------------------------------


def class_counts(classes: int) -> Tensor:
    """Samples per class, from 1000 down to 1."""
    return torch.logspace(3, 0, classes, dtype=torch.float64).round()


def problem(case: Case, device: torch.device = CPU) -> Problem:
    """Normal logits; targets drawn from the long-tailed counts."""
    generator = torch.Generator(device).manual_seed(0)
    # Targets are drawn on the CPU, so that they are the same on every GPU.
    of_targets = generator if device.type == "cpu" else torch.Generator().manual_seed(0)
    counts = class_counts(case.shape[1])
    logits = torch.randn(case.shape, generator=generator, device=device).mul_(2).to(case.dtype)
    rows = torch.Size(case.shape[:1] + case.shape[2:])
    target = torch.multinomial(counts, rows.numel(), replacement=True, generator=of_targets)
    weight = class_balanced_weights(counts, BETA).to(device)
    return Problem(logits.requires_grad_(), target.reshape(rows).to(device), weight)


def with_soft_targets(kind: str, given: Problem) -> Problem:
    """The same with "soft", "multi-hot" or "multi-hot, bool" targets in the logits' shape."""
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(given.logits.shape, generator=generator)
    if kind == "soft":
        return given._replace(target=u / u.sum(1, keepdim=True))
    labels = (u < 0.05).scatter_(1, given.target.unsqueeze(1), True)
    return given._replace(target=labels if kind == "multi-hot, bool" else labels.float())


def preset_data(rows: int = 256, classes: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class indices drawn from the long-tailed counts, multi-hot targets; float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, classes, generator=generator)
    y = torch.multinomial(class_counts(classes), rows, replacement=True, generator=generator)
    return x, y, (torch.rand(rows, classes, generator=generator) < 0.05).float()
