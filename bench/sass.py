"""Machine code of a compiled Triton kernel, counted: no GPU, only tools that Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Counts(NamedTuple):
    """What a thread executes between two points, or all that stands in a kernel."""

    all: int
    special: int  # MUFU: ex2, lg2, rcp, rsq; 16 a clock and multiprocessor, beside 128 others
    loads: int  # of 16 bytes
    stores: int  # of 16 bytes
    loads_small: int
    stores_small: int


class Code(NamedTuple):
    """A kernel's SASS and what the assembler says of it."""

    straight: Counts  # outside loops
    loops: list[Counts]  # in order
    registers: int
    stack: int  # bytes a thread; 0: no spills
    shared: int  # bytes a block
    local: int  # loads and stores of local memory: spills


def read(kernel: Any) -> Code:
    """Disassemble a kernel compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = _run("-sass", file.name)
        usage = _run("-res-usage", file.name)
    code = [
        (int(address, 16), text.strip())
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
        if not text.strip().startswith("NOP")
    ]
    loops = _loops(code)
    inside = {i for first, last in loops for i in range(first, last + 1)}
    outside = [text for i, (_, text) in enumerate(code) if i not in inside]
    names = [_name(text) for _, text in code]
    return Code(
        _count(outside),
        [_count([text for _, text in code[first : last + 1]]) for first, last in loops],
        _usage(usage, "REG"),
        _usage(usage, "STACK"),
        _usage(usage, "SHARED"),
        sum(name.startswith(("LDL", "STL")) for name in names),
    )


def _run(*arguments: str) -> str:
    done = subprocess.run([TOOLS / "cuobjdump", *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def _usage(text: str, key: str) -> int:
    found = re.search(rf"{key}:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def _loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last instruction of what is branched back over, but for the end's own loop."""
    index = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (_, text) in enumerate(code):
        target = re.search(r"BRA.*?(0x[0-9a-f]+)", text)
        first = index.get(int(target[1], 16)) if target else None
        if first is not None and first < i:
            found.append((first, i))
    return [a for a in found if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in found)]


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P[\dT]+\s+", "", text).split()[0]


def _count(code: list[str]) -> Counts:
    names = Counter(_name(text) for text in code)

    def total(*starts: str, wide: bool | None = None) -> int:
        return sum(
            n
            for name, n in names.items()
            if name.startswith(starts) and wide in (None, ".128" in name)
        )

    return Counts(
        len(code),
        total("MUFU"),
        total("LDG", wide=True),
        total("STG", wide=True),
        total("LDG", wide=False),
        total("STG", wide=False),
    )
