"""Every Python snippet of the README and of docs/ runs, on the CPU, and what it asserts holds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cbloss_fused import class_balanced_weights

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a reader of that recipe has, and the tests need not have.
OPTIONAL = ("pandas", "accelerate", "lightning", "tensorboard", "transformers")


class Snippet(NamedTuple):
    page: Path
    heading: str
    line: int  # of the page, before its first
    code: str

    def run(self, names: dict[str, Any]) -> None:
        """In these names alone; a traceback shows the page's own lines."""
        code = compile("\n" * self.line + self.code, str(self.page), "exec", dont_inherit=True)
        with torch.device("cpu"):
            torch.manual_seed(0)
            exec(code, names)


def snippets(page: Path) -> Iterator[Snippet]:
    heading, start, lines = "", 0, page.read_text("utf-8").splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line == "```python\n":
            start = i + 1
        elif start and line == "```\n":
            yield Snippet(page, heading, start, "".join(lines[start:i]))
            start = 0
        elif not start and line.startswith("#"):
            heading = line.strip("# \n")


def named() -> dict[str, Any]:
    """What the snippets of docs/options.md take as given."""
    counts = torch.tensor([50, 20, 5])
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 0, 1, 2])
    hot = torch.nn.functional.one_hot(target, 3).float()
    weight = class_balanced_weights(counts)
    return {
        "counts": counts, "logits": logits, "target": target,
        "x": logits, "y": target, "t": hot, "w": weight, "cosine": logits.tanh(),
    }  # fmt: skip


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: f"{s.page.stem}: {s.heading}")
def test_snippet(snippet):
    given: dict[str, Any] = {}
    if snippet.page.name == "options.md":
        with torch.device("cpu"):
            given = named()
            exec("from cbloss_fused import *", given)
    try:
        with warnings.catch_warnings():
            if re.search(rf"^(import|from) ({'|'.join(OPTIONAL)})\b", snippet.code, re.MULTILINE):
                warnings.simplefilter("ignore")  # they warn of each other
            snippet.run(given)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    """Files are there, and so are the headings, as GitHub names them."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in names, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_tests(page):
    """Tests that a page names are in the file that it links to."""
    for name, path in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", page.read_text("utf-8")):
        assert f"\ndef {name}(" in (page.parent / path).read_text("utf-8"), name
