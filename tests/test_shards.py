"""Classes over ranks: the loss and gradient of one process that has all classes."""

from __future__ import annotations

import copy
import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED
from support.marks import REDUCTIONS, name_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.spawn import spawn

from cbloss_fused import (
    ClassBalancedLoss,
    ClassShards,
    LinearClassBalancedLoss,
    class_balanced_loss,
    linear_class_balanced_loss,
    sharded_softmax,
)
from cbloss_fused.options import Options, check_options
from cbloss_fused.sharded import checked
from cbloss_fused.sharded_sigmoid import sigmoid_gradient, sigmoid_losses
from cbloss_fused.shards import Part

N = 13
SIZES = {2: (5, 3), 3: (3, 0, 6), 4: (1, 2, 4, 1)}  # of the ranks; uneven, one without classes
FORMULAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "focal": {"gamma": 0.5},
    "smooth": {"label_smoothing": 0.1, "gamma": 2.0},
    "adjusted": {"logit_scale": 2.0, "logit_bias": True, "margin": True},
    "z-loss": {"z_loss": 1e-2, "label_smoothing": 0.1, "margin": True},
    "background": {"activation": "sigmoid", "gamma": 1.5, "background_index": -7},
    "sigmoid": {"activation": "sigmoid", "label_smoothing": 0.2, "alpha": 0.3, "pos_weight": True},
    "by class": {"activation": "sigmoid", "class_weighting": "class", "label_smoothing": 0.1},
    "clipped": {"activation": "sigmoid", "gamma_neg": 2.0, "clip": 0.05, "margin": True},
}
WITHIN = {torch.float64: 1e-7, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=DEVICE)


def data(C: int, background: int | None = None, N: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C) float64, targets, weight."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = 3 * torch.randn(N, C, generator=generator, dtype=torch.float64, device=DEVICE)
    y = torch.randint(C, (N,), generator=generator, device=DEVICE)
    y[3] = -100
    if background is not None:
        y[5:8] = background
    return x, y, draw(1, C)


def options_of(kind: str, C: int) -> dict[str, Any]:
    found = dict(FORMULAS[kind])
    for name in ("logit_bias", "margin", "pos_weight"):
        if found.get(name):
            found[name] = 2 * draw(2, C) - float(name != "pos_weight")
    return found


def factors(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), device=DEVICE, dtype=loss.dtype).view(loss.shape)


