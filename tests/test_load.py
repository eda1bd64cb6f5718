"""Long runs, many threads and processes, interruptions, memory that ends, tensors beyond 2^31."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.backends import DEVICE, INTERPRETED
from torch.utils.data import DataLoader, Dataset

from cbloss_fused import (
    ClassBalancedLoss,
    ClassShards,
    class_balanced_loss,
    linear_class_balanced_loss,
)

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="of the CPU"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def run(code: str, *arguments: str, limit: int = 600) -> str:
    """In a process of its own, whose memory is no other test's."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


STEPS = """
import os, sys, torch
from cbloss_fused import ClassBalancedLoss, LinearClassBalancedLoss, class_balanced_loss
torch.set_num_threads(1)
def used():
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
x, y = torch.randn(32, 10, requires_grad=True), torch.randint(10, (32,))
soft, counts = torch.rand(32, 10), range(10, 0, -1)
losses = [ClassBalancedLoss(counts, 0.9, activation=a, gamma=0.5) for a in ("softmax", "sigmoid")]
head = LinearClassBalancedLoss(10, counts)
def step(i):
    x.grad = None
    kind = i % 6
    if kind < 2:
        loss = losses[kind](x, y)
    elif kind == 2:  # a number that is new in every step
        loss = class_balanced_loss(x, y, gamma=1 + i * 1e-6, reduction="none").sum()
    elif kind == 3:
        n = 1 + i % 32
        loss, _ = class_balanced_loss(x[:n], y[:n], normalizer=1.0 + i, return_stats=True)
    elif kind == 4:
        loss = class_balanced_loss(x, soft, activation="sigmoid", recompute=True)
    else:
        loss = head(x, y)
    loss.backward()
for i in range(10_000):
    step(i)
before = used()
for i in range(10_000, 100_000):
    step(i)
after = used()
print(after[0] - before[0], after[1] - before[1])
"""


@pytest.mark.long
def test_a_hundred_thousand_steps_keep_nothing():
    grown, handles = map(int, run(STEPS).split())
    assert grown < 4 << 20
    assert handles == 0


