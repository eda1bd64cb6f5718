"""What the package does not do: reach the network, unpickle, run a shell."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "cbloss_fused").rglob("*.py"))
# Files that may, and why.
NETWORK: set[str] = set()
PICKLE = {
    "experiments/cifar_data.py"
}  # CIFAR's own format, read by an unpickler that calls nothing
PROGRAMS = {"experiments/fonts.py", "doctor.py"}  # dpkg-deb and apt-get, nvidia-smi


def named(file: Path) -> str:
    return file.relative_to(ROOT / "cbloss_fused").as_posix()


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


@pytest.mark.parametrize(
    "modules, allowed",
    [
        (("socket", "urllib", "http", "ftplib", "requests", "httpx"), NETWORK),
        (("pickle", "shelve", "marshal", "dill", "cloudpickle"), PICKLE),
        (("subprocess", "pty"), PROGRAMS),
    ],
    ids=("network", "pickle", "programs"),
)
def test_modules_that_few_files_import(modules, allowed):
    found = {
        named(file)
        for file in FILES
        if any(name.partition(".")[0] in modules for name in imported(file))
    }
    assert found <= allowed


def calls(file: Path) -> Iterator[ast.Call]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_shell_no_code_from_text_no_pickled_arrays():
    for file in FILES:
        for call in calls(file):
            name = ast.unparse(call.func)
            options = {each.arg: ast.unparse(each.value) for each in call.keywords}
            where = f"{named(file)}:{call.lineno}"
            assert options.get("shell", "False") == "False", where
            assert name not in ("eval", "exec", "os.system", "os.popen"), where
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", where
            if name == "torch.load":
                assert options.get("weights_only") == "True", where


OFFLINE = """
import socket
def refuse(*_, **__):
    raise AssertionError("a socket")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch, cbloss_fused, cbloss_fused.cli
x = torch.randn(4, 3, requires_grad=True)
cbloss_fused.ClassBalancedLoss([3, 2, 1], 0.9)(x, torch.tensor([0, 1, 2, 0])).backward()
cbloss_fused.cli.main([])
"""


def test_nothing_is_fetched():
    done = subprocess.run([sys.executable, "-c", OFFLINE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_core_needs_pytorch_alone():
    """Everything else is an extra, or a part of Python."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dependencies = \["torch>=[\d.]+"\]$', project, re.MULTILINE)
    code = "import sys, torch; before = set(sys.modules); import cbloss_fused; " + (
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import site; site.main(); {code}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"cbloss_fused", "torch"}
    assert not {name for name in loaded if not name.startswith("_")}
