"""What tests of the command line share: files, and what a command prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbloss_fused import cli

N = [1, 2, 3]
E = [1, 1.5, 1.75]  # (1 - 0.5^n) / (1 - 0.5)
CAT = "class,count\ncat,1\ndog,2\nowl,3\n"


def save(name: str, data: Any) -> str:
    if isinstance(data, np.ndarray):
        np.save(name, data)
    else:
        Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that has nothing to complain of."""
    cli.main(arguments)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert re.fullmatch(r"python -m cbloss_fused\b.*: error: .+\n", err)
    return err


def folders(root: str, images: dict[str, list[str]]) -> str:
    for name, files in images.items():
        for file in files:
            path = Path(root, name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root
