"""Whether the kernels of this machine compute what the formulas say: loss and gradient, in float64.

`doctor` runs it, in a few seconds and without the project's tests.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import ops, reference
from .backends import REGISTRY, set_isa
from .functional import class_balanced_loss
from .options import Activation, BackendName

ACTIVATIONS: tuple[Activation, ...] = ("softmax", "sigmoid")
GAMMAS = (0.0, 0.5, 2.0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((21, 10), (6, 1000), (2, 5, 6, 7), (9, 131))
STRIDED = SHAPES[-1]  # whose classes are not adjacent in memory
IGNORED = -100

RELATIVE = {torch.float64: 1e-12}  # others are computed in float32:
RELATIVE_FLOAT32 = 2e-5
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a spacing
SMALLEST = {torch.float64: 2.3e-308, torch.float16: 2.0**-24}
FLUSHED = 1.2e-38  # float32 below it may be 0
SLACK = 10  # of backend="reference": in its derivatives, which autograd makes, sums cancel


class Case(NamedTuple):
    """A loss of logits of some shape and type."""

    activation: Activation
    gamma: float
    dtype: torch.dtype
    soft: bool  # targets: one number per class, not class indices
    shape: tuple[int, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        strided = " with classes apart" if self.shape == STRIDED else ""
        targets = "soft targets" if self.soft else "class indices"
        name = f"{self.activation}, gamma = {self.gamma:g}, {dtype}"
        return f"{name}, {self.shape}{strided}, {targets}"


class Problem(NamedTuple):
    """The tensors of a call."""

    logits: Tensor
    target: Tensor
    weight: Tensor
    sample_weight: Tensor

    def to(self, device: str) -> Problem:
        return Problem(*(tensor.to(device) for tensor in self))


Result: TypeAlias = tuple[Tensor, Tensor]  # loss and gradient
Run: TypeAlias = Callable[[Problem, Case], Result]


class Route(NamedTuple):
    """A backend on a device, and what it is checked with."""

    name: str
    device: str
    run: Run
    cases: Sequence[Case]
    isa: str = ""  # an instruction set of the CPU's kernels; "": the best
    slack: float = 1.0  # times the relative error that is allowed


def all_cases() -> list[Case]:
    found = map(Case._make, product(ACTIVATIONS, GAMMAS, DTYPES, (False, True), SHAPES))
    return [case for case in found if not (case.soft and case.gamma and case[0] == "softmax")]


def covering(cases: Sequence[Case]) -> list[Case]:
    """Few of them, in which each activation has every value of every parameter."""

    def new(case: Case) -> set[tuple[Any, ...]]:
        values = {(case.activation, *item) for item in case._asdict().items()}
        return values - seen

    seen: set[tuple[Any, ...]] = set()
    chosen: list[Case] = []
    while new(best := max(cases, key=lambda case: len(new(case)))):
        seen |= new(best)
        chosen.append(best)
    return chosen


def routes(cases: Sequence[Case]) -> Iterator[Route]:
    """Every backend that is usable here, on every device that has kernels.

    Triton's kernels are compiled at their first call: they get few cases.
    """
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, backend in REGISTRY.items():
            title = f"{device} tensors, backend={name!r}"
            if name == "reference":
                yield Route(title, device, run_by(name), cases, slack=SLACK)
            elif device in backend.devices and backend.missing is None:
                some = cases if backend.soft else [case for case in cases if not case.soft]
                some = covering(some) if name == "triton" else some
                for isa in set_isa() if name == "cpu" else ("",):
                    full = f"{title}, {isa}" if isa else title
                    yield Route(full, device, run_by(name), some, isa)
        if device in ops.why_eager:
            yield Route(f"{device} tensors, eager operators", device, run_by(None), cases)


def run_by(name: str | None) -> Run:
    """By the public function; None: by the backend that it chooses."""
    backend: BackendName | None = name  # type: ignore[assignment]

    def run(given: Problem, case: Case) -> Result:
        leaf = given.logits.detach().requires_grad_()
        loss = class_balanced_loss(
            leaf, given.target, given.weight, sample_weight=given.sample_weight,
            activation=case.activation, gamma=case.gamma, ignore_index=IGNORED, backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    return run


class Expected(dict[Case, tuple[Problem, Result]]):
    """Problems, and their results by `reference.loss` in float64."""

    def __missing__(self, case: Case) -> tuple[Problem, Result]:
        given = problem(case)
        self[case] = given, exact(given, case)
        return self[case]


def problem(case: Case) -> Problem:
    """Rows from flat to nearly certain, right and wrong; one class index is ignored."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    N, C, *inner = case.shape
    spread = torch.logspace(-2, 1, N, dtype=torch.float64).reshape(N, *[1] * (len(case.shape) - 1))
    logits = (random(*case.shape) * 6 - 3) * spread
    target = (random(N, *inner) * C).long()
    target[-1] = IGNORED
    if case.soft:
        target = random(*case.shape) ** 4
        target = target / target.sum(1, keepdim=True)
    logits = logits.to(case.dtype)
    if case.shape == STRIDED:
        logits = logits.T.contiguous().T
    return Problem(logits, target, random(C).float() + 0.2, random(N, *inner).float() + 0.2)


