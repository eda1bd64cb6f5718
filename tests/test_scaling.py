"""The formulas of bench/step.py: what processes exchange, what is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from bench import scaling, step
from bench.step import Collective
from cbloss_fused import (
    ClassBalancedLoss,
    ClassShards,
    chunks,
    class_balanced_loss,
    distributed,
    global_normalizer,
)
from cbloss_fused.sharded import AGREED

N, D = 6, 3  # rows, features
OTHERS = ("broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all")
DTYPES = {torch.float32: 4, torch.bfloat16: 4, torch.float64: 8}  # bytes of the compute type


def test_page() -> None:
    """It is the one of the defaults, which say where they come from."""
    assert scaling.page(step.Setting()) == scaling.PAGE.read_text()
    assert scaling.SOURCES.keys() == step.Setting._field_defaults.keys()


@pytest.mark.parametrize("kind", ("cpu", "cuda"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("C", (7, 8142, *scaling.CLASSES))
def test_buffer(C: int, dtype: torch.dtype, kind: str) -> None:
    """Of shapes alone: what a call would allocate."""
    for rows in (1, 100, 1024, 65_536):
        x, head = (torch.empty(n, D, dtype=dtype, device="meta") for n in (rows, C))
        at_once = chunks.chunk_rows(rows, C, dtype, kind)
        found = [logits for _, logits in chunks.by_chunk(x, chunks.Head(head, None), at_once)]
        assert len(found) == step.chunk_count(rows, C, dtype, kind)
        assert found[0].untyped_storage().nbytes() == step.chunk_buffer(rows, C, dtype, kind)


def test_head_state() -> None:
    head = nn.Linear(D, N, bias=False, device="cpu")
    head(torch.ones(1, D, device="cpu")).sum().backward()
    adam = torch.optim.Adam(head.parameters())
    adam.step()
    state = adam.state[head.weight]
    assert head.weight.grad is not None
    tensors = head.weight, head.weight.grad, state["exp_avg"], state["exp_avg_sq"]
    assert sum(t.nbytes for t in tensors) == step.head_state(N, D)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="processes of the CPU")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.long
@pytest.mark.parametrize("ranks", (2, 4))
def test_wire(ranks: int, tmp_path: Path) -> None:
    spawn(on_a_rank, (str(tmp_path / "store"), ranks), ranks)


def on_a_rank(rank: int, store: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    shards = ClassShards(rank + 1)
    for dtype, itemsize in DTYPES.items():
        classes_over_ranks(shards, dtype, itemsize)
    rows_over_ranks()
    gradient_of_the_head()
    gradient_of_the_input(shards)
    torch.distributed.destroy_process_group()


@contextmanager
def counted() -> Iterator[list[Collective]]:
    """What this process passes to torch.distributed, in order."""
    found: list[Collective] = []
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        found.append(Collective("all_reduce", tensor.numel() * tensor.element_size()))
        assert found[-1].held(torch.distributed.get_world_size()) == tensor.nbytes
        return reduce(tensor, *args, **options)

    def all_gather(out: list[Tensor], tensor: Tensor, *args: Any, **options: Any) -> Any:
        found.append(Collective("all_gather", tensor.numel() * tensor.element_size()))
        assert found[-1].held(torch.distributed.get_world_size()) == sum(t.nbytes for t in out)
        return gather(out, tensor, *args, **options)

    def not_counted(*args: Any, **options: Any) -> Any:
        raise AssertionError("a collective that is not counted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        patch.setattr(torch.distributed, "all_gather", all_gather)
        for name in OTHERS:
            patch.setattr(torch.distributed, name, not_counted)
        yield found


def classes_over_ranks(shards: ClassShards, dtype: torch.dtype, itemsize: int) -> None:
    softmax = step.softmax_rows(N, itemsize=itemsize)
    sigmoid = step.sigmoid_rows(N, itemsize=itemsize)
    losses = step.sigmoid_rows(N, per_row=True, itemsize=itemsize)
    of_sigmoid = {"activation": "sigmoid", "label_smoothing": 0.1}
    smooth = step.softmax_rows(N, smoothing=True, itemsize=itemsize)
    own = torch.ones(shards.num_local_classes)
    with_own = [step.own_weight(N, itemsize=itemsize), softmax]
    for expected, options in (
        ([softmax], {}),
        ([softmax], {"reduction": "none"}),
        ([softmax], {"return_stats": True}),
        ([smooth], {"label_smoothing": 0.1}),
        (with_own, {"weight": own}),
        ([sigmoid], of_sigmoid),
        ([sigmoid], {**of_sigmoid, "recompute": True}),
        ([losses], {**of_sigmoid, "reduction": "none"}),
        ([losses], {**of_sigmoid, "return_stats": True}),
    ):
        for shape in ((N, shards.num_local_classes), (2, shards.num_local_classes, N // 2)):
            x = torch.ones(shape, dtype=dtype, requires_grad=True)
            y = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
            with counted() as found:
                result: Any = class_balanced_loss(x, y, shards=shards, **options)
                loss = result[0] if options.get("return_stats") else result
                assert found == [step.agreement(AGREED), *expected]
                loss.sum().backward()
                assert found == [step.agreement(AGREED), *expected]  # nothing in the backward


def rows_over_ranks() -> None:
    x, y = torch.zeros(N, 3, requires_grad=True), torch.zeros(N, dtype=torch.int64)
    loss_fn = ClassBalancedLoss([3, 2, 1], group=torch.distributed.group.WORLD)
    with counted() as found:
        global_normalizer(y)
        loss_fn(x, y).backward()
    assert found == 2 * [step.agreement(1)]
    with counted() as found, pytest.MonkeyPatch.context() as patch:  # where a GPU would branch
        patch.setattr(distributed, "_device", lambda tensor: torch.device("cuda"))
        global_normalizer(y, torch.ones(3))
        loss_fn(x, y).backward()
    assert found == 2 * [step.normalizer()]
    with counted() as found:
        loss_fn.eval()(x, y).backward()
    assert not found


def gradient_of_the_head() -> None:
    """What DistributedDataParallel would all-reduce."""
    C, found = 50, []

    def passed(bucket: Any) -> torch.futures.Future[Tensor]:
        found.append(Collective("all_reduce", bucket.buffer().nbytes))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    head = nn.parallel.DistributedDataParallel(nn.Linear(D, C, bias=False))
    head.register_comm_hook(None, lambda _, bucket: passed(bucket))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.ones(N, D))
    class_balanced_loss(logits, torch.zeros(N, dtype=torch.int64)).backward()
    assert found == [step.head_gradient(C, D)]


def gradient_of_the_input(shards: ClassShards) -> None:
    """Each rank has a term of it."""
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, D, generator=generator) for n in (N, shards.num_classes))
    y = torch.randint(shards.num_classes, (N,), generator=generator)
    whole, part = (x.clone().requires_grad_() for _ in range(2))
    class_balanced_loss(F.linear(whole, head), y).backward()
    own = F.linear(part, head[shards.start : shards.stop])
    class_balanced_loss(own, y, shards=shards).backward()
    assert whole.grad is not None
    assert part.grad is not None
    with counted() as found:
        torch.distributed.all_reduce(part.grad)
    assert found == [step.input_gradient(N, D, itemsize=4)]
    torch.testing.assert_close(part.grad, whole.grad)
