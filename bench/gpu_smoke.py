"""Works or not, within a minute: `python -m bench.gpu_smoke FOLDER [SECONDS]`.

A few calls that take a kernel each, on every backend of the GPU, held to the float64 reference;
then the first timings, beside a copy, of the backends that were never wrong. Each is a JSON line in
FOLDER/smoke.jsonl as soon as it is known: a hung or lost GPU does not take the others along.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not __package__:  # run by its path: the package is beside bench/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cbloss_fused
from bench import lines
from bench.gpu import usable
from bench.gpu_cases import backends
from bench.gpu_table import EVEN, ODD
from cbloss_fused import class_balanced_loss, cuda, reference

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a value: half a spacing
SMALLEST = {torch.float16: 2**-24}  # its subnormal numbers are coarse
FUSED_ONLY = ("inplace", "recompute")  # options that the reference does not have
TIMED = [("softmax", 0.0), ("sigmoid", 0.5), ("sigmoid", 0.0)]
TIMED_SHAPES = [(ODD, torch.bfloat16), (ODD, torch.float32), (EVEN, torch.bfloat16)]
CALLS = 50  # of a timing


class Case(NamedTuple):
    """A call. target: "index"; "soft", of the logits' dtype; "multi-hot", of bool."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any]
    target: str = "index"


def cases() -> list[Case]:
    """A kernel each, what tells most first."""
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    sigmoid = {"activation": "sigmoid"}
    return [
        Case((64, 8142), bf16, {}),
        Case((64, 8142), bf16, {**sigmoid, "gamma": 0.5}),
        Case((64, 8142), f32, sigmoid),
        Case((64, 1000), f32, {"gamma": 2.0}),
        Case((64, 1000), f16, {"recompute": True}),
        Case((300, 10), f32, {"gamma": 0.5}),
        Case((300, 10), bf16, {**sigmoid, "gamma": 1.0}),
        Case((300, 100), f32, {}),
        Case((300, 100), bf16, {**sigmoid, "gamma": 2.0}),
        Case((4, 131072), f32, {}),
        Case((4, 131072), bf16, {**sigmoid, "gamma": 2.0}),
        Case((600, 20000), bf16, {}),
        Case((64, 8142), bf16, {}, "soft"),
        Case((64, 8142), f32, sigmoid, "soft"),
        Case((64, 8142), f32, sigmoid, "multi-hot"),  # the same shape: another compiled kernel
        Case((2, 19, 40, 33), f32, {}),
        Case((2, 300, 5), bf16, sigmoid),
        Case((65, 12001), f32, {"label_smoothing": 0.1, "z_loss": 1e-3}),
        Case((65, 3001), f64, {"gamma": 0.5}),
        Case((65, 3001), f32, {**sigmoid, "gamma": 1.0, "gamma_neg": 4.0, "clip": 0.05}),
        Case((65, 3001), bf16, {"reduction": "none"}),
        Case((65, 3001), f32, {**sigmoid, "reduction": "weighted_mean", "logit_scale": 2.0}),
        Case((65, 8143), f32, {"inplace": True}),
        Case((65, 301), bf16, {**sigmoid, "inplace": True}),
        Case((9, 50001), f32, {"recompute": True, "gamma": 0.5}),
        Case((65, 301), f32, {**sigmoid, "class_weighting": "class"}),
    ]


class Journal:
    """The lines of FOLDER/smoke.jsonl, printed too."""

    def __init__(self, folder: Path) -> None:
        self.path, self.start = lines.start(folder / "smoke.jsonl"), time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 2)

    def write(self, step: str, **facts: Any) -> None:
        entry = {"t": self.seconds(), "step": step, **facts}
        print(json.dumps(entry, default=str), flush=True)
        lines.append(self.path, entry)


def main(argv: list[str]) -> int:
    """The exit status: 1 where anything is wrong or nothing was checked."""
    parser = argparse.ArgumentParser(prog="bench.gpu_smoke")
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float, nargs="?", default=60)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu_smoke: no GPU here: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    return smoke(Journal(arguments.folder), device, arguments.seconds)


def smoke(journal: Journal, device: torch.device, limit: float) -> int:
    journal.write("start", **machine(device))
    names = backends(device)
    checked, wrong = check_all(journal, device, names, limit)
    right = [name for name in names if name not in wrong]
    if device.type == "cuda" and right and usable(device):
        time_all(journal, device, right, limit + 30)
    asked = len(names) * len(cases())
    journal.write("end", checked=checked, unchecked=asked - checked, wrong=len(wrong))
    return 1 if wrong or not checked else 0


def machine(device: torch.device) -> dict[str, Any]:
    there = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if there else "none",
        "capability": torch.cuda.get_device_capability() if there else None,
        "missing": cuda.missing,
        "backends": cbloss_fused.backends(),
    }


