"""The head with its loss: the loss and gradients of all logits, which are never in memory."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED
from support.marks import DTYPES, REDUCTIONS, name_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cbloss_fused import (
    ClassBalancedLoss,
    ClassShards,
    LinearClassBalancedLoss,
    class_balanced_loss,
    linear_autograd,
    linear_class_balanced_loss,
)
from cbloss_fused.chunks import BYTES, LEAST_ROWS, chunk_rows

N, D, C = 11, 6, 9
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
FORMULAS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "focal": {"gamma": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3},
    "adjusted": {"logit_scale": 2.0, "logit_bias": True, "margin": True},
    "sigmoid": {"activation": "sigmoid", "gamma": 1.5, "alpha": 0.25, "background_index": C},
    "asymmetric": {"activation": "sigmoid", "gamma_neg": 2.0, "clip": 0.05, "pos_weight": True},
}
SOFT: dict[str, dict[str, Any]] = {
    "soft": {"label_smoothing": 0.1},
    "multi-hot": {"activation": "sigmoid", "class_weighting": "class", "ignore_index": -1},
}
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=DEVICE)


def head(dtype: torch.dtype, bias: bool = True, rows: tuple[int, ...] = (N,)) -> list[Tensor]:
    """input, weight, bias: leaves."""
    found = [draw(0, *rows, D), draw(1, C, D), *([draw(2, C)] if bias else [])]
    return [t.to(dtype).requires_grad_() for t in found]


def targets(kind: str, rows: tuple[int, ...] = (N,)) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(3)
    if kind == "soft":
        return torch.rand(*rows, C, generator=generator, device=DEVICE).softmax(-1)
    if kind == "multi-hot":
        return torch.randint(-1, 2, (*rows, C), generator=generator, device=DEVICE).float()
    found = torch.randint(C, rows, generator=generator, device=DEVICE)
    found.view(-1)[2:3] = -100
    if kind == "sigmoid":
        found.view(-1)[5:7] = C
    return found


def options_of(kind: str, reduction: str) -> dict[str, Any]:
    found: dict[str, Any] = {**(FORMULAS | SOFT)[kind], "reduction": reduction}
    for name in ("logit_bias", "margin", "pos_weight"):
        if found.get(name):
            found[name] = draw(4, C).abs()
    if found.get("class_weighting") == "class" and reduction == "weighted_mean":
        found["class_weighting"] = "sample"
    return found


def expected(
    leaves: list[Tensor], target: Tensor, weight: Tensor | None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """In float64, from all logits, by the differentiable formula."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = F.linear(*wide).reshape(-1, C)
    flat = target.reshape(-1, C) if target.is_floating_point() else target.reshape(-1)
    loss = class_balanced_loss(logits, flat, weight, backend="reference", **options)
    return loss, list(torch.autograd.grad((loss * factors(loss)).sum(), wide))


