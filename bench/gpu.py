"""Time the fused losses on one NVIDIA GPU beside everyone else: `python -m bench.gpu`.

Logits smaller than twice the L2 cache come in enough copies (at most SLOTS) that a round through
them exceeds it, each with a gradient that lives until its next turn: calls follow each other as in
training and yet find nothing cached. A flush between them would hide launches behind its own time.
Tensors below SMALL bytes have a few copies only: a call on them is all launches.

A sample is one pair of events around many calls, queued behind a pause so that the GPU never waits
for the first of them. A graph holds a call on every copy. `--device cpu --quick` is a dry run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import chain, cycle, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cbloss_fused
from cbloss_fused import class_balanced_loss, class_balanced_weights, reference

from . import measure
from .cases import BETA, OURS, Case, Contestant, Problem, counts, formulas
from .gpu_table import FORWARD, GRAPH, TRAIN, Row, report
from .measure import Verdict, Wanted

FIRST = [(4096, 8142), (4096, 8192), (16384, 8142)]
THEN = [(32, 10), (32, 1000), (256, 8142), (1024, 8142), (8, 131072), (4096, 32768)]
LAST = [(4096, 131072), (64, 1048576), (1_000_000, 10), (8, 19, 512, 512)]
MAIN = [("softmax", 0.0), ("sigmoid", 0.5)]
OTHER = [("softmax", 0.5), ("sigmoid", 0.0), ("softmax", 2.0), ("sigmoid", 2.0)]
DTYPES = (torch.float32, torch.bfloat16)
QUICK = [Case(s, d, *f) for s, d, f in product([(32, 10), (4, 300)], DTYPES, MAIN + OTHER)]
COMPILED = [Case(s, d, *f) for s, d, f in product([(4096, 8142), (256, 8142)], DTYPES, MAIN)]
COMPILED_FORMULAS = 2  # the reference, and the one that compiles to the fastest code

SLOTS, SMALL = 48, 2**20
TURNS = (20, 100)  # samples: at the least, at the most
SAMPLE_MS = {"cuda": 1.0, "cpu": 0.1}  # of a sample, unless one call takes longer
PAUSE = 500_000  # cycles: 0.3 ms
HOST_CALLS, HOST_NUMEL = 20, 2**22  # calls that fit the launch queue; logits small enough to ask
CASE_BYTES, EAGER_BYTES = 32, 48  # per element of the logits: what is kept, what eager needs more
CAPTURED_EAGER = 2**26  # elements: beyond, graphs would hoard eager's memory for nothing
UNCAPTURABLE = ("eager reference", "liger")  # they synchronise


def main(argv: list[str]) -> int:
    """The exit status: 1 where fused is wrong or fails."""
    arguments = parse(argv)
    device, start = torch.device(arguments.device), time.perf_counter()
    deadline = start + arguments.budget
    cases = QUICK if arguments.quick else all_cases()
    result = {**environment(device), "command": shlex.join(["python", "-m", "bench.gpu", *argv])}
    if device.type == "cuda" and arguments.workers:
        compile_all(cases, arguments.workers, arguments.budget * 0.35)
        result["compilation beforehand"] = f"{time.perf_counter() - start:.0f} s"
    rows, skipped = run_cases(cases, device, deadline)
    result |= {"seconds": round(time.perf_counter() - start, 1), "skipped": skipped, "rows": rows}
    text = report(result)
    print(text)
    path = arguments.json or default_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    outcomes = [row["contestants"]["fused"]["outcome"] for row in rows]
    wrong = sum(outcome is not None for outcome in outcomes)
    print(f"fused is wrong or fails in {wrong} of {len(rows)} rows", file=sys.stderr)
    return int(wrong > 0)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes")
    parser.add_argument("--budget", type=float, default=480, help="seconds, compilation included")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that fill the compilers' caches beforehand; 0: compile on the way",
    )
    parser.add_argument(
        "--json", type=Path, help="default: bench/results/GPU-DATE.json; .md beside"
    )
    return parser.parse_args(argv)


def default_path(result: Row) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"{slug}-{result['date']}.json"


def environment(device: torch.device) -> Row:
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else "none, a dry run",
        "driver": driver() if cuda else "none",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": getattr(optional("triton"), "__version__", "none"),
        "python": platform.python_version(),
        "cbloss_fused": cbloss_fused.__version__,
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def optional(module: str) -> Any:
    """A package that need not be there, nor work: its column stays empty."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError):
        return None


# The cases and the contestants --------------------------------------------------------------------


