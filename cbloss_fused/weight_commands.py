"""The commands that make weights, and a figure of them, from counts."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from .count_files import InputError, read_counts
from .weight_table import WRITERS, as_text, weight_table
from .weights import beta_from_prototypes

BETAS = (0.9, 0.99, 0.999, 0.9999)  # the paper's
COUNTS = (
    "samples of each class: a .txt file, or - for standard input; a .csv file of counts, or of "
    "class names and counts; a .json list, or object class: count; an .npy file of integers; or a "
    "folder with a folder of images for each class"
)


def add_weights(parser: argparse.ArgumentParser) -> None:
    add_counts(parser)
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--beta", type=beta, default=0.999, metavar="B", help="in [0, 1] (default %(default)s)"
    )
    one.add_argument(
        "--prototypes", dest="beta", type=prototypes, metavar="N", help="beta = (N - 1) / N"
    )
    parser.add_argument(
        "--empty",
        choices=("error", "zero", "one"),
        default="error",
        help="a class without samples is an error (default), has weight 0, or counts as one sample",
    )
    parser.add_argument(
        "--output",
        type=output(tuple(WRITERS)),
        metavar="FILE",
        help="a .csv or .json file of the table, or an .npy file of the weights alone; "
        "without it the table is printed",
    )
    parser.set_defaults(run=run_weights, parser=parser)


def run_weights(options: argparse.Namespace) -> None:
    found = read_counts(options.counts, options.column)
    empty = [name for name, n in zip(*found, strict=True) if n == 0]
    if empty and options.empty == "error":
        names = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        raise InputError(
            f"COUNTS {options.counts!r}: {len(empty)} of {len(found.counts)} classes have no "
            f"samples ({names}): expected counts > 0, or --empty zero or --empty one"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = weight_table(found, options.beta, options.empty)
    for warning in caught:
        print(f"{options.parser.prog}: warning: {warning.message}", file=sys.stderr)
    if options.output is not None:
        write(options, WRITERS[options.output.suffix.lower()](table))
    else:
        encoding = sys.stdout.encoding or "utf-8"
        print(as_text(table).encode(encoding, "backslashreplace").decode(encoding), end="")


def add_plot(parser: argparse.ArgumentParser) -> None:
    add_counts(parser)
    parser.add_argument(
        "--beta",
        type=beta,
        nargs="+",
        default=BETAS,
        metavar="B",
        help=f"in [0, 1] (default {' '.join(map(str, BETAS))})",
    )
    parser.add_argument(
        "--output",
        type=output((".png", ".svg")),
        default="weights.png",
        metavar="FILE",
        help="a .png or .svg file (default %(default)s)",
    )
    parser.set_defaults(run=run_plot, parser=parser)


def run_plot(options: argparse.Namespace) -> None:
    counts = read_counts(options.counts, options.column).counts
    from .weight_figure import MISSING, weight_figure  # Matplotlib takes a second

    if MISSING:
        raise InputError(MISSING)
    write(options, weight_figure(counts, options.beta, options.output.suffix.lower()))
    print(f"Figure: {options.output}")


def add_counts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("counts", metavar="COUNTS", help=COUNTS)
    parser.add_argument("--column", metavar="NAME", help="the counts' column in a .csv file")


def beta(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number in [0, 1]")
    return value


def prototypes(text: str) -> float:
    try:
        return beta_from_prototypes(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number >= 1") from None


def output(suffixes: tuple[str, ...]) -> Callable[[str], Path]:
    """The type of --output: a file with one of these suffixes, in a folder that exists."""

    def path(text: str) -> Path:
        file = Path(text)
        if file.suffix.lower() not in suffixes:
            expected = f"expected a file that ends in {' or '.join(suffixes)}"
            raise argparse.ArgumentTypeError(f"{text!r}: {expected}")
        if not os.path.isdir(file.absolute().parent):
            raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(file.parent)!r}")
        if os.path.isdir(file):
            raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected a file")
        return file

    return path


def write(options: argparse.Namespace, data: bytes) -> None:
    """Write the output, whole; the counts that were read are not overwritten."""
    path: Path = options.output
    try:
        if path.exists() and options.counts != "-" and path.samefile(options.counts):
            raise InputError(f"--output {str(path)!r} is the file of the COUNTS: expected another")
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"--output {str(path)!r}: {error.strerror or error}") from None
