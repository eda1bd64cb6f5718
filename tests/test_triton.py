"""What is the Triton kernels' own: layouts, splits, targets that nobody may look at, launches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from conftest import (
    DEVICE,
    FAMILIES,
    INTERPRETED,
    assert_grad,
    assert_loss,
    loss_and_grad,
    name_of,
    operator_arguments,
    oracle,
    same_bits,
)

from cbloss_fused import class_balanced_loss, kernels, ops
from cbloss_fused.kernels import launch, plan

FAMILY = pytest.mark.parametrize("family", FAMILIES)
H100 = plan.Device(132, 32)


def problem(N, C, dtype, offset=0, gap=0):
    """Logits in a buffer of NaN, their first element offset away from a 16-byte boundary."""
    generator = torch.Generator(DEVICE).manual_seed(N + C)
    buffer = torch.full((offset + N * (C + gap) + 9,), float("nan"), dtype=dtype)
    logits = buffer.as_strided((N, C), (C + gap, 1), offset)
    logits.copy_(torch.randn(N, C, generator=generator) * 4)
    target = torch.randint(C, (N,), generator=generator)
    target[: min(N, 2)] = torch.tensor([0, C - 1])[: min(N, 2)]
    return logits, target


def check(backend, logits, target, **options):
    want = oracle(logits, target, **options)
    for recompute in (False, True):
        loss, grad = loss_and_grad(backend, logits, target, **options, recompute=recompute)
        assert_loss(loss, want[0], logits.dtype)
        assert_grad(grad, want[1], logits.dtype)


@pytest.mark.parametrize("offset", range(10), ids="at{}".format)
@pytest.mark.parametrize("C", (1, 2, 7, 8, 9, 1000, 8142, 8192), ids="C{}".format)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@FAMILY
def test_every_class_count_at_every_offset(triton, family, dtype, C, offset):
    logits, target = problem(3, C, dtype, offset, gap=offset % 4)
    check(triton, logits, target, activation=family, gamma=0.5)


@pytest.mark.parametrize("smoothing", (0.0, 0.1), ids="s{}".format)
@pytest.mark.parametrize("shape", ((2, 20_000), (5, 70_001), (300, 33_000)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=name_of)
@FAMILY
def test_long_rows_split_or_looped(triton, monkeypatch, family, dtype, shape, smoothing):
    """300 rows loop on a GPU of few multiprocessors; with few rows several programs share one."""
    if shape[0] == 300:
        monkeypatch.setattr(launch, "device_of", lambda tensor: plan.Device(1, 32))
        shape = (3, shape[1])
    logits, target = problem(*shape, dtype, offset=3)
    target[1] = -100
    check(triton, logits, target, activation=family, gamma=2.0, label_smoothing=smoothing)


@FAMILY
@pytest.mark.parametrize("C", (10, 300, 30_000), ids="C{}".format)
def test_split_rows_in_place(triton, family, C):
    logits, target = problem(4, C, torch.float32, offset=1)
    for recompute in (False, True):
        options = {"activation": family, "gamma": 0.5, "recompute": recompute}
        want = loss_and_grad(triton, logits, target, **options)
        leaf = logits.clone().requires_grad_()
        middle = leaf * 1
        loss = class_balanced_loss(middle, target, inplace=True, backend="triton", **options)
        loss.backward()
        assert same_bits(middle.detach(), leaf.grad)
        assert_loss(loss.detach(), want[0].double(), logits.dtype)
        assert_grad(leaf.grad, want[1].double(), logits.dtype)


@pytest.mark.parametrize("wrong", (-1, 7, -100, 2**40, -(2**63)), ids=str)
@pytest.mark.parametrize("C", (7, 200, 20_000), ids="C{}".format)
@FAMILY
def test_a_target_that_is_no_class_makes_its_row_nan(triton, family, C, wrong):
    logits, target = problem(3, C, torch.float32)
    good, bad = target.clone(), target
    bad[1] = C if wrong == 7 else wrong
    options = {"activation": family, "gamma": 0.5, "ignore_index": None}
    for recompute in (False, True):
        want = loss_and_grad(triton, logits, good, **options, recompute=recompute)
        loss, grad = loss_and_grad(triton, logits, bad, **options, recompute=recompute)
        assert loss.isnan()
        assert grad[1].isnan().all()
        assert same_bits(grad[[0, 2]], want[1][[0, 2]])
        rows, _ = loss_and_grad(triton, logits, bad, **options, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]


@FAMILY
def test_an_infinite_logit_is_a_limit(triton, family):
    """Alone it takes all of p, two are NaN; registers, loops and tiles alike."""
    for C, layout in ((10, "C"), (300, "C"), (20_000, "C"), (300, "N"), (10, "N")):
        for rival in (2, 5):  # the target, another class
            logits, target = torch.zeros(2, C), torch.tensor([2, 2])
            if layout == "N":  # samples side by side
                logits = logits.t().contiguous().t()
            logits[0, rival] = float("inf")
            logits[1, [3, C - 1]] = float("inf")
            loss, grad = loss_and_grad(
                triton, logits, target, activation=family, gamma=1.0, reduction="none"
            )
            if family == "softmax":
                expected = torch.zeros(C)
                if rival == 5:
                    expected[5], expected[2] = 1, -1
                assert loss[0] == (0 if rival == 2 else float("inf"))
                assert torch.equal(grad[0], expected)
                assert loss[1].isnan()
                assert grad[1].isnan().all()
            else:
                assert (loss[0] < C) if rival == 2 else (loss[0] == float("inf"))
                assert grad.isfinite().all()


@pytest.mark.parametrize("offset", (0, 1, 5))
@pytest.mark.parametrize("numel", (1, 7, 4096, 100_001))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=name_of)
def test_scaling_of_a_stored_gradient(triton, dtype, numel, offset):
    buffer = torch.full((numel + offset + 9,), 3.0, dtype=dtype)
    grad = buffer[offset : offset + numel]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for factor, want in ((1.0, 3.0), (2.5, 7.5)):
        launch.scale_gradient(grad, torch.tensor(factor, dtype=compute), numel)
        assert (grad == want).all()
    assert (buffer[:offset] == 3).all()
    assert (buffer[offset + numel :] == 3).all()


def test_a_padded_gradient_lies_as_its_logits(monkeypatch):
    """new_grad's layout, on a device that passes for a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for N, C, K, offset, gap in ((5, 8142, None, 1, 3), (5, 1000, None, 0, 8), (2, 300, 6, 3, 1)):
        size = offset + N * (K or 1) * (C + gap) + 9
        buffer = torch.empty(size, dtype=torch.bfloat16, device="meta")
        shape, strides = (N, C), (C + gap, 1)
        if K:
            shape, strides = (N, C, K), (K * (C + gap), 1, C + gap)
        logits = buffer.as_strided(shape, strides, offset)
        grad = ops.new_grad(logits)
        assert grad.shape == logits.shape
        assert grad.stride(1) == 1
        for x, g in zip(logits.stride(), grad.stride(), strict=True):
            assert (x - g) % 8 == 0
        assert grad.untyped_storage().nbytes() <= 2 * (grad.numel() + 8 * (1 + N * (K or 1)))


