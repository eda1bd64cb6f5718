"""doctor: what it tells, and that a wrong kernel fails it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import DEVICE

import cbloss_fused
from cbloss_fused import class_balanced_loss, cli, doctor, ops, self_test
from cbloss_fused.backends import REGISTRY, set_isa
from cbloss_fused.self_test import Case, Expected, Route, all_cases, covering, failures_of, run_by

ROOT = Path(cbloss_fused.__file__).parents[1]
FEW, ROUTES = covering(all_cases()), list(self_test.routes(all_cases()))
CPU_BUILT = pytest.mark.skipif(REGISTRY["cpu"].missing is not None, reason="no library")


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "all_cases", lambda: FEW)


def told(capfd: pytest.CaptureFixture[str], *options: str, status: int = 0) -> str:
    """What doctor prints; it says nothing elsewhere."""
    if status:
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", *options])
        assert stop.value.code == status
    else:
        cli.main(["doctor", *options])
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_text(capfd):
    lines = told(capfd).splitlines()
    assert lines[0].startswith(f"cbloss_fused {cbloss_fused.__version__}, python 3.")
    assert f"torch {torch.__version__}" in lines[0]
    for word in ("platform", "CPU", "threads", "CPU kernels", "CUDA kernels", "GPUs", "device cpu"):
        assert sum(line.startswith(f"{word}: ") for line in lines) == 1
    checks = [line for line in lines if line.startswith("self-test, ")]
    assert all(line.endswith(" checks passed") for line in checks)
    passed = sum(int(line.rsplit(": ")[-1].split()[0]) for line in checks)
    assert lines[-1] == f"all {passed} checks passed"
    for name, backend in REGISTRY.items():
        usable = name == "reference" or (backend.missing is None and DEVICE in backend.devices)
        assert usable == any(f"{DEVICE} tensors, backend={name!r}" in line for line in checks)


def test_json(capfd):
    found = json.loads(told(capfd, "--json"))
    assert found["passed"] is True
    assert found["versions"]["cbloss_fused"] == cbloss_fused.__version__
    assert found["backends"] == cbloss_fused.backends()
    assert found["threads"]["torch"] == torch.get_num_threads()
    kernels = found["kernels"]["cpu"]
    assert kernels["missing"] == REGISTRY["cpu"].missing
    if kernels["missing"] is None:
        assert Path(kernels["file"]).exists()
        assert kernels["instruction_sets"] == set_isa()
        names = {check["name"] for check in found["self_test"]}
        assert {f"cpu tensors, backend='cpu', {isa}" for isa in set_isa()} <= names


def test_cases_cover_every_value():
    names = {"gamma": self_test.GAMMAS, "dtype": self_test.DTYPES, "shape": self_test.SHAPES}
    for name, values in (names | {"soft": (False, True)}).items():
        for activation, value in product(self_test.ACTIVATIONS, values):
            found = [case for case in FEW if case.activation == activation]
            assert value in [getattr(case, name) for case in found]
    assert len(FEW) < len(all_cases()) / 10


@pytest.mark.long
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_every_case(route):
    assert failures_of(route, Expected()) == []


# Faults -------------------------------------------------------------------------------------------


def wrong_loss(loss, grad, case):
    return loss * (1 + (1e-10 if case.dtype is torch.float64 else 1e-3)), grad


def wrong_element(loss, grad, case):
    index = (-1, -1) + (0,) * (grad.dim() - 2)
    grad[index] += 0.02 * grad.abs().max()
    return loss, grad


def no_number(loss, grad, case):
    return loss, torch.where(grad == grad.amax(), float("nan"), grad)


def no_scalar(loss, grad, case):
    return loss.expand(2), grad


def an_exception(loss, grad, case):
    raise RuntimeError("the kernel failed\nsomewhere")


FAULTS = {
    wrong_loss: "loss = ",
    wrong_element: "gradient[",
    no_number: " = nan, expected ",
    no_scalar: "loss has shape (2,), expected ()",
    an_exception: "RuntimeError: the kernel failed",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_every_case(fault):
    right = run_by("reference")

    def run(given: self_test.Problem, case: Case) -> self_test.Result:
        loss, grad = right(given, case)
        return fault(loss, grad, case)

    expected = Expected()
    failures = failures_of(Route("", DEVICE, run, FEW, slack=self_test.SLACK), expected)
    assert len(failures) == len(FEW)
    for case, failure in zip(FEW, failures, strict=True):
        assert failure.startswith(f"{case}: ")
        assert FAULTS[fault] in failure
        assert "\n" not in failure
    assert failures_of(Route("", DEVICE, right, FEW, slack=self_test.SLACK), expected) == []


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of sigmoid losses are off by a thousandth on the CPU."""
    backend = REGISTRY["cpu"]

    def loss(*arguments: Any) -> None:
        backend.loss(*arguments)
        sigmoid, grad = arguments[8][0], arguments[-2]
        if sigmoid and grad is not None:
            grad.mul_(1.02)

    monkeypatch.setitem(REGISTRY, "cpu", backend._replace(loss=loss))