def factors(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), device=DEVICE, dtype=loss.dtype).view(loss.shape)


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype] * max(1.0, want.abs().max().item())
    torch.testing.assert_close(got.double(), want.view(got.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_size", (None, 1, 4), ids="chunk{}".format)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no_bias"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", (*FORMULAS, *SOFT))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_same_as_all_logits(backend, dtype, kind, reduction, bias, chunk_size):
    leaves, target, options = head(dtype, bias), targets(kind), options_of(kind, reduction)
    weight = draw(5, C).abs()
    if not target.is_floating_point():
        options["sample_weight"] = draw(6, N).abs()
    want, grads = expected(leaves, target, weight, **options)
    input, linear_weight, *rest = leaves
    loss = linear_class_balanced_loss(
        input, linear_weight, target, weight, linear_bias=rest[0] if rest else None,
        chunk_size=chunk_size, backend=backend.argument, **options,
    )  # fmt: skip
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near(loss, want, dtype)
    for got, grad in zip(
        torch.autograd.grad((loss * factors(loss)).sum(), leaves), grads, strict=True
    ):
        assert got.dtype == dtype
        near(got, grad, dtype)


@pytest.mark.parametrize("frozen", ("input", "weight", "bias", "all"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_frozen(backend, reduction, frozen):
    """Whatever is frozen gets no gradient, and the others the same as before."""
    leaves, target = head(torch.float32), targets("softmax")
    want, grads = expected(leaves, target, None, reduction=reduction)
    for name, leaf in zip(("input", "weight", "bias"), leaves, strict=True):
        leaf.requires_grad_(frozen not in (name, "all"))
    input, weight, bias = leaves
    loss = linear_class_balanced_loss(
        input, weight, target, linear_bias=bias, chunk_size=4, reduction=reduction,
        backend=backend.argument,
    )  # fmt: skip
    near(loss, want, torch.float32)
    if frozen == "all":
        assert not loss.requires_grad
        return
    (loss * factors(loss)).sum().backward()
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf.requires_grad:
            assert leaf.grad is not None
            near(leaf.grad, grad, torch.float32)
        else:
            assert leaf.grad is None


class LargestTensor(TorchDispatchMode):
    """The most elements that an operator made, and how many products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.elements = max(self.elements, found.untyped_storage().nbytes() // 4)
        self.products += func.overloadpacket in PRODUCTS
        return found


@pytest.mark.parametrize("needed", ((True, True), (False, True), (True, False), (False, False)))
def test_memory_and_products(needed, monkeypatch):
    """No tensor larger than a chunk's logits or a gradient; a product for each gradient."""
    inside = linear_autograd._Operators(linear_autograd._loss, linear_autograd._gradient)
    monkeypatch.setattr(linear_autograd, "_operators", inside)  # a mode sees no operator's own
    rows, classes, chunk = 64, 640, 16
    input, weight = draw(0, rows, D).float(), draw(1, classes, D).float()
    for leaf, requires in zip((input, weight), needed, strict=True):
        leaf.requires_grad_(requires)
    target = torch.arange(rows, device=DEVICE)
    with LargestTensor() as seen:
        loss = linear_class_balanced_loss(input, weight, target, chunk_size=chunk)
        if any(needed):
            loss.backward()
    assert seen.elements <= chunk * classes
    assert seen.products == rows // chunk * (1 + sum(needed))


def test_evaluation_computes_no_gradient(monkeypatch):
    """Parameters require grad under no_grad, too."""
    inside = linear_autograd._Operators(linear_autograd._loss, linear_autograd._gradient)
    monkeypatch.setattr(linear_autograd, "_operators", inside)
    input, weight, bias = head(torch.float32)
    target = torch.arange(N, device=DEVICE) % C
    for shards in (None, ClassShards(C)):
        with LargestTensor() as seen, torch.no_grad():
            linear_class_balanced_loss(
                input, weight, target, linear_bias=bias, shards=shards, chunk_size=N
            )
        assert seen.products == 1


def test_meta_tensors():
    input, weight = torch.empty(4, D, device="meta"), torch.empty(C, D, device="meta")
    target = torch.empty(4, dtype=torch.int64, device="meta")
    loss = linear_class_balanced_loss(input, weight, target, reduction="none")
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (4,), torch.float32)


def test_tied_weights_and_two_backwards(backend):
    """An embedding that is the head too; retain_graph gives the gradient twice."""
    input, weight, _ = head(torch.float32)
    target = targets("softmax")

    def loss_of(fused: bool) -> Tensor:
        embedded = F.embedding(target.clamp(min=0), weight) + input
        if fused:
            return linear_class_balanced_loss(
                embedded, weight, target, chunk_size=4, backend=backend.argument
            )
        return F.cross_entropy(F.linear(embedded, weight), target)

    want = torch.autograd.grad(loss_of(False), (input, weight))
    loss = loss_of(True)
    for factor in (3.0, 0.5, 1.0):  # each from the same stored gradient
        found = torch.autograd.grad(factor * loss, (input, weight), retain_graph=factor != 1)
        for got, grad in zip(found, want, strict=True):
            torch.testing.assert_close(got, factor * grad)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss_of(True), input, create_graph=True)


def test_weights_change_before_the_backward(backend):
    """As a schedule may do: a row's weight is part of what the forward left."""
    input, head_weight, _ = head(torch.float32)
    target, weight = targets("softmax"), draw(5, C).abs().float()
    options: dict[str, Any] = {"reduction": "none", "backend": backend.argument}
    loss = linear_class_balanced_loss(input, head_weight, target, weight, **options)
    (want,) = torch.autograd.grad(loss.sum(), input, retain_graph=True)
    weight.mul_(2)
    (got,) = torch.autograd.grad(loss.sum(), input)
    assert torch.equal(got, want)


def test_leading_dimensions(backend):
    leaves, target = head(torch.float32, rows=(2, 3)), targets("softmax", (2, 3))
    sample = draw(6, 2, 3).abs()
    options: dict[str, Any] = {"reduction": "none", "backend": backend.argument}
    input, weight, bias = leaves
    loss = linear_class_balanced_loss(
        input, weight, target, linear_bias=bias, sample_weight=sample, **options
    )
    assert loss.shape == (2, 3)
    near(loss, expected(leaves, target, None, sample_weight=sample.flatten(), reduction="none")[0],
         torch.float32)  # fmt: skip
    one = linear_class_balanced_loss(input[0, 0], weight, target[0, 0], linear_bias=bias, **options)
    torch.testing.assert_close(one, loss[0, 0] / sample[0, 0].float())


@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
def test_statistics(backend, recompute):
    leaves, target = head(torch.float32), targets("softmax")
    target[target == 1] = 0  # a class without rows
    input, weight, bias = leaves
    options: dict[str, Any] = {"gamma": 0.5, "backend": backend.argument}
    want = class_balanced_loss(F.linear(input, weight, bias), target, return_stats=True, **options)
    if recompute:
        input, weight, bias = (t.half() for t in leaves)
    found = linear_class_balanced_loss(
        input, weight, target, linear_bias=bias, chunk_size=4, return_stats=True, **options
    )
    dtype = input.dtype
    for got, right in zip(found[1], want[1], strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    grads = [torch.autograd.grad(loss, leaves) for loss in (found[0], want[0])]
    for got, right in zip(*grads, strict=True):
        near(got, right.double(), dtype)


@pytest.mark.parametrize("target", ("softmax", "soft"))
def test_nothing_to_average(backend, target):
    input, weight, bias = head(torch.float32)
    ignored = torch.full((N,), -100, device=DEVICE)
    empty = targets(target, (0,))
    for x, y in ((input, ignored), (input[:0], empty)):
        for reduction in ("mean", "weighted_mean", "sum"):
            weight.grad = None
            loss = linear_class_balanced_loss(
                x, weight, y, linear_bias=bias, chunk_size=4, reduction=reduction,
                backend=backend.argument,
            )  # fmt: skip
            loss.backward()
            assert loss == 0
            assert weight.grad is not None
            assert not weight.grad.any()


def test_small_gradients_of_float16(backend):
    """They must reach the loss scaler's factor before they are rounded."""
    input, weight, _ = head(torch.float16)
    target = torch.arange(N, device=DEVICE) % C
    scale, normalizer = 2.0**16, 2.0**20
    loss = linear_class_balanced_loss(
        input, weight, target, chunk_size=4, normalizer=normalizer, backend=backend.argument
    )
    found = torch.autograd.grad(loss * scale, (input, weight))
    _, want = expected([input, weight], target, None, reduction="sum")
    for got, grad in zip(found, want, strict=True):
        factor = scale / normalizer / 0.5  # of factors()
        near(got, factor * grad, torch.float16)
        assert (got != 0).any()


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=name_of)
def test_autocast(low, reduction):
    """float32 parameters get float32 gradients, of products of the lower type."""
    leaves, target = head(torch.float32), targets("softmax")
    rounded = [t.detach().to(low) for t in leaves]
    want, grads = expected(rounded, target, None, reduction=reduction)
    input, weight, bias = leaves
    with torch.autocast(DEVICE, low):
        loss = linear_class_balanced_loss(
            input, weight, target, linear_bias=bias, chunk_size=4, reduction=reduction
        )
    near(loss, want, low)
    found = torch.autograd.grad((loss * factors(loss)).sum(), leaves)
    for got, grad in zip(found, grads, strict=True):
        assert got.dtype == torch.float32
        near(got, grad, low)


def test_autocast_leaves_float64_as_it_is():
    """As F.linear, which refuses such a mixture too."""
    input, weight, _ = head(torch.float32)
    refused = pytest.raises(TypeError, match="must have input's dtype")
    for x, w in ((input.double(), weight), (input, weight.double())):
        with torch.autocast(DEVICE, torch.bfloat16), refused:
            linear_class_balanced_loss(x, w, targets("softmax"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(INTERPRETED, reason="compiles for the machine")
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compile(reduction):
    torch.compiler.reset()
    input, weight, bias = head(torch.float32)
    target = targets("softmax")

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        loss = linear_class_balanced_loss(
            2 * x, w, target, linear_bias=b, chunk_size=4, reduction=reduction, gamma=0.5
        )
        return loss.sum()

    found = []
    for run in (step, torch.compile(step, fullgraph=True)):
        loss = run(input, weight, bias)
        found.append([loss, *torch.autograd.grad(loss, (input, weight, bias))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif(INTERPRETED, reason="compiles for the machine")
def test_compile_takes_any_number_of_rows():
    """Chunks of as many rows as suit it: compiled twice, for one number and for all others."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    weight = draw(1, C, D).float().requires_grad_()
    target = targets("softmax", (600,))
    step = torch.compile(
        lambda x, y: linear_class_balanced_loss(x, weight, y), backend=counter, fullgraph=True
    )
    for rows in (50, 114, 178, 300, 562):
        x = draw(0, rows, D).float()
        want = linear_class_balanced_loss(x, weight, target[:rows])
        torch.testing.assert_close(step(x, target[:rows]), want)
    assert counter.frame_count == 2


@pytest.mark.filterwarnings("ignore")  # torch's: that torch.jit is deprecated
@pytest.mark.skipif(INTERPRETED, reason="of the CPU")
def test_torch_jit_trace_says_what_to_do():
    input, weight, _ = head(torch.float32)
    target = targets("softmax")

    def step(x: Tensor, w: Tensor) -> Tensor:
        return linear_class_balanced_loss(x, w, target)

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.jit.trace(step, (input, weight))
    plain = input.detach(), weight.detach()
    torch.testing.assert_close(torch.jit.trace(step, plain)(*plain), step(*plain))


def test_module():
    counts = [90, 9, 1]
    torch.manual_seed(0)
    head = LinearClassBalancedLoss(D, counts, 0.99, gamma=0.5, device=DEVICE, chunk_size=2)
    input, target = draw(0, 5, D).float(), torch.tensor([0, 1, 2, 0, 1], device=DEVICE)
    loss_fn = ClassBalancedLoss(counts, 0.99, gamma=0.5).to(DEVICE)
    want = loss_fn(head.logits(input), target)
    torch.testing.assert_close(head(input, target), want)
    loss, stats = head(input, target, return_stats=True)
    torch.testing.assert_close(loss, want)
    assert stats.rows.tolist() == [2, 2, 1]
    other = copy.deepcopy(head)
    head.loss_fn.set_beta(0)
    torch.testing.assert_close(other(input, target), want)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(input, target), head(input, target))
    assert set(head.state_dict()) >= {"linear.weight", "linear.bias", "loss_fn.weight"}
    assert LinearClassBalancedLoss(D, counts, bias=False).linear.bias is None
    assert "chunk_size=2" in repr(head)


@pytest.mark.parametrize("change, error, message", [
    ({"inplace": True}, ValueError, "here they lie in a buffer"),
    ({"recompute": False}, ValueError, "here they lie in a buffer"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ({"chunk_size": 1.5}, TypeError, "chunk_size must be an int or None, got 1.5"),
    ({"linear_weight": torch.zeros(C, D + 1)}, ValueError, r"must have shape \(C, 6\)"),
    ({"linear_weight": torch.zeros(C, D).double()}, TypeError, "linear_weight must have input's"),
    ({"linear_weight": None}, TypeError, "linear_weight must be a Tensor, got NoneType"),
    ({"linear_bias": torch.zeros(C + 1)}, ValueError, r"linear_bias must have shape \(9,\)"),
    ({"input": torch.zeros(())}, ValueError, r"input must be \(..., D\)"),
    ({"target": torch.zeros(N, 1).long()}, ValueError, r"target must have shape \(11,\)"),
    ({"target": torch.zeros(N, C + 1)}, ValueError, r"target must have shape \(11, 9\)"),
    ({"sample_weight": torch.ones(N - 1)}, ValueError, "sample_weight must have shape"),
    ({"input": torch.zeros(3, 2, D), "target": torch.zeros(3, 2).long(),
      "sample_weight": torch.ones(6)}, ValueError, r"sample_weight must have shape \(3, 2\)"),
    ({"weight": torch.ones(C + 1)}, ValueError, "weight must have shape"),
    ({"gama": 1}, TypeError, "did you mean 'gamma'"),
    ({"input": [1.0], "inplace": True}, ValueError, "inplace and recompute are about logits"),
])  # fmt: skip
def test_errors(change, error, message):
    given: dict[str, Any] = {
        "input": torch.zeros(N, D),
        "linear_weight": torch.zeros(C, D),
        "target": torch.zeros(N).long(),
    }
    with pytest.raises(error, match=message):
        linear_class_balanced_loss(**(given | change))


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
@pytest.mark.parametrize("change, error, message", [
    ({"target": torch.tensor([0] * 9 + [C, 0])}, IndexError, r"target\[9\] = 9 is out of range"),
    ({"sample_weight": torch.tensor([1.0] * 9 + [-1, 1])}, ValueError, r"sample_weight\[9\] = -1"),
    ({"target": torch.zeros(N, C).index_fill_(0, torch.tensor(9), -1)}, ValueError,
     r"target\[9, 0\] = -1.0: must be finite and >= 0"),
    ({"weight": torch.tensor([1.0] * 8 + [-1])}, ValueError, r"weight\[8\] = -1"),
    ({"normalizer": torch.tensor(torch.nan)}, ValueError, "normalizer must be finite"),
])  # fmt: skip
def test_errors_of_late_chunks(change, error, message):
    given: dict[str, Any] = {
        "input": torch.zeros(N, D),
        "linear_weight": torch.zeros(C, D),
        "target": torch.zeros(N).long(),
    }
    with pytest.raises(error, match=message):
        linear_class_balanced_loss(**(given | change), chunk_size=4)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
@pytest.mark.parametrize("backend", (None, "reference"))
def test_errors_name_the_callers_index(backend):
    """Not that of the rows that it is reshaped to."""
    input, weight = torch.zeros(2, 3, 2, D), torch.zeros(C, D)
    target, of_rows, soft = (
        torch.zeros(2, 3, 2).long(),
        torch.ones(2, 3, 2),
        torch.zeros(2, 3, 2, C),
    )
    target[1, 0, 1], of_rows[0, 2, 1], soft[1, 2, 0, 5] = C, -1, -1
    loss_of = partial(linear_class_balanced_loss, input, weight, backend=backend)
    with pytest.raises(IndexError, match=r"^target\[1, 0, 1\] = 9 is out of range"):
        loss_of(target)
    with pytest.raises(ValueError, match=r"^sample_weight\[0, 2, 1\] = -1"):
        loss_of(target % C, sample_weight=of_rows)
    for chunk_size in (None, 2):
        with pytest.raises(ValueError, match=r"^target\[1, 2, 0, 5\] = -1"):
            loss_of(soft, chunk_size=chunk_size)
    with pytest.raises(IndexError, match=r"^target\[\] = 9 is out of range"):
        linear_class_balanced_loss(input[0, 0, 0], weight, target[1, 0, 1], backend=backend)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
def test_errors_without_rows():
    """No chunk has a kernel that looks at the vectors."""
    input, weight, target = torch.zeros(0, D), torch.zeros(C, D), torch.zeros(0).long()
    bad = torch.ones(C).index_fill_(0, torch.tensor(3), -torch.inf)
    for name in ("weight", "logit_bias", "margin"):
        given: dict[str, Any] = {name: bad}
        with pytest.raises(ValueError, match=rf"{name}\[3\] = -inf"):
            linear_class_balanced_loss(input, weight, target, **given)


def test_chunk_rows():
    """What the budget holds, at least the fewest that are fast, in chunks of nearly equal size."""
    for classes in (10, 8142, 100_000, 10**6):
        for rows in (0, 1, 63, 64, 1000, 4096, 100_000):
            found = chunk_rows(rows, classes, torch.float32, "cpu")
            assert found % 64 == 0
            assert found * classes * 4 <= max(BYTES["cpu"], LEAST_ROWS["cpu"] * classes * 4)
            if rows > found:
                assert -(-rows // found) * found < rows + found
    assert chunk_rows(2048, 100_000, torch.float32, "cpu") == 320


def test_reference_has_second_derivatives():
    input, weight, bias = head(torch.float64)
    target = targets("softmax")

    def loss_of(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_class_balanced_loss(x, w, target, linear_bias=b, backend="reference")

    assert torch.autograd.gradgradcheck(loss_of, (input, weight, bias))
