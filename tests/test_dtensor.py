"""DTensor logits over two processes: those of plain tensors, whoever holds which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED
from support.marks import REDUCTIONS
from torch.multiprocessing.spawn import spawn

from cbloss_fused import ClassBalancedLoss, class_balanced_loss
from cbloss_fused.options import LossOptions

RANKS, N, C = 2, 7, 5  # 4 rows and 3


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="processes of the CPU")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks(tmp_path: Path) -> None:
    spawn(on_a_rank, (str(tmp_path / "store"),), RANKS)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="processes of the CPU")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_errors_of_one_of_four_ranks(tmp_path: Path) -> None:
    """Rows over a mesh of 2 x 2: those in another row and column raise, too."""
    spawn(one_of_four, (str(tmp_path / "store"),), 4)


def one_of_four(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4
    )
    errors_of_one_rank()
    torch.distributed.destroy_process_group()


def on_a_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    placed_losses()
    images_over_ranks()
    classes_over_ranks()
    statistics_of_all_rows()
    refused()
    torch.distributed.destroy_process_group()


def data() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (N,), generator=generator)
    y[2] = -100
    return x, y, torch.rand(C, generator=generator), torch.rand(N, generator=generator)


def mesh() -> Any:
    ranks = torch.distributed.get_world_size()
    return torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))


def placed_losses() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    x, y, w, s = data()
    on = mesh()
    for placement in (Shard(0), Replicate()):
        logits: Any = distribute_tensor(x, on, [placement]).requires_grad_()
        target, sample = (distribute_tensor(t, on, [placement]) for t in (y, s))
        for reduction in REDUCTIONS:
            leaf = x.clone().requires_grad_()
            theirs = {"none": "none", "sum": "sum", "mean": "sum", "weighted_mean": "mean"}
            want = F.cross_entropy(leaf, y, w.double(), reduction=theirs[reduction])
            if reduction == "mean":
                want = want / (y != -100).sum()
            want.sum().backward()
            for own in (target, target.to_local()):  # as a DTensor, or this rank's rows
                logits.grad = None
                options: LossOptions = {"reduction": reduction}
                loss = class_balanced_loss(logits, own, w, **options)
                assert isinstance(loss, DTensor)
                torch.testing.assert_close(loss.full_tensor(), want.detach())
                loss.sum().backward()
                assert logits.grad.placements == logits.placements
                torch.testing.assert_close(logits.grad.full_tensor(), leaf.grad)
        given: dict[str, Any] = {
            "activation": "sigmoid",
            "gamma": 0.5,
            "recompute": True,
            "label_smoothing": 0.1,
        }
        want = class_balanced_loss(x, y, w, sample_weight=s, **given)
        placed = cast(
            DTensor, class_balanced_loss(logits, target, w, sample_weight=sample, **given)
        )
        torch.testing.assert_close(placed.full_tensor(), want)


def images_over_ranks() -> None:
    """Targets and sample weights have no dimension of classes."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    _, _, w, _ = data()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, C, 4, 3, generator=generator)
    y = torch.randint(C, (2, 4, 3), generator=generator)
    s, t = torch.rand(2, 4, 3, generator=generator), torch.rand(x.shape, generator=generator)
    on = mesh()
    for dim in (0, 2):
        logits = distribute_tensor(x, on, [Shard(dim)])
        target, sample = (distribute_tensor(v, on, [Shard(dim - (dim > 1))]) for v in (y, s))
        soft = distribute_tensor(t, on, [Shard(dim)])
        for labels, whole in ((target, y), (soft, t)):
            given: dict[str, Any] = {"activation": "sigmoid"}
            want = class_balanced_loss(x, whole, w, sample_weight=s, **given)
            loss = class_balanced_loss(logits, labels, w, sample_weight=sample, **given)
            torch.testing.assert_close(cast(DTensor, loss).full_tensor(), want)


def classes_over_ranks() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    x, y, w, s = data()
    for on in (mesh(), torch.distributed.device_mesh.init_device_mesh("cpu", (1, RANKS))):
        for activation in ("softmax", "sigmoid"):
            options: dict[str, Any] = {"activation": activation, "gamma": 0.5}
            leaf = x.clone().requires_grad_()
            want, stats = class_balanced_loss(
                leaf, y, w, sample_weight=s, return_stats=True, **options
            )
            want.backward()
            placements = [Replicate()] * (on.ndim - 1) + [Shard(1)]
            logits: Any = distribute_tensor(x, on, placements).requires_grad_()
            loss, own = class_balanced_loss(
                logits, y, w, sample_weight=s, return_stats=True, **options
            )
            assert isinstance(loss, DTensor)
            assert all(p.is_replicate() for p in loss.placements)
            torch.testing.assert_close(loss.to_local(), want.detach())
            loss.backward()
            assert logits.grad.placements == placements_of_a_gradient(logits)
            torch.testing.assert_close(logits.grad.full_tensor(), leaf.grad)
            first = 0 if torch.distributed.get_rank() == 0 else 3  # as torch.chunk divides 5
            for got, right in zip(own, stats, strict=True):
                torch.testing.assert_close(got, right[first : first + len(got)], equal_nan=True)


