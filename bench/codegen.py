"""What the GPU kernels compile to, counted without a GPU: `python -m bench.codegen`.

The kernels of a call are recorded instead of launched, compiled ahead of time and disassembled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from cbloss_fused import kernels, ops
from cbloss_fused.call import formula

from . import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES = DTYPES | {torch.float64: "fp64", torch.int64: "i64"}
TYPES = {"tl.int32": "i32", "tl.int64": "i64", "tl.float64": "fp64"}
CLASSES = (1000, 8142, 8192, 32768, 131072)
FAMILIES = [("softmax", 0.0), *(("sigmoid", gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 1.5))]
SMS, CLOCK = {"H100": 132, "H200": 132}, 1.7e9  # multiprocessors; Hz, sustained
ISSUE, SPECIAL = 128, 16  # a clock and multiprocessor


class Launch(NamedTuple):
    """A recorded launch: what a kernel is compiled from."""

    kernel: Any
    grid: tuple[int, ...]
    types: tuple[str | None, ...]  # of the pointers
    constants: tuple[Any, ...]
    warps: int
    registers: int | None = None  # at most so many a thread

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def constant(self, name: str) -> Any:
        return self.constants[self.kernel.arg_names.index(name) - len(self.kernel.arg_names)]

    def elements(self, warp: int = 32) -> float:
        """Of a tile, a thread."""
        names = self.kernel.arg_names
        first, second = ("ROWS", "BLOCK_C") if "ROWS" in names else ("V", "VEC")
        return self.constant(first) * self.constant(second) / (self.warps * warp)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches are written down and not done."""
    launcher, launches = kernels.load(), []
    original = launcher.run

    def record(plan: Any, tensors: tuple[Tensor | None, ...], like: Tensor) -> None:
        for step in plan.steps:
            types = [None if p is None else f"*{NAMES[p.dtype]}" for p in step.pick(tensors)]
            launches.append(
                Launch(
                    step.kernel, step.grid, tuple(types), step.constants, step.warps, step.registers
                )
            )

    launcher.run = record
    try:
        yield launches
    finally:
        launcher.run = original


def launches(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, gamma: float, *,
    grad: bool = True, weight: bool = True, recompute: bool = False, bias: bool = False,
    dense: bool = False, **options: Any,
) -> list[Launch]:  # fmt: skip
    """Of one forward, or of a recomputing backward, with every row's options in use."""
    logits = torch.empty(shape, dtype=dtype, device="meta")
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device="meta")
    if dense:
        target = torch.empty_like(logits)
    loss = ops.new_loss(logits, target, 1)
    w = loss.new_empty(shape[1]) if weight else None
    numbers = formula(activation, gamma, **options)
    adjusting = (loss.new_empty(shape[1]),) * 2 if bias else (None, None)
    gradient: Tensor | None = torch.empty_like(logits) if grad else None
    with recorded() as found:
        if recompute:
            saved = ops.new_saved(logits, numbers.sigmoid)
            kernels.load().gradient(
                logits, target, None, *adjusting, saved, loss, numbers, gradient
            )
        else:
            kernels.load().loss(
                logits, target, w, None, None, *adjusting, numbers, -100, 1, loss, gradient, None
            )
    return found


@cache
def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel of a launch, compiled for a GPU that need not be there."""
    signature: dict[str, str | None] = {}
    constants: dict[str, Any] = {}
    position = len(launch.kernel.arg_names) - len(launch.constants)
    for i, name in enumerate(launch.kernel.arg_names):
        annotation = launch.kernel.params[i].annotation
        if i >= position:
            signature[name], constants[name] = "constexpr", launch.constants[i - position]
        elif i >= len(launch.types):
            signature[name] = annotation
        elif launch.types[i] is None:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = launch.types[i]
    source = triton.compiler.ASTSource(launch.kernel, signature, constants)
    warps = launch.warps * 32 // target.warp_size or 1
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if launch.registers and target.backend == "cuda":
        options["maxnreg"] = launch.registers
    return triton.compile(source, target=target, options=options)


def row_kernel(found: list[Launch]) -> list[Launch]:
    """Those that see the logits: neither prologue nor epilogue."""
    return [launch for launch in found if launch.name not in ("prologue", "epilogue")]


class Line(NamedTuple):
    """A row of the table."""

    kernel: str
    C: int
    dtype: str
    target: str
    registers: int
    shared: int
    instructions: float  # an element: a whole tile's, or a loop's
    special: float
    outside: int  # instructions once a row, where there is a loop
    loads: int
    stores: int

    def floors(self, bandwidth: float) -> tuple[float, float, float]:
        """Nanoseconds a million elements: memory, issue, special functions."""
        itemsize = 4 if self.dtype == "fp32" else 2
        rate = SMS["H100"] * CLOCK
        return (
            2e6 * itemsize / bandwidth * 1e9,
            1e6 * self.instructions / (rate * ISSUE) * 1e9,
            1e6 * self.special / (rate * SPECIAL) * 1e9,
        )


def line(launch: Launch, C: int, dtype: torch.dtype, target: str, label: str) -> Line:
    code = sass.read(compiled(launch, TARGETS[target]))
    n = launch.elements()
    big = [loop for loop in code.loops if loop.loads or loop.stores]
    parts = big or [code.straight]
    return Line(
        label, C, DTYPES[dtype], target, code.registers, code.shared,
        sum(part.all for part in parts) / n, sum(part.special for part in parts) / n,
        code.straight.all if big else 0,
        sum(part.loads for part in parts), sum(part.stores for part in parts),
    )  # fmt: skip


def table(target: str, classes: tuple[int, ...]) -> Iterator[Line]:
    for activation, gamma in FAMILIES:
        for dtype in (torch.bfloat16, torch.float32):
            for C in classes:
                for launch in row_kernel(launches((4096, C), dtype, activation, gamma)):
                    label = launch.name + (f" g={gamma:g}" if activation == "sigmoid" else "")
                    yield line(launch, C, dtype, target, label)


def liger(C: int, dtype: torch.dtype) -> Launch | None:
    """Liger-Kernel's cross-entropy as it is launched for (N, C) with class weights."""
    try:
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel as kernel
    except ImportError:
        return None
    values = {
        "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean",
        "RETURN_Z_LOSS": 0, "RETURN_TOKEN_ACCURACY": 0, "RETURN_PREDICTED_TOKENS": 0,
        "BLOCK_SIZE": min(32768, triton.next_power_of_2(C)), "HAS_WEIGHT": True,
        "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True,
    }  # fmt: skip
    return Launch(kernel, (4096,), (), tuple(values.items()), 32)


