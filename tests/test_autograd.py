"""The autograd Functions: incoming gradients, kept graphs, in place, autocast, what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import DEVICE, INTERPRETED, long_if_interpreted
from support.marks import DTYPES, FAMILIES, name_of
from support.oracle import oracle, sample
from support.tolerances import assert_grad, same_bits
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck

from cbloss_fused import ClassShards, class_balanced_loss, linear_class_balanced_loss

FAMILY = pytest.mark.parametrize("family", FAMILIES)
MODES = pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
HALF = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)


@long_if_interpreted
@pytest.mark.parametrize("reduction", ("none", "sum", "mean", "weighted_mean"))
@pytest.mark.parametrize("gamma", (0.0, 0.1, 0.5, 1.0, 2.0, 5.0), ids="g{}".format)
@MODES
@FAMILY
def test_gradcheck(backend, family, recompute, gamma, reduction):
    logits, target, weight, sample_weight = sample(5, torch.float64)
    logits, target, sample_weight = logits[::3], target[::3], sample_weight[::3]
    options = {
        "activation": family,
        "gamma": gamma,
        "reduction": reduction,
        "recompute": recompute,
        "label_smoothing": 0.1 if gamma == 1 else 0.0,
        "sample_weight": sample_weight,
        "backend": backend.argument,
    }
    x = logits.clamp(-6, 6).requires_grad_()
    assert gradcheck(lambda x: class_balanced_loss(x, target, weight, **options), x)


@pytest.mark.parametrize("incoming", (1.0, -1.0, 0.0, 0.25, 65536.0), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@MODES
@FAMILY
def test_incoming_gradient(backend, family, recompute, dtype, incoming):
    logits, target, weight, _ = sample(10, dtype)
    options = {"activation": family, "gamma": 0.5}
    leaf = logits.clone().requires_grad_()
    loss = class_balanced_loss(
        leaf, target, weight, recompute=recompute, backend=backend.argument, **options
    )
    (loss * incoming).backward()
    assert leaf.grad is not None
    want = oracle(logits, target, weight, **options)[1] * incoming
    if dtype == torch.float16 and not recompute:  # stored with a subnormal's error, then scaled
        want = torch.where(want.abs() > abs(incoming) * 2.0**-14, want, leaf.grad.double())
    assert_grad(leaf.grad, want, dtype)


@pytest.mark.parametrize("scale", (2.0**16, 2.0**24), ids=str)
def test_float16_gradient_does_not_underflow_before_the_loss_scaler(backend, scale):
    """1/N below the smallest subnormal: a stored gradient would be 0, so float16 recomputes."""
    N = 2**17
    rows, normalizer = (64, N) if INTERPRETED else (N, None)  # as many take the interpreter long
    logits, target = torch.zeros(rows, 2, dtype=torch.float16), torch.zeros(rows, dtype=torch.int64)
    logits[:, 0] = 10
    leaf = logits.requires_grad_()
    loss = class_balanced_loss(leaf, target, normalizer=normalizer, backend=backend.argument)
    (loss * scale).backward()
    assert leaf.grad is not None
    want = scale / N / (1 + torch.tensor(10.0).exp().item())
    torch.testing.assert_close(
        leaf.grad[:, 1].double(), torch.full((rows,), want).double(), rtol=1e-3, atol=6e-8
    )


@MODES
@FAMILY
@pytest.mark.parametrize("C", (10, 131), ids="C{}".format)
def test_vector_of_incoming_gradients(backend, family, recompute, C):
    logits, target, weight, _ = sample(C, torch.float64)
    incoming = torch.linspace(-2, 3, len(target), dtype=torch.float64)
    incoming[4] = 0
    leaf = logits.clone().requires_grad_()
    options = {"activation": family, "gamma": 2.0, "reduction": "none"}
    loss = class_balanced_loss(
        leaf, target, weight, recompute=recompute, backend=backend.argument, **options
    )
    loss.backward(incoming)
    assert leaf.grad is not None
    assert_grad(leaf.grad, oracle(logits, target, weight, incoming, **options)[1], torch.float64)


@pytest.mark.parametrize("first", (1.0, -3.0), ids=str)
@pytest.mark.parametrize("reduction", ("none", "mean"))
@MODES
@FAMILY
def test_second_backward_of_a_kept_graph(backend, family, recompute, reduction, first):
    logits, target, weight, _ = sample(10, torch.float64)
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    loss = class_balanced_loss(
        middle, target, weight, activation=family, reduction=reduction, recompute=recompute,
        backend=backend.argument,
    )  # fmt: skip
    (a,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, first), retain_graph=True)
    kept = a.clone()
    a.mul_(7)  # the caller's own now
    (b,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, first), retain_graph=True)
    assert same_bits(b, kept)
    (c,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    torch.testing.assert_close(c * first, b, rtol=1e-12, atol=1e-15)
    assert same_bits(middle.detach(), logits)


def test_accumulates_into_the_leaf(backend):
    logits, target, _, _ = sample(10, torch.float32)
    leaf = logits.clone().requires_grad_()
    for _ in range(3):
        class_balanced_loss(leaf, target, backend=backend.argument).backward()
    assert leaf.grad is not None
    assert_grad(leaf.grad / 3, oracle(logits, target)[1], torch.float32)


@pytest.mark.parametrize("reduction", ("none", "mean"))
@MODES
def test_second_derivative_is_refused(backend, recompute, reduction):
    logits, target, _, _ = sample(10, torch.float32)
    leaf = logits.clone().requires_grad_()
    loss = class_balanced_loss(
        leaf, target, reduction=reduction, recompute=recompute, backend=backend.argument
    )
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True)


@MODES
def test_without_grad_nothing_is_recorded(backend, recompute):
    logits, target, _, _ = sample(10, torch.float32)
    for inplace in (False, True):
        options = {"recompute": recompute, "inplace": inplace, "backend": backend.argument}
        before = logits.clone()
        assert class_balanced_loss(logits, target, **options).grad_fn is None
        leaf = logits.clone().requires_grad_()
        middle = leaf * 1
        with torch.no_grad():
            loss = class_balanced_loss(middle, target, **options)
        assert loss.grad_fn is None
        assert middle._version == 0
        assert same_bits(middle.detach(), before)
        assert same_bits(logits, before)


# In place -----------------------------------------------------------------------------------------


def in_place(logits, target, backend, **options):
    return class_balanced_loss(logits, target, inplace=True, backend=backend.argument, **options)


@pytest.mark.parametrize(
    "view", (lambda x: x, lambda x: x[:], lambda x: x.view(-1, 10)[2:], lambda x: x.t().t()),
    ids=("leaf", "slice", "view", "transposed"),
)  # fmt: skip
@MODES
def test_inplace_refuses_a_leaf(backend, view, recompute):
    leaf = torch.zeros(6, 10, requires_grad=True)
    logits = view(leaf)
    with pytest.raises(ValueError, match="leaf"):
        in_place(logits, torch.zeros(len(logits)).long(), backend, recompute=recompute)
    assert (leaf == 0).all()


@pytest.mark.parametrize("shape", ((6, 1), (1, 10), (1, 1)), ids=("classes", "rows", "both"))
def test_inplace_refuses_logits_that_overlap(backend, shape):
    leaf = torch.zeros(shape, requires_grad=True)
    logits = (leaf * 1).expand(6, 10)
    with pytest.raises(ValueError, match="expand"):
        in_place(logits, torch.zeros(6).long(), backend)


def test_inplace_refuses_windows_that_overlap(backend):
    leaf = torch.zeros(20, requires_grad=True)
    logits = (leaf * 1).as_strided((6, 10), (2, 1))
    with pytest.raises(ValueError, match="overlap"):
        in_place(logits, torch.zeros(6).long(), backend)


@MODES
@FAMILY
def test_inplace_writes_the_gradient_over_the_logits(backend, family, recompute):
    logits, target, _, _ = sample(10, torch.float32)
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    version = middle._version
    loss = in_place(middle, target, backend, activation=family, recompute=recompute)
    if recompute:
        assert same_bits(middle.detach(), logits)
    else:
        assert middle._version > version
    loss.backward()
    assert middle._version > version
    want = oracle(logits, target, activation=family)[1]
    assert leaf.grad is not None
    assert_grad(middle.detach(), want, torch.float32)
    assert_grad(leaf.grad, want, torch.float32)


@MODES
def test_inplace_and_a_consumer_that_saved_the_logits(backend, recompute):
    logits, target, _, _ = sample(10, torch.float32)
    middle = logits.clone().requires_grad_() * 1
    other = (middle**2).sum()
    loss = in_place(middle, target, backend, recompute=recompute)
    if recompute:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("shape", ((2, 5, 3, 4), (2, 70, 3, 4), (10,)), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@MODES
def test_inplace_images(backend, recompute, layout, shape):
    """Written into the caller's own tensor, or refused; never into a copy."""
    logits = torch.linspace(-3, 3, torch.Size(shape).numel()).sin().reshape(shape)
    if layout == "channels_last" and len(shape) == 4:
        logits = logits.contiguous(memory_format=torch.channels_last)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.arange(torch.Size(rows).numel()).reshape(rows) % 5
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    in_place(middle, target, backend, recompute=recompute).backward()
    batched = logits if len(shape) > 1 else logits[None]
    want = oracle(batched, target if rows else target[None])[1].reshape(shape)
    assert leaf.grad is not None
    assert middle.is_contiguous() == logits.is_contiguous()
    for got in (leaf.grad, middle.detach()):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)


