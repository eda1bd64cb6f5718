"""The commands: what each is given, how each ends, and one line for wrong options."""

from __future__ import annotations

import csv
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command_line import CAT, E, complaint, printed, save

import cbloss_fused
from cbloss_fused import cli, weight_table

ROOT = Path(cbloss_fused.__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test is in an empty folder, as a shell would be."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODULES = [
    (["demo"], "cbloss_fused.demo"),
    (["experiment", "kanji"], "cbloss_fused.experiments.kanji"),
    (["experiment", "cifar"], "cbloss_fused.experiments.cifar"),
]


@pytest.fixture(params=MODULES, ids=lambda param: param[1])
def module(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    """The words of a command, and what stands for its module."""
    command, name = request.param
    stand_in = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "cbloss_fused.experiments", SimpleNamespace())
    monkeypatch.setitem(sys.modules, name, stand_in)
    return command, stand_in


@pytest.mark.parametrize(
    "rest", [[], ["--help"], ["-h"], ["--seeds", "1", "x", "--beta", "-0.5", "y", "--version"]]
)
def test_options_of_a_module(rest, module):
    command, stand_in = module
    given: list[Any] = []
    stand_in.main = given.append
    cli.main([*command, *rest])
    assert given == [rest]


def test_a_module_that_ends(module, capsys):
    command, stand_in = module

    def end(_: Any) -> None:
        raise SystemExit('it needs more packages: pip install "cbloss_fused[demo]"')

    stand_in.main = end
    prog = " ".join(["python -m cbloss_fused", *command])
    assert f"{prog}: error: it needs more packages: pip" in complaint(capsys, *command)

    def finish(_: Any) -> None:
        raise SystemExit(3)

    stand_in.main = finish
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 3


@pytest.mark.parametrize(
    "command, wrong",
    [
        (["demo", "--seeds", "0"], "at least 1"),
        (["experiment", "kanji", "--epochs", "0"], "--epochs 0: expected at least 1"),
        (["experiment", "cifar", "--data", "nowhere"], "cifar-10-python.tar.gz"),
    ],
)
def test_wrong_options_of_a_module(command, wrong, capsys):
    assert wrong in complaint(capsys, *command)


def test_a_module_that_is_not_there(module, capsys, monkeypatch):
    command, stand_in = module
    for name, value in list(sys.modules.items()):
        if value is stand_in:
            monkeypatch.setitem(sys.modules, name, None)
    assert "error: cannot be imported: " in complaint(capsys, *command)


def test_interrupt(module, capsys):
    command, stand_in = module

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    stand_in.main = interrupted
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_goes_away(monkeypatch, folder):
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            return file.fileno()

    save("n.txt", "1 2 3")
    with open("out", "wb") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        with pytest.raises(SystemExit) as stop:
            cli.main(["weights", "n.txt"])
        assert stop.value.code == 1
        file.write(b"what Python flushes as it ends")
    assert Path("out").read_bytes() == b""


