"""Whether the kernels work, within a minute: `python -m bench.gpu_smoke FOLDER [SECONDS]`.

A few calls, at least one for each kernel, on every backend of the GPU, are compared with the
reference in float64; then the backends without an error are timed, beside a copy. Each result is a
line of JSON in FOLDER/smoke.jsonl as soon as it is known: a hung or lost GPU does not take the
others along.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a script: the repository is not in the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cbloss_fused
from bench.cases import ALIGNED, UNALIGNED, SmokeCase, smoke_cases
from bench.losses import backends, reference_loss
from bench.measure import device_usable
from bench.result_files import append_line, start_lines
from cbloss_fused import class_balanced_loss
from cbloss_fused.backends import REGISTRY

HALF_SPACING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative to the value
SMALLEST = {torch.float16: 2**-24}  # its subnormal numbers are coarse
FUSED_ONLY = ("inplace", "recompute")  # options that the reference does not have
TIMED_FAMILIES = [("softmax", 0.0), ("sigmoid", 0.5), ("sigmoid", 0.0)]
TIMED_SHAPES = [(UNALIGNED, torch.bfloat16), (UNALIGNED, torch.float32), (ALIGNED, torch.bfloat16)]
TIMED_CALLS = 50
PAUSE_CYCLES = 80_000_000  # about 40 ms, in which the host queues TIMED_CALLS


class SmokeLog:
    """The lines of FOLDER/smoke.jsonl, printed too."""

    def __init__(self, folder: Path) -> None:
        self.path, self.start = start_lines(folder / "smoke.jsonl"), time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 2)

    def write(self, step: str, **facts: Any) -> None:
        entry = {"t": self.seconds(), "step": step, **facts}
        print(json.dumps(entry, default=str), flush=True)
        append_line(self.path, entry)


def main(argv: list[str]) -> int:
    """The exit status: 1 if anything is wrong or nothing was checked."""
    parser = argparse.ArgumentParser(prog="bench.gpu_smoke", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "seconds", type=float, nargs="?", default=60, help="for the checks; then 30 for timings"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu_smoke: no GPU here: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    return smoke(SmokeLog(arguments.folder), device, arguments.seconds)


def smoke(log: SmokeLog, device: torch.device, limit: float) -> int:
    log.write("start", **machine(device))
    names = backends(device)
    checked, wrong = check_all(log, device, names, limit)
    right = [name for name in names if name not in wrong]
    if device.type == "cuda" and right and device_usable(device):
        time_all(log, device, right, limit + 30)
    unchecked = len(names) * len(smoke_cases()) - checked
    log.write("end", checked=checked, unchecked=unchecked, wrong=len(wrong))
    return 1 if wrong or not checked else 0


def machine(device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "capability": torch.cuda.get_device_capability() if gpu else None,
        "missing": REGISTRY["cuda"].missing,
        "backends": cbloss_fused.backends(),
    }


def check_all(
    log: SmokeLog, device: torch.device, names: list[str], limit: float
) -> tuple[int, list[str]]:
    """How many calls were checked, and the backend of each wrong one."""
    checked, wrong = 0, list[str]()
    for case, name in product(smoke_cases(), names):
        if log.seconds() > limit:
            log.write("out of time")
            break
        try:
            facts = check(case, device, name)
        except Exception as error:
            facts = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        call = {**case._asdict(), "dtype": str(case.dtype)[6:], "backend": name}
        log.write("case", **facts, **call)
        checked, wrong = checked + 1, wrong + [name] * (not facts["ok"])
        if "error" in facts and not device_usable(device):
            log.write("the GPU's context is lost")
            break
    return checked, wrong


def check(case: SmokeCase, device: torch.device, name: str) -> dict[str, Any]:
    """Compare a call and its gradient with the reference."""
    x, y, w = draw(case, device)
    given = {key: w if value == "weight" else value for key, value in case.options.items()}
    plain = {key: value for key, value in given.items() if key not in FUSED_ONLY}
    exact = x.double().clone().requires_grad_()
    expected = reference_loss(exact, y, w.double(), **plain)
    expected.sum().backward()
    leaf, start = x.clone().requires_grad_(), time.perf_counter()
    logits = leaf * 1 if case.options.get("inplace") else leaf
    options: dict[str, Any] = {"backend": name or None, **given}
    loss = class_balanced_loss(logits, y, w, **options)
    loss.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    grad = leaf.grad.double()
    if not grad.isfinite().all():  # this waits for the GPU
        return {"ok": False, "error": "the gradient is not finite"}
    seconds = time.perf_counter() - start
    tolerance = 1e-11 if case.dtype == torch.float64 else 2e-5
    loss_errors = (loss.double() - expected).abs() / expected.abs().clamp(min=1e-30)
    loss_error = loss_errors.max().item()
    grad_error = gradient_error(grad, exact.grad, case.dtype)
    return {
        "ok": loss_error <= tolerance and grad_error <= tolerance,
        "loss_error": loss_error,
        "gradient_error": grad_error,
        "first_call_s": round(seconds, 3),
    }


def gradient_error(grad: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest error beyond the dtype's rounding, relative to the row's largest gradient."""
    size = expected.abs()
    rounding = HALF_SPACING.get(dtype, 0) * size + SMALLEST.get(dtype, 1e-37)
    error = ((grad - expected).abs() - rounding) / (size.amax(1, keepdim=True) + 1e-300)
    return error.nan_to_num(nan=torch.inf).max().item()


