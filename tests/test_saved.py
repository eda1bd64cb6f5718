"""What earlier versions saved, by tests/data/save.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data import save
from support.backends import INTERPRETED

import cbloss_fused
from cbloss_fused import DeferredReweighting, class_balanced_weights

DATA = Path(__file__).parent / "data"
VERSIONS = sorted(path.stem.removeprefix("states-") for path in DATA.glob("states-*.pt"))
EACH = pytest.mark.parametrize("name", save.MODULES)
OF_VERSION = pytest.mark.parametrize("version", VERSIONS)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with Triton")


def states(version):
    return torch.load(DATA / f"states-{version}.pt", weights_only=True)


def assert_same_loss(module, name, found):
    with torch.no_grad():
        loss = module(found["features" if name == "linear" else "logits"], found["target"])
    torch.testing.assert_close(loss, found[name]["loss"])


@OF_VERSION
@EACH
def test_a_saved_state_loads(version, name):
    found, module = states(version), save.make(name)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    module.load_state_dict(found[name]["state"])
    assert_same_loss(module, name, found)
    if name == "deferred":  # its last epoch with uniform weights has begun
        assert module.weight.tolist() == [1, 1, 1, 1, 0]
        DeferredReweighting(module, save.DEFER).step()
        want = class_balanced_weights(save.COUNTS, 0.999, empty="zero")
        torch.testing.assert_close(module.weight, want)


@OF_VERSION
@EACH
def test_a_saved_module_loads(version, name):
    """Whole, as torch.save(model) has it: with the attributes that it had."""
    module = torch.load(DATA / f"modules-{version}.pt", weights_only=False)[name]
    assert_same_loss(module, name, states(version))
    assert repr(module) == repr(save.make(name))
    assert_same_state(module.state_dict(), states(version)[name]["state"])


def assert_same_state(found, want):
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(found[key], value), key


def test_this_version_is_among_them():
    assert cbloss_fused.__version__ in VERSIONS
