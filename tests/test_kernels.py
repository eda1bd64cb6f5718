"""What is the GPU kernels' own: 16-byte layouts, splits, targets that nobody looks at, graphs."""

from __future__ import annotations

import pytest
import torch
from support.backends import (
    DEVICE,
    INTERPRETED,
    gradient_arguments,
    loss_and_grad,
    nothing_synchronises,
    operator_arguments,
)
from support.marks import FAMILIES, name_of
from support.oracle import oracle
from support.tolerances import assert_grad, assert_loss, same_bits

from cbloss_fused import class_balanced_loss
from cbloss_fused.backends import REGISTRY
from cbloss_fused.buffers import co_aligned, new_saved
from cbloss_fused.inputs import Inputs

FAMILY = pytest.mark.parametrize("family", FAMILIES)


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
def test_every_class_count_at_every_offset(gpu, family, dtype, C, offset):
    logits, target = problem(3, C, dtype, offset, gap=offset % 4)
    check(gpu, logits, target, activation=family, gamma=0.5)


@pytest.mark.parametrize("smoothing", (0.0, 0.1), ids="s{}".format)
@pytest.mark.parametrize("shape", ((2, 20_000), (5, 70_001), (600, 33_000)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=name_of)
@FAMILY
def test_long_rows_split_or_looped(gpu, family, dtype, shape, smoothing):
    """600 rows loop, 3 do where there is one multiprocessor; else several programs share a row."""
    (N, C), multiprocessors = shape, 132
    if N == 600 and DEVICE == "cpu":
        N, multiprocessors = 3, 1
    logits, target = problem(N, C, dtype, offset=3)
    target[1] = -100
    with gpu.on_a_gpu_of(multiprocessors):
        check(gpu, logits, target, activation=family, gamma=2.0, label_smoothing=smoothing)


@pytest.mark.parametrize("C", (10, 300, 9000, 40_000), ids="C{}".format)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@FAMILY
def test_a_gradient_that_lies_otherwise_than_its_logits(gpu, monkeypatch, family, dtype, C):
    """As under torch.compile, where rows of the two differ modulo 16 bytes."""
    record = gpu.record._replace(new_grad=torch.empty_like)
    monkeypatch.setitem(REGISTRY, record.name, record)
    logits, target = problem(3, C, dtype, offset=1, gap=3)
    check(gpu, logits, target, activation=family, gamma=0.5)


@FAMILY
@pytest.mark.parametrize("C", (10, 300, 30_000), ids="C{}".format)
def test_split_rows_in_place(gpu, family, C):
    logits, target = problem(4, C, torch.float32, offset=1)
    for recompute in (False, True):
        options = {"activation": family, "gamma": 0.5, "recompute": recompute}
        want = loss_and_grad(gpu, logits, target, **options)
        leaf = logits.clone().requires_grad_()
        middle = leaf * 1
        loss = class_balanced_loss(middle, target, inplace=True, backend=gpu.argument, **options)
        loss.backward()
        assert same_bits(middle.detach(), leaf.grad)
        assert_loss(loss.detach(), want[0].double(), logits.dtype)
        assert_grad(leaf.grad, want[1].double(), logits.dtype)


@pytest.mark.parametrize("wrong", (-1, 7, -100, 2**40, -(2**63)), ids=str)
@pytest.mark.parametrize("C", (7, 200, 20_000), ids="C{}".format)
@FAMILY
def test_a_target_that_is_no_class_makes_its_row_nan(gpu, family, C, wrong):
    logits, target = problem(3, C, torch.float32)
    good, bad = target.clone(), target
    bad[1] = C if wrong == 7 else wrong
    options = {"activation": family, "gamma": 0.5, "ignore_index": None}
    for recompute in (False, True):
        want = loss_and_grad(gpu, logits, good, **options, recompute=recompute)
        loss, grad = loss_and_grad(gpu, logits, bad, **options, recompute=recompute)
        assert loss.isnan()
        assert grad[1].isnan().all()
        assert same_bits(grad[[0, 2]], want[1][[0, 2]])
        rows, _ = loss_and_grad(gpu, logits, bad, **options, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]


@FAMILY
def test_an_infinite_logit_is_a_limit(gpu, family):
    """Alone it takes all of p, two are NaN; registers, loops and tiles alike."""
    for C, layout in (*((C, "C") for C in (10, 300, 3000, 9000, 20_000)), (300, "N"), (10, "N")):
        for rival in (2, 5):  # the target, another class
            logits, target = torch.zeros(2, C), torch.tensor([2, 2])
            if layout == "N":  # samples side by side
                logits = logits.t().contiguous().t()
            logits[0, rival] = float("inf")
            logits[1, [3, C - 1]] = float("inf")
            loss, grad = loss_and_grad(
                gpu, logits, target, activation=family, gamma=1.0, reduction="none"
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("C", (10, 300, 1500, 3000, 9000, 20_000, 70_000), ids="C{}".format)
@FAMILY
def test_one_nan_is_seen_by_the_whole_row(gpu, family, C, dtype):
    for place in (0, C // 2, C - 1):
        logits, target = problem(3, C, dtype, offset=1)
        logits[1, place] = float("nan")
        options = {"activation": family, "gamma": 0.5, "reduction": "none"}
        loss, grad = loss_and_grad(gpu, logits, target, **options)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all() if family == "softmax" else grad[1, place].isnan()
        assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", ((2, 300, 3), (2, 3000, 2), (1, 9000, 2)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@FAMILY
def test_classes_side_by_side_around_inner_positions(gpu, family, dtype, shape):
    N, C, K = shape
    logits, target = problem(N * K, C, dtype, offset=3)
    inner, rows = logits.view(N, K, C).transpose(1, 2), target.view(N, K)
    check(gpu, inner, rows, activation=family, gamma=2.0)


@FAMILY
def test_ever_larger_logits_are_summed_as_well_as_others(gpu, family, pytestconfig):
    C = 30_000 if pytestconfig.getoption("long") or not INTERPRETED else 10_000
    logits = torch.linspace(0, 1, C).unsqueeze(1).expand(-1, 2).contiguous().t()
    check(gpu, logits, torch.tensor([0, C - 1]), activation=family, gamma=0.5)


@pytest.mark.parametrize("offset", (0, 1, 5))
@pytest.mark.parametrize("numel", (1, 7, 4096, 100_001))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=name_of)
def test_scaling_of_a_stored_gradient(gpu, dtype, numel, offset):
    buffer = torch.full((numel + offset + 9,), 3.0, dtype=dtype)
    grad = buffer[offset : offset + numel]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for factor, want in ((1.0, 3.0), (2.5, 7.5)):
        gpu.record.scale_gradient(grad, torch.tensor(factor, dtype=compute), numel)
        assert (grad == want).all()
    assert (buffer[:offset] == 3).all()
    assert (buffer[offset + numel :] == 3).all()


def test_a_padded_gradient_lies_as_its_logits():
    for N, C, K, offset, gap in ((5, 8142, None, 1, 3), (5, 1000, None, 0, 8), (2, 300, 6, 3, 1)):
        size = offset + N * (K or 1) * (C + gap) + 9
        buffer = torch.empty(size, dtype=torch.bfloat16, device="meta")
        row = C + gap
        logits = buffer.as_strided((N, C), (row, 1), offset)
        if K:
            logits = buffer.as_strided((N, C, K), (K * row, 1, row), offset)
        grad = co_aligned(logits)
        assert grad.shape == logits.shape
        assert grad.stride(1) == 1
        for x, g in zip(logits.stride(), grad.stride(), strict=True):
            assert (x - g) % 8 == 0
        assert grad.untyped_storage().nbytes() <= 2 * (grad.numel() + 8 * (1 + N * (K or 1)))


# Under torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", (10, 300), ids="C{}".format)
@FAMILY
def test_a_normalizer_of_nan_is_not_lost(gpu, family, C):
    """Its value is not looked at: loss and gradient are NaN, not those of another denominator."""
    logits, target = problem(4, C, torch.float32)
    loss, grad = loss_and_grad(
        gpu, logits, target, activation=family, normalizer=torch.tensor(float("nan"))
    )
    assert loss.isnan()
    assert grad.isnan().all()


TORCH_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@TORCH_WARNS
@pytest.mark.parametrize("shape", ((5, 3), (2, 4, 6), (3, 300)), ids=str)
@FAMILY
def test_opcheck(gpu, family, shape):
    logits = torch.linspace(-3, 3, torch.Size(shape).numel()).reshape(shape)
    rows = shape[:1] + shape[2:]
    target = torch.arange(torch.Size(rows).numel()).reshape(rows) % shape[1]
    arguments, loss, formula = operator_arguments(logits, target, family, 0.5, 0.1)
    grad, saved = torch.empty_like(logits), new_saved(logits, family == "sigmoid")
    for buffers in ((None, None), (grad, None), (None, saved)):
        torch.library.opcheck(gpu.record.loss, (*arguments, loss, *buffers))
    gpu.record.loss(*arguments, loss, None, saved)
    incoming = torch.ones_like(loss)
    torch.library.opcheck(
        gpu.record.gradient,
        gradient_arguments(logits, Inputs(target), saved, incoming, formula, grad),
    )


@TORCH_WARNS
@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
@FAMILY
def test_compile(gpu, family, recompute):
    torch._dynamo.reset()

    def step(x, y):
        options = {"activation": family, "gamma": 0.5, "recompute": recompute}
        return class_balanced_loss(x * 1.5, y, backend=gpu.argument, **options) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (6, 9):
        logits, target = problem(N, 20, torch.float32)
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            function(leaf, target).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results)


def test_export(gpu):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return class_balanced_loss(x, y, backend=gpu.argument, activation="sigmoid")

    logits, target = problem(6, 20, torch.float32)
    program = torch.export.export(Model(), (logits, target))
    torch.testing.assert_close(program.module()(logits, target), Model()(logits, target))


ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@ON_A_GPU
@pytest.mark.parametrize("reduction", ("mean", "weighted_mean", "sum"))
@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
@FAMILY
def test_a_cuda_graph_holds_the_step(gpu, family, soft, reduction):
    def targets(y, C):
        return torch.nn.functional.one_hot(y, 1000) * 0.75 + 0.25 / C if soft else y

    logits, target = problem(64, 1000, torch.float32)
    target = targets(target, 1000)
    focal = {} if soft else {"gamma": 0.5}
    common = {"activation": family, "reduction": reduction, **focal}
    weight = torch.rand(1000) + 0.5
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss = class_balanced_loss(leaf, target, weight, backend=gpu.argument, **common)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()
    for seed in range(3):
        other, y = problem(64, 1000 - seed, torch.float32)
        with torch.no_grad():
            leaf[:, : 1000 - seed] = other
            target.copy_(targets(y, 1000 - seed))
        graph.replay()
        want = oracle(leaf.detach(), target, weight, **common)
        assert_loss(loss.detach(), want[0], leaf.dtype)
        assert_grad(leaf.grad, want[1], leaf.dtype)


@ON_A_GPU
@pytest.mark.parametrize("offset", (0, 1))
def test_a_stored_gradient_is_scaled_without_synchronising(gpu, offset):
    logits, target = problem(16, 300, torch.float32, offset, gap=offset)
    want = oracle(logits, target)[1]
    for factor in (1.0, 3.0):
        leaf = logits.detach().requires_grad_()
        with nothing_synchronises():
            loss = class_balanced_loss(leaf, target, backend=gpu.argument) * factor
            first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            kept = first.clone()
            second = torch.autograd.grad(loss, leaf)[0]
        for grad in (first, kept, second):
            assert_grad(grad, want * factor, leaf.dtype)
