"""The CUDA C++ kernels without a GPU: emulated in every order and error, with faults planted in
them, and as nvcc compiles them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulator import build, faults
from support.backends import BACKENDS, EMULATOR, loss_and_grad
from support.marks import FAMILIES
from support.oracle import oracle
from support.tolerances import same_bits

from cbloss_fused.backends import REGISTRY
from cbloss_fused.inputs import Inputs
from cbloss_fused.options import Formula, Options

FAMILY = pytest.mark.parametrize("family", FAMILIES)
CHECK = [sys.executable, "-m", "emulator.check"]


@pytest.fixture
def emulated():
    if EMULATOR is None:
        pytest.skip("the kernels are not emulated here")
    with BACKENDS["cuda"].active():
        yield BACKENDS["cuda"]


@pytest.fixture
def setting(emulated, monkeypatch):
    """setting(name, value) until the test ends."""
    emulator = EMULATOR
    assert emulator is not None
    return lambda name, value: monkeypatch.setattr(emulator.setting(name), "value", value)


@pytest.mark.parametrize("C", (10, 300, 1000, 8142, 20_000, 70_000), ids="C{}".format)
@FAMILY
def test_the_order_of_threads_changes_no_bit(emulated, setting, family, C):
    generator = torch.Generator().manual_seed(C)
    logits = torch.randn(3, C, generator=generator)
    target = torch.randint(C, (3,), generator=generator)
    for recompute in (False, True):
        options = {"activation": family, "gamma": 0.5, "recompute": recompute}
        want = loss_and_grad(emulated, logits, target, **options)
        for order in (1, 2, 3):
            setting("order", order)
            got = loss_and_grad(emulated, logits, target, **options)
            assert all(map(same_bits, got, want))
        setting("order", 0)


def rows_of_every_kind(C):
    generator = torch.Generator().manual_seed(C)
    logits = torch.randn(4, C, generator=generator)
    target, rows = torch.randint(C, (4,), generator=generator), torch.arange(4)
    for margin in (12, 20, 30, 45):
        sure = logits.clone()
        sure[rows, target] = margin + math.log(C)
        yield sure, target
    wrong = logits * 3
    wrong[rows, target] = -40
    flat = torch.full_like(logits, -math.log(max(C - 1, 1)))
    for kind in (logits, wrong, flat, logits * 30, logits * 1e4, logits - 25, logits + 3e4):
        yield kind, target


@pytest.mark.parametrize("error", (0, 1, 2, 3), ids=("exact", "up", "down", "either"))
@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 2.0, 1.5, 5.0), ids="g{}".format)
@FAMILY
def test_special_functions_at_their_worst(emulated, setting, family, gamma, error):
    """The errors that the PTX ISA allows the hardware, float32: 1.5e-5; without them 6e-6."""
    setting("error", error)
    bound = 1.5e-5 if error else 6e-6
    options = {"activation": family, "gamma": gamma, "reduction": "none"}
    for C in (10, 1000, 8142, 20_000):
        for logits, target in rows_of_every_kind(C):
            want = oracle(logits, target, **options)
            loss, grad = loss_and_grad(emulated, logits, target, **options)
            smallest = 2e-38 * C  # where terms may be flushed to 0
            assert ((loss - want[0]).abs() <= bound * want[0].abs() + smallest).all()
            largest = want[1].abs().amax(1, keepdim=True)
            assert ((grad - want[1]).abs() <= bound * largest + smallest).all()


def checked(library: Path | None, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [*CHECK, str(library), *arguments],
        capture_output=True, text=True, env=os.environ | environment, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_is_touched_outside_the_buffers(emulated, pytestconfig):
    """Pages without access around every buffer; every layout, option, order and error."""
    share, cases = ("1", 1280) if pytestconfig.getoption("long") else ("7", 183)
    assert checked(build.emulated(), "--share", share) == f"{cases} cases\n"


@pytest.mark.long
def test_under_sanitizers(emulated, pytestconfig):
    names = [subprocess.run(["g++", f"-print-file-name=lib{kind}san.so"], capture_output=True,
                            text=True).stdout.strip() for kind in ("a", "ub")]  # fmt: skip
    if not all(Path(name).is_absolute() for name in names):
        pytest.skip("g++ has no sanitizers here")
    environment = {"LD_PRELOAD": " ".join(names), "ASAN_OPTIONS": "detect_leaks=0"}
    library = build.emulated(sanitized=True)
    share, cases = ("11", 117) if pytestconfig.getoption("long") else ("29", 45)
    assert checked(library, "--share", share, **environment) == f"{cases} cases\n"


REFUSED = (ValueError, RuntimeError)  # torch 2.15 makes the second of what C++ throws


def test_the_operator_refuses_what_would_leave_its_buffers(emulated):
    with pytest.raises(REFUSED, match="within grad's storage"):
        torch.ops.cbloss_fused._scale(torch.ones(8), torch.tensor(2.0), 9)
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    arguments = (x, *Inputs(y), Formula.of(Options()), None, None, 1)
    for loss, wanted in ((torch.zeros(3), 2), (torch.zeros((), dtype=torch.float64), 1)):
        with pytest.raises(REFUSED, match=f"loss must be {wanted} contiguous"):
            REGISTRY["cuda"].loss(*arguments, loss, None, None)
    with pytest.raises(REFUSED, match="grad must have the shape"):
        REGISTRY["cuda"].loss(*arguments, torch.zeros(()), torch.zeros(2, 2), None)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What the checks say of each planted fault, and of the kernels without one."""
    folder, planted = tmp_path_factory.mktemp("faults"), faults.NONE + faults.FAULTS
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        places = [folder / str(i) for i in range(len(planted))]
        return dict(zip(planted, pool.map(faults.plant, planted, places), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="the kernels are not emulated here")
@pytest.mark.parametrize("none", faults.NONE, ids=lambda fault: fault.dtype)
def test_nothing_is_found_without_a_fault(findings, none):
    """Else whatever fails for another reason would count as a fault that is found."""
    assert findings[none] is None


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="the kernels are not emulated here")
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(findings, fault):
    assert findings[fault] is not None