def draw(case: SmokeCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target, weight."""
    classes, rows = case.shape[1], case.shape[:1] + case.shape[2:]
    x = (torch.randn(case.shape, device=device) * 3).to(case.dtype)
    w = torch.rand(classes, device=device) + 0.5
    if case.target == "soft":
        return x, (torch.rand(case.shape, device=device) / classes).to(case.dtype), w
    if case.target == "multi-hot":
        return x, torch.rand(case.shape, device=device) < 0.01, w
    if case.target == "partial":
        t = (torch.rand(case.shape, device=device) < 0.01).float()
        t[torch.rand(case.shape, device=device) < 0.3] = case.options["ignore_index"]
        return x, t, w
    y = torch.randint(classes, rows, device=device)
    if case.target == "background":
        y.view(-1)[::2] = case.options["background_index"]
    y.view(-1)[1] = -100
    return x, y, w


# Timings ------------------------------------------------------------------------------------------


def time_all(log: SmokeLog, device: torch.device, names: list[str], limit: float) -> None:
    """Softmax and sigmoid, forward + backward, beside a copy of the logits."""
    for shape, dtype in TIMED_SHAPES:
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        y = torch.randint(shape[1], shape[:1], device=device)
        other = torch.empty_like(x, requires_grad=False)
        copy = milliseconds(lambda other=other, x=x: other.copy_(x.detach()))  # type: ignore[misc]
        rate = {"copy_ms": round(copy, 4), "copy_TBps": round(2 * x.nbytes / copy / 1e9, 2)}
        facts = {"shape": shape, "dtype": str(dtype)[6:], **rate}
        for (activation, gamma), name in product(TIMED_FAMILIES, names):
            if log.seconds() > limit:
                return log.write("out of time")
            facts |= {"loss": f"{activation} {gamma:g}", "backend": name}
            options = {"activation": activation, "gamma": gamma, "ignore_index": None}
            try:
                ms = milliseconds(step(x, y, backend=name or None, **options))
            except Exception as error:
                return log.write("time", error=f"{type(error).__name__}: {error}"[:400], **facts)
            share = {"ms": round(ms, 4), "percent_of_copy": round(100 * copy / ms)}
            log.write("time", **share, **facts)


def step(x: Tensor, y: Tensor, **options: Any) -> Callable[[], None]:
    def call() -> None:
        x.grad = None
        class_balanced_loss(x, y, **options).backward()

    return call


def milliseconds(call: Callable[[], Any]) -> float:
    """The GPU's time of a call. The calls are queued behind a pause."""
    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE_CYCLES)
    begin.record()
    for _ in range(TIMED_CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / TIMED_CALLS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
