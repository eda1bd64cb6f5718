"""The process of `python -m bench.limits` that loads one build of cbloss_fused and times its calls.

A line of standard input is a case, as JSON, or "go"; the answer to each is a line of JSON. Imports
nothing of bench, so that a build of another version can be measured, too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cbloss_fused

MEAN = 1  # the operator's code for reduction="mean"
SETTLE = 0.02  # seconds until the threads of the other build have stopped waiting actively


def calls_of(case: dict[str, Any]) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is timed, by column, each with what comes before it untimed."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = case["shape"], getattr(torch, case["dtype"])
    layout = torch.channels_last if case["channels_last"] else torch.contiguous_format
    source = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    C, positions = shape[1], [shape[0], *shape[2:]]
    weight: Tensor | None = torch.rand(C, generator=generator) + 0.5
    if case["soft"]:
        target = torch.rand(shape, generator=generator).contiguous(memory_format=layout)
        target /= target.sum(1, keepdim=True)
        weight = None
    else:
        target = torch.randint(C, positions, generator=generator)
    if len(shape) > 2:  # as the operator takes it
        source, target = source.flatten(2), target.flatten(2 if case["soft"] else 1)
    logits, grad, loss = source.clone(), source.clone(), torch.empty(())
    options = (target, weight, *[None] * 5, case["numbers"], None, None, MEAN, loss)
    call = torch.ops.cbloss_fused.loss

    def nothing() -> None:
        pass

    return {
        "copy": (nothing, lambda: grad.copy_(source)),
        "loss": (nothing, lambda: call(source, *options, None, None)),
        "loss + gradient": (nothing, lambda: call(source, *options, grad, None)),
        "in place": (lambda: logits.copy_(source), lambda: call(logits, *options, logits, None)),
    }


def milliseconds(before: Callable[[], Any], run: Callable[[], Any], repeat: int) -> float:
    before()
    start = time.perf_counter_ns()
    for _ in range(repeat):
        run()
    return (time.perf_counter_ns() - start) / repeat / 1e6


def wake(run: Callable[[], Any]) -> None:
    """Until this process's threads have a core each: it takes some milliseconds."""
    end = time.perf_counter() + SETTLE
    while time.perf_counter() < end:
        run()


def main() -> None:
    cbloss_fused.backends()  # loads the operators
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    repeat = 1
    for line in sys.stdin:
        if line.strip() == "go":
            time.sleep(SETTLE)
            wake(calls["copy"][1])
            found: Any = {name: milliseconds(*call, repeat) for name, call in calls.items()}
        else:
            case = json.loads(line)
            torch.set_num_threads(case["threads"])
            calls, repeat = calls_of(case), case["repeat"]
            found = "ready"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
