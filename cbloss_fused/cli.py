"""Class-balanced losses: the demo, the experiments, class weights from counts, a check of what is
installed, and a timing."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .bench_command import add_bench
from .count_files import InputError
from .doctor import add_doctor
from .parser import Parser
from .weight_commands import add_plot, add_weights

SCRIPT = "cbloss-fused"  # in pyproject.toml


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what is wrong with its input is one line on stderr and exit status 2."""
    options = parse(argv)
    try:
        options.run(options)
        sys.stdout.flush()
    except InputError as error:
        options.parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: `run` is the command, `rest` what a module of `add_module` is given."""
    called = Path(sys.argv[0]).stem  # an installed script has its own name
    prog = SCRIPT if called.startswith(SCRIPT) else "python -m cbloss_fused"
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--version", action="version", version=f"cbloss_fused {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help(), parser=parser, module=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_module(commands, "demo", "demo", "train on long-tailed digits with each loss")
    experiment = commands.add_parser("experiment", help="train on larger data with each loss")
    experiments = experiment.add_subparsers(title="experiments", metavar="NAME", required=True)
    add_module(experiments, "kanji", "experiments.kanji", "kanji at their natural frequency")
    add_module(experiments, "cifar", "experiments.cifar", "long-tailed CIFAR")
    add_weights(commands.add_parser("weights", help="class-balanced weights from counts"))
    add_plot(commands.add_parser("plot", help="a figure of counts, effective numbers and weights"))
    add_doctor(
        commands.add_parser("doctor", help="what is installed here, and whether it is right")
    )
    add_bench(commands.add_parser("bench", help="time the fused kernels and eager PyTorch here"))
    options, rest = parser.parse_known_args(argv)
    if rest and options.module is None:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    return options


def add_module(
    commands: argparse._SubParsersAction[Parser], name: str, module: str, text: str
) -> None:
    """A command that is the `main` of a module, with options of its own."""
    parser = commands.add_parser(name, add_help=False, help=text)
    parser.set_defaults(run=run_module, parser=parser, module=module)


def run_module(options: argparse.Namespace) -> None:
    try:
        module = importlib.import_module(f".{options.module}", __package__)
    except ImportError as error:
        raise InputError(f"cannot be imported: {error}") from None
    try:
        module.main(options.rest)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # an extra is missing
            raise InputError(stop.code) from None
        raise
