"""Backends, samples, oracle and tolerances: once, for every test.

A backend is one entry of BACKENDS; every test that takes the fixture `backend` runs on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch
from cuda.build import emulated
from hypothesis import strategies as st
from torch import Tensor

from cbloss_fused import class_balanced_loss, cuda, kernels, ops, reference
from cbloss_fused.call import Inputs, formula

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

FAMILIES = ("softmax", "sigmoid")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GAMMAS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 5.0)
REDUCTIONS = ("none", "mean", "weighted_mean", "sum")
IGNORED = -100


def name_of(value: object) -> str | None:
    """Ids of parameters: float16, g0.5 is left to the caller."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


INTERPRETED = kernels.available and os.environ.get("TRITON_INTERPRET") == "1"

SHARE = 18 if INTERPRETED else 8  # see share()
CPU_SHARE = 3  # the best instruction set runs everything; others are the same source, or eager
QUICK = 12  # a run that is not --long takes one of so many of these
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
CUDA_SHARE = 1 if DEVICE == "cuda" else 8  # nothing to compile; emulated it is slow
if DEVICE == "cuda":
    torch.set_default_device(DEVICE)
if INTERPRETED:
    import interpreter

# Backends -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """What a test needs to know about an implementation of the two operators."""

    argument: str | None  # of class_balanced_loss(backend=...)
    isa: str = ""  # an instruction set of the C++ kernels
    fallback: bool = False  # the operators' Python implementation instead of the kernels

    @property
    def gpu(self) -> bool:
        """Takes values as given, whether it runs on a GPU, interpreted or emulated."""
        return self.argument in ("triton", "cuda")

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Equal whatever layout and threads; others' sums depend on where a row begins and ends."""
        half = a.element_size() == 2
        rtol, atol = (0, 0)
        if self.fallback or self.gpu:
            rtol, atol = (1e-2 if half else 1e-3, 1e-6)
        return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "_warned", True)
            if self.fallback:
                patch.setattr(ops, "loss", ops._loss)
                patch.setattr(ops, "gradient", ops._gradient)
                patch.setattr(ops, "loss_and_stats", None)
                patch.setitem(ops.losses, None, ops._loss)
                patch.setitem(ops.gradients, None, ops._gradient)
            if self.gpu:
                patch.setattr(ops, "loss", ops.losses[self.argument])
                patch.setattr(ops, "gradient", ops.gradients[self.argument])
                patch.setattr(ops, "new_grad", _co_aligned)
            if self.isa:
                best = torch.ops.cbloss_fused._set_isa(self.isa).split()[0]
            try:
                yield
            finally:
                if self.isa:
                    torch.ops.cbloss_fused._set_isa(best)

    def scale(self, grad: Tensor, grad_loss: Tensor, numel: int) -> None:
        """The kernel that multiplies a stored gradient."""
        if self.argument == "cuda":
            torch.ops.cbloss_fused._scale(grad, grad_loss, numel)
        else:
            kernels.load().scale_gradient(grad, grad_loss, numel)

    @contextlib.contextmanager
    def on_a_gpu_of(self, multiprocessors: int) -> Iterator[None]:
        """As if the GPU had so many, where it is not a real one."""
        if DEVICE == "cuda":
            yield
            return
        with pytest.MonkeyPatch.context() as patch:
            if self.argument == "triton":
                from cbloss_fused.kernels import launch, layout

                device = layout.Device(multiprocessors, 32)
                patch.setattr(launch, "device_of", lambda tensor: device)
            elif EMULATOR is not None:
                patch.setattr(EMULATOR.setting("multiprocessors"), "value", multiprocessors)
            yield


def _co_aligned(logits: Tensor) -> Tensor:
    """As on a GPU, where the tensor's address is known."""
    if torch.compiler.is_compiling() or logits.is_meta or type(logits) is not Tensor:
        return torch.empty_like(logits)
    return ops.co_aligned(logits)


