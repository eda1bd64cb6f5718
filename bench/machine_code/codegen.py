"""What the Triton kernels compile to: `python -m bench.machine_code.codegen`. Needs no GPU.

The launches of a call are recorded instead of executed; their kernels are compiled ahead of time,
disassembled and counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from cbloss_fused import triton as kernels
from cbloss_fused.buffers import new_loss, new_saved
from cbloss_fused.inputs import Inputs
from cbloss_fused.options import Activation, Formula, Options

from ..report import markdown_table
from . import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
POINTER_TYPES = DTYPES | {torch.float64: "fp64", torch.int64: "i64"}
CLASSES = (1000, 8142, 8192, 32768, 131072)
LIGER_CLASSES = (8142, 8192)
FAMILIES = [("softmax", 0.0), *(("sigmoid", gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 1.5))]
H100_SMS, CLOCK = 132, 1.7e9  # multiprocessors; Hz, sustained
ISSUE, SPECIAL = 128, 16  # lanes per clock and multiprocessor: all instructions; MUFU


class Launch(NamedTuple):
    """A recorded launch: what a kernel is compiled from."""

    kernel: Any
    grid: tuple[int, ...]
    types: tuple[str | None, ...]  # of the pointers
    constants: tuple[Any, ...]
    warps: int
    registers: int | None = None  # limit per thread

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def constant(self, name: str) -> Any:
        return self.constants[self.kernel.arg_names.index(name) - len(self.kernel.arg_names)]

    def elements(self, warp: int = 32) -> float:
        """Elements of a tile that one thread holds."""
        names = self.kernel.arg_names
        first, second = ("ROWS", "BLOCK_C") if "ROWS" in names else ("V", "VEC")
        return self.constant(first) * self.constant(second) / (self.warps * warp)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A context in which launches are recorded and not executed."""
    launcher, found = kernels.load(), list[Launch]()
    original = launcher.run

    def record(plan: Any, tensors: tuple[Tensor | None, ...], like: Tensor) -> None:
        for each in plan.launches:
            types = tuple(
                None if p is None else f"*{POINTER_TYPES[p.dtype]}" for p in each.pick(tensors)
            )
            found.append(
                Launch(each.kernel, each.grid, types, each.constants, each.warps, each.registers)
            )

    launcher.run = record
    try:
        yield found
    finally:
        launcher.run = original


def launches(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, gamma: float, *,
    grad: bool = True, weight: bool = True, recompute: bool = False, bias: bool = False,
    soft: bool = False, positive: bool = False, **options: Any,
) -> list[Launch]:  # fmt: skip
    """The launches of a forward, or of a backward that recomputes the gradient.

    `bias` adds logit_bias and margin, `soft` targets in the logits' shape, `positive` pos_weight.
    """
    logits = torch.empty(shape, dtype=dtype, device="meta")
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device="meta")
    if soft:
        target = torch.empty_like(logits)
    loss = new_loss(logits, target, 1)
    w = loss.new_empty(shape[1]) if weight else None
    formula = Formula.of(Options(cast(Activation, activation), gamma, **options))
    vector = loss.new_empty(shape[1]) if bias else None
    pos_weight = loss.new_empty(shape[1]) if positive else None
    inputs = Inputs(target, w, logit_bias=vector, margin=vector, pos_weight=pos_weight)
    gradient: Tensor | None = torch.empty_like(logits) if grad else None
    marks = -100, options.get("background_index")
    with recorded() as found:
        if recompute:
            saved = new_saved(logits, formula.sigmoid)
            given = inputs._replace(weight=None).of_gradient()
            kernels.load().gradient(logits, *given, saved, loss, formula, *marks, gradient)
        else:
            kernels.load().loss(logits, *inputs, formula, *marks, 1, loss, gradient, None)
    return found