def placements_of_a_gradient(tensor: Any) -> Any:
    """The tensor's own; torch 2.11 gathers the gradient where ranks have unequally many classes."""
    from torch.distributed.tensor import DTensor, Replicate

    leaf = tensor.detach().clone().requires_grad_()
    total, everywhere = leaf.to_local().sum(), [Replicate()] * tensor.device_mesh.ndim
    loss: Any = DTensor.from_local(total, tensor.device_mesh, everywhere, run_check=False)
    loss.backward()
    return leaf.grad.placements


def statistics_of_all_rows() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x, y, _, _ = data()
    y[y == 1] = 0  # a class without rows
    on = mesh()
    module = ClassBalancedLoss([9, 4, 3, 2, 1], 0.9)
    logits, target = (distribute_tensor(t, on, [Shard(0)]) for t in (x, y))
    loss: Any
    loss, stats = module(logits, target, return_stats=True)
    want, want_stats = module(x, y, return_stats=True)
    torch.testing.assert_close(loss.full_tensor(), want)
    for a, b in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    nothing = torch.full_like(y, -100)
    leaf: Any = logits.detach().requires_grad_()
    loss = module(leaf, distribute_tensor(nothing, on, [Shard(0)]))
    loss.backward()
    assert loss.full_tensor() == 0
    assert (leaf.grad.full_tensor() == 0).all()


def refused() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, y, w, _ = data()
    on = mesh()
    images = distribute_tensor(x.view(N, C, 1).expand(N, C, 4), on, [Shard(1)])
    both = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS, 1))
    rows_and_classes = distribute_tensor(x, both, [Shard(0), Shard(1)])
    with pytest.raises(NotImplementedError, match="its rows or its classes sharded"):
        class_balanced_loss(rows_and_classes, y, w)
    with pytest.raises(ValueError, match="target must have shape"):
        class_balanced_loss(images, y, w)
    rows = distribute_tensor(x, on, [Shard(0)])
    with pytest.raises(ValueError, match="target must be placed as"):
        class_balanced_loss(rows, distribute_tensor(y, on, [Replicate()]), w)
    with pytest.raises(ValueError, match="needs plain logits"):
        class_balanced_loss(rows, distribute_tensor(y, on, [Shard(0)]), w, inplace=True)
    with pytest.raises(ValueError, match="target must have shape"):
        class_balanced_loss(rows, y, w)  # all rows, not this rank's


def errors_of_one_rank() -> None:
    """All raise, none waits: of rows over one dimension of the mesh, or two."""
    from torch.distributed.tensor import Shard, distribute_tensor

    x, y, w, s = data()
    flat, shape = mesh(), (2, torch.distributed.get_world_size() // 2)
    square = torch.distributed.device_mesh.init_device_mesh("cpu", shape)
    for on, placements in ((flat, [Shard(0)]), (square, [Shard(0), Shard(0)])):
        logits, target, sample = (distribute_tensor(t, on, placements) for t in (x, y, s))
        first = torch.distributed.get_rank() == 0
        wrong, bad = target.to_local().clone(), sample.to_local().clone()
        wrong[0], bad[0] = (C, -1) if first else (wrong[0], bad[0])
        with pytest.raises(IndexError, match="out of range" if first else "another rank"):
            class_balanced_loss(logits, wrong, w)
        with pytest.raises(ValueError, match="sample_weight" if first else "another rank"):
            class_balanced_loss(logits, target, w, sample_weight=bad, reduction="weighted_mean")
        for without_denominator in ({"reduction": "sum", "return_stats": True}, {"normalizer": 8}):
            options: dict[str, Any] = without_denominator
            with pytest.raises(IndexError, match="out of range" if first else "another rank"):
                class_balanced_loss(logits, wrong, w, **options)
        loss: Any = class_balanced_loss(logits, target, w)
        torch.testing.assert_close(loss.full_tensor(), class_balanced_loss(x, y, w))