def result(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 1000, generator=generator).requires_grad_()
    y = torch.randint(1000, (200,), generator=generator)
    loss_fn = ClassBalancedLoss(range(1000, 0, -1), 0.99, activation="sigmoid", gamma=0.5)
    loss = loss_fn(x, y)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_eight_threads_at_once():
    want = [result(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert all(map(same, pool.map(result, range(8)), want))


def test_the_number_of_threads_may_change_meanwhile():
    want, threads, done = result(0), torch.get_num_threads(), threading.Event()

    def change() -> None:
        while not done.is_set():
            for number in (1, 3, 2):
                torch.set_num_threads(number)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        assert all(same(result(0), want) for _ in range(30))
    finally:
        done.set()
        changing.join()
        torch.set_num_threads(threads)


class Losses(Dataset[torch.Tensor]):
    """Computed where they are loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return result(index)[0]


@pytest.mark.long
@pytest.mark.parametrize("start", ("fork", "spawn"))
def test_workers_of_a_data_loader(start):
    want = [result(index)[0] for index in range(4)]  # the parent's threads run before the fork
    loader = DataLoader(Losses(), num_workers=2, multiprocessing_context=start, timeout=120)
    assert [float(loss) for loss in loader] == [float(loss) for loss in want]


INTERRUPTED = """
import signal, torch
from cbloss_fused import class_balanced_loss
signal.signal(signal.SIGALRM, signal.default_int_handler)
x, y = torch.randn(200_000, 100), torch.zeros(200_000, dtype=torch.int64)
small = torch.randn(4, 5, requires_grad=True)
want = torch.nn.functional.cross_entropy(small, torch.arange(4))
interrupted = 0
for delay in (0.001, 0.01, 0.03):
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        while True:
            class_balanced_loss(x, y, activation="sigmoid", gamma=1.5)
    except KeyboardInterrupt:
        interrupted += 1
    loss = class_balanced_loss(small, torch.arange(4))
    loss.backward()
    torch.testing.assert_close(loss, want)
print(interrupted)
"""


def test_a_call_that_is_interrupted_leaves_the_process_usable():
    assert int(run(INTERRUPTED)) == 3


OUT_OF_RANGE, NEGATIVE = torch.tensor([0, 7]), torch.full((2, 3), -1.0)
RAISES: dict[str, Callable[[torch.Tensor], object]] = {
    "plain": lambda x: class_balanced_loss(x, OUT_OF_RANGE),
    "soft": lambda x: class_balanced_loss(x, NEGATIVE, activation="sigmoid"),
    "weight": lambda x: class_balanced_loss(x, OUT_OF_RANGE.clamp(max=2), -torch.ones(3)),
    "recompute": lambda x: class_balanced_loss(x, OUT_OF_RANGE, recompute=True),
    "stats": lambda x: class_balanced_loss(x, OUT_OF_RANGE, return_stats=True),
    "reference": lambda x: class_balanced_loss(x, OUT_OF_RANGE, backend="reference"),
    "shards": lambda x: class_balanced_loss(x, OUT_OF_RANGE, shards=ClassShards(3)),
    "head": lambda x: linear_class_balanced_loss(x, torch.ones(3, 3), OUT_OF_RANGE),
    "module": lambda x: ClassBalancedLoss([3, 2, 1])(x, OUT_OF_RANGE),
}


@pytest.mark.parametrize("call", RAISES.values(), ids=RAISES)
def test_an_error_keeps_no_logits(call):
    """An exception in a variable of its own traceback keeps them until the collector runs."""

    def raised() -> weakref.ref[torch.Tensor]:
        x = torch.randn(2, 3, requires_grad=True)
        with contextlib.suppress(IndexError, ValueError):
            call(x)
            pytest.fail("raised nothing")
        return weakref.ref(x)

    gc.disable()
    try:
        assert raised()() is None
    finally:
        gc.enable()


NO_MEMORY = """
import os, resource, torch
from cbloss_fused import class_balanced_loss
torch.set_num_threads(1)
def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
def small():
    x, y = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    loss = class_balanced_loss(x, y)
    loss.backward()
    return loss.item()
rows = 1 << 26
x, y = torch.zeros(rows, 1, requires_grad=True), torch.zeros(1, dtype=torch.int64).expand(rows)
sizes, failed = [], 0
for _ in range(3):
    small()
    sizes.append(size())
    for more in (100, 300, 600, 900):  # MiB: at the gradient, within the operator, ...
        resource.setrlimit(resource.RLIMIT_AS, (sizes[-1] + (more << 20), resource.RLIM_INFINITY))
        try:
            class_balanced_loss(x, y)
        except (RuntimeError, MemoryError) as error:
            assert "lloc" in str(error), error
            failed += 1
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert sizes[2] - sizes[1] < 1 << 20, sizes  # once malloc has what it keeps
print(failed, small())
"""


@pytest.mark.long
def test_memory_that_ends_raises_and_leaks_nothing():
    failed, loss = run(NO_MEMORY).split()
    assert int(failed) >= 6
    assert float(loss) == pytest.approx(1.0986123)


def available() -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10


@pytest.mark.long
@pytest.mark.parametrize("shape", ((70_001, 31_000), (3, 37, 19_400_000)), ids=("rows", "images"))
def test_more_than_two_to_the_31_elements(shape):
    """At their far end, as the same rows alone."""
    if available() < 12 << 30:
        pytest.skip("needs 12 GiB")
    N, C, *K = shape
    logits = torch.empty(shape, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    for part in logits:
        part.fill_(-1)
    last = (
        (slice(-3, None), slice(None)) if not K else (slice(-1, None), slice(None), slice(-5, None))
    )
    rows = last[:1] + last[2:]
    logits[last] = torch.randn(logits[last].shape).bfloat16()
    target = torch.zeros((N, *K), dtype=torch.int64)
    target[rows] = C - 1
    alone = logits[last].clone().requires_grad_()
    want = class_balanced_loss(alone, target[rows].clone(), gamma=0.5, reduction="none")
    (want_grad,) = torch.autograd.grad(want.sum(), alone)
    losses = class_balanced_loss(logits, target, gamma=0.5, reduction="none")
    assert torch.equal(losses[rows], want.detach())
    loss = class_balanced_loss(logits.requires_grad_(), target, gamma=0.5, reduction="sum")
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad[last], want_grad)
