"""Time and peak memory of the head with its loss: `python -m bench.linear`.

Into results/linear-cpu.md. Each implementation has a process of its own; they take turns. A step is
the loss of N rows of D features with C classes, weighted, and the gradients of the rows, the head's
weight and its bias, into memory that is new. Memory is the peak of a step beyond what it was given
and the gradients that it leaves. What holds more than 4 GiB of logits is not run: its memory is
computed, and marked so.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cbloss_fused import class_balanced_loss, linear_class_balanced_loss

from . import result_files
from .cpu import save_table
from .measure import peak_of

ROUNDS, TOLERANCE = 5, 1e-4
SLOW = ("F.linear_cross_entropy, chunked",)  # timed once, and not at the largest size
MOST_BYTES, MOST_SECONDS = 4 << 30, 60.0  # of logits and gradients; of all turns after the first
OPTIONS: dict[str, Any] = {"reduction": "weighted_mean"}  # what F.cross_entropy computes


class Size(NamedTuple):
    N: int
    D: int
    C: int

    def nbytes(self) -> int:
        """Of the logits, float32."""
        return 4 * self.N * self.C


SIZES = Size(1024, 512, 8142), Size(2048, 256, 100_000), Size(4096, 128, 1_000_000)


class Given(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    class_weight: Tensor


def linear(given: Given, chunk_size: int | None = None) -> Tensor:
    x, weight, bias, y, w = given
    return linear_class_balanced_loss(
        x, weight, y, w, linear_bias=bias, chunk_size=chunk_size, **OPTIONS
    )


def unfused(given: Given, inplace: bool = False) -> Tensor:
    x, weight, bias, y, w = given
    return class_balanced_loss(F.linear(x, weight, bias), y, w, inplace=inplace, **OPTIONS)


def chunked(given: Given) -> Tensor:
    x, weight, bias, y, w = given
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(x, weight, y, linear_bias=bias, weight=w, options=options)
    return loss


def eager(given: Given) -> Tensor:
    x, weight, bias, y, w = given
    return F.cross_entropy(F.linear(x, weight, bias), y, w)


class Contender(NamedTuple):
    loss: Callable[[Given], Tensor]
    tensors: int = 0  # N x C tensors that it holds, for what is not run


def contenders(chunks: list[int]) -> dict[str, Contender]:
    found = {"linear": Contender(linear)}
    found |= {f"linear, chunks of {n}": Contender(partial(linear, chunk_size=n)) for n in chunks}
    found |= {
        "unfused": Contender(unfused, 2),
        "unfused, in place": Contender(partial(unfused, inplace=True), 1),
        "eager": Contender(eager, 3),
    }
    if hasattr(F, "linear_cross_entropy"):
        found[SLOW[0]] = Contender(chunked)
    return found


def tensors(size: Size) -> Given:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.N, size.D, generator=generator)
    weight = torch.randn(size.C, size.D, generator=generator) / size.D**0.5
    y = torch.randint(size.C, (size.N,), generator=generator)
    w = torch.rand(size.C, generator=generator) + 0.5
    x, weight, bias = (t.requires_grad_() for t in (x, weight, torch.zeros(size.C)))
    return Given(x, weight, bias, y, w)


def worker(
    connection: Connection, size: Size, loss: Callable[[Given], Tensor], threads: int
) -> None:
    """Answers "time", "memory" and "result"."""
    torch.set_num_threads(threads)
    given = tensors(size)
    leaves = given[:3]
    left = sum(t.nbytes for t in leaves)

    def step() -> float:
        for leaf in leaves:
            leaf.grad = None
        result = loss(given)
        result.backward()
        return result.item()

    found: Any
    for question in iter(connection.recv, "end"):
        if question == "time":
            gc.collect()
            start = time.perf_counter()
            step()
            found = time.perf_counter() - start
        elif question == "memory":
            for leaf in leaves:
                leaf.grad = None
            found = (peak_of(step) or 0) - left
        else:
            found = [step(), *(leaf.grad.norm().item() for leaf in leaves if leaf.grad is not None)]
        connection.send(found)


class Process:
    def __init__(self, size: Size, contender: Contender, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = other, size, contender.loss, threads
        self.process = context.Process(target=worker, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def ask(self, question: str) -> Any:
        self.pipe.send(question)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send("end")
        self.process.join()


def lines(size: Size, chunks: list[int], threads: int, rounds: int) -> list[dict[str, str]]:
    """A line for each contender; all agree with the first."""
    found = contenders(chunks)
    large = size.nbytes() > MOST_BYTES
    fits = {n: c for n, c in found.items() if not large or (c.tensors == 0 and n not in SLOW)}
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    want: list[float] = []
    processes = {name: Process(size, contender, threads) for name, contender in fits.items()}
    for name, process in processes.items():
        got = process.ask("result")
        want = want or got
        worst = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
        if worst > TOLERANCE:
            raise SystemExit(f"{name} differs at {size} by {worst:.1e}: {got}, {want}")
        memory[name] = process.ask("memory")
    start = time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - start > MOST_SECONDS:
            break
        for name, process in processes.items():
            if turn == 0 or name not in SLOW:
                seconds.setdefault(name, []).append(process.ask("time"))
    for process in processes.values():
        process.close()
    base = median(seconds.get("unfused", seconds["linear"]))
    table = []
    for name, contender in found.items():
        line = {"N, D, C": f"{size.N}, {size.D}, {size.C:,}", "loss": name}
        computed = contender.tensors * size.nbytes() / 2**20
        line |= {"s": "-", "/ unfused": "-"}
        line["MiB"] = f"{computed:,.0f} (computed)" if computed else "not run"
        if name in fits:
            took = median(seconds[name])
            line |= {"s": f"{took:.3f}", "MiB": f"{memory[name] / 2**20:,.0f}"}
            line["/ unfused"] = f"{took / base:.2f}" if "unfused" in fits else "-"
        table.append(line)
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.linear", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="other chunk sizes, too")
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 1, 2], help="which of three")
    parser.add_argument("--out", type=Path, default=result_files.FOLDER, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "bench.linear", *argv])
    torch.set_num_threads(arguments.threads)
    table = []
    for index in tqdm(arguments.sizes, unit="size"):
        table += lines(SIZES[index], arguments.chunks, arguments.threads, arguments.rounds)
    title = "The head with its loss, float32: forward, backward, peak memory"
    note = "Medians. MiB: beyond input, head and their gradients."
    return save_table("linear-cpu.md", title, table, note, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