@CPU_BUILT
@pytest.mark.skipif(DEVICE != "cpu", reason="the fault is in the CPU's kernels")
def test_a_wrong_kernel_fails(wrong_kernel, capfd):
    text = told(capfd, status=1)
    assert "self-test, cpu tensors, backend='cpu', baseline: " in text
    assert "  sigmoid, gamma = " in text
    assert "gradient[" in text
    assert "  softmax" not in text
    assert text.splitlines()[-1].endswith(" checks failed")
    found = json.loads(told(capfd, "--json", status=1))
    assert found["passed"] is False
    failures = [failure for check in found["self_test"] for failure in check["failures"]]
    assert failures
    assert all(failure.startswith("sigmoid") for failure in failures)
    assert text.splitlines()[-1].startswith(f"{len(failures)} of ")


@CPU_BUILT
def test_the_best_instruction_set_runs_afterwards():
    """Variants differ in last bits: whoever answers is seen in them."""
    logits, target = torch.randn(64, 1000, device="cpu"), torch.arange(64, device="cpu")

    def losses() -> Any:
        return class_balanced_loss(logits, target, activation="sigmoid", reduction="none")

    set_isa(set_isa()[0])
    before = losses()
    for isa in set_isa():
        failures_of(Route("", "cpu", run_by("cpu"), FEW[:1], isa), Expected())
    assert torch.equal(losses(), before)


# What is not here ---------------------------------------------------------------------------------


def test_without_kernels(monkeypatch, capfd):
    """Eager PyTorch in their place is checked, and the reason told."""
    reason = "no C++ compiler found"
    monkeypatch.setitem(REGISTRY, "cpu", REGISTRY["cpu"]._replace(missing=reason))
    for name in ("cuda", "triton"):
        monkeypatch.setitem(REGISTRY, name, REGISTRY[name]._replace(missing="not built"))
    monkeypatch.setitem(ops.why_eager, DEVICE, reason)
    monkeypatch.setattr(ops, "_warned", False)
    text = told(capfd)
    assert f"CPU kernels: none usable: {reason}\n" in text
    assert f"self-test, {DEVICE} tensors, eager operators: {len(FEW)} checks passed\n" in text
    assert f"all {2 * len(FEW)} checks passed" in text


@pytest.mark.parametrize("status, shown", [(0, ["NVIDIA X, 999.1, 9.0"]), (1, [])])
def test_gpus_by_the_driver(status, shown, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho NVIDIA X, 999.1, 9.0\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert doctor.nvidia_driver() == shown
    if shown and not torch.cuda.is_available():
        line = next(line for line in doctor.as_lines(doctor.installation()) if "GPUs" in line)
        assert "none that PyTorch can use" in line
        assert "NVIDIA X, 999.1, 9.0" in line


def test_a_package_that_is_not_there_or_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.version_of("no_such_package") is None
    (tmp_path / "broken_package.py").write_text("raise OSError('no such library')")
    assert doctor.version_of("broken_package") == "cannot be imported: no such library"


def test_the_issue_form_asks_for_it():
    form = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    assert "python -m cbloss_fused doctor" in form.read_text(encoding="utf-8")


@pytest.mark.long
def test_process():
    """The document is all of standard output, whatever PyTorch says."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-m", "cbloss_fused", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["passed"] is True
    assert sum(check["checks"] for check in found["self_test"]) >= len(all_cases())
