"""Predicted times: `python -m bench.machine_code.roofline > bench/machine_code/roofline.md`.

For every shape of the GPU benchmark: the bytes follow from the shape, the instructions from the
machine code of the kernels that the shape takes, a GPU's rates from the command line. Nothing is
timed, no GPU is needed.
"""

from __future__ import annotations

import argparse

import torch

from ..cases import GPU_SHAPES
from ..report import Floor, floor_key, markdown_table
from . import sass
from .codegen import CLOCK, ISSUE, SPECIAL, TARGETS, Launch, compiled, launches, row_kernel

FAMILIES = [("softmax", 0.0), ("sigmoid", 0.0), ("sigmoid", 0.5)]
DTYPES = (torch.float32, torch.bfloat16)
INTRO = """\
# Rooflines

Loss and gradient of one call, computed by `{command}`; no figure here was measured on a GPU.

- memory: one read of the logits and one write of the gradient at {bandwidth:.1f} TB/s, the rate of
  a copy (about 3.0 TB/s on an H100, 4.3 on an H200).
- issue, special: the instructions and special functions (ex2, lg2, rcp, rsq) of the kernels'
  machine code for sm_90, at {sms} multiprocessors of {clock:.1f} GHz that issue {issue} and
  {special} lanes per clock. Padding to whole tiles and the work once per row are counted.
- bound: the largest of the three; `host` where all are below {host:g} us, the host time of
  three launches by `python -m bench.launch_cost`: there a CUDA graph or a larger batch helps.
- Softmax rows of more than 16,384 classes are read twice. The second read is meant to come from L2
  and is not counted in `memory`: if it comes from memory, that time is half as long again.
"""


def thread_work(launch: Launch, elements: int) -> tuple[float, float]:
    """(instructions, special functions) of one thread of a program over so many elements."""
    code = sass.read(compiled(launch, TARGETS["sm_90"]))
    tile = launch.elements() * launch.warps * 32
    tiles = -(-elements // tile)
    loops = [loop for loop in code.loops if loop.loads or loop.stores or loop.stores_small]
    instructions = code.straight.all + tiles * sum(loop.all for loop in loops)
    return instructions, code.straight.special + tiles * sum(loop.special for loop in loops)


def floor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    family: tuple[str, float],
    bandwidth: float,
    sms: int,
) -> Floor:
    """The least microseconds of a call; `shape` has at most one dimension behind the classes."""
    issue = special = 0.0
    elements = torch.Size(shape).numel()
    for launch in row_kernel(launches(shape, dtype, *family)):
        programs = launch.grid[0] * launch.grid[1]
        elements_per_program = elements // programs
        if launch.name.endswith("_tiles"):  # its loop is over the classes of a program's rows
            elements_per_program = shape[1] * launch.constant("ROWS")
        instructions, functions = thread_work(launch, elements_per_program)
        threads = programs * launch.warps * 32
        issue += threads * instructions / (sms * CLOCK * ISSUE) * 1e6
        special += threads * functions / (sms * CLOCK * SPECIAL) * 1e6
    return Floor(2 * elements * dtype.itemsize / bandwidth * 1e6, issue, special)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.machine_code.roofline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of a copy")
    parser.add_argument("--sms", type=int, default=132)
    parser.add_argument("--host", type=float, default=20, help="host time of a call in us")
    arguments = parser.parse_args()
    options = f"--bandwidth {arguments.bandwidth:g} --sms {arguments.sms}"
    print(INTRO.format(
        command=f"python -m bench.machine_code.roofline {options}", clock=CLOCK / 1e9,
        issue=ISSUE, special=SPECIAL, **vars(arguments),
    ))  # fmt: skip
    print(markdown_table([
        cells(shape, dtype, family, arguments)
        for shape in sorted(GPU_SHAPES) for dtype in DTYPES for family in FAMILIES
    ]))  # fmt: skip


def cells(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    family: tuple[str, float],
    arguments: argparse.Namespace,
) -> dict[str, str]:
    """A row of the table, which `report.floors` reads back."""
    flat = (*shape[:2], *([torch.Size(shape[2:]).numel()] if len(shape) > 2 else []))
    found = floor(flat, dtype, family, arguments.bandwidth * 1e12, arguments.sms)
    largest = max(found)
    name, dtype_name, loss = floor_key(shape, str(dtype)[6:], f"{family[0]} {family[1]:g}")
    return {
        "shape": name,
        "dtype": dtype_name,
        "loss": loss,
        "MB": f"{2 * torch.Size(shape).numel() * dtype.itemsize / 1e6:.3g}",
        "memory us": f"{found.memory:.3g}",
        "issue us": f"{found.issue:.3g}",
        "special us": f"{found.special:.3g}",
        "bound": "host" if largest < arguments.host else found._fields[found.index(largest)],
    }


if __name__ == "__main__":
    main()