def all_cases() -> list[Case]:
    """Whatever the budget ends before should matter least."""
    groups = [(FIRST, MAIN), (THEN, MAIN), (LAST, MAIN), (FIRST + THEN + LAST, OTHER)]
    ordered = [product(shapes, families, DTYPES) for shapes, families in groups]
    return [Case(shape, dtype, *family) for shape, family, dtype in chain(*ordered)]


def problem(case: Case, device: torch.device) -> Problem:
    """As on the CPU, but large logits are drawn where they are used."""
    generator = torch.Generator(device).manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    n_c, rows = counts(case), torch.Size(case.shape[:1] + case.shape[2:])
    logits = torch.randn(case.shape, generator=generator, device=device).mul_(2).to(case.dtype)
    target = torch.multinomial(n_c, rows.numel(), replacement=True, generator=draws)
    weight = class_balanced_weights(n_c, BETA).to(device)
    return Problem(logits.requires_grad_(), target.reshape(rows).to(device), weight)


def copies(logits: Tensor) -> list[Tensor]:
    """The logits as often as the module's docstring says: the first is no copy."""
    count = 2
    if logits.is_cuda:
        cache = torch.cuda.get_device_properties(logits.device).L2_cache_size
        enough = min(math.ceil(2 * cache / logits.nbytes), SLOTS)
        count = enough if logits.nbytes >= SMALL else 4
    return [logits, *(logits.detach().clone().requires_grad_() for _ in range(count - 1))]


def contestants(case: Case, slots: int, device: torch.device) -> list[Contestant]:
    """Everyone who can compute the case; fused first."""
    options = {"activation": case.activation, "gamma": case.gamma, "ignore_index": None}
    fused = partial(class_balanced_loss, **options)
    eager = {"reference": partial(reference.loss, **options), **formulas(case)}
    field = [Contestant("fused", fused)]
    if (case.activation, case.gamma) == ("softmax", 0):
        field += cross_entropies(case, fused, device)
    focal = optional("torchvision.ops") if case.activation == "sigmoid" else None
    if focal is not None:
        by_focal = partial(torchvision_focal, focal.sigmoid_focal_loss, case.gamma)
        field.append(Contestant("torchvision", by_focal))
    field += [Contestant("eager", loss, name) for name, loss in eager.items()]
    for name, loss in list(eager.items())[:COMPILED_FORMULAS] if case in COMPILED else []:
        code = torch.compile(loss, fullgraph=True, dynamic=False)
        field.append(Contestant("compile", code, name))
    buffers = cycle([torch.empty(case.shape, dtype=case.dtype, device=device)] * 1)
    if slots > 1:
        buffers = cycle([torch.empty_like(next(buffers)) for _ in range(slots)])
    return [*field, Contestant("copy", lambda x, y, w: next(buffers).copy_(x))]


def cross_entropies(case: Case, fused: Any, device: torch.device) -> list[Contestant]:
    """Those who divide by the weights' sum; half types as they are, and in float32."""
    kind = "weighted_mean"
    field = [
        Contestant("weighted", partial(fused, reduction=kind), "", kind),
        Contestant(
            "cross_entropy", lambda x, y, w: F.cross_entropy(x.float(), y, w), "float32", kind
        ),
    ]
    if case.dtype != torch.float32:
        half = Contestant(
            "cross_entropy", lambda x, y, w: F.cross_entropy(x, y, w.to(x.dtype)), "as is", kind
        )
        field.append(half)
    liger = optional("liger_kernel.transformers.functional") if device.type == "cuda" else None
    if liger is not None and len(case.shape) == 2:
        loss = liger.liger_cross_entropy
        field.append(Contestant("liger", loss, "", kind, overwrites=True))
    return field


def torchvision_focal(focal: Any, gamma: float, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """alpha < 0: no weights of its own; float32, since its 1 - p_t cancels."""
    t = torch.zeros_like(x, dtype=torch.float32).scatter_(1, y.unsqueeze(1), 1.0)
    return (w[y] * focal(x.float(), t, alpha=-1, gamma=gamma, reduction="none").sum(1)).mean()


def lineup(case: Case, field: list[Contestant], title: str) -> list[Contestant]:
    """Who takes part in a pass. Compiled forwards alone would be compiled once more."""
    large = torch.Size(case.shape).numel() > CAPTURED_EAGER
    if title == FORWARD:
        return [c for c in field if c.column != "compile"]
    if title == GRAPH:
        barred = ("eager",) if large else ()
        return [c for c in field if c.name not in UNCAPTURABLE and c.column not in barred]
    return field


# Calling, checking, timing ------------------------------------------------------------------------
