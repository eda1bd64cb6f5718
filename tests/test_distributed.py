"""Data parallel training over processes: gradients, losses and counts are those of one process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.multiprocessing.spawn import spawn
from torch.utils.data import TensorDataset

from cbloss_fused import (
    ClassBalancedLoss,
    DeferredReweighting,
    class_balanced_loss,
    class_balanced_weights,
    class_counts,
    global_normalizer,
)

N, C, D = 12, 5, 4
PARTS = {2: (8, 4), 3: (7, 0, 5)}  # rows of each rank
COUNTS, BETA = [50, 20, 9, 4, 1], 0.9
BACKGROUND = C  # the target of rows without a class

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="processes of the CPU"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_ranks(ranks: int, tmp_path: Path) -> None:
    spawn(on_a_rank, (ranks, str(tmp_path / "store")), ranks)


def on_a_rank(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    normalizers()
    gradients()
    accumulated_gradients()
    nothing_to_average()
    silent_calls()
    errors()
    counts()
    updated_counts()
    copies()
    a_broadcast_state()
    a_smaller_group()
    if ranks == 2:
        compiled()
    torch.distributed.destroy_process_group()


def ranks_() -> int:
    return torch.distributed.get_world_size()


def world() -> Any:
    return torch.distributed.group.WORLD


def own(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return tensor.split(PARTS[ranks])[rank]


def made(**options: Any) -> ClassBalancedLoss:
    return ClassBalancedLoss(COUNTS, BETA, **options).double()


def data(background: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, targets, row weights r of the loss in `made`, sample weights; all rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (N,), generator=generator)
    s = torch.rand(N, generator=generator, dtype=torch.float64) + 0.5
    y[[1, 2, 9]] = -100
    if background:
        y[[0, 3, 10]] = BACKGROUND
    w = class_balanced_weights(COUNTS, BETA).double()
    r = torch.where(y < C, w[y.clamp(0, C - 1)], 1.0) * s
    return x, y, torch.where(y == -100, 0.0, r), s


def row_losses(logits: Tensor, y: Tensor, sigmoid: bool) -> Tensor:
    """By PyTorch's own functions, unweighted; 0 where ignored."""
    if not sigmoid:
        return F.cross_entropy(logits, y, reduction="none")
    hot = F.one_hot(y.clamp(0, C), C + 1)[:, :C].to(logits)
    rows = F.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(1)
    return torch.where(y == -100, 0.0, rows)


def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, C, dtype=torch.float64)


def whole_batch(reduction: str, sigmoid: bool) -> tuple[Tensor, list[Tensor]]:
    """What one process has: the loss and its gradients."""
    x, y, r, _ = data(background=sigmoid)
    model = head()
    divisor = r.sum() if reduction == "weighted_mean" else (y != -100).sum()
    loss = (r * row_losses(model(x), y, sigmoid)).sum() / divisor
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def mean_over_ranks(loss: Tensor) -> Tensor:
    mean = loss.detach() / torch.distributed.get_world_size()
    torch.distributed.all_reduce(mean)
    return mean


def normalizers() -> None:
    ranks = torch.distributed.get_world_size()
    x, y, r, s = data(background=True)
    w = class_balanced_weights(COUNTS, BETA)
    marks: dict[str, Any] = {"background_index": BACKGROUND}
    mine, kept = own(y), y != -100
    unweighted = torch.where(kept, r / s, 0.0).sum()
    found = {
        "rows": (global_normalizer(mine), kept.sum()),
        "all": (global_normalizer(mine.clamp(min=0), ignore_index=None), torch.tensor(N)),
        "r": (global_normalizer(mine, w, sample_weight=own(s), **marks), r.sum()),
        "w": (global_normalizer(mine.int(), w, group=world(), **marks), unweighted),
        "s": (global_normalizer(mine, sample_weight=own(s), **marks), s[kept].sum()),
        "2-d": (global_normalizer(mine[:, None], w, **marks), unweighted),
    }
    soft = x[:, :1].sigmoid() * F.one_hot(y.clamp(0, C - 1), C)
    soft[3] = 0  # no label: r = 1
    mean_weights = torch.cat([w[y.clamp(0, C - 1)][:3], torch.ones(1), w[y.clamp(0, C - 1)][4:]])
    found["soft rows"] = (global_normalizer(own(soft)), torch.tensor(N))
    found["soft r"] = (global_normalizer(own(soft), w), mean_weights.sum())
    unknown = soft.clone()
    unknown[:, 0] = -1  # the labels of class 0 are not known
    without = torch.where((y.clamp(0, C - 1) == 0), 1.0, mean_weights)
    found["unknown"] = (global_normalizer(own(unknown), w, ignore_index=-1), without.sum())
    for name, (normalizer, total) in found.items():
        assert normalizer.shape == () and normalizer.dtype == torch.float64, name
        torch.testing.assert_close(normalizer, total.double() / ranks, msg=name)


