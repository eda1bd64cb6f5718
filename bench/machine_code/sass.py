"""Read and count the machine code of compiled kernels, with the tools that Triton ships."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Counts(NamedTuple):
    """Instructions of a part of a kernel."""

    all: int
    special: int  # MUFU (ex2, lg2, rcp, rsq): 16 lanes per clock, other instructions 128
    loads: int  # of 16 bytes
    stores: int  # of 16 bytes
    loads_small: int
    stores_small: int


class Code(NamedTuple):
    """A kernel's instructions and the resources that the assembler reports."""

    straight: Counts  # outside loops
    loops: list[Counts]  # in order
    interior: Counts  # the path of a thread without a row's edge or target; each loop once
    registers: int  # per thread
    stack: int  # bytes per thread; 0: no spills
    shared: int  # bytes per block
    local: int  # loads and stores of local memory: spills


def read(kernel: Any) -> Code:
    """Disassemble a Triton kernel compiled for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (code,) = read_library(Path(file.name)).values()
    return code


def read_library(path: Path) -> dict[str, Code]:
    """Disassemble all kernels of a file that cuobjdump reads, keyed by their C++ names."""
    usage = dict(re.findall(r"Function (\S+):\n\s*(.*)", _run("-res-usage", str(path))))
    parts = _run("-sass", str(path)).split("Function : ")[1:]
    names = [part.split(maxsplit=1)[0] for part in parts]
    codes = [_code(part, usage[name]) for name, part in zip(names, parts, strict=True)]
    return dict(zip(_demangled(names), codes, strict=True))


def _code(listing: str, usage: str) -> Code:
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
        _count(_interior(code)),
        _usage(usage, "REG"),
        _usage(usage, "STACK"),
        _usage(usage, "SHARED"),
        sum(name.startswith(("LDL", "STL")) for name in names),
    )


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not any(name.startswith("_Z") for name in names):
        return names
    text = "\n".join(names)
    return subprocess.run([tool], input=text, capture_output=True, text=True).stdout.splitlines()


def _run(*arguments: str) -> str:
    done = subprocess.run([TOOLS / "cuobjdump", *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def _usage(text: str, key: str) -> int:
    found = re.search(rf"{key}:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def _loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last instruction of each outermost loop: what a branch jumps back over."""
    index = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (_, text) in enumerate(code):
        first = index.get(_target(text) or -1)
        if first is not None and first < i:  # not the endless loop that ends a kernel
            found.append((first, i))
    return [a for a in found if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in found)]


def _target(text: str) -> int | None:
    """The address that a branch jumps to."""
    found = re.search(r"BRA.*?(0x[0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def _interior(code: list[tuple[int, str]]) -> list[str]:
    """The instructions of most threads, each loop once.

    A branch that skips code is taken if few threads need that code: it has small accesses but no
    16-byte ones (a row's edge, the target), an integer division, or neither accesses nor special
    functions. Of an if and its else the shorter one is taken, which serves complete vectors and
    logits of usual size.
    """
    index = {address: i for i, (address, _) in enumerate(code)}
    path, i = [], 0
    while i < len(code):
        text = code[i][1]
        path.append(text)
        if text.startswith("EXIT"):
            break
        to = index.get(_target(text) or -1, 0)
        if to > i and (text.startswith("BRA") or _rare([t for _, t in code[i + 1 : to]])):
            i = to
        elif to > i and (other := _target(code[to - 1][1])) is not None:
            end = index.get(other, 0)
            i = to if code[to - 1][1].startswith("BRA") and 0 < end - to < to - i else i + 1
        else:
            i += 1
    return path


def _rare(region: list[str]) -> bool:
    """Whether few threads execute this region."""
    names = [_name(text) for text in region]
    special = any(name.startswith("MUFU") for name in names)
    small = any(name.startswith(("LDG", "STG")) for name in names)
    if any(name.startswith("F2I") for name in names):
        return True
    return not any(".128" in name for name in names) and (small or not special)


def _name(text: str) -> str:
    """The instruction without its predicate and operands."""
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