def check_all(
    journal: Journal, device: torch.device, names: list[str], limit: float
) -> tuple[int, list[str]]:
    """How many cases were checked, and the backend of each that was wrong."""
    checked, wrong = 0, list[str]()
    for case, name in product(cases(), names):
        if journal.seconds() > limit:
            journal.write("out of time")
            break
        try:
            facts = check(case, device, name)
        except Exception as error:
            facts = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        told = {**case._asdict(), "dtype": str(case.dtype)[6:], "backend": name}
        journal.write("case", **facts, **told)
        checked, wrong = checked + 1, wrong + [name] * (not facts["ok"])
        if "error" in facts and not usable(device):
            journal.write("the GPU's context is lost")
            break
    return checked, wrong


def check(case: Case, device: torch.device, name: str) -> dict[str, Any]:
    """One call and its gradient, held to the reference."""
    x, y, w = draw(case, device)
    plain = {key: value for key, value in case.options.items() if key not in FUSED_ONLY}
    exact = x.double().clone().requires_grad_()
    want = reference.loss(exact, y, w.double(), **plain)
    want.sum().backward()
    leaf, start = x.clone().requires_grad_(), time.perf_counter()
    logits = leaf * 1 if case.options.get("inplace") else leaf
    loss = class_balanced_loss(logits, y, w, backend=name or None, **case.options)
    loss.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    grad = leaf.grad.double()
    if not grad.isfinite().all():  # the GPU is waited for
        return {"ok": False, "error": "the gradient is not finite"}
    seconds = time.perf_counter() - start
    tolerance = 1e-11 if case.dtype == torch.float64 else 2e-5
    of_loss = ((loss.double() - want).abs() / want.abs().clamp(min=1e-30)).max().item()
    of_grad = gradient_error(grad, exact.grad, case.dtype)
    return {
        "ok": of_loss <= tolerance and of_grad <= tolerance,
        "loss_error": of_loss,
        "gradient_error": of_grad,
        "first_call_s": round(seconds, 3),
    }


def gradient_error(grad: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The largest by the largest of its row, less what the dtype's rounding may take."""
    rounding = HALF.get(dtype, 0) * want.abs() + SMALLEST.get(dtype, 1e-37)
    error = ((grad - want).abs() - rounding) / (want.abs().amax(1, keepdim=True) + 1e-300)
    return error.nan_to_num(nan=torch.inf).max().item()


def draw(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target, weight."""
    classes, rows = case.shape[1], case.shape[:1] + case.shape[2:]
    x = (torch.randn(case.shape, device=device) * 3).to(case.dtype)
    w = torch.rand(classes, device=device) + 0.5
    if case.target == "soft":
        return x, (torch.rand(case.shape, device=device) / classes).to(case.dtype), w
    if case.target == "multi-hot":
        return x, torch.rand(case.shape, device=device) < 0.01, w
    y = torch.randint(classes, rows, device=device)
    y.view(-1)[1] = -100
    return x, y, w


# Timings ------------------------------------------------------------------------------------------


def time_all(journal: Journal, device: torch.device, names: list[str], limit: float) -> None:
    """Softmax and sigmoid, forward + backward, beside a copy of the logits."""
    for shape, dtype in TIMED_SHAPES:
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        y = torch.randint(shape[1], shape[:1], device=device)
        other = torch.empty_like(x, requires_grad=False)
        copy = milliseconds(lambda other=other, x=x: other.copy_(x.detach()))  # type: ignore[misc]
        rate = {"copy_ms": round(copy, 4), "copy_TBps": round(2 * x.nbytes / copy / 1e9, 2)}
        told = {"shape": shape, "dtype": str(dtype)[6:], **rate}
        for (activation, gamma), name in product(TIMED, names):
            if journal.seconds() > limit:
                return journal.write("out of time")
            told |= {"loss": f"{activation} {gamma:g}", "backend": name}
            options = {"activation": activation, "gamma": gamma, "ignore_index": None}
            try:
                ms = milliseconds(step(x, y, backend=name or None, **options))
            except Exception as error:
                return journal.write("time", error=f"{type(error).__name__}: {error}"[:400], **told)
            share = {"ms": round(ms, 4), "percent_of_copy": round(100 * copy / ms)}
            journal.write("time", **share, **told)


def step(x: Tensor, y: Tensor, **options: Any) -> Callable[[], None]:
    def call() -> None:
        x.grad = None
        class_balanced_loss(x, y, **options).backward()

    return call


def milliseconds(call: Callable[[], Any]) -> float:
    """Of a call, the GPU's: the calls are queued behind a pause."""
    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