def gradients() -> None:
    """Of uneven parts, with ignored and background rows, class and sample weights."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    for sigmoid in (False, True):
        x, y, _, s = data(background=sigmoid)
        options: dict[str, Any] = (
            {"activation": "sigmoid", "background_index": BACKGROUND} if sigmoid else {}
        )
        for reduction in ("mean", "weighted_mean"):
            want, grads = whole_batch(reduction, sigmoid)
            loss_fn = made(reduction=reduction, group=world(), **options)
            replicated: Any = DistributedDataParallel(head())
            sharded: Any = head()
            fully_shard(
                sharded, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (ranks_(),))
            )
            for model in (replicated, sharded):
                loss = loss_fn(model(own(x)), own(y), own(s))
                loss.backward()
                torch.testing.assert_close(mean_over_ranks(loss), want)
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    have: Any = parameter.grad
                    have = have.full_tensor() if hasattr(have, "full_tensor") else have
                    torch.testing.assert_close(have, grad)
            loss, stats = loss_fn(head()(own(x)), own(y), own(s), return_stats=True)
            torch.testing.assert_close(mean_over_ranks(loss), want)
            assert stats.rows.tolist() == [int((own(y) == c).sum()) for c in range(C)]


def accumulated_gradients() -> None:
    """Two parts on each rank, of which the first communicates nothing."""
    from torch.nn.parallel import DistributedDataParallel

    x, y, _, s = data()
    for reduction in ("mean", "weighted_mean"):
        model = DistributedDataParallel(head())
        loss_fn = made(group=world())
        weights: dict[str, Any] = {"weight": loss_fn.weight, "sample_weight": own(s)}
        given = weights if reduction == "weighted_mean" else {}
        normalizer = global_normalizer(own(y), **given)
        parts = [own(t).tensor_split(2) for t in (x, y, s)]
        for i, (px, py, ps) in enumerate(zip(*parts, strict=True)):
            model.require_backward_grad_sync = i == 1  # what no_sync() sets
            loss_fn(model(px), py, ps, normalizer=normalizer).backward()
        _, grads = whole_batch(reduction, sigmoid=False)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


def nothing_to_average() -> None:
    """0 and not NaN where no rank has a row to average, or all weights are 0."""
    x, y, _, _ = data()
    nothing = torch.full_like(own(y), -100)
    assert global_normalizer(nothing) == 1
    assert global_normalizer(own(y), sample_weight=torch.zeros(len(own(y)))) == 1
    for reduction in ("mean", "weighted_mean"):
        loss_fn = made(reduction=reduction, group=world())
        logits = head()(own(x)).detach().requires_grad_()
        loss = loss_fn(logits, nothing)
        loss.backward()
        assert loss == 0
        assert (logits.grad == 0).all()


@contextmanager
def no_communication() -> Iterator[None]:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a rank communicates")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", refused)
        yield


def silent_calls() -> None:
    """In evaluation one rank does not wait for others, nor with a normalizer or without a mean."""
    x, y, _, s = data()
    logits = head()(x).detach()
    plain = made()
    with no_communication():
        with pytest.raises(AssertionError, match="communicates"):
            made(group=world())(logits, y)
        for reduction in ("none", "sum", "mean", "weighted_mean"):
            loss_fn = made(reduction=reduction, group=world())
            want = made(reduction=reduction)(logits, y, s)
            torch.testing.assert_close(loss_fn.eval()(logits, y, s), want)
            if reduction in ("none", "sum"):
                torch.testing.assert_close(loss_fn.train()(logits, y, s), want)
        want = plain(logits, y, normalizer=7.0)
        torch.testing.assert_close(made(group=world())(logits, y, normalizer=7.0), want)
        class_counts(y, C, ignore_index=-100)
        plain.update_counts([1] * C)


def errors() -> None:
    """What one rank finds all raise; the next calls are in step again."""
    x, y, _, s = data()
    first = torch.distributed.get_rank() == 0
    logits, mine, weights = head()(own(x)).detach(), own(y), own(s)
    loss_fn = made(group=world())

    def only(bad: Any, good: Any) -> Any:
        return bad if first else good

    high, low, negative = mine.clone(), mine.clone(), weights.clone()
    if first:
        high[0], low[0], negative[0] = C, -1, -2
    expected = "is out of range" if first else "another rank of the group raised IndexError"
    w = loss_fn.weight
    call: Callable[[], Any]
    for call in (
        lambda: loss_fn(logits, high),
        lambda: loss_fn(logits, low),
        lambda: global_normalizer(high, w),
        lambda: global_normalizer(low),
    ):
        with pytest.raises(IndexError, match=expected):
            call()
    other = None if first else "another rank of the group raised ValueError"
    for call in (
        lambda: loss_fn(logits, only(mine[1:], mine)),
        lambda: loss_fn(logits, mine, negative),
        lambda: loss_fn(logits, only(logits - 50, logits.sigmoid())),
        lambda: global_normalizer(mine, sample_weight=negative),
        lambda: global_normalizer(mine, only(-w, w)),
        lambda: global_normalizer(mine, only(w[None], w)),
        lambda: global_normalizer(mine, sample_weight=only(s[:1], weights)),
        lambda: global_normalizer(mine, background_index=only(-100, None)),
        lambda: global_normalizer(only(torch.tensor(0.5), mine)),
        lambda: class_counts(mine.clamp(min=0), num_classes=only(1, C), group=world()),
        lambda: class_counts(only([-1], [1]), group=world()),
        lambda: loss_fn.update_counts(only([1, 2], [1] * C)),
        lambda: loss_fn.update_counts(only([-1] * C, [1] * C)),
    ):
        before = loss_fn.counts.clone()
        with pytest.raises(ValueError, match=other):
            call()
        assert torch.equal(loss_fn.counts, before)
    for call in (
        lambda: global_normalizer(only(None, mine)),
        lambda: loss_fn(only(None, logits), mine),
    ):
        expected = "must be a Tensor" if first else "another rank of the group raised TypeError"
        with pytest.raises(TypeError, match=expected):
            call()
    with pytest.raises(ValueError, match="there are no labels"):
        class_counts([], group=world())
    kind, expected = (OSError, "unreadable") if first else (RuntimeError, "raised RuntimeError")
    with pytest.raises(kind, match=expected):
        class_counts(only(Unreadable(), [0]), group=world())
    torch.testing.assert_close(global_normalizer(mine), (y != -100).sum().double() / ranks_())

    from torch.distributed.tensor import Shard, distribute_tensor

    on = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks_(),))
    with pytest.raises(ValueError, match="needs plain logits, got a DTensor"):
        loss_fn(distribute_tensor(head()(x).detach(), on, [Shard(0)]), mine)


class Unreadable(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise OSError("unreadable")


def counts() -> None:
    y = torch.tensor([0, 0, 0, 0, 0, 0, 0, 4, 1, 2, 2, -100])  # 2 ranks: 4 is rank 0's alone
    want = torch.tensor([7, 1, 2, 0, 1])
    for num_classes in (None, C):
        have = class_counts(own(y), num_classes, ignore_index=-100, group=world())
        assert have.dtype == torch.int64
        assert torch.equal(have, want)
    wider = class_counts(own(y).tolist(), 8, ignore_index=-100, group=world())
    assert wider.tolist() == [*want, 0, 0, 0]
    loss_fn = ClassBalancedLoss.from_labels(own(y), empty="one", group=world())
    assert torch.equal(loss_fn.counts, want.double())
    assert loss_fn.group is world()
    dataset = TensorDataset(own(y), own(y))
    loss_fn = ClassBalancedLoss.from_dataset(dataset, C, empty="one", group=world())
    assert torch.equal(loss_fn.counts, want.double())
    assert class_counts([3], 4).tolist() == [0, 0, 0, 1]  # without a group a rank's own


def updated_counts() -> None:
    loss_fn, ranks = made(group=world()), ranks_()
    more = [torch.distributed.get_rank() * c for c in range(C)]
    loss_fn.eval().update_counts(more)
    total = torch.tensor(COUNTS) + ranks * (ranks - 1) // 2 * torch.arange(C)
    assert torch.equal(loss_fn.counts, total.double())
    torch.testing.assert_close(loss_fn.weight, class_balanced_weights(total, BETA).double())
    loss_fn.group = None
    loss_fn.update_counts([1] * C)
    assert torch.equal(loss_fn.counts, total.double() + 1)


def copies() -> None:
    """Copies have the same group, pickles none."""
    from torch.optim.swa_utils import AveragedModel

    x, y, _, s = data()
    logits = head()(own(x)).detach()
    model = nn.ModuleDict({"net": head(), "loss": made(group=world())})
    average: Any = AveragedModel(model)
    average.update_parameters(model)
    loss_fn: Any = model["loss"]
    want = loss_fn(logits, own(y), own(s))
    for copied in (copy.deepcopy(loss_fn), copy.copy(loss_fn), average.module["loss"]):
        assert copied.group is world()
        assert torch.equal(copied(logits, own(y), own(s)), want)
    assert all(type(value) is Tensor for value in model.state_dict().values())
    made(group=world()).load_state_dict(loss_fn.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["loss"]
    alone = made()(logits, own(y), own(s))
    for unpickled in (loaded, pickle.loads(pickle.dumps(loss_fn))):
        assert unpickled.group is None
        assert torch.equal(unpickled(logits, own(y), own(s)), alone)
        unpickled.group = world()
        assert torch.equal(unpickled(logits, own(y), own(s)), want)
    assert f"group of {ranks_()}" in repr(loss_fn)


def a_broadcast_state() -> None:
    """Rank 0 alone has the checkpoint: all go on with its counts, in its epoch."""
    saved, loaded = (nn.ModuleDict({"net": head(), "loss": made()}) for _ in range(2))
    schedule = DeferredReweighting(saved["loss"], 2)  # type: ignore[arg-type]
    schedule.step()
    saved["loss"].update_counts([1] * C)  # type: ignore[operator]
    state = saved.state_dict() if torch.distributed.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(loaded, state, options=options)
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def a_smaller_group() -> None:
    """Of the first rank alone: the others are not in it and are told so."""
    group = torch.distributed.new_group([0])
    x, y, _, _ = data()
    logits = head()(x).detach()
    if torch.distributed.get_rank() == 0:
        want = F.cross_entropy(logits, y, made().weight)
        have = made(reduction="weighted_mean", group=group)(logits, y)
        torch.testing.assert_close(have, want)
        assert global_normalizer(y, group=group) == (y != -100).sum()
    else:
        for call in (
            lambda: made(group=group),
            lambda: global_normalizer(y, group=group),
            lambda: class_counts([0], group=group),
        ):
            with pytest.raises(TypeError, match="that this rank is in"):
                call()


def compiled() -> None:
    """The graph breaks where ranks communicate; results and errors are the same."""
    x, y, _, s = data()
    loss_fn = made(reduction="weighted_mean", group=world())
    model, graphs = head(), torch.compile(loss_fn, backend="eager")
    bad = own(y).clone()
    bad[0] = 77
    if torch.distributed.get_rank():
        bad = own(y)
    for training in (True, False, True):
        loss_fn.train(training)
        want = torch.autograd.grad(loss_fn(model(own(x)), own(y), own(s)), model.weight)
        have = torch.autograd.grad(graphs(model(own(x)), own(y), own(s)), model.weight)
        torch.testing.assert_close(have, want)
    expected = "another rank" if torch.distributed.get_rank() else "is out of range"
    with pytest.raises(IndexError, match=expected):
        graphs(model(own(x)), bad, own(s))


# One process --------------------------------------------------------------------------------------


def test_one_process() -> None:
    """Without torch.distributed's initialisation a process is all ranks."""
    x, y, _, s = data()
    logits = head()(x).detach()
    w = class_balanced_weights(COUNTS, BETA)
    weights: dict[str, Any] = {"weight": w, "sample_weight": s}
    for reduction in ("mean", "weighted_mean"):
        given = weights if reduction == "weighted_mean" else {}
        normalizer = global_normalizer(y, **given)
        have = class_balanced_loss(logits, y, w, sample_weight=s, normalizer=normalizer)
        torch.testing.assert_close(have, made(reduction=reduction)(logits, y, s))
    row = torch.tensor([0.5, 0.25, 0.0, 0.0, 0.25])  # a 1-d soft target is one row
    assert global_normalizer(row) == 1
    torch.testing.assert_close(global_normalizer(row, w), (row * w).sum().double())


def test_many_rows_are_counted() -> None:
    """Above 2**24, where float32 has no odd numbers."""
    target = torch.zeros((), dtype=torch.uint8).expand(2**24 + 1)
    assert global_normalizer(target) == 2**24 + 1


@pytest.mark.parametrize("group", [0, "WORLD", object()], ids=str)
def test_no_group(group: Any) -> None:
    loss_fn = made()
    for call in (
        lambda: made(group=group),
        lambda: setattr(loss_fn, "group", group),
        lambda: global_normalizer(torch.tensor([0]), group=group),
        lambda: class_counts([0], group=group),
    ):
        with pytest.raises(TypeError, match="group must be None or a torch"):
            call()
    assert loss_fn.group is None


def test_a_module_of_before_groups() -> None:
    loss_fn = made()
    del loss_fn.__dict__["_group"]
    old = pickle.loads(pickle.dumps(loss_fn))
    assert old.group is None
    x, y, _, _ = data()
    assert torch.equal(old(head()(x), y), made()(head()(x), y))
