"""The cases of the GPU benchmark, and everyone who takes part in them."""

from __future__ import annotations

import importlib
import math
from contextlib import suppress
from functools import partial
from itertools import chain, cycle, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cbloss_fused.cuda
from cbloss_fused import class_balanced_loss, class_balanced_weights, kernels, ops, reference

from .cases import BETA, Case, Contestant, LossFunction, Problem, counts, formulas
from .gpu_table import EVEN, FORWARD, GRAPH, ODD, Row

LONG: list[tuple[int, ...]] = [ODD, EVEN]
# Large; under a graph; does L2 hold the second read; split rows; few classes; the host's time.
TELLING: list[tuple[int, ...]] = [
    *((16384, 8142), (256, 8142), (4096, 32768), (4, 131072), (8, 131072)),
    *((1_000_000, 10), (262144, 100), (32, 1000)),
]
MORE: list[tuple[int, ...]] = [
    *((1_000_000, 19), (1024, 8142), (32, 10)),
    *((4096, 131072), (64, 1048576), (8, 19, 512, 512)),
]
MAIN = [("softmax", 0.0), ("sigmoid", 0.5)]
OTHER = [("softmax", 0.5), ("sigmoid", 0.0), ("softmax", 2.0), ("sigmoid", 2.0)]
DTYPES = (torch.float32, torch.bfloat16)
QUICK = [Case(s, d, *f) for s, d, f in product([(32, 10), (4, 300)], DTYPES, MAIN + OTHER)]
COMPILED = [Case(s, d, *f) for s, d, f in product([ODD, (256, 8142)], DTYPES, MAIN)]
FORMULAS = 2  # to compile: the reference, and what compiles to the fastest code
SLOTS, SMALL = 48, 2**20
HOARDED = 2**26  # elements: a graph of eager would keep too much memory beyond
SYNCHRONISE = ("eager reference", "liger")  # so no graph holds them


def optional(module: str) -> Any:
    """A package that need not be there, nor work: its column stays empty."""
    with suppress(ImportError, RuntimeError):
        return importlib.import_module(module)
    return None


def all_cases() -> list[Case]:
    """What tells most first, 24 of them: the budget may end before the rest."""
    half, single = (torch.bfloat16,), (torch.float32,)
    groups: list[tuple[list[tuple[int, ...]], list[tuple[str, float]], tuple[torch.dtype, ...]]] = [
        (LONG, MAIN, DTYPES[::-1]),
        (TELLING, MAIN, half),
        (TELLING, MAIN, single),
        (MORE, MAIN, DTYPES),
        (LONG + TELLING + MORE, OTHER, DTYPES),
    ]
    ordered = chain(*(product(*group) for group in groups))
    return [Case(shape, dtype, *family) for shape, family, dtype in ordered]


def problem(case: Case, device: torch.device) -> Problem:
    """As on the CPU, but the logits are drawn where they are used."""
    generator, draws = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    n_c, rows = counts(case), torch.Size(case.shape[:1] + case.shape[2:])
    logits = torch.randn(case.shape, generator=generator, device=device).mul_(2).to(case.dtype)
    target = torch.multinomial(n_c, rows.numel(), replacement=True, generator=draws)
    weight = class_balanced_weights(n_c, BETA).to(device)
    return Problem(logits.requires_grad_(), target.reshape(rows).to(device), weight)


def copies(logits: Tensor) -> list[Tensor]:
    """The logits as often as the module's docstring says; the first is no copy."""
    count = 2
    if logits.is_cuda:
        cache = torch.cuda.get_device_properties(logits.device).L2_cache_size
        enough = min(math.ceil(2 * cache / logits.nbytes), SLOTS)
        count = enough if logits.nbytes >= SMALL else 4
    return [logits, *(logits.detach().clone().requires_grad_() for _ in range(count - 1))]


def backends(device: torch.device) -> list[str]:
    """Whose kernels take part, the default's first; "" is what a call gets without backend=."""
    found = ["cuda"] * (cbloss_fused.cuda.device == device.type)
    if kernels.available and (device.type == "cuda" or kernels.load().INTERPRETED):
        found.append("triton")
    found.sort(key=lambda name: name != ops.PREFERRED)
    return found if found and device.type == "cuda" else ["", *found]


def options(case: Case) -> Row:
    return {"activation": case.activation, "gamma": case.gamma, "ignore_index": None}


def fused(case: Case, device: torch.device, column: str = "fused", **more: Any) -> list[Contestant]:
    """Our own, by backend: its name is the formula."""
    loss = partial(class_balanced_loss, **options(case), **more)
    names = backends(device)
    return [Contestant(column, partial(loss, backend=name or None), name) for name in names]


def contestants(case: Case, ring: list[Tensor]) -> list[Contestant]:
    """Everyone who can compute the case, fused first; the copy in turns, as the logits are."""
    eager: dict[str, LossFunction] = {"reference": partial(reference.loss, **options(case))}
    eager |= formulas(case)
    field = fused(case, ring[0].device)
    if (case.activation, case.gamma) == ("softmax", 0):
        field += fused(case, ring[0].device, "weighted", reduction="weighted_mean")
        field += cross_entropies(case, ring[0].is_cuda)
    focal = optional("torchvision.ops") if case.activation == "sigmoid" else None
    if focal is not None:
        rival = partial(torchvision_focal, focal.sigmoid_focal_loss, case.gamma)
        field.append(Contestant("torchvision", rival))
    field += [Contestant("eager", loss, name) for name, loss in eager.items()]
    for name, loss in list(eager.items())[: FORMULAS if case in COMPILED else 0]:
        code = torch.compile(loss, fullgraph=True, dynamic=False)
        field.append(Contestant("compile", code, name))
    buffers = cycle([torch.empty_like(logits, requires_grad=False) for logits in ring])
    field.append(Contestant("copy", lambda x, y, w: next(buffers).copy_(x)))
    by_weight = ("weighted", "cross_entropy", "liger")
    kinds = ["weighted_mean" if c.column in by_weight else "mean" for c in field]
    return [c._replace(reduction=kind) for c, kind in zip(field, kinds, strict=True)]


def cross_entropies(case: Case, cuda: bool) -> list[Contestant]:
    """F.cross_entropy, of half types in float32 and as they are; liger's, if it is there."""
    in_float = Contestant("cross_entropy", lambda x, y, w: F.cross_entropy(x.float(), y, w))
    as_is = Contestant(
        "cross_entropy", lambda x, y, w: F.cross_entropy(x, y, w.to(x.dtype)), "as is"
    )
    field = [in_float, as_is] if cuda and case.dtype != torch.float32 else [in_float]
    liger = optional("liger_kernel.transformers.functional") if cuda else None
    if liger is not None and len(case.shape) == 2:
        field.append(Contestant("liger", liger.liger_cross_entropy, overwrites=True))
    return field


def torchvision_focal(focal: Any, gamma: float, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """alpha < 0: no weights of its own; float32, since its 1 - p_t cancels."""
    t = torch.zeros_like(x, dtype=torch.float32).scatter_(1, y.unsqueeze(1), 1.0)
    return (w[y] * focal(x.float(), t, alpha=-1, gamma=gamma, reduction="none").sum(1)).mean()


def lineup(case: Case, field: list[Contestant], title: str) -> list[Contestant]:
    """Who takes part in a pass."""
    if title == FORWARD:
        return [c for c in field if c.column != "compile"]
    if title == GRAPH:
        hoarder = "eager" if torch.Size(case.shape).numel() > HOARDED else None
        return [c for c in field if c.name not in SYNCHRONISE and c.column != hoarder]
    return field