def test_help(capsys):
    text = printed(capsys)
    for command in ("demo", "experiment", "weights", "plot", "doctor", "bench"):
        assert re.search(rf"^ +{command}\b", text, re.M)
    for arguments in (["-h"], ["weights", "--help"], ["plot", "--help"], ["experiment", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: python -m cbloss_fused")
        assert err == ""
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"cbloss_fused {cbloss_fused.__version__}\n"


@pytest.mark.parametrize("script", ["/usr/bin/cbloss-fused", r"cbloss-fused.exe"])
def test_the_installed_script_has_its_own_name(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit):
        cli.main(["weights"])
    assert capsys.readouterr().err.startswith("cbloss-fused weights: error: ")


def test_the_installed_script_is_the_command_line():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\ncbloss-fused = "cbloss_fused.cli:main"\n' in text


def test_main_module(capsys, monkeypatch):
    save("n.txt", "1 2 3")
    monkeypatch.setattr(sys, "argv", ["cbloss_fused", "weights", "n.txt", "--output", "w.csv"])
    runpy.run_module("cbloss_fused", run_name="__main__")
    assert Path("w.csv").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["weights"], "the following arguments are required: COUNTS"),
        (["weights", "no.txt"], "COUNTS 'no.txt': No such file or directory"),
        (["weights", "no\nfile"], r"COUNTS 'no\\nfile': No such file or directory"),
        (["weights", "n.txt", "--column", "x"], "--column 'x' chooses a column of a .csv file"),
        (["weights", "n.csv", "--column", "x"], "--column 'x': expected one of the columns class,"),
        (["weights", "n.txt", "--beta", "1.5"], "argument --beta: '1.5': expected a number in [0"),
        (["weights", "n.txt", "--beta", "-0.5"], "argument --beta: '-0.5': expected a number in"),
        (["weights", "n.txt", "--beta", "nan"], "argument --beta: 'nan': expected a number in [0"),
        (["weights", "n.txt", "--beta", "x\ny"], r"argument --beta: 'x\ny': expected a number in"),
        (["weights", "n.txt", "--prototypes", "0.5"], "argument --prototypes: '0.5': expected a"),
        (["weights", "n.txt", "--prototypes", "ten"], "argument --prototypes: 'ten': expected a"),
        (["weights", "n.txt", "--prototypes", "2", "--beta", "0"], "not allowed with argument --p"),
        (["weights", "n.txt", "--empty", "two"], "argument --empty: invalid choice: 'two'"),
        (["weights", "n.txt", "--output", "w.txt"], "--output: 'w.txt': expected a file that ends"),
        (["weights", "n.txt", "--output", "w"], "--output: 'w': expected a file that ends in .csv"),
        (["weights", "n.txt", "--output", "no/w.csv"], "'no/w.csv': there is no folder 'no'"),
        (["weights", "n.txt", "--output", "d.csv"], "'d.csv' is a folder: expected a file"),
        (["weights", "n.csv", "--output", "n.csv"], "--output 'n.csv' is the file of the COUNTS"),
        (["weights", "n.txt", "--gamma", "2"], "unrecognized arguments: --gamma 2"),
        (["plot", "n.txt", "--beta"], "argument --beta: expected at least one argument"),
        (["plot", "n.txt", "--beta", "0.9", "2"], "argument --beta: '2': expected a number in"),
        (["plot", "n.txt", "--output", "w.pdf"], "'w.pdf': expected a file that ends in .png or"),
        (["plot", "n.txt", "--output", "no/w.png"], "'no/w.png': there is no folder 'no'"),
        (["doctor", "--quick"], "unrecognized arguments: --quick"),
        (["bench", "-N", "0"], "--rows 0: expected at least 1"),
        (["bench", "--classes", "0"], "--classes 0: expected at least 1"),
        (["bench", "--threads", "0"], "--threads 0: expected at least 1"),
        (["bench", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["bench", "--gamma", "-1"], "argument --gamma: '-1': expected a finite number >= 0"),
        (["bench", "--gamma", "inf"], "argument --gamma: 'inf': expected a finite number >= 0"),
        (["bench", "--gamma", "two"], "argument --gamma: 'two': expected a finite number >= 0"),
        (["bench", "--device", "tpu"], "--device 'tpu': Expected one of cpu"),
        (["bench", "--device", "meta"], "--device 'meta': "),
        (
            ["bench", "-N", str(10**9), "-C", str(10**6)],
            "(1000000000, 1000000) in float32 on cpu: ",
        ),
        (["experiment"], "the following arguments are required: NAME"),
        (["experiment", "mnist"], "invalid choice: 'mnist'"),
        (["train"], "invalid choice: 'train'"),
        (["--beta"], "unrecognized arguments: --beta"),
    ],
)
def test_bad_options(arguments, message, capsys, folder):
    save("n.txt", "1 2 3")
    save("n.csv", CAT)
    Path("d.csv").mkdir()
    before = {path.name for path in folder.iterdir()}
    assert message.replace("\\\\", "\\") in complaint(capsys, *arguments)
    assert {path.name for path in folder.iterdir()} == before
    assert Path("n.csv").read_text() == CAT


def test_process():
    """Standard input and output as they are, once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cbloss_fused", "weights", "-", "--beta", "0.5"]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate(b"1,2,3\n" + b"3\n" * weight_table.LONG, timeout=60)
    assert err == b""
    assert process.returncode == 0
    rows = list(csv.DictReader(io.StringIO(out.decode())))
    assert [float(row["effective_number"]) for row in rows[:3]] == pytest.approx(E)