@cache
def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel of a launch, compiled ahead of time."""
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
    """The launches that read the logits: neither prologue nor epilogue."""
    return [launch for launch in found if launch.name not in ("prologue", "epilogue")]


class Line(NamedTuple):
    """A row of the table."""

    kernel: str
    C: int
    dtype: str
    target: str
    registers: int
    shared: int
    instructions: float  # per element, of a whole tile or of the loops
    special: float  # per element
    outside: int  # instructions outside the loops, once per row; 0 without a loop
    loads: int
    stores: int

    def floors(self, bandwidth: float) -> tuple[float, float, float]:
        """Least nanoseconds per million elements: memory, all instructions, special functions."""
        itemsize = 4 if self.dtype == "fp32" else 2
        rate = H100_SMS * CLOCK
        return (
            2e6 * itemsize / bandwidth * 1e9,
            1e6 * self.instructions / (rate * ISSUE) * 1e9,
            1e6 * self.special / (rate * SPECIAL) * 1e9,
        )


def line(launch: Launch, C: int, dtype: torch.dtype, target: str, label: str) -> Line:
    code = sass.read(compiled(launch, TARGETS[target]))
    loops = [loop for loop in code.loops if loop.loads or loop.stores]
    outside = code.straight.all if loops else 0
    parts = loops or [code.straight]
    return counted(label, C, dtype, target, code, parts, launch.elements(), outside)


def counted(
    label: str, C: int, dtype: torch.dtype, target: str, code: sass.Code,
    parts: list[sass.Counts], elements: float, outside: int,
) -> Line:  # fmt: skip
    """A row of the table; `parts` are executed once per `elements` of a thread."""
    return Line(
        label, C, DTYPES[dtype], target, code.registers, code.shared,
        sum(part.all for part in parts) / elements, sum(part.special for part in parts) / elements,
        outside, sum(part.loads for part in parts), sum(part.stores for part in parts),
    )  # fmt: skip


def table(target: str, classes: tuple[int, ...]) -> Iterator[Line]:
    for activation, gamma in FAMILIES:
        for dtype in (torch.bfloat16, torch.float32):
            for C in classes:
                for launch in row_kernel(launches((4096, C), dtype, activation, gamma)):
                    label = launch.name + (f" g={gamma:g}" if activation == "sigmoid" else "")
                    yield line(launch, C, dtype, target, label)


# Liger-Kernel's cross-entropy, for comparison -----------------------------------------------------

LIGER_WARPS = 32
LIGER_CONSTANTS = {
    "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean",
    "RETURN_Z_LOSS": 0, "RETURN_TOKEN_ACCURACY": 0, "RETURN_PREDICTED_TOKENS": 0,
    "HAS_WEIGHT": True, "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True,
}  # fmt: skip
LIGER_TYPES = {
    "Y_ptr": "*i64", "weight_ptr": "*fp32", "loss_ptr": "*fp32",
    "n_non_ignore": "i64", "sum_non_ignore_weight": "fp32", "weight_sum": "fp32",
}  # fmt: skip


def liger_line(C: int, dtype: torch.dtype, target: str) -> Line | None:
    """Its kernel as it is launched for (N, C) with class weights; None if it is not installed."""
    try:
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel as kernel
    except ImportError:
        return None
    block = min(32768, triton.next_power_of_2(C))
    constants: dict[str, Any] = LIGER_CONSTANTS | {"BLOCK_SIZE": block}
    types = LIGER_TYPES | {"X_ptr": f"*{DTYPES[dtype]}"}
    signature: dict[str, str | None] = {}
    divisible: dict[tuple[int], Any] = {}
    for i, param in enumerate(kernel.params):
        name = param.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr") or name == "softcap":
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = "i32"
        aligned = name in ("X_ptr", "Y_ptr", "weight_ptr", "loss_ptr")
        if aligned or (name in ("X_stride", "n_cols") and C % 16 == 0):
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
    options = {"num_warps": LIGER_WARPS, "enable_fp_fusion": True}
    code = sass.read(triton.compile(source, target=TARGETS[target], options=options))
    loops = [loop for loop in code.loops if loop.special or loop.stores or loop.stores_small]
    elements = block / (LIGER_WARPS * 32)
    name, outside = "Liger cross_entropy", code.straight.all
    return counted(name, C, dtype, target, code, loops, elements, outside)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.machine_code.codegen", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", choices=[t for t in TARGETS if t != "gfx942"], default="sm_90")
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES)
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes/s of a copy")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lines = list(table(arguments.target, tuple(arguments.classes)))
    for dtype in (torch.bfloat16, torch.float32):
        liger = [liger_line(C, dtype, arguments.target) for C in LIGER_CLASSES]
        lines += [each for each in liger if each is not None]
    if arguments.json:
        print(json.dumps([each._asdict() for each in lines], indent=1))
        return
    print(markdown(lines, arguments.bandwidth))


def markdown(lines: list[Line], bandwidth: float) -> str:
    title = (
        f"# Machine code of the Triton kernels\n\n`python -m bench.machine_code.codegen`, triton "
        f"{triton.__version__}; floors at {H100_SMS} multiprocessors of {CLOCK / 1e9} GHz and "
        f"{bandwidth / 1e12} TB/s. Counted, not timed.\n"
    )
    return f"{title}\n{markdown_table([cells(line, bandwidth) for line in lines])}"


def cells(line: Line, bandwidth: float) -> dict[str, str]:
    memory, issue, special = line.floors(bandwidth)
    return {
        "kernel": line.kernel,
        "C": str(line.C),
        "dtype": line.dtype,
        "target": line.target,
        "regs": str(line.registers),
        "shared B": str(line.shared),
        "instr/el": f"{line.instructions:.1f}",
        "MUFU/el": f"{line.special:.2f}",
        "instr per row outside": str(line.outside or "-"),
        "16 B loads, stores": f"{line.loads}, {line.stores}",
        "memory ns/M": f"{memory:.0f}",
        "issue ns/M": f"{issue:.0f}",
        "MUFU ns/M": f"{special:.0f}",
    }


if __name__ == "__main__":
    main()