@pytest.mark.parametrize("sigmoid", (False, True))
@pytest.mark.parametrize("itemsize", (2, 4, 8))
def test_configurations_cover_every_row(sigmoid, itemsize):
    """Every vector in one split, tiles within a block's means, few programs none too many."""
    VEC = 16 // itemsize
    for smooth in (False, True):
        for rows in (1, 8, 200, 4096):
            for C in (129, 1000, 8142, 8192, 8193, 16_384, 16_385, 50_000, 131_072, 2**20, 2**24):
                found = plan.config(rows, C, itemsize, sigmoid, smooth, H100)
                assert found.splits * found.span >= C // VEC > (found.splits - 1) * found.span
                assert found.span % found.V == 0
                assert 2048 * found.warps >= found.V * VEC
                assert found.warps in (1, 2, 4, 8, 16, 32)
                assert not found.one or found.V >= C // VEC
                assert found.splits == 1 or rows * found.splits <= 8 * 132


# Under torch -------------------------------------------------------------------------------------

TORCH_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@TORCH_WARNS
@pytest.mark.parametrize("shape", ((5, 3), (2, 4, 6), (3, 300)), ids=str)
@FAMILY
def test_opcheck(triton, family, shape):
    logits = torch.linspace(-3, 3, torch.Size(shape).numel()).reshape(shape)
    rows = shape[:1] + shape[2:]
    target = torch.arange(torch.Size(rows).numel()).reshape(rows) % shape[1]
    arguments, loss, formula = operator_arguments(logits, target, family, 0.5, 0.1)
    grad, saved = torch.empty_like(logits), ops.new_saved(logits, target, family == "sigmoid")
    for buffers in ((None, None), (grad, None), (None, saved)):
        torch.library.opcheck(ops.losses["triton"], (*arguments, loss, *buffers))
    ops.losses["triton"](*arguments, loss, None, saved)
    incoming = torch.ones_like(loss)
    torch.library.opcheck(ops.gradients["triton"], (logits, target, saved, incoming, *formula, grad))