def exact(given: Problem, case: Case) -> Result:
    leaf = given.logits.double().requires_grad_()
    loss = reference.loss(
        leaf, given.target, given.weight.double(), given.sample_weight.double(),
        activation=case.activation, gamma=case.gamma, ignore_index=IGNORED,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def failures_of(route: Route, expected: Expected) -> list[str]:
    """One line for each of its cases that fails; an exception is a failure."""
    failures = []
    with instruction_set(route.isa), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that eager PyTorch is slower, and the like
        for case in route.cases:
            given, want = expected[case]
            try:
                loss, grad = route.run(given.to(route.device), case)
                wrong = difference((loss.cpu(), grad.cpu()), want, case.dtype, route.slack)
            except Exception as error:  # whatever a broken installation raises
                told = str(error).strip().splitlines() or [""]
                wrong = f"{type(error).__name__}: {told[0]}"
            if wrong:
                failures.append(f"{case}: {wrong}")
    return failures


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The CPU's kernels of that name within; "": those that run anyway."""
    if not name:
        yield
        return
    best = set_isa(name)[0]
    try:
        yield
    finally:
        set_isa(best)


def relative_error(dtype: torch.dtype) -> float:
    """That a loss of logits of this type may have."""
    return RELATIVE.get(dtype, RELATIVE_FLOAT32)


def difference(got: Result, want: Result, dtype: torch.dtype, slack: float = 1.0) -> str:
    """What is wrong of a result, "" if nothing is.

    A loss may be off by a relative error, a gradient by that of the largest in its row and by its
    own rounding; slack multiplies the relative error.
    """
    relative, C = slack * relative_error(dtype), want[1].shape[1]
    flushed = C * (SMALLEST[dtype] if dtype is torch.float64 else FLUSHED)
    bound_of_loss = relative * want[0].abs() + flushed
    largest = want[1].abs().amax(1, keepdim=True)
    rounding = ROUNDING.get(dtype, 0.0) * want[1].abs()
    bound_of_grad = relative * largest + rounding + SMALLEST.get(dtype, flushed)
    return _beyond("loss", got[0], want[0], bound_of_loss) or _beyond(
        "gradient", got[1], want[1], bound_of_grad
    )


def _beyond(name: str, got: Tensor, want: Tensor, bound: Tensor) -> str:
    if got.shape != want.shape:
        return f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    bad = ~((got.double() - want).abs() <= bound)  # NaN too
    if not bad.any():
        return ""
    at = tuple(bad.nonzero()[0].tolist())
    return (
        f"{name}{list(at) if at else ''} = {float(got[at]):.6g}, expected {float(want[at]):.6g} "
        f"within {float(bound[at]):.1g} ({int(bad.sum())} of {bad.numel()} wrong)"
    )
