"""Class counts from files and from folders of images, for the command line."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import re
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MOST = 2**53  # beyond it float64, in which weights are computed, has no longer every integer
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision


class InputError(Exception):
    """What the user gave is wrong; the message says where, what was given and what is expected."""


class Counts(NamedTuple):
    """The samples of each class; where the input has no names, class indices are the names."""

    names: list[str]
    counts: list[int]


def read_counts(source: str, column: str | None = None) -> Counts:
    """The counts in a .txt, .csv, .json or .npy file, in a folder of folders, or in text from "-".

    column: the name of the counts' column in a CSV file.
    """
    try:
        counts = _read(source, column)
        if not counts.counts:
            raise InputError("no counts: expected one for each class")
        if not any(counts.counts):
            raise InputError(f"all {len(counts.counts)} counts are 0: expected one > 0")
        return counts
    except InputError as error:
        raise InputError(f"COUNTS {source!r}: {error}") from None
    except OSError as error:
        raise InputError(f"COUNTS {source!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"COUNTS {source!r}: expected UTF-8 text ({error})") from None


def numpy() -> Any:
    """NumPy, which only .npy files need."""
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise InputError(f".npy files need NumPy ({error}): pip install numpy") from None


def _read(source: str, column: str | None) -> Counts:
    suffix = "" if source == "-" else Path(source).suffix.lower()
    folder = source != "-" and os.path.isdir(source)
    if column is not None and (suffix != ".csv" or folder):
        raise InputError(f"--column {column!r} chooses a column of a .csv file")
    if folder:
        return _of_folder(source)
    if suffix == ".npy":
        return _numbered(_of_npy(source))
    if suffix not in ("", ".txt", ".csv", ".json"):
        raise InputError(
            f"unknown suffix {suffix!r}: expected .txt, .csv, .json, .npy, a folder of class "
            "folders, or - for text on standard input"
        )
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    text = data.decode("utf-8-sig")  # which spreadsheets begin with a byte order mark
    if suffix == ".csv":
        return _of_csv(text, column)
    return _of_json(text) if suffix == ".json" else _numbered(_of_text(text))


def _of_text(text: str) -> list[int]:
    lines = enumerate(text.splitlines(), 1)
    return [_count(w, f"line {i}") for i, line in lines for w in re.split(r"[\s,]+", line) if w]


def _of_csv(text: str, column: str | None) -> Counts:
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}") from None
    if not rows:
        return Counts([], [])
    first = rows[0][1]
    at, header = _count_column(first, column)
    rows = rows[1:] if header else rows
    for line, row in rows:
        if len(row) != len(first):
            raise InputError(f"line {line}: {len(row)} columns: expected {len(first)}")
    counts = [_count(row[at], f"line {line}") for line, row in rows]
    if len(first) == 1:
        return _numbered(counts)
    return _named([row[1 if at == 0 else 0] for _, row in rows], counts)


def _count_column(first: list[str], column: str | None) -> tuple[int, bool]:
    """Which column has the counts, and whether the first row is a header."""
    if column is not None:
        if first.count(column) != 1:
            raise InputError(f"--column {column!r}: expected one of the columns {', '.join(first)}")
        return first.index(column), True
    named = [i for i, cell in enumerate(first) if cell.lower() in ("count", "counts")]
    if len(named) == 1:
        return named[0], True
    if len(first) > 2:
        raise InputError(
            f"{len(first)} columns: expected one that is named count, or --column NAME"
        )
    return len(first) - 1, first[-1][:1].isalpha() and _number(first[-1]) is None


class _Object(list[tuple[str, Any]]):
    """Keys and values of JSON, keys that are there twice too."""


def _of_json(text: str) -> Counts:
    try:
        data = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if isinstance(data, _Object):
        counts = [_count(value, f"class {reprlib.repr(name)}") for name, value in data]
        return _named([name for name, _ in data], counts)
    if isinstance(data, list):
        return _numbered([_count(value, f"[{i}]") for i, value in enumerate(data)])
    raise InputError(f"{reprlib.repr(data)}: expected a list of counts, or an object class: count")


def _of_npy(source: str) -> list[int]:
    np = numpy()
    try:  # mapped: a header that lies about the size allocates nothing
        array = np.load(source, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"expected an .npy file of integers ({error})") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError("a .npz archive: expected an .npy file of integers")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{array.dtype} {array.shape}: expected integers (C,)")
    return [_count(value, f"[{i}]") for i, value in enumerate(array.tolist())]


def _of_folder(source: str) -> Counts:
    """Classes and images as torchvision's ImageFolder finds them."""
    names = sorted(entry.name for entry in os.scandir(source) if entry.is_dir())
    if not names:
        raise InputError("no sub-folders: expected one for each class, with its images")
    counts = [_images(os.path.join(source, name)) for name in names]
    if not any(counts):
        raise InputError(f"no images in its {len(names)} sub-folders: expected {', '.join(IMAGES)}")
    return Counts(names, counts)


def _images(folder: str) -> int:
    def fail(error: OSError) -> NoReturn:  # os.walk would leave out what it cannot read
        raise error

    found = os.walk(folder, onerror=fail, followlinks=True)
    return sum(file.lower().endswith(IMAGES) for _, _, files in found for file in files)


def _count(value: Any, where: str) -> int:
    """A number, or the text of one, as a count."""
    number = _number(value) if isinstance(value, str) else value
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise InputError(f"{where}: {reprlib.repr(value)} is no number: expected a count")
    if not 0 <= number <= MOST or number != int(number):
        raise InputError(f"{where}: {reprlib.repr(value)}: expected an integer >= 0 and <= 2**53")
    return int(number)


def _number(text: str) -> float | None:
    for kind in (int, float):  # int first: it is exact
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def _numbered(counts: list[int]) -> Counts:
    return Counts([str(i) for i in range(len(counts))], counts)


def _named(names: Sequence[str], counts: Sequence[int]) -> Counts:
    """Counts by name; names that are class indices put them in order."""
    classes = list(zip(names, counts, strict=True))
    if all(re.fullmatch("[0-9]{1,9}", name) for name in names):
        classes.sort(key=lambda item: int(item[0]))
        if [int(name) for name, _ in classes] != list(range(len(classes))):
            raise InputError(
                f"classes {reprlib.repr(list(names))}: expected names, or the class indices 0 to "
                f"{len(classes) - 1}, each once"
            )
    seen = set[str]()
    for name, _ in classes:
        if name in seen:
            raise InputError(f"class {reprlib.repr(name)} is there twice: expected one count each")
        seen.add(name)
    return Counts([name for name, _ in classes], [count for _, count in classes])
