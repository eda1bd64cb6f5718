"""Every example in a docstring gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import cbloss_fused

MODULES = ["cbloss_fused"] + [
    f"cbloss_fused.{module.name}"
    for module in pkgutil.iter_modules(cbloss_fused.__path__)
    if module.name not in ("_C", "_cuda", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert failed == 0


@pytest.mark.parametrize("name", cbloss_fused.__all__)
def test_public_names_have_an_example(name):
    """Found, documented, and with an example that the test above runs."""
    text = getattr(cbloss_fused, name).__doc__
    assert text
    assert ">>>" in text
