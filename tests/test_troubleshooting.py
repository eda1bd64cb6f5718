"""The messages that docs/troubleshooting.md explains are those that come."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from cbloss_fused import (
    ClassBalancedLoss,
    ClassShards,
    class_balanced_loss,
    class_balanced_weights,
    linear_class_balanced_loss,
    ops,
)
from cbloss_fused.backends import REGISTRY

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
MESSAGES = [line for block in BLOCKS for line in block.splitlines()]
REASONS = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
SOURCES = ("setup.py", "csrc/cuda/ops.cu", "cbloss_fused/backends.py")
# Of several ranks, and of builds, which tests/test_build.py makes.
NOT_RAISED = ("cbloss_fused/groups.py", "cbloss_fused/sharded.py", "setup.py")
y = torch.tensor([0, 1, 2, 0], device="cpu")
one_hot = nn.functional.one_hot(y, 3).float()


def logits(*shape: int) -> torch.Tensor:
    return torch.zeros(shape or (4, 3), requires_grad=True)


def loss(target: Any = y, *arguments: Any, **options: Any) -> torch.Tensor:
    return class_balanced_loss(logits(), target, *arguments, **options)


def in_eager_pytorch() -> None:
    kernels = dict(zip(("loss", "gradient"), ops.overloads("reference"), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "cpu", REGISTRY["cpu"]._replace(**kernels))
        patch.setitem(ops.why_eager, "cpu", "no C++ compiler found")
        patch.setattr(ops, "_warned", False)
        loss()


def not_built() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "cuda", REGISTRY["cuda"]._replace(missing="not built"))
        loss(backend="cuda")


def on_the_cpu() -> None:
    with pytest.MonkeyPatch.context() as patch:
        not_interpreted = REGISTRY["triton"]._replace(missing=None, on_request=())
        patch.setitem(REGISTRY, "triton", not_interpreted)
        loss(backend="triton")


def saved_before() -> None:
    z = logits() * 2
    other = z.exp() * z
    (class_balanced_loss(z, y, inplace=True) + other.sum()).backward()


def second_derivative() -> None:
    leaf = logits()
    torch.autograd.grad(class_balanced_loss(leaf, y), leaf, create_graph=True)


def load(into: nn.Module, state: nn.Module) -> None:
    into.load_state_dict(state.state_dict())


def with_a_group(function: Callable[[], Any]) -> Callable[[], Any]:
    def case() -> None:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            function()
        finally:
            dist.destroy_process_group()

    return case


def placed(tensor: torch.Tensor, placement: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [placement])


@with_a_group
def a_group_and_shards() -> None:
    loss_fn = ClassBalancedLoss([3, 2, 1], 0.9, group=dist.group.WORLD)
    loss_fn(logits(), y, shards=ClassShards(3))


@with_a_group
def a_partial_sum() -> None:
    from torch.distributed.tensor import Partial

    class_balanced_loss(placed(logits(), Partial()), y)


@with_a_group
def a_sharded_head() -> None:
    from torch.distributed.tensor import Shard

    linear_class_balanced_loss(torch.zeros(4, 2), placed(torch.zeros(3, 2), Shard(0)), y)


CASES: list[Callable[[], Any]] = [
    in_eager_pytorch,
    not_built,
    on_the_cpu,
    lambda: loss(torch.tensor([0, 7, 1, 2])),
    lambda: class_balanced_loss(logits(4, 1), torch.tensor([0, 1, 1, 0])),
    lambda: loss(y.unsqueeze(1)),
    lambda: loss(y.float()),
    lambda: loss(1.5 * one_hot, activation="sigmoid"),
    lambda: loss(one_hot, gamma=2),
    lambda: loss(clip=0.05),
    lambda: loss(gama=2),
    lambda: class_balanced_weights([10**6, 10**5, 10**4]),
    lambda: class_balanced_weights([0.5, 0.3, 0.2]),
    lambda: class_balanced_weights([5, 0, 2]),
    lambda: loss(y, torch.ones(5)),
    lambda: ClassBalancedLoss([3, 2, 1], 0.9).update_counts([1, 1]),
    lambda: class_balanced_loss(logits(4, 1), torch.zeros(4, 1), torch.ones(2)),
    lambda: loss(y.to("meta")),
    lambda: loss(inplace=True),
    saved_before,
    second_derivative,
    lambda: torch.func.grad(lambda z: class_balanced_loss(z, y))(logits()),
    lambda: torch.jit.trace(lambda z: class_balanced_loss(z, y), logits()),
    lambda: loss(y, nn.Parameter(torch.ones(3))),
    lambda: loss(logit_scale=nn.Parameter(torch.ones(()))),
    lambda: setattr(ClassBalancedLoss([3, 2, 1], 0.9), "weight", nn.Parameter(torch.ones(3))),
    lambda: ClassBalancedLoss([3, 2, 1], 0.9, group=3),  # type: ignore[arg-type]
    a_group_and_shards,
    a_partial_sum,
    a_sharded_head,
    lambda: load(ClassBalancedLoss([3, 2, 1], 0.9), ClassBalancedLoss([4, 3, 2, 1], 0.9)),
    lambda: load(ClassBalancedLoss([3, 2, 1], 0.9), nn.CrossEntropyLoss()),
    lambda: load(nn.CrossEntropyLoss(torch.ones(3)), ClassBalancedLoss([3, 2, 1], 0.9)),
]


@cache
def raised() -> list[str]:
    """The error and the warnings of every case."""
    found = []
    for case in CASES:
        with torch.device("cpu"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                case()
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            found += [f"{each.category.__name__}: {each.message}" for each in caught]
    return found


def parts(quoted: str) -> list[str]:
    """What stands between the …"""
    return [part.strip() for part in quoted.split("…")]


def in_sources(quoted: str, files: tuple[str, ...]) -> bool:
    text = "".join((ROOT / file).read_text("utf-8") for file in files)
    return all(part in text for part in parts(quoted))


@pytest.mark.parametrize("quoted", MESSAGES)
def test_message(quoted):
    pattern = re.compile(r"\s*".join(rf"{re.escape(part)}.*" for part in parts(quoted)), re.DOTALL)
    message = quoted.partition(": ")[2]
    assert any(map(pattern.match, raised())) or in_sources(message, NOT_RAISED)


@pytest.mark.parametrize("quoted", REASONS)
def test_reason(quoted):
    assert in_sources(quoted.replace("extension ", "extension …"), SOURCES)