@TORCH_WARNS
@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
@FAMILY
def test_compile(triton, family, recompute):
    torch._dynamo.reset()
    kernels.load()

    def step(x, y):
        options = {"activation": family, "gamma": 0.5, "recompute": recompute}
        return class_balanced_loss(x * 1.5, y, backend="triton", **options) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (6, 9):
        logits, target = problem(N, 20, torch.float32)
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            function(leaf, target).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results)


def test_export(triton):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return class_balanced_loss(x, y, backend="triton", activation="sigmoid")

    kernels.load()
    logits, target = problem(6, 20, torch.float32)
    program = torch.export.export(Model(), (logits, target))
    torch.testing.assert_close(program.module()(logits, target), Model()(logits, target))


ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@ON_A_GPU
@FAMILY
def test_a_cuda_graph_holds_the_step(triton, family):
    logits, target = problem(64, 1000, torch.float32)
    weight = torch.rand(1000) + 0.5
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss = class_balanced_loss(leaf, target, weight, activation=family, gamma=0.5)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for seed in range(3):
        other, y = problem(64, 1000 - seed, torch.float32)
        with torch.no_grad():
            leaf[:, : 1000 - seed] = other
            target.copy_(y)
        graph.replay()
        want = oracle(leaf.detach(), target, weight, activation=family, gamma=0.5)
        assert_loss(loss.detach(), want[0], leaf.dtype)
        assert_grad(leaf.grad, want[1], leaf.dtype)


@ON_A_GPU
@pytest.mark.parametrize("offset", (0, 1))
def test_a_stored_gradient_is_scaled_without_synchronising(triton, offset):
    logits, target = problem(16, 300, torch.float32, offset, gap=offset)
    want = oracle(logits, target)[1]
    for factor in (1.0, 3.0):
        leaf = logits.detach().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = class_balanced_loss(leaf, target) * factor
            first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            kept = first.clone()
            second = torch.autograd.grad(loss, leaf)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for grad in (first, kept, second):
            assert_grad(grad, want * factor, leaf.dtype)


# Where ------------------------------------------------------------------------------------------


def test_backend_triton_needs_a_gpu_or_the_interpreter():
    if INTERPRETED or DEVICE == "cuda":
        pytest.skip("there is one")
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu.*TRITON_INTERPRET=1"):
        class_balanced_loss(x, y, backend="triton")
    kernels_available, kernels.available = kernels.available, False
    try:
        with pytest.raises(ValueError, match="triton, which is not installed"):
            class_balanced_loss(x, y, backend="triton")
    finally:
        kernels.available = kernels_available


def test_importing_does_not_import_triton():
    code = "import sys, cbloss_fused; cbloss_fused.backends(); print('triton' in sys.modules)"
    before = "import sys, torch; print('triton' in sys.modules)"
    outputs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (before, code)
    ]
    assert outputs[0] == outputs[1]


def test_cuda_has_the_triton_kernels():
    assert "CUDA" in torch._C._dispatch_dump("cbloss_fused::loss")
    assert "CUDA" in torch._C._dispatch_dump("cbloss_fused::gradient")
