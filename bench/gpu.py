"""Time the fused losses on one NVIDIA GPU beside everyone else: `python -m bench.gpu`.

Logits smaller than twice the L2 cache come in enough copies (at most SLOTS) that a round through
them exceeds it, each with a gradient that lives until its next turn: calls follow each other as in
training, and yet find nothing cached. A flush before each would hide launches behind its own time.
Below SMALL bytes a few copies do: a call on them is all launches. A sample is a pair of events
around many calls, queued behind a pause, so that the GPU does not wait for the first of them. A
graph holds one call on every copy. torch.compile takes seconds a formula: see COMPILED, and no
forward alone. `--device cpu --quick` is a dry run, without events, graphs and memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cbloss_fused
from cbloss_fused import class_balanced_loss, class_balanced_weights, reference

from .cases import BETA, Case, Contestant, Problem, counts, formulas

Row = dict[str, Any]
FORWARD, TRAIN, GRAPH = "forward only", "forward + backward", "forward + backward, CUDA graph"
ODD, EVEN = (4096, 8142), (4096, 8192)  # rows that are not 16-byte aligned, and rows that are
FIRST = [ODD, EVEN, (16384, 8142)]
THEN = [(32, 10), (32, 1000), (256, 8142), (1024, 8142), (8, 131072), (4096, 32768)]
LAST = [(4096, 131072), (64, 1048576), (1_000_000, 10), (8, 19, 512, 512)]
MAIN = [("softmax", 0.0), ("sigmoid", 0.5)]
OTHER = [("softmax", 0.5), ("sigmoid", 0.0), ("softmax", 2.0), ("sigmoid", 2.0)]
DTYPES = (torch.float32, torch.bfloat16)
QUICK = [Case(s, d, *f) for s, d, f in product([(32, 10), (4, 300)], DTYPES, MAIN + OTHER)]
COMPILED = [Case(s, d, *f) for s, d, f in product([ODD, (256, 8142)], DTYPES, MAIN)]
FORMULAS = 2  # to compile: the reference, and what compiles to the fastest code
SLOTS, SMALL = 48, 2**20
TURNS = (20, 100)  # samples of everyone in a row: at the least, at the most
SAMPLE_MS = {"cuda": 1.0, "cpu": 0.1}  # of a sample, where a round is not longer
ROW_SECONDS = 0.1  # for more than the fewest turns
PAUSE = 500_000  # cycles: 0.3 ms
HOST_CALLS, HOST_NUMEL = 20, 2**22  # calls that the launch queue holds, logits that it outruns
CASE_BYTES, EAGER_BYTES = 32, 48  # per element: all that a case keeps, what eager adds
HOARDED = 2**26  # elements: a graph of eager would keep too much memory beyond
SYNCHRONISE = ("eager reference", "liger")  # so no graph holds them
RIVALS = dict.fromkeys(
    ("eager", "compile", "torchvision"), "fused"
)  # and whom they are compared to
RIVALS |= dict.fromkeys(("cross_entropy", "liger"), "weighted")


def main(argv: list[str]) -> int:
    """The exit status: 1 where fused is wrong or fails."""
    arguments = parse(argv)
    device, start = torch.device(arguments.device), time.perf_counter()
    cases = QUICK if arguments.quick else all_cases()
    result = {"command": shlex.join(["python", "-m", "bench.gpu", *argv]), **environment(device)}
    if device.type == "cuda" and arguments.workers:
        compile_all(cases, arguments.workers, arguments.budget / 3)
        result["compiled beforehand in"] = f"{time.perf_counter() - start:.0f} s"
    rows, skipped = measure_cases(cases, device, start + arguments.budget)
    result |= {"seconds": round(time.perf_counter() - start, 1), "skipped": skipped, "rows": rows}
    text = report(result)
    print(text)
    path = arguments.json or default_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    wrong = [row for row in rows if row["contestants"]["fused"]["outcome"] is not None]
    print(f"fused is wrong or fails in {len(wrong)} of {len(rows)} rows", file=sys.stderr)
    return 1 if wrong or not rows else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes")
    parser.add_argument("--budget", type=float, default=480, help="seconds, compilation included")
    parser.add_argument("--workers", type=int, default=8, help="compile before; 0: on the way")
    parser.add_argument("--json", type=Path, help="default: bench/results/GPU-DATE.json; .md too")
    return parser.parse_args(argv)


def default_path(result: Row) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"{slug}-{result['date']}.json"


def environment(device: torch.device) -> Row:
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else "none (dry run)",
        "driver": driver() if cuda else "none",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": getattr(optional("triton"), "__version__", "none"),
        "python": platform.python_version(),
        "cbloss_fused": cbloss_fused.__version__,
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip()
    return "unknown"


def optional(module: str) -> Any:
    """A package that need not be there, nor work: its column stays empty."""
    with suppress(ImportError, RuntimeError):
        return importlib.import_module(module)
    return None


# The cases and the contestants --------------------------------------------------------------------


def all_cases() -> list[Case]:
    """What matters most first: the budget may end before the rest."""
    groups = [(FIRST, MAIN), (THEN, MAIN), (LAST, MAIN), (FIRST + THEN + LAST, OTHER)]
    ordered = chain(*(product(shapes, families, DTYPES) for shapes, families in groups))
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


def contestants(case: Case, ring: list[Tensor]) -> list[Contestant]:
    """Everyone who can compute the case, fused first; the copy in turns, as the logits are."""
    options: Row = {"activation": case.activation, "gamma": case.gamma, "ignore_index": None}
    fused = partial(class_balanced_loss, **options)
    eager = {"reference": partial(reference.loss, **options), **formulas(case)}
    field = [Contestant("fused", fused)]
    if (case.activation, case.gamma) == ("softmax", 0):
        field += cross_entropies(case, fused, ring[0].is_cuda)
    focal = optional("torchvision.ops") if case.activation == "sigmoid" else None
    if focal is not None:
        loss = partial(torchvision_focal, focal.sigmoid_focal_loss, case.gamma)
        field.append(Contestant("torchvision", loss))
    field += [Contestant("eager", loss, name) for name, loss in eager.items()]
    for name, formula in list(eager.items())[: FORMULAS if case in COMPILED else 0]:
        field.append(
            Contestant("compile", torch.compile(formula, fullgraph=True, dynamic=False), name)
        )
    buffers = cycle([torch.empty_like(x, requires_grad=False) for x in ring])
    return [*field, Contestant("copy", lambda x, y, w: next(buffers).copy_(x))]


def cross_entropies(case: Case, fused: Any, cuda: bool) -> list[Contestant]:
    """Those who divide by the weights' sum; F.cross_entropy on half types also as they are."""
    field: Row = {"weighted": partial(fused, reduction="weighted_mean")}
    field["cross_entropy"] = lambda x, y, w: F.cross_entropy(x.float(), y, w)
    if case.dtype != torch.float32:
        field["cross_entropy as is"] = lambda x, y, w: F.cross_entropy(x, y, w.to(x.dtype))
    liger = optional("liger_kernel.transformers.functional") if cuda else None
    if liger is not None and len(case.shape) == 2:
        field["liger"] = liger.liger_cross_entropy
    return [
        Contestant(*f"{name} ".split(" ", 1)[:1], loss, name.partition(" ")[2], "weighted_mean")
        for name, loss in field.items()
    ]


def torchvision_focal(focal: Any, gamma: float, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """alpha < 0: no weights of its own; float32, since its 1 - p_t cancels."""
    t = torch.zeros_like(x, dtype=torch.float32).scatter_(1, y.unsqueeze(1), 1.0)
    return (w[y] * focal(x.float(), t, alpha=-1, gamma=gamma, reduction="none").sum(1)).mean()


def lineup(case: Case, field: list[Contestant], title: str) -> list[Contestant]:
    """Who takes part in a pass."""
    if title == FORWARD:
        return [c for c in field if c.column != "compile"]
    if title == GRAPH:
        hoarders = ("eager",) if torch.Size(case.shape).numel() > HOARDED else ()
        return [c for c in field if c.name not in SYNCHRONISE and c.column not in hoarders]
    return field