# Autocast and memory ------------------------------------------------------------------------------


@HALF
@FAMILY
def test_autocast(backend, family, dtype):
    """The logits keep their type, no copy; the loss is float32; the layer below is trained."""
    head = torch.nn.Linear(6, 10)
    features, target = torch.randn(8, 6), torch.arange(8)
    with torch.autocast(DEVICE, dtype=dtype):
        logits = head(features)
        loss = class_balanced_loss(logits, target, activation=family, backend=backend.argument)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    logits.retain_grad()
    loss.backward()
    assert_grad(logits.grad, oracle(logits, target, activation=family)[1], dtype)
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("inplace", (False, True), ids=("", "inplace"))
@pytest.mark.parametrize("C", (10, 2000), ids="C{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@MODES
@FAMILY
def test_saved_for_backward(backend, family, recompute, dtype, C, inplace):
    """One N×C tensor, the gradient or the logits themselves, and at most three numbers per row."""
    N = 16
    leaf = torch.zeros(N, C, dtype=dtype, requires_grad=True)
    logits = leaf * 1
    saved = []

    def keep(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        class_balanced_loss(
            logits, torch.arange(N) % C, activation=family, recompute=recompute, inplace=inplace,
            backend=backend.argument,
        )  # fmt: skip
    large = [t for t in saved if t.numel() >= N * C and t.numel() > 3 * N]
    assert len(large) == 1
    assert (large[0].data_ptr() == logits.data_ptr()) == (recompute or inplace)
    assert large[0].dtype == dtype
    small = sum(t.numel() for t in saved) - N * C
    assert small <= 4 * N


@pytest.mark.filterwarnings("ignore")  # torch's, of its own vmap
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_batch_of_incoming_gradients(backend, reduction):
    """A stored gradient takes it; a recomputed one says what does."""
    logits, target, _, _ = sample(10, torch.float64)
    leaf = logits.clone().requires_grad_()
    loss = class_balanced_loss(leaf, target, reduction=reduction, backend=backend.argument)
    incoming = torch.eye(loss.numel(), dtype=loss.dtype, device=DEVICE).reshape(-1, *loss.shape)
    if reduction == "none":
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.autograd.grad(loss, leaf, incoming, is_grads_batched=True)
        return
    (got,) = torch.autograd.grad(loss, leaf, 3 * incoming, is_grads_batched=True, retain_graph=True)
    (want,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got, 3 * want.unsqueeze(0))


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("recompute", (False, True))
def test_fake_and_meta_tensors(recompute, inplace):
    """Shapes alone: nothing looks at a value or at an address."""
    options = {"recompute": recompute, "inplace": inplace}
    with FakeTensorMode():
        leaf, target = torch.randn(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.int64)
        class_balanced_loss(leaf * 1, target, **options).backward()
        assert leaf.grad is not None and leaf.grad.shape == (4, 3)
    leaf = torch.empty(4, 3, device="meta", requires_grad=True)
    target = torch.empty(4, dtype=torch.int64, device="meta")
    class_balanced_loss(leaf * 1, target, **options).backward()
    assert leaf.grad is not None and leaf.grad.is_meta


@MODES
@pytest.mark.parametrize("incoming", (1.0, 2.0))
def test_what_a_backward_returns_is_the_callers_own(backend, recompute, incoming):
    """Written over, it changes no later backward through a graph that is kept."""
    logits, target, _, _ = sample(10, torch.float64)
    leaf = logits.clone().requires_grad_()
    loss = incoming * class_balanced_loss(
        leaf, target, recompute=recompute, backend=backend.argument
    )
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    want = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(second, want)


# Of input and of what is a constant here
DUALS = ("input", "weight", "sample_weight", "logit_bias", "margin", "pos_weight", "target")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", DUALS)
@pytest.mark.parametrize("needs_grad", (False, True), ids=("", "needs_grad"))
def test_a_tangent_is_never_lost(backend, name, needs_grad):
    logits, target, *_ = sample(10, torch.float32)
    given: dict[str, Any] = {"input": logits.clone(), "target": target, "activation": "sigmoid"}
    if name == "target":
        given["target"] = torch.full(logits.shape, 0.5)
    elif name != "input":
        given[name] = torch.ones(len(target) if name == "sample_weight" else 10)
    if needs_grad:
        given["input"].requires_grad_()
    with forward_ad.dual_level():
        tensor = given[name]
        given[name] = forward_ad.make_dual(tensor, torch.ones_like(tensor))
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            class_balanced_loss(**given, backend=backend.argument)
        loss = class_balanced_loss(**given, backend="reference")
        assert forward_ad.unpack_dual(loss).tangent is not None


@pytest.mark.filterwarnings("ignore")  # torch's: that torch.jit is deprecated
def test_torch_jit_trace_says_what_to_do(backend):
    logits, target, *_ = sample(10, torch.float32)
    leaf = logits.clone().requires_grad_()

    def step(x, y, which=backend.argument):
        return class_balanced_loss(x, y, backend=which)

    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.jit.trace(step, (leaf, target))
    if DEVICE == "cpu" and not backend.gpu:  # what is wrong with a value is said as ever
        weight = torch.full((10,), -1.0)
        with pytest.raises(ValueError, match="weight"):
            torch.jit.trace(
                lambda x, y: class_balanced_loss(x, y, weight, backend=backend.argument),
                (leaf, target),
            )
    traced = torch.jit.trace(lambda x, y: step(x, y, "reference"), (leaf, target))
    torch.testing.assert_close(traced(leaf, target), step(leaf, target))


class Unused(torch.autograd.Function):
    """Leaves what it is given without a gradient, as DDP does with an output that is not used."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("how", ("function", "shards", "head", "sharded head"))
@pytest.mark.parametrize("return_stats", (False, True), ids=("", "stats"))
@MODES
@FAMILY
def test_a_loss_that_is_not_used_has_no_gradient(family, recompute, return_stats, how):
    logits, target, *_ = sample(10, torch.float16 if recompute else torch.float32)
    leaf = logits.clone().requires_grad_()
    leaf.data[1] = torch.nan  # which is not the sum of these
    given: dict[str, Any] = {"activation": family, "return_stats": return_stats}
    if how in ("shards", "sharded head"):
        given["shards"] = ClassShards(10)
    if how in ("head", "sharded head"):
        head = torch.eye(10, dtype=leaf.dtype, device=DEVICE)
        loss: Any = linear_class_balanced_loss(leaf, head, target, **given)
    else:
        loss = class_balanced_loss(leaf, target, **given)
    loss = loss[0] if return_stats else loss
    (Unused.apply(loss) + 3 * leaf.nansum() + 3 * leaf[1].sum()).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(leaf, 3))


@pytest.mark.parametrize("C", (10, 131), ids="C{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@FAMILY
def test_every_nan_that_comes_in_goes_out(backend, family, dtype, C):
    """That of GPUs has all bits set, which rounding to a half type must not carry over into 0."""
    logits, target, *_ = sample(C, dtype)
    leaf = logits.clone().requires_grad_()
    options: dict[str, Any] = {"activation": family, "backend": backend.argument}
    loss = class_balanced_loss(leaf, target, reduction="none", **options)
    bits = {4: (torch.int32, 2**31 - 1), 8: (torch.int64, 2**63 - 1)}[loss.element_size()]
    nan = torch.tensor(bits[1], dtype=bits[0], device=DEVICE).view(loss.dtype)
    (grad,) = torch.autograd.grad(loss, leaf, nan.expand(loss.shape))
    kept = target != -100
    assert grad[kept].isnan().all()
    assert (grad[~kept] == 0).all()