def liger_line(C: int, dtype: torch.dtype, target: str) -> Line | None:
    launch = liger(C, dtype)
    if launch is None:
        return None
    values = dict(launch.constants)
    signature: dict[str, str | None] = {}
    divisible: dict[tuple[int], Any] = {}
    types: dict[str, str | None] = {
        "X_ptr": f"*{DTYPES[dtype]}",
        "Y_ptr": "*i64",
        "weight_ptr": "*fp32",
    }
    types |= {"loss_ptr": "*fp32", "softcap": None, "n_non_ignore": "i64"}
    types |= {"sum_non_ignore_weight": "fp32", "weight_sum": "fp32"}
    for i, param in enumerate(launch.kernel.params):
        name = param.name
        if name in values:
            signature[name] = "constexpr"
        elif name in types and types[name] is not None:
            signature[name] = types[name]
        elif name.endswith("_ptr") or name == "softcap":
            signature[name], values[name] = "constexpr", None
        else:
            signature[name] = "i32"
        aligned = name in ("X_ptr", "Y_ptr", "weight_ptr", "loss_ptr")
        if aligned or (name in ("X_stride", "n_cols") and C % 16 == 0):
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(launch.kernel, signature, values, divisible)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=TARGETS[target], options=options)
    code = sass.read(kernel)
    n = values["BLOCK_SIZE"] / (launch.warps * 32)
    parts = [part for part in code.loops if part.special or part.stores or part.stores_small]
    return Line(
        "Liger cross_entropy", C, DTYPES[dtype], target, code.registers, code.shared,
        sum(part.all for part in parts) / n, sum(part.special for part in parts) / n,
        code.straight.all, sum(p.loads for p in parts), sum(p.stores for p in parts),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=[t for t in TARGETS if t != "gfx942"], default="sm_90")
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES)
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes/s of a copy")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lines = list(table(arguments.target, tuple(arguments.classes)))
    for dtype in (torch.bfloat16, torch.float32):
        rival = [liger_line(C, dtype, arguments.target) for C in (8142, 8192)]
        lines += [each for each in rival if each is not None]
    if arguments.json:
        print(json.dumps([each._asdict() for each in lines], indent=1))
        return
    print(markdown(lines, arguments.bandwidth))


def markdown(lines: list[Line], bandwidth: float) -> str:
    """The table; every floor in ns a million elements at 132 multiprocessors of 1.7 GHz."""
    title = (
        f"# Machine code of the Triton kernels\n\n`python -m bench.codegen`, triton "
        f"{triton.__version__}; floors at {SMS['H100']} multiprocessors of {CLOCK / 1e9} GHz and "
        f"{bandwidth / 1e12} TB/s. Counted, not timed.\n"
    )
    heads = (
        "kernel", "C", "dtype", "target", "regs", "shared B", "instr/el", "MUFU/el",
        "instr a row beside", "16 B loads, stores", "memory ns/M", "issue ns/M", "MUFU ns/M",
    )  # fmt: skip
    rows = [title, "| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for x in lines:
        floors = " | ".join(f"{floor:.0f}" for floor in x.floors(bandwidth))
        rows.append(
            f"| {x.kernel} | {x.C} | {x.dtype} | {x.target} | {x.registers} | {x.shared} | "
            f"{x.instructions:.1f} | {x.special:.2f} | {x.outside or '-'} | "
            f"{x.loads}, {x.stores} | {floors} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