class Emulator:
    """The CUDA kernels on this CPU: tests/cuda/host/cuda_runtime.h."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        cuda.load_from(library, "cpu")

    def setting(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, f"emulated_{name}")


def _emulator() -> Emulator | None:
    if INTERPRETED or DEVICE == "cuda":
        return None
    library = emulated()
    return None if library is None else Emulator(library)


def _backends() -> dict[str, Backend]:
    """On a GPU its kernels; under TRITON_INTERPRET=1 the Triton kernels; else all on the CPU."""
    if INTERPRETED:
        return {"triton": Backend("triton")}
    if DEVICE == "cuda":
        names = ["triton"] * kernels.available + ["cuda"] * (cuda.device == "cuda")
        return {name: Backend(name) for name in names}
    found = {"fallback": Backend(None, fallback=True)}
    if ops.missing is None:
        isas = torch.ops.cbloss_fused._set_isa("").split()
        found = {f"cpu-{isa}": Backend("cpu", isa=isa) for isa in isas} | found
    if EMULATOR is not None:
        found["cuda"] = Backend("cuda")
    return found


EMULATOR = _emulator()
BACKENDS = _backends()
BEST = next(iter(BACKENDS.values()))


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # NumPy warns of every NaN and infinity that a kernel handles
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        interpreter.mend()
    if DEVICE == "cuda":  # torch's own operators may be as they are
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="many more of the combinations of parameters"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of many combinations of parameters some; all of a test that is named on the command line.

    Of tests that take a backend, and of those marked `sampled`. By a hash of their names and
    parameters, not of their files: for each backend, enough to have every value of every parameter
    at least once, and one of `share` of the rest.
    """
    if any("::" in argument for argument in config.args):
        return
    long = config.getoption("long")
    covered: set[tuple[object, ...]] = set()
    kept, left_out = set(), []
    for item in sorted(items, key=_hash):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backend = parameters.get("backend", parameters.get("gpu"))
        if not isinstance(backend, Backend) and not item.get_closest_marker("sampled"):
            kept.add(item)
            continue
        test = getattr(item, "originalname", item.name), repr(backend)
        values = {(*test, name, repr(value)) for name, value in parameters.items()}
        if values - covered or _hash(item) % share(parameters, backend, long) == 0:
            covered |= values
            kept.add(item)
        else:
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item in kept]


def _hash(item: pytest.Item) -> int:
    return zlib.crc32(item.name.encode())


def share(parameters: dict[str, object], backend: Backend | None, long: bool) -> int:
    """One of how many combinations runs."""
    if backend is None or (long and len(parameters) < 3):
        each = 1
    elif backend.argument == "triton":  # interpreted, or compiled; long rows even less
        C = parameters.get("C", 0)
        each = SHARE * (4 if isinstance(C, int) and C >= 1000 else 1)
    elif backend.argument == "cuda":
        each = CUDA_SHARE
    else:
        each = 1 if backend is BEST else CPU_SHARE
    return each if long else each * QUICK


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend, one after the other."""
    with request.param.active():
        yield request.param


GPU_BACKENDS = {name: each for name, each in BACKENDS.items() if each.gpu}


@pytest.fixture(params=GPU_BACKENDS.values() or [None], ids=GPU_BACKENDS.keys() or ["none"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The GPU kernels, where they can run."""
    if request.param is None:
        pytest.skip("needs a GPU, TRITON_INTERPRET=1 or g++")
    with request.param.active():
        yield request.param


@contextlib.contextmanager
def nothing_synchronises() -> Iterator[None]:
    """Within, on a GPU, what waits for the device raises."""
    if DEVICE == "cpu":
        yield
        return
    with warnings.catch_warnings():  # that this mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True, scope="session")
def _surroundings() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel forgets to write is seen. Threads only where tested."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def loss_and_grad(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient through the public function; the logits keep their layout."""
    leaf = logits.detach().requires_grad_()
    loss = class_balanced_loss(leaf, target, weight, backend=backend.argument, **options)
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output)
    return loss.detach(), grad