def expected(x: Tensor, y: Tensor, w: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().double().clone().requires_grad_()
    loss = class_balanced_loss(leaf, y, w, backend="reference", **options)
    (grad,) = torch.autograd.grad((loss * factors(loss)).sum(), leaf)
    return loss.detach(), grad


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    largest = max(1.0, want[want.isfinite()].abs().max().item() if want.numel() else 0.0)
    atol = WITHIN[dtype] * largest
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("K", (None, 2), ids="K{}".format)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_half_types_are_rounded_once(dtype, K, monkeypatch):
    """Where k e^{z - M} and what smoothing subtracts cancel; some rows at a time."""
    monkeypatch.setattr(sharded_softmax, "BYTES", 5 * 4 * 3 * (K or 1))  # 5 of 13 samples
    x, y, _ = data(3)
    x = (0.1 * x).to(dtype)
    if K:
        x, y = torch.stack([x, x.flip(0)], 2), torch.stack([y, y.flip(0)], 1)
    options: dict[str, Any] = {"label_smoothing": 0.9, "gamma": 0.5, "reduction": "sum"}
    want, want_grad = expected(x, y, None, **options)
    leaf = x.clone().requires_grad_()
    loss = class_balanced_loss(leaf, y, shards=ClassShards(3), **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double() * factors(want), want_grad,
                               rtol=torch.finfo(dtype).eps, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("activation", ("softmax", "sigmoid"))
def test_in_place_without_grad_writes_nothing(activation):
    x, y, w = data(4)
    before = x.clone()
    for leaf in (x.requires_grad_(), x * 1):
        with torch.no_grad():
            class_balanced_loss(
                leaf, y, w, activation=activation, inplace=True, shards=ClassShards(4)
            )
        assert torch.equal(leaf, before)


@pytest.mark.parametrize("kind", FORMULAS)
def test_another_default_dtype(kind):
    """What is computed in depends on the logits alone."""
    options = options_of(kind, 4)
    x, y, w = data(4, options.get("background_index"))
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            leaf = x.float().requires_grad_()
            loss = class_balanced_loss(leaf, y, w, shards=ClassShards(4), **options)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_no_tangent_is_lost():
    x, y, _ = data(4)
    head = torch.ones(4, 4, dtype=x.dtype, device=DEVICE)
    for grad_mode in (torch.enable_grad, torch.no_grad):
        with forward_ad.dual_level(), grad_mode():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                class_balanced_loss(dual, y, shards=ClassShards(4))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                linear_class_balanced_loss(dual, head, y, shards=ClassShards(4))


# Two parts in one process: every backend ---------------------------------------------------------


INFINITE = [
    [torch.inf, 1.0], [-torch.inf, 1.0], [torch.inf, -torch.inf], [torch.inf, torch.inf],
    [-torch.inf, -torch.inf], [torch.nan, 1.0], [torch.nan, torch.nan], [1e3, 1.0],
]  # fmt: skip


@pytest.mark.parametrize("columns", (1, 2), ids="C{}".format)
@pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name_of)
def test_infinite_logits_of_one_rank(backend, dtype, eps, columns):
    """As without shards: limits, and NaN where there is none."""
    x = torch.tensor(INFINITE, dtype=dtype, device=DEVICE)[:, :columns]
    x = x.repeat_interleave(columns, 0)
    target = torch.arange(len(x), device=DEVICE) % columns
    target[-2 * columns :] = -100
    options: dict[str, Any] = {
        "label_smoothing": eps, "reduction": "none", "backend": backend.argument,
    }  # fmt: skip
    found = []
    for shards in (None, ClassShards(columns)):
        leaf = x.clone().requires_grad_()
        loss = class_balanced_loss(leaf, target, shards=shards, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for want, got in zip(*found, strict=True):
        want, got = (torch.where(v > 1e30, torch.inf, v) for v in (want, got))  # GPUs' are bounded
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("K", (None, 2), ids="K{}".format)
@pytest.mark.parametrize("columns", (1, 40), ids="at{}".format)
@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=name_of)
def test_parts(backend, dtype, kind, columns, K, monkeypatch):
    """Both parts' rows, brought together by hand, give the loss of all columns."""
    C = 67
    options = options_of(kind, C)
    x, y, w = data(C, options.get("background_index"))
    x = x.to(dtype)
    if K:
        x, y = torch.stack([x, x.flip(0)], 2), torch.stack([y, y.flip(0)], 1)
    vectors = {n: options.pop(n, None) for n in ("logit_bias", "margin", "pos_weight")}
    spec = check_options(Options(**options))
    want, want_grad = expected(x, y, w, **options, **vectors)
    shards = [ClassShards.of([columns, C - columns], None) for _ in range(2)]
    shards[1].start, shards[1].stop = columns, C
    record, parts, rows = backend.record, [], None
    if not record.soft and (spec.formula.per_class or vectors["pos_weight"] is not None):
        pytest.skip("no kernel: a call takes another backend")
    for each in shards:
        local = x[:, each.start : each.stop].contiguous()
        given: Any = local, (y, w, None, None, *vectors.values())
        make: Any = lambda given=given: given  # noqa: E731
        _, inputs, rows = checked(make, local, spec, False, each)
        parts.append((local, Part.of(inputs, spec, each)))
    assert rows is not None
    if spec.formula.sigmoid:
        losses = torch.zeros_like(rows)
        grads = [torch.empty_like(local) for local, _ in parts]
        for (local, part), grad in zip(parts, grads, strict=True):
            losses += sigmoid_losses(local, part, record, rows, grad)
        once_more = [torch.empty_like(local) for local, _ in parts]
        saved, one = torch.where(rows < 0, -1.0, rows).unsqueeze(0), torch.ones_like(rows[0])
        for (local, part), grad in zip(parts, once_more, strict=True):
            sigmoid_gradient(local, part, record, saved, one, grad)
        for a, b in zip(grads, once_more, strict=True):
            torch.testing.assert_close(a, b)
    else:
        both = torch.stack([sharded_softmax._of_part(*each, record) for each in parts])
        monkeypatch.setattr(sharded_softmax, "gathered", lambda numbers, group: both)
        grads, one = [], torch.ones_like(rows[0])
        for local, part in parts:
            losses, found, _ = sharded_softmax.softmax_losses(local, part, record, rows)
            grads.append(local.clone())  # over which the gradient is written
            sharded_softmax.softmax_gradient(grads[-1], part, record, found, one, grads[-1])
    near(losses.sum(dtype=torch.float64), want, torch.float32 if dtype.itemsize < 8 else dtype)
    near(torch.cat(grads, 1) * factors(want), want_grad, dtype)


# Processes ---------------------------------------------------------------------------------------

PROCESSES = pytest.mark.skipif(
    DEVICE != "cpu" or INTERPRETED or not torch.distributed.is_available(),
    reason="processes of the CPU",
)


@PROCESSES
@pytest.mark.parametrize(
    "ranks", [3, *(pytest.param(ranks, marks=pytest.mark.long) for ranks in (2, 4))]
)
def test_ranks(ranks: int, tmp_path: Path) -> None:
    spawn(on_a_rank, (str(tmp_path / "store"), ranks), ranks)


@PROCESSES
@pytest.mark.long
def test_a_rank_that_dies(tmp_path: Path) -> None:
    """The others end with an error."""
    spawn(beside_a_dead_rank, (str(tmp_path / "store"),), 2)


def beside_a_dead_rank(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    shards = ClassShards(4)
    x, y, w = data(8)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        class_balanced_loss(x[:, :4], y, w, shards=shards)
    os._exit(0)  # without a farewell to the other


def on_a_rank(rank: int, store: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    shards = ClassShards(SIZES[ranks][rank])
    assert shards.sizes == SIZES[ranks]
    every_formula(shards)
    module(shards)
    images_in_place(shards)
    small_gradients(shards)
    statistics(shards)
    infinite(shards)
    nothing(shards)
    changed_in_place(shards)
    errors_of_one_rank(shards)
    copies(shards)
    weights_of_one_rank(shards)
    heads(shards)
    heads_of_rows()
    torch.distributed.destroy_process_group()


def mine(shards: ClassShards, vector: Any) -> Any:
    return vector[shards.start : shards.stop] if isinstance(vector, Tensor) else vector


def every_formula(shards: ClassShards) -> None:
    C = shards.num_classes
    for kind in FORMULAS:
        options = options_of(kind, C)
        x, y, w = data(C, options.get("background_index"))
        for i, reduction in enumerate(REDUCTIONS):
            if options.get("class_weighting") and reduction == "weighted_mean":
                continue
            given: dict[str, Any] = {"sample_weight": draw(4, N), "reduction": reduction}
            want, grad = expected(x, y, w, **given, **options)
            dtype = (torch.float64, torch.float32)[i % 2]
            for own in (False, True):  # vectors of all classes, or of this rank's
                vectors = {k: mine(shards, v) if own else v for k, v in options.items()}
                weight = mine(shards, w) if own else w
                local = mine(shards, x.T).T.to(dtype).clone().requires_grad_()
                loss = class_balanced_loss(local, y, weight, shards=shards, **given, **vectors)
                near(loss.detach(), want, dtype)
                same_everywhere(loss.detach())
                for _ in range(2):  # the graph is kept
                    (got,) = torch.autograd.grad(
                        (loss * factors(loss)).sum(), local, retain_graph=True
                    )
                    near(got, mine(shards, grad.T).T, dtype)


def same_everywhere(tensor: Tensor) -> None:
    found = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, tensor.contiguous())
    for other in found:
        assert torch.equal(other, tensor)


def module(shards: ClassShards) -> None:
    """Whose vectors are those of all classes."""
    C = shards.num_classes
    x, y, _ = data(C)
    loss_fn = ClassBalancedLoss(range(C, 0, -1), 0.9, logit_bias=draw(2, C))
    loss = loss_fn(mine(shards, x.T).T, y, shards=shards)
    torch.testing.assert_close(loss, loss_fn(x, y))
    loss_fn.group = torch.distributed.group.WORLD
    with pytest.raises(ValueError, match="a group and shards"):
        loss_fn(mine(shards, x.T).T, y, shards=shards)


def images_in_place(shards: ClassShards) -> None:
    """(N, C, d1, d2), the gradient over the logits, of two families."""
    C = shards.num_classes
    x, y, w = data(C, N=24)
    x, y = x.view(2, 3, 4, C).permute(0, 3, 1, 2), y.view(2, 3, 4)
    for activation in ("softmax", "sigmoid"):
        options: dict[str, Any] = {"activation": activation, "label_smoothing": 0.1}
        want, grad = expected(x, y, w, **options)
        leaf = x[:, shards.start : shards.stop].clone().requires_grad_()
        logits = leaf * 1.0
        loss = class_balanced_loss(logits, y, w, shards=shards, inplace=True, **options)
        near(loss.detach(), want, torch.float64)
        loss.backward()
        assert leaf.grad is not None
        near(factors(loss) * leaf.grad, grad[:, shards.start : shards.stop], torch.float64)
        near(logits.detach(), leaf.grad, torch.float64)


def small_gradients(shards: ClassShards) -> None:
    """Of float16: scaled before they are rounded."""
    x, y, w = data(shards.num_classes)
    x = x.half().double()
    for activation in ("softmax", "sigmoid"):
        options: dict[str, Any] = {"activation": activation, "normalizer": 2.0**20}
        _, grad = expected(x, y, w, **options)
        local = mine(shards, x.T).T.half().clone().requires_grad_()
        loss = class_balanced_loss(local, y, w, shards=shards, **options)
        (got,) = torch.autograd.grad(loss * 2.0**20, local)
        near(got, mine(shards, grad.T).T * 2.0**21, torch.float16)  # factors() is 0.5


def statistics(shards: ClassShards) -> None:
    x, y, w = data(shards.num_classes)
    y[y == 1] = 0  # a class without rows
    for activation in ("softmax", "sigmoid"):
        options: dict[str, Any] = {"activation": activation, "gamma": 0.5, "return_stats": True}
        options |= {"label_smoothing": 0.1}
        want, stats = class_balanced_loss(x, y, w, **options)
        local = mine(shards, x.T).T.clone().requires_grad_()
        loss, own = class_balanced_loss(local, y, w, shards=shards, **options)
        near(loss.detach(), want, torch.float64)
        for got, right in zip(own, stats, strict=True):
            torch.testing.assert_close(got, mine(shards, right), equal_nan=True)


def infinite(shards: ClassShards) -> None:
    """+inf on one rank has a limit, on two there is none; NaN is NaN; -inf has no probability."""
    C = shards.num_classes
    x, y, _ = data(C)
    last = C - 1
    x[0, 0], x[1, last], x[2, 0], x[2, last] = torch.inf, torch.inf, torch.inf, torch.inf
    x[4, last], x[5, :], x[5, 1], x[6, 0] = torch.nan, -torch.inf, 0.0, -torch.inf
    x[3] = torch.nan  # an ignored row
    y[0], y[1], y[5], y[6] = 0, 0, 1, last
    huge = 1.7e308 * x.sign()  # sums of which overflow
    smooth: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    losses = class_balanced_loss(mine(shards, huge.T).T, y, shards=shards, **smooth)
    assert losses.isnan().eq(class_balanced_loss(huge, y, **smooth).isnan()).all()
    local = mine(shards, x.T).T.clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    want = class_balanced_loss(leaf, y, reduction="none", recompute=True)
    loss = class_balanced_loss(local, y, reduction="none", shards=shards)
    torch.testing.assert_close(loss, want, equal_nan=True)
    want.sum().backward()
    loss.sum().backward()
    assert local.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(local.grad, mine(shards, leaf.grad.T).T, equal_nan=True)


def nothing(shards: ClassShards) -> None:
    """A batch without rows."""
    C = shards.num_classes
    y, head = torch.zeros(0, dtype=torch.int64), torch.ones(shards.num_local_classes, 3)
    for activation in ("softmax", "sigmoid"):
        options: dict[str, Any] = {"activation": activation, "shards": shards}
        options |= {"label_smoothing": 0.1, "return_stats": True}
        local = torch.zeros(0, shards.num_local_classes, requires_grad=True)
        weight = head.clone().requires_grad_()
        for loss, stats in (
            class_balanced_loss(local, y, torch.ones(C), **options),
            linear_class_balanced_loss(torch.zeros(0, 3), weight, y, torch.ones(C), **options),
        ):
            assert loss == 0
            assert stats.rows.tolist() == [0] * shards.num_local_classes
            loss.backward()
        assert weight.grad is not None
        assert not weight.grad.any()


def changed_in_place(shards: ClassShards) -> None:
    """A vector that the backward needs must be what it was in the forward."""
    C = shards.num_classes
    x, y, _ = data(C)
    for activation in ("softmax", "sigmoid"):
        bias = draw(2, C)
        local = mine(shards, x.T).T.clone().requires_grad_()
        options: dict[str, Any] = {"activation": activation, "reduction": "none"}
        loss = class_balanced_loss(local, y, logit_bias=bias, shards=shards, **options)
        bias.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def errors_of_one_rank(shards: ClassShards) -> None:
    """All ranks raise, with the first's message or a pointer to it."""
    x, y, w = data(shards.num_classes)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = mine(shards, x.T).T.contiguous()
    there = rank == ranks - 1
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (IndexError, {"target": torch.where(y == -100, 99, y)}),
        (ValueError, {"weight": -w}),
        (ValueError, {"input": x[:, :0].expand(N, 0) if shards.num_local_classes else x}),
        (ValueError, {"target": x.softmax(1)}),
        (TypeError, {"sample_weight": torch.ones(N, dtype=torch.int64)}),
    ]
    for error, change in wrong:
        given: dict[str, Any] = {"input": local, "target": y, "weight": w}
        with pytest.raises(error):
            class_balanced_loss(**(given | change if there else given), shards=shards)
    with pytest.raises(ValueError, match=r"same rows|raised ValueError"):
        fewer = slice(0, N - 1) if there else slice(0, N)
        class_balanced_loss(local[fewer], y[fewer], w, shards=shards)
    for name, value, other in (
        ("weight", w, None), ("reduction", "sum", "mean"), ("label_smoothing", 0.1, 0.0),
        ("return_stats", True, False),
    ):  # fmt: skip
        unlike: dict[str, Any] = {name: value if there else other}
        with pytest.raises(ValueError, match=f"every rank must have the same .*{name}"):
            class_balanced_loss(local, y, shards=shards, **unlike)
    head, x_head = torch.ones(shards.num_local_classes, 2), torch.ones(N, 2)
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1|raised ValueError"):
        linear_class_balanced_loss(x_head, head, y, shards=shards, chunk_size=0 if there else 4)
    with pytest.raises(TypeError):
        ClassShards(1.5 if there else 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 on every rank"):
        ClassShards(0)


def weights_of_one_rank(of_all: ClassShards) -> None:
    """Which are those of all classes; or some ranks have these, others their own."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for shards in (ClassShards(4 if rank == ranks - 1 else 0), of_all):
        x, y, w = data(shards.num_classes)
        own = mine(shards, w) if shards is not of_all or rank == 0 else w
        for activation in ("softmax", "sigmoid"):
            options: dict[str, Any] = {"activation": activation, "reduction": "weighted_mean"}
            want, _ = expected(x, y, w, **options)
            loss = class_balanced_loss(mine(shards, x.T).T, y, own, shards=shards, **options)
            near(loss, want, torch.float64)


def copies(shards: ClassShards) -> None:
    assert copy.deepcopy(shards).sizes == shards.sizes
    loaded = pickle.loads(pickle.dumps(shards))
    assert (loaded.sizes, loaded.group) == (shards.sizes, None)
    again = ClassShards(shards.num_local_classes, torch.distributed.group.WORLD)
    assert copy.deepcopy(again).group is again.group
    assert pickle.loads(pickle.dumps(again)).group is None


def heads(shards: ClassShards) -> None:
    """The linear head of this rank's classes; the gradient of the input is that of all classes."""
    C, D = shards.num_classes, 6
    _, y, w = data(C)
    leaves = [draw(5, N, D) - 0.5, draw(6, C, D) - 0.5, draw(7, C) - 0.5]
    for kind in ("smooth", "adjusted", "sigmoid"):
        options = options_of(kind, C)
        for reduction in ("none", "mean"):
            for dtype in (torch.float64, torch.float16):
                input, head, bias = (t.to(dtype).double().requires_grad_() for t in leaves)
                given: dict[str, Any] = {"reduction": reduction, **options}
                want = class_balanced_loss(F.linear(input, head, bias), y, w, **given)
                grads = torch.autograd.grad((want * factors(want)).sum(), (input, head, bias))
                own = [input, mine(shards, head), mine(shards, bias)]
                own = [t.detach().to(dtype).requires_grad_() for t in own]
                loss = linear_class_balanced_loss(
                    own[0], own[1], y, w, linear_bias=own[2], shards=shards, chunk_size=4, **given
                )
                near(loss.detach(), want.detach(), torch.float32 if dtype.itemsize < 8 else dtype)
                same_everywhere(loss.detach())
                found = torch.autograd.grad((loss * factors(loss)).sum(), own)
                rights = grads[0], mine(shards, grads[1]), mine(shards, grads[2])
                for got, right in zip(found, rights, strict=True):
                    near(got, right, dtype)
    input, head, _ = leaves
    local = mine(shards, head)
    loss, stats = linear_class_balanced_loss(
        input, local, y, w, shards=shards, chunk_size=4, return_stats=True
    )
    want, right_stats = class_balanced_loss(F.linear(input, head), y, w, return_stats=True)
    near(loss, want, torch.float64)
    for got, right in zip(stats, right_stats, strict=True):
        torch.testing.assert_close(got, mine(shards, right), equal_nan=True)
    with pytest.raises(ValueError, match=r"linear_weight must have|raised ValueError"):
        wrong = head[:, :5] if torch.distributed.get_rank() == 0 else local
        linear_class_balanced_loss(input, wrong, y, w, shards=shards)


def heads_of_rows() -> None:
    """A module with a group, as of DDP and of FSDP2: uneven rows of the ranks have one mean."""
    from torch.distributed.fsdp import fully_shard

    C, D, rank = 5, 6, torch.distributed.get_rank()
    _, y, _ = data(C)
    input, ranks = draw(5, N, D), torch.distributed.get_world_size()
    for reduction in ("mean", "weighted_mean"):
        torch.manual_seed(0)
        group: Any = torch.distributed.group.WORLD
        head = LinearClassBalancedLoss(
            D, [9, 5, 3, 2, 1], 0.9, dtype=torch.float64, group=group, reduction=reduction
        )
        rows = torch.arange(N).tensor_split([2, 9, 11][: ranks - 1])[rank]
        head(input[rows], y[rows]).backward()
        grad = head.linear.weight.grad
        assert grad is not None
        torch.distributed.all_reduce(grad)
        sharded = copy.deepcopy(head)
        fully_shard(sharded)  # its head's parameters are over the ranks
        sharded.zero_grad()
        sharded(input[rows], y[rows]).backward()
        own: Any = sharded.linear.weight.grad
        torch.testing.assert_close(own.full_tensor(), grad / ranks)
        head.eval()
        (want,) = torch.autograd.grad(head(input, y), head.linear.weight)
        torch.testing.assert_close(grad / ranks, want)
