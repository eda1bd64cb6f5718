"""Faults to plant in Triton's kernels, each of which native/check.py must find, interpreted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from .build import PACKAGE, package


class Fault(NamedTuple):
    """A text that a source has once, what it becomes, and the classes of the cases that see it."""

    name: str
    file: str
    text: str
    becomes: str
    classes: tuple[int, ...] = (7, 131)


LONG = (20_011,)  # of which a row is several programs' work

FAULTS = (
    # Bounds
    Fault("a row's last column is not stored", "rows.py",
          "tail < C, in_body)", "tail < C - 1, in_body)"),
    Fault("a column past the row's head is left out", "rows.py",
          "t < VEC, t < head,", "t < VEC, t < head - 1,"),
    Fault("a vector past the row is loaded", "rows.py",
          "mask = (v < whole) & (v != at_y)", "mask = (v <= whole) & (v != at_y)"),
    Fault("vectors are counted from the row's first column", "rows.py",
          "return head, (C - head) // VEC,", "return head, C // VEC,"),
    Fault("a class past the last is stored", "tiles.py",
          "mask = (c < C)[:, None] & there", "mask = (c <= C)[:, None] & there"),
    Fault("a row past the last is there", "tiles.py",
          "return row, tl.zeros((ROWS,), tl.int32), row, row < rows",
          "return row, tl.zeros((ROWS,), tl.int32), row, row <= rows"),
    Fault("rows of the next sample are there", "tiles.py",
          "n * K + k, k < K", "n * K + k, n * K + k < rows"),
    Fault("soft targets past the last class are read", "soft_targets.py",
          "there[:, None] & (c < C)[None, :]", "there[:, None] & (c <= C)[None, :]"),
    # Targets
    Fault("the target's vector counts twice", "rows.py",
          "mask = (v < whole) & (v != at_y)", "mask = v < whole"),
    Fault("the target counts twice at the edges", "rows.py",
          "there & (column != y) & (column < ", "there & (column < "),
    Fault("the target counts twice in a tile", "tiles.py",
          "others = there & (c[:, None] != y[None, :])", "others = there"),
    Fault("a background row has the last class", "rows.py",
          "tl.where(y == background, C, y)", "tl.where(y == background, C - 1, y)"),
    Fault("a background row has a target's loss", "sigmoid.py",
          "        L = tl.where(labelled, L, 0.0)\n", "        L = L + 0.0\n"),
    Fault("a background row has a class's weight", "prologue.py",
          "labelled = keep & (y != background)", "labelled = keep"),
    Fault("an unknown label has a loss", "soft_targets.py",
          "known = inside & (t_j != scalar(unknown, T))", "known = inside"),
    Fault("an unknown label has a weight", "soft_targets.py",
          "            tw_j = tl.where(known, tw_j, 0.0)\n", ""),
    Fault("the largest logit's target counts twice", "soft_softmax.py",
          "    tw_j = tl.where(other, tw_j, 0.0)\n", ""),
    # Ignored rows
    Fault("an ignored row has a weight", "rows.py",
          "r = tl.where(keep, tl.where(valid, r, float(\"nan\")), 0.0)",
          "r = tl.where(valid, r, float(\"nan\"))"),
    Fault("an ignored row is read", "rows.py", "keep, keep & valid & there", "keep, valid & there"),
    Fault("an ignored row is saved as one of weight 0", "softmax.py",
          "tl.store(saved + row, tl.where(keep, r, -1.0), there)",
          "tl.store(saved + row, r, there)"),
    # Sums
    Fault("sums are not moved to the larger maximum", "softmax.py",
          "R = R * exp(step) + tl.sum(exp(t))\n", "R = R + tl.sum(exp(t))\n", LONG),
    Fault("sums of parts are not moved to the largest maximum", "softmax.py",
          "return top, tl.sum(R * exp(step)), D", "return top, tl.sum(R), D", LONG),
    Fault("a part of a row is written twice, another never", "softmax.py",
          "(tiles - 1 - tile) * V", "(tiles - tile) * V", LONG),
    Fault("every part of a row has the target's loss", "sigmoid.py",
          "tl.where(split == 0, L_y, 0.0)", "L_y", LONG),
    Fault("the last of the partial losses is left out", "prologue.py",
          "j, j < count, 0.0)", "j, j < count - 1, 0.0)"),
    Fault("a product is taken for a sum", "sigmoid.py",
          "return a + tl.fma(a, b, b)", "return a + b"),
    # Numbers
    Fault("smoothing counts what is masked", "sigmoid.py",
          "linear = tl.where(mask, tl.maximum((1.0 - t) * z, -t * z), 0.0)",
          "linear = tl.maximum((1.0 - t) * z, -t * z)"),
    Fault("the focal factor lacks u", "softmax.py",
          "(1 + gamma * p * u)", "(1 + gamma * p)"),
    Fault("smoothing leaves the target's logit out", "softmax.py",
          "    D = d\n    if SMOOTH:\n        D += tl.sum(tl.where(mask",
          "    D = d * 0.0\n    if SMOOTH:\n        D += tl.sum(tl.where(mask"),
)  # fmt: skip

NONE = tuple(Fault("none", "rows.py", "", "", classes) for classes in ((7, 131), LONG))


def plant(fault: Fault, folder: Path) -> Path:
    """A folder with the package, whose Triton kernels have the fault."""
    made = package(folder, "triton")
    shutil.copytree(
        PACKAGE / "triton", made / "triton", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = made / "triton" / fault.file
    text = path.read_text()
    if fault.text:
        assert text.count(fault.text) == 1, f"{fault.name}: {fault.file} must have the text once"
        text = text.replace(fault.text, fault.becomes)
    path.write_text(text)
    return folder


def arguments(fault: Fault) -> list[str]:
    """Of native/check.py: what sees the fault within seconds."""
    chosen = ["--rows", "67"]
    if fault.classes == LONG:  # vectors of rows are slow there
        chosen = [
            *("--rows", "3", "--layouts", "rows", "padded"),
            "--targets",
            "index",
            "background",
        ]
    dtypes = "--dtypes", "float32", "bfloat16"
    return ["--backend", "triton", *dtypes, *chosen, "--classes", *map(str, fault.classes)]