def operator_arguments(
    logits: Tensor,
    target: Tensor,
    family: str,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    vectors: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[tuple[object, ...], Tensor, tuple[object, ...]]:
    """Arguments of the operator loss before its buffers, a loss buffer, the formula's numbers."""
    numbers = formula(family, gamma, label_smoothing=label_smoothing)
    number = REDUCTIONS.index(reduction)
    arguments = (logits, *Inputs(target, *vectors), numbers, IGNORED, number)
    return arguments, ops.new_loss(logits, target, number), numbers


# Oracle -------------------------------------------------------------------------------------------


def oracle(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """The eager formula, differentiated by autograd, in float64 of the same numbers."""
    compute = reference.compute_dtype(logits.dtype)

    def exact(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.to(compute).double()

    leaf = logits.double().detach().clone().requires_grad_()
    vectors = {"logit_bias": exact(logit_bias), "margin": exact(margin)}
    loss = reference.loss(
        leaf, target, exact(weight), exact(sample_weight), exact(normalizer), **vectors, **options
    )
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output.double())
    return loss.detach(), grad


@cache
def sample(C: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, target, weight, sample_weight: rows flat to certain, right and wrong; one ignored."""
    N = 21 if C < 100 else 5  # few classes: more than a vector of rows
    g = torch.Generator(DEVICE).manual_seed(seed + C)
    spread = torch.logspace(-3, 1, N, dtype=torch.float64).unsqueeze(1)
    logits = torch.randn(N, C, generator=g, dtype=torch.float64) * spread
    target = torch.randint(C, (N,), generator=g)
    logits[0, target[0]] += 12
    logits[2, target[2]] -= 12
    target[1] = IGNORED
    weight = torch.rand(C, generator=g, dtype=torch.float64) + 0.2
    sample_weight = torch.rand(N, generator=g, dtype=torch.float64) + 0.2
    return logits.to(dtype), target, weight.float(), sample_weight.float()


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, object]:
    """The options of a formula, and a reduction, in any combination that has a meaning."""
    any_gamma = st.sampled_from(GAMMAS) | st.floats(0, 6)
    options = {
        "activation": draw(st.sampled_from(FAMILIES)),
        "gamma": draw(any_gamma),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 0.9))),
        "logit_scale": draw(st.sampled_from((1.0, 0.5, 3.0))),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    if options["activation"] == "softmax":
        return options | {"z_loss": draw(st.sampled_from((0.0, 0.01)))}
    if options["reduction"] != "weighted_mean":
        options["class_weighting"] = draw(st.sampled_from(("sample", "class")))
    return options | {
        "gamma_neg": draw(st.none() | any_gamma),
        "alpha": draw(st.none() | st.floats(0, 1)),
        "clip": draw(st.sampled_from((0.0, 0.05, 0.3))),
    }


def soft_targets(draw: st.DrawFn, logits: Tensor, generator: torch.Generator) -> Tensor:
    """One-hot, soft, or multi-hot, as floats or bools, in the shape of the logits."""
    kind = draw(st.sampled_from(("one-hot", "soft", "multi-hot", "bool")))
    t = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    if kind == "one-hot":
        return torch.zeros_like(t).scatter(1, t.argmax(1, keepdim=True), 1.0)
    if kind == "soft":
        return t.pow(4) / t.pow(4).sum(1, keepdim=True)
    return t > 0.7 if kind == "bool" else (t > 0.7).double()


# Tolerances ---------------------------------------------------------------------------------------

EXACT = 1e-12, 2e-5  # relative, computed in float64 or float32
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a spacing, relative
SMALLEST = {torch.float64: 2.3e-308, torch.float16: 2.0**-24}  # float32: may be flushed to 0
FLUSHED = 1.2e-38  # a class


def assert_loss(
    got: Tensor, want: Tensor, dtype: torch.dtype, C: int = 1, slack: float = 0, **context: object
) -> None:
    """The loss, or every row's, against float64; C: where flushed terms count."""
    assert got.dtype == reference.compute_dtype(dtype)
    assert got.shape == want.shape
    rtol = EXACT[0] if dtype == torch.float64 else EXACT[1]
    smallest = SMALLEST[dtype] if dtype == torch.float64 else FLUSHED
    bound = rtol * want.abs() + C * smallest + slack
    _assert_within(got, want, bound, "loss", context)


def assert_grad(
    got: Tensor, want: Tensor, dtype: torch.dtype, slack: float = 0, **context: object
) -> None:
    """The gradient (N, C, ...): relative to the row's largest, half types rounded once."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    rtol = EXACT[0] if dtype == torch.float64 else EXACT[1]
    largest = want.abs().amax(1, keepdim=True)
    smallest = SMALLEST.get(dtype, want.shape[1] * FLUSHED)
    bound = rtol * largest + ROUNDING.get(dtype, 0) * want.abs() + smallest
    bound = bound + slack
    _assert_within(got, want, bound, "gradient", context)


def _assert_within(
    got: Tensor, want: Tensor, bound: Tensor, what: str, context: dict[str, object]
) -> None:
    got = got.detach().double()
    good = ((got - want).abs() <= bound) | (got == want) | (got.isnan() & want.isnan())
    if good.all():
        return
    where = tuple((~good).nonzero()[0].tolist())
    told = "".join(f", {key} {value}" for key, value in context.items())
    pytest.fail(
        f"{what}{list(where)} is {got[where]:.9g}, expected {want[where]:.9g} "
        f"within {bound.expand_as(want)[where]:.2g} "
        f"({int((~good).sum())} of {good.numel()} wrong{told})"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN too."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integer), b.contiguous().view(integer)
    )
