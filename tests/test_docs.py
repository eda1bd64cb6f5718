"""Every example in a docstring gives what it says."""

from __future__ import annotations

import doctest
import pkgutil

import pytest

import cbloss_fused.experiments

MODULES = ["cbloss_fused"] + [
    module.name
    for package in (cbloss_fused, cbloss_fused.experiments)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if module.name.rpartition(".")[2] not in ("_C", "_cuda", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = pytest.importorskip(name, exc_type=ImportError)  # experiments need extras
    failed, _ = doctest.testmod(module, raise_on_error=False)
    assert failed == 0


@pytest.mark.parametrize("name", cbloss_fused.__all__)
def test_public_names_have_an_example(name):
    """Found, documented, and with an example that the test above runs."""
    text = getattr(cbloss_fused, name).__doc__
    assert text
    assert ">>>" in text
