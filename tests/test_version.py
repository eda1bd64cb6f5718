"""The version is stated in cbloss_fused/__init__.py; what repeats it agrees."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import cbloss_fused

ROOT = Path(__file__).parent.parent


def test_citation_states_the_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", text, re.MULTILINE) == [cbloss_fused.__version__]


def test_version_is_read_without_an_import():
    """setuptools reads a literal; anything else it would import, and torch with it."""
    tree = ast.parse((ROOT / "cbloss_fused" / "__init__.py").read_text(encoding="utf-8"))
    found = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert found == [cbloss_fused.__version__]
