"""Weights and figures from every form of counts, by value; one line for what is wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.command_line import CAT, E, N, complaint, folders, printed, save

import cbloss_fused
from cbloss_fused import cli, weight_table

WEIGHTS = [3 / e / (1 + 1 / 1.5 + 1 / 1.75) for e in E]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test is in an empty folder, as a shell would be."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# weights ------------------------------------------------------------------------------------------


NAMED = [["cat", "1"], ["dog", "2"], ["owl", "3"]]
NUMBERED = [["0", "1"], ["1", "2"], ["2", "3"]]
FORMS: list[Any] = [
    ("n.txt", "1\n2\n3\n", NUMBERED),
    ("n.txt", " 1, 2\n\n3.0", NUMBERED),
    ("counts", "\ufeff1\t2e0\r\n3", NUMBERED),
    ("n.csv", "1\n2\n3\n", NUMBERED),
    ("n.csv", "n\n1\n2\n3\n", NUMBERED),
    ("n.csv", CAT, NAMED),
    ("n.CSV", "\ufeff" + CAT.replace("\n", "\r\n"), NAMED),
    ("n.csv", "cat,1\ndog,2\n\nowl,3", NAMED),
    ("n.csv", "Counts,kind\n1,cat\n2,dog\n3,owl\n", NAMED),
    ("n.csv", 'species,number\ncat,1\n"dog",2\nowl, 3\n', NAMED),
    ("n.csv", "2,3\n0,1\n1,2\n", NUMBERED),  # class indices
    ("n.csv", "a,count,b\ncat,1,x\ndog,2,x\nowl,3,x\n", NAMED),
    ("n.json", "[1, 2.0, 3]", NUMBERED),
    ("n.json", '{"cat": 1, "dog": 2, "owl": 3}', NAMED),
    ("n.json", '{"2": 3, "0": 1, "1": 2}', NUMBERED),  # of a Counter, as labels come
    ("n.npy", np.array(N), NUMBERED),
    ("n.npy", np.array(N, np.uint8), NUMBERED),
]


@pytest.mark.parametrize("name, data, rows", FORMS)
def test_forms_of_counts(name, data, rows, capsys):
    printed(capsys, "weights", save(name, data), "--beta", "0.5", "--output", "w.csv")
    with open("w.csv", newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["class", "count", "effective_number", "weight"]
    assert [row[:2] for row in found] == rows
    assert [float(row[2]) for row in found] == pytest.approx(E, rel=1e-15)
    assert [float(row[3]) for row in found] == pytest.approx(WEIGHTS, rel=1e-7)


def test_column(capsys):
    save("n.csv", "name,train,test\ncat,1,7\ndog,2,8\nowl,3,9\n")
    one, other = (
        printed(capsys, "weights", "n.csv", "--column", column) for column in ("train", "test")
    )
    assert re.findall(r"^(\w+) +(\d+)", one, re.M) == [("cat", "1"), ("dog", "2"), ("owl", "3")]
    assert re.findall(r"^(\w+) +(\d+)", other, re.M) == [("cat", "7"), ("dog", "8"), ("owl", "9")]


def test_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"1 2\n3")))
    printed(capsys, "weights", "-", "--beta", "0.5", "--output", "w.json")
    assert json.loads(Path("w.json").read_text())["counts"] == N


def test_folder_of_images_is_counted_as_torchvision_does(capsys):
    images = {
        "10": ["a.jpg", "b.PNG", "deep/er/c.webp", "note.txt", ".DS_Store"],
        "2": ["a.tiff"],
        "B": ["x.jpeg", "y.bmp"],
        "a": ["x.ppm"],
    }
    folders("train", images)
    save("train/list.jpg", "")  # a file, no class
    printed(capsys, "weights", "train", "--beta", "1", "--output", "w.json")
    table = json.loads(Path("w.json").read_text())
    assert table["classes"] == ["10", "2", "B", "a"]  # in the order of their labels
    assert table["counts"] == [3, 1, 2, 1]


def test_outputs_agree(capsys):
    save("n.csv", CAT)
    for suffix in ("csv", "json", "npy", "NPY"):
        printed(capsys, "weights", "n.csv", "--beta", "0.5", "--output", "w." + suffix)
    want = cbloss_fused.class_balanced_weights(N, 0.5).tolist()
    for file in ("w.npy", "w.NPY"):
        found = np.load(file, allow_pickle=False)
        assert found.dtype == np.float32
        assert found.tolist() == want
    table = json.loads(Path("w.json").read_text())
    assert table.keys() == {"classes", "counts", "effective_numbers", "weights", "beta"}
    assert np.float32(table["weights"]).tolist() == want
    assert table["effective_numbers"] == pytest.approx(E, rel=1e-15)
    assert (table["classes"], table["beta"]) == (["cat", "dog", "owl"], 0.5)
    rows = list(csv.DictReader(io.StringIO(Path("w.csv").read_text())))
    assert [np.float32(row["weight"]) for row in rows] == want
    again = printed(capsys, "weights", "w.csv", "--beta", "0.5")  # an output has counts, too
    assert again == printed(capsys, "weights", "n.csv", "--beta", "0.5")


@pytest.mark.parametrize(
    "arguments, weights",
    [
        ([], [1 / sum(0.999**k for k in range(n)) for n in (1, 2, 5)]),
        (["--beta", "0"], [1, 1, 1]),
        (["--beta", "1"], [30 / 17, 15 / 17, 6 / 17]),
        (["--prototypes", "1"], [1, 1, 1]),
        (["--prototypes", "2"], [1 / E for E in (1, 1.5, 1.9375)]),
    ],
)
def test_beta(arguments, weights, capsys):
    save("n.txt", "1 2 5")
    printed(capsys, "weights", "n.txt", *arguments, "--output", "w.npy")
    total = sum(weights)
    assert np.load("w.npy") == pytest.approx([3 * w / total for w in weights], rel=1e-6)


def test_empty_classes(capsys):
    save("n.txt", "4 0 2")
    printed(capsys, "weights", "n.txt", "--beta", "1", "--empty", "zero", "--output", "w.npy")
    assert np.load("w.npy") == pytest.approx([2 / 3, 0, 4 / 3])
    printed(capsys, "weights", "n.txt", "--beta", "1", "--empty", "one", "--output", "w.json")
    table = json.loads(Path("w.json").read_text())
    assert table["counts"] == [4, 0, 2]
    assert table["effective_numbers"] == [4, 1, 2]
    assert table["weights"] == pytest.approx([3 / 7, 12 / 7, 6 / 7])
    assert "(1): expected counts > 0, or --empty zero" in complaint(capsys, "weights", "n.txt")


def test_table(capsys):
    pytest.importorskip("tabulate")
    save("n.csv", "007,100\n1e3,10\nowl,1\n")
    assert printed(capsys, "weights", "n.csv", "--beta", "0.9").splitlines() == [
        "class      count    effective number    weight",
        "-------  -------  ------------------  --------",
        "007          100              9.9997   0.23933",
        "1e3           10              6.5132   0.36744",
        "owl            1              1        2.3932",
    ]


def test_table_of_many_classes_or_without_tabulate_is_csv(capsys, monkeypatch):
    save("n.csv", CAT)
    printed(capsys, "weights", "n.csv", "--output", "w.csv")
    with monkeypatch.context() as patch:
        patch.setattr(weight_table, "LONG", 2)
        assert printed(capsys, "weights", "n.csv") == Path("w.csv").read_text()
    monkeypatch.setitem(sys.modules, "tabulate", None)  # its import fails
    assert printed(capsys, "weights", "n.csv") == Path("w.csv").read_text()


def test_a_warning_is_one_line(capsys):
    save("n.txt", "5000 100000")
    cli.main(["weights", "n.txt", "--beta", "0.9", "--output", "w.npy"])
    err = capsys.readouterr().err
    assert re.fullmatch(r"python -m cbloss_fused weights: warning: beta = 0.9 re-w.*\n", err)
    assert np.load("w.npy").tolist() == [1, 1]


def test_names_that_the_terminal_cannot_show(capsys, monkeypatch):
    save("n.csv", "猫,1\ndog,2\n")
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    cli.main(["weights", "n.csv"])
    out.seek(0)
    assert r"\u732b" in out.read()


# plot ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["7", "1000000 0 12 0 1"])
def test_figure(counts, capsys):
    pytest.importorskip("matplotlib")
    save("n.txt", counts)
    assert printed(capsys, "plot", "n.txt") == "Figure: weights.png\n"
    data = Path("weights.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")


def test_drawing(capsys, monkeypatch):
    """SVG has the labels, in words; a second run has the same bytes."""
    monkeypatch.setitem(pytest.importorskip("matplotlib").rcParams, "svg.fonttype", "none")
    save("n.csv", CAT)
    for name in ("a.svg", "b.SVG"):
        printed(capsys, "plot", "n.csv", "--beta", "0.5", "1", "0", "--output", name)
    text = Path("a.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml") and "<svg" in text
    assert re.findall("β = ([0-9.]+)<", text) == ["0.5", "1.0", "0.0"]
    assert "Classes: 3; samples: 6; imbalance factor: 3<" in text
    assert Path("b.SVG").read_text(encoding="utf-8") == text


def test_lines(monkeypatch):
    """What is drawn, in the order of frequency, without the classes that have no samples."""
    pytest.importorskip("matplotlib")
    from cbloss_fused import weight_figure

    figures: list[Any] = []
    figure = "matplotlib.figure.Figure"
    monkeypatch.setattr(f"{figure}.savefig", lambda self, *_, **__: figures.append(self))
    weight_figure.weight_figure([2, 0, 3, 1], [0.5, 1], ".png")
    left, middle, right = [[line.get_ydata() for line in ax.lines] for ax in figures[0].axes]
    assert np.array(left).tolist() == [[3, 2, 1]]
    balanced = [6 / 11, 9 / 11, 18 / 11]
    np.testing.assert_allclose(middle, np.array([E[::-1], [3, 2, 1]]))
    np.testing.assert_allclose(right[:2], np.array([WEIGHTS[::-1], balanced]), rtol=1e-6)
    styles = [(line.get_ls(), line.get_marker()) for line in figures[0].axes[1].lines]
    assert styles == [("-", "o"), ("--", "s")]  # told apart without colours


# What is wrong ------------------------------------------------------------------------------------


BAD_FILES: list[Any] = [
    ("n.txt", "", "no counts: expected one for each class"),
    ("n.txt", "1 2\n3 cat", "line 2: 'cat' is no number: expected a count"),
    ("n.txt", "1 -2", "line 1: '-2': expected an integer >= 0"),
    ("n.txt", "1 2.5", "line 1: '2.5': expected an integer >= 0"),
    ("n.txt", "1 nan", "line 1: 'nan': expected an integer"),
    ("n.txt", "1 inf", "line 1: 'inf': expected an integer"),
    ("n.txt", "1 " + "9" * 9000, "line 1: '9999.*': expected an integer"),
    ("n.txt", "0 0", "all 2 counts are 0: expected one > 0"),
    ("n.txt", b"1 \xff\xfe", "expected UTF-8 text"),
    ("n.txt", b"\x80\x04K\x01.", "expected UTF-8 text"),  # a pickle
    ("n.csv", "", "no counts"),
    ("n.csv", "class,count\n", "no counts"),
    ("n.csv", "cat,1\ndog,many", "line 2: 'many' is no number"),
    ("n.csv", "cat,\ndog,2", "line 1: '' is no number"),
    ("n.csv", "cat,nan\ndog,2", "line 1: 'nan': expected an integer"),
    ("n.csv", "cat,1\ndog,2,3", "line 2: 3 columns: expected 2"),
    ("n.csv", "cat,1,2\n", "3 columns: expected one that is named count, or --column NAME"),
    ("n.csv", "cat,1\ncat,2\n", "class 'cat' is there twice"),
    ("n.csv", "1,5\n2,5\n", r"classes \['1', '2'\]: expected names, or .* indices 0 to 1"),
    ("n.csv", '"cat,1\n', "line 1: unexpected end of data"),
    ("n.json", "", "not JSON: "),
    ("n.json", "[" * 100_000, "not JSON: "),
    ("n.json", "[1, " + "9" * 9000 + "]", "not JSON: |expected an integer"),
    ("n.json", "3", "3: expected a list of counts, or an object"),
    ("n.json", "[1, true]", r"\[1\]: True is no number"),
    ("n.json", '[1, "2\\n3"]', r"\[1\]: '2\\n3' is no number"),
    ("n.json", "[1, NaN]", r"\[1\]: nan: expected an integer"),
    ("n.json", "[1, 1.5]", r"\[1\]: 1.5: expected an integer"),
    ("n.json", '{"cat": null}', "class 'cat': None is no number"),
    ("n.json", '{"cat": 1, "cat": 1}', "class 'cat' is there twice"),
    ("n.json", "{}", "no counts"),
    ("n.npy", np.array([1.0]), r"float64 \(1,\): expected integers \(C,\)"),
    ("n.npy", np.array([[1]]), r"int64 \(1, 1\): expected integers"),
    ("n.npy", np.array([True]), r"bool \(1,\): expected integers"),
    ("n.npy", np.array([1, -1]), r"\[1\]: -1: expected an integer"),
    ("n.npy", np.array([], int), "no counts"),
    ("n.npy", np.array([print], object), r"expected an .npy file of integers \("),  # pickled
    ("n.npy", b"", "expected an .npy file of integers"),
    ("n.npy", b"1 2 3", "expected an .npy file of integers"),
    ("n.pkl", "1", "unknown suffix '.pkl': expected .txt, .csv, .json, .npy, a folder"),
]


@pytest.mark.parametrize("command, output", [("weights", "w.csv"), ("plot", "w.png")])
@pytest.mark.parametrize("name, data, message", BAD_FILES)
def test_bad_files(command, output, name, data, message, capsys, folder):
    save(name, data)
    save(output, "old")
    found = complaint(capsys, command, name, "--output", output)
    assert re.search(rf"error: COUNTS '{name}': (.*?)({message})", found)
    assert len(found) < 400
    assert Path(output).read_text() == "old"
    assert {path.name for path in folder.iterdir()} == {name, output}


def test_an_npy_file_that_lies_about_its_size(capsys):
    save("n.npy", np.array(N))
    data = Path("n.npy").read_bytes()
    Path("n.npy").write_bytes(data.replace(b"(3,), }            ", b"(3000000000000,), }"))
    assert "expected an .npy file of integers" in complaint(capsys, "weights", "n.npy")
    np.savez("n.npz", N)
    os.replace("n.npz", "n.npy")
    assert "a .npz archive: expected an .npy" in complaint(capsys, "weights", "n.npy")


def test_bad_folders(capsys):
    Path("empty").mkdir()
    folders("text", {"a": ["x.txt"], "b": ["y.npy"]})
    folders("part", {"a": ["x.jpg"], "b": ["y.npy"]})
    assert "COUNTS 'empty': no sub-folders: expected" in complaint(capsys, "weights", "empty")
    assert "no images in its 2 sub-folders: expected .jpg" in complaint(capsys, "weights", "text")
    assert "1 of 2 classes have no samples (b)" in complaint(capsys, "weights", "part")


def test_what_cannot_be_written_or_read(capsys, monkeypatch):
    save("n.txt", "1 2 3")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        found = complaint(capsys, "weights", "n.txt", "--output", "w.json")
    assert "error: --output 'w.json': Permission denied" in found
    monkeypatch.setattr(Path, "read_bytes", refuse)
    found = complaint(capsys, "weights", "n.txt", "--output", "w.json")
    assert "error: COUNTS 'n.txt': Permission denied" in found


def test_folders_that_cannot_be_read_are_not_left_out(capsys, monkeypatch):
    folders("train", {"a": ["x.jpg"], "b": ["y.jpg"]})
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "COUNTS 'train': Permission denied" in complaint(capsys, "weights", "train")


def test_missing_extras(capsys, monkeypatch):
    save("n.txt", "1 2 3")
    save("n.npy", np.array(N))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numpy", None)
        assert printed(capsys, "weights", "n.txt") != ""  # only .npy files need it
        for arguments in (["n.npy"], ["n.txt", "--output", "w.npy"]):
            found = complaint(capsys, "weights", *arguments)
            assert re.search(r".npy files need NumPy \(.*\): pip install numpy$", found)
    figure = "cbloss_fused.weight_figure"  # imported anew, and afterwards as it was
    monkeypatch.setattr(figure, None, raising=False)
    monkeypatch.setitem(sys.modules, figure, None)
    monkeypatch.delitem(sys.modules, figure)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = complaint(capsys, "plot", "n.txt")
    assert re.search(
        r'a figure needs Matplotlib \(.*\): pip install "cbloss_fused\[demo\]"$', found
    )
    assert not any(Path(name).exists() for name in ("w.npy", "weights.png"))
