"""Which combinations of parameters run: some, but every value of each; all of a named test."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.backends import BACKENDS, BEST
from support.sampling import select


class Item(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def item(test: str, folder: str = "", **parameters: Any) -> Any:
    """What select() looks at of a test with these parameters, in a file of a folder."""
    name = f"{test}[{'-'.join(map(repr, parameters.values()))}]"
    return Item(
        name=name, nodeid=f"{folder}::{name}", originalname=test,
        callspec=SimpleNamespace(params=parameters), get_closest_marker=lambda marker: None,
    )  # fmt: skip


def combinations(folder: str = "") -> list[Any]:
    values = product(BACKENDS.values(), range(7), "abc", (0.0, 0.1))
    return [item("test", folder, backend=b, C=c, family=f, eps=e) for b, c, f, e in values]


@pytest.mark.parametrize("long", (False, True))
def test_every_value_runs_on_every_backend(long: bool) -> None:
    items = combinations()
    kept, left_out = select(items, long)
    assert len(kept) + len(left_out) == len(items)
    for backend in BACKENDS.values():
        ran = [each.callspec.params for each in kept if each.callspec.params["backend"] is backend]
        for name, count in (("C", 7), ("family", 3), ("eps", 2)):
            assert len({parameters[name] for parameters in ran}) == count


def test_a_long_run_takes_more_and_all_of_the_best_backend() -> None:
    items = [each for each in combinations() if each.callspec.params["backend"] is BEST]
    quick, long = (select(items, long)[0] for long in (False, True))
    assert len(quick) < len(long)
    if not BEST.gpu:
        assert len(long) == len(items)


def test_the_file_changes_nothing() -> None:
    here, there = (select(combinations(folder), False)[0] for folder in ("a", "b"))
    assert [each.name for each in here] == [each.name for each in there]
    assert [each.name for each in here] == [
        each.name for each in combinations() if each.name in {kept.name for kept in here}
    ]


def test_what_takes_no_backend_always_runs() -> None:
    items = [item("test", C=C) for C in range(50)]
    assert select(items, False) == (items, [])


@pytest.mark.long
def test_a_test_that_is_named_runs() -> None:
    """One that a quick run leaves out."""
    file, mark = "tests/test_layouts.py", "named:"
    code = f"""
import pytest
collect = ["--collect-only", "-q", "-p", "no:cacheprovider"]
pytest.main([*collect, "{file}"])
print("{mark}")
pytest.main([*collect, "{file}::test_in_place_gives_the_same_bits"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    some, every = done.stdout.split(mark)
    named = {line for line in every.splitlines() if "::" in line}
    assert named - set(some.splitlines())
    assert "deselected" not in every
