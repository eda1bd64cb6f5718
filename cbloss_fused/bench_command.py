"""A short timing on this machine, fused against eager PyTorch: the command `bench`."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .backends import choose
from .count_files import InputError
from .functional import class_balanced_loss
from .plain import plain_formulas
from .self_test import ACTIVATIONS, Case, Problem, Result, difference, exact, relative_error

SECONDS = 1.5  # of timing for each activation, at least
ROUNDS = (5, 2000)  # of one call of each, at least and at most
CHECKED = 2**20  # logits whose loss and gradient are compared first
PLAIN = 1e-3  # relative error that plain formulas may have: they compute in float32, 1 - p cancels
DTYPES = {  # float64 is none: plain formulas compute in float32
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
COLUMNS = "{:24}{:>10}{:>10}{:>15}"

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and weight


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-N", "--rows", type=int, default=256, help="default %(default)s")
    parser.add_argument("-C", "--classes", type=int, default=1000, help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the logits (default %(default)s)"
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, help="default: both, in turn")
    parser.add_argument("--gamma", type=gamma, default=0.0, metavar="G", help=">= 0 (default 0)")
    parser.add_argument("--device", default="cpu", help="as PyTorch's (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: as it is)")
    parser.set_defaults(run=run_bench, parser=parser)


def gamma(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number >= 0")
    return value


def run_bench(options: argparse.Namespace) -> None:
    """Compare values, then times; a wrong value ends it with exit status 1."""
    options.parser.check_at_least_one(options, "rows", "classes", "threads")
    device, activations = device_of(options.device), ACTIVATIONS
    if options.activation is not None:
        activations = (options.activation,)
    shape, dtype = (options.rows, options.classes), DTYPES[options.dtype]
    with threads(options.threads):
        try:
            lines = []
            for activation in activations:
                case = Case(activation, options.gamma, dtype, False, shape)
                given = sample(case, device)
                check(case, given)
                fused, *eager = times(case, given)
                cells = f"{fused:.3f}", f"{min(eager):.3f}", f"{min(eager) / fused:.2f}"
                lines.append(COLUMNS.format(f"{activation}, gamma = {case.gamma:g}", *cells))
        except (RuntimeError, MemoryError) as error:  # too little memory, or no such type there
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{shape} in {options.dtype} on {device}: {told[0]}") from None
        backend = choose(device.type, None, soft=False)
        about = "no fused kernels: see doctor" if backend.name == "reference" else backend.about()
        used = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    print(f"{shape} {options.dtype} logits on {device}{used}; {about}")
    print(
        "Forward and backward, medians in ms; eager: the faster of two formulas in plain PyTorch."
    )
    print(COLUMNS.format("loss", "fused", "eager", "eager / fused"))
    print("\n".join(lines))


def device_of(text: str) -> torch.device:
    """A device that holds numbers."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except Exception as error:  # whatever PyTorch raises for one that it cannot use
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--device {text!r}: {told[0]}") from None
    return device


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many within; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def losses(case: Case) -> list[Loss]:
    """The fused one, then the plain formulas."""
    options: dict[str, Any] = {"activation": case.activation, "gamma": case.gamma}
    formulas = plain_formulas(case.activation, case.gamma)
    return [
        partial(class_balanced_loss, **options),
        *(partial(formula, gamma=case.gamma) for formula in formulas),
    ]


def sample(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    N, C = case.shape
    logits = torch.randn(N, C, device=device, generator=generator, dtype=torch.float32)
    target = torch.randint(C, (N,), device=device, generator=generator)
    weight = torch.rand(C, device=device, generator=generator) + 0.5
    return Problem(logits.to(case.dtype), target, weight, torch.ones(N, device=device))


def check(case: Case, given: Problem) -> None:
    """The first rows' loss and gradient against float64; exit status 1 for a wrong one."""
    some = slice(max(1, CHECKED // case.shape[1]))
    logits, target, weight, sample_weight = given
    given = Problem(logits[some], target[some], weight, sample_weight[some])
    want = exact(given.to("cpu"), case)
    for loss, name in zip(losses(case), ("fused", "eager", "eager"), strict=True):
        leaf = given.logits.clone().requires_grad_()
        value = loss(leaf, given.target, given.weight)
        (grad,) = torch.autograd.grad(value, leaf)
        got: Result = value.detach().cpu(), grad.cpu()
        slack = 1.0 if name == "fused" else PLAIN / relative_error(case.dtype)
        wrong = difference(got, want, case.dtype, slack)
        if wrong:
            raise SystemExit(f"{name} {case}: {wrong}; nothing was timed, see doctor")


def times(case: Case, given: Problem) -> list[float]:
    """Medians in ms of each loss's forward and backward, called in turns."""
    leaf = given.logits.requires_grad_()

    def step(loss: Loss) -> None:
        leaf.grad = None
        loss(leaf, given.target, given.weight).backward()

    return medians([partial(step, loss) for loss in losses(case)], leaf.device)


def medians(steps: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    for step in steps:
        step()
    found: list[list[float]] = [[] for _ in steps]
    least, most = ROUNDS
    end = time.perf_counter() + SECONDS
    while len(found[0]) < least or (len(found[0]) < most and time.perf_counter() < end):
        for step, durations in zip(steps, found, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            durations.append((time.perf_counter() - start) * 1e3)
    return list(map(median, found))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
