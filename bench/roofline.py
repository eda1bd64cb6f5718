"""Floors of every GPU benchmark shape, computed: `python -m bench.roofline > bench/roofline.md`.

Bytes from the shapes, instructions from the machine code of the kernels that the shape takes
(bench.codegen), a GPU's rates from the command line. Nothing here was timed on a GPU.
"""

from __future__ import annotations

import argparse

import torch

from . import sass
from .codegen import CLOCK, ISSUE, SPECIAL, TARGETS, Launch, compiled, launches, row_kernel
from .floors import Floor, key

SHAPES = [
    (32, 10), (32, 1000), (256, 8142), (1024, 8142), (4096, 8142), (4096, 8192), (16384, 8142),
    (4096, 32768), (4096, 131072), (4, 131072), (8, 131072), (64, 1048576), (1_000_000, 10),
    (1_000_000, 19), (262144, 100), (8, 19, 512 * 512),
]  # fmt: skip
FAMILIES = [("softmax", 0.0), ("sigmoid", 0.0), ("sigmoid", 0.5)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INTRO = """\
# Rooflines

Loss and gradient of one call, computed by `{command}`; no figure here was measured on a GPU.

- memory: one read of the logits and one write of the gradient at {bandwidth:.1f} TB/s, the rate of
  a copy (an H100 moves about 3.0 TB/s so, an H200 4.3).
- issue, special: the instructions and special functions (ex2, lg2, rcp, rsq) of the kernels'
  machine code for sm_90, at {sms} multiprocessors of {clock:.1f} GHz that issue {issue} and
  {special} lanes a clock. Padding to whole tiles and the work once a row are counted.
- bound: the largest of the three; `host` where all are below {host:g} us, the host time of
  three launches by `python -m bench.launch_cost`: there a CUDA graph or a larger batch helps.
- Softmax rows beyond 16,384 classes are read twice. The second read is meant for L2 and is not
  counted in `memory`: from L2 it costs no memory time, else half as much again.
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
    issue = special = 0.0
    elements = torch.Size(shape).numel()
    for launch in row_kernel(launches(shape, dtype, *family)):
        programs = launch.grid[0] * launch.grid[1]
        each = elements // programs
        if launch.name.endswith("_tiles"):  # a program's rows: their classes are its loop
            each = shape[1] * launch.constant("ROWS")
        instructions, functions = thread_work(launch, each)
        threads = programs * launch.warps * 32
        issue += threads * instructions / (sms * CLOCK * ISSUE) * 1e6
        special += threads * functions / (sms * CLOCK * SPECIAL) * 1e6
    return Floor(2 * elements * dtype.itemsize / bandwidth * 1e6, issue, special)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of a copy")
    parser.add_argument("--sms", type=int, default=132)
    parser.add_argument("--host", type=float, default=20, help="us of a call's host time")
    arguments = parser.parse_args()
    command = f"python -m bench.roofline --bandwidth {arguments.bandwidth:g} --sms {arguments.sms}"
    print(INTRO.format(
        command=command, bandwidth=arguments.bandwidth, sms=arguments.sms, clock=CLOCK / 1e9,
        issue=ISSUE, special=SPECIAL, host=arguments.host,
    ))  # fmt: skip
    print("| shape | dtype | loss | MB | memory us | issue us | special us | bound |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for family in FAMILIES:
                found = floor(shape, dtype, family, arguments.bandwidth * 1e12, arguments.sms)
                largest = max(found)
                bound = "host" if largest < arguments.host else found._fields[found.index(largest)]
                size = 2 * torch.Size(shape).numel() * dtype.itemsize / 1e6
                times = " | ".join(f"{us:.3g}" for us in found)
                named = " | ".join(key(shape, name, f"{family[0]} {family[1]:g}"))
                print(f"| {named} | {size:.3g} | {times} | {bound} |")


if __name__ == "__main__":
    main()
