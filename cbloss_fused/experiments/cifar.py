"""The paper's own experiment: ResNet-32 on long-tailed CIFAR with all losses of its search.

Nothing is downloaded: DIR holds cifar-10-python.tar.gz or cifar-100-python.tar.gz, or the folders
they unpack to, from https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ClassBalancedLoss, __version__
from ..parser import Parser
from .cifar_data import (
    DATASETS,
    DataError,
    Images,
    Split,
    find_cifar,
    long_tailed_split,
)
from .cifar_model import ResNet, crop_and_flip, normalized
from .evaluation import evaluate
from .paper import IMBALANCES, LOSSES, Loss

MISSING = ""
try:
    from tqdm import tqdm

    from .cifar_tables import error_table
    from .runs import Record, run_missing
except ImportError as error:
    extra = 'pip install "cbloss_fused[experiments]"'
    MISSING = f"the experiment needs more packages ({error}): {extra}"

BATCH = 128
EPOCHS = 200
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 2e-4
WARM_UP = 5  # epochs of EPOCHS
FALLS = (160, 180)  # epochs of EPOCHS, at each of which the learning rate is multiplied by
FALL = 0.01


def learning_rate(epoch: float, epochs: int = EPOCHS) -> float:
    """After so many epochs, fractions allowed; a shorter run has the same shape in less time.

    >>> [f"{learning_rate(epoch):g}" for epoch in (0, 2.5, 5, 160, 180)]
    ['0', '0.05', '0.1', '0.001', '1e-05']
    """
    of_paper = epoch * EPOCHS / epochs
    falls = sum(of_paper >= fall for fall in FALLS)
    return LEARNING_RATE * min(1.0, of_paper / WARM_UP) * FALL**falls


def parameter_groups(model: ResNet, loss: Loss) -> list[dict[str, Any]]:
    """All parameters decay, BatchNorm's too, but for the head's bias under a sigmoid."""
    kept = {id(model.head.bias)} if loss.sigmoid else set()
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]


def batches(N: int, steps: int) -> Iterator[Tensor]:
    """Indices of so many batches; all are full, the next epoch begins within one."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < BATCH:
            left = torch.cat([left, torch.randperm(N)])
        yield left[:BATCH]
        left = left[BATCH:]


def make_loss(loss: Loss, counts: Tensor) -> ClassBalancedLoss:
    """The fused loss; in the paper's search some β re-weight nothing, which is no mistake here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "beta = .* re-weights nothing")
        return ClassBalancedLoss(counts, **loss.options)


def train(
    loss: Loss, split: Split, seed: int, epochs: int, device: torch.device, quiet: bool = False
) -> ResNet:
    """A model trained as the paper's were.

    All losses of a seed have the same images, initial weights, batches, crops and flips.

    Source: Cui et al., CVPR 2019 (arXiv 1901.05555), section 5.1, and their public code for
    TensorFlow, whose settings these are: ResNet-32, SGD with momentum, batches of 128, 200 epochs,
    a learning rate of 0.1 with a linear warm-up over 5 epochs and falls to a hundredth at 160 and
    180, set anew at each step; weight decay 2e-4 on all but the head's bias under a sigmoid;
    images padded by 4 zeros, cropped and mirrored, x / 128 - 1.
    Deviations: whole epochs are shuffled, which there was done in a buffer of 0.4 epochs; a seed
    draws which images of a class are kept, and the test is that of the last epoch, while the paper
    tells neither its images nor its epoch.
    """
    torch.manual_seed(seed)
    model = ResNet(len(split.counts), loss.sigmoid).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss_fn = make_loss(loss, split.counts).to(device)
    optimizer = torch.optim.SGD(parameter_groups(model, loss), LEARNING_RATE, momentum=MOMENTUM)
    x, y = (tensor.to(device) for tensor in split.train)
    N = len(y)
    steps = max(1, N * epochs // BATCH)
    bar = tqdm(batches(N, steps), loss.name, steps, unit="step", leave=False, disable=quiet)
    for done, index in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done * BATCH / N, epochs)
        i = index.to(device)
        logits = model(normalized(crop_and_flip(x[i])))
        optimizer.zero_grad()
        loss_fn(logits, y[i]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def probabilities(model: nn.Module, loss: Loss, images: Images, device: torch.device) -> Tensor:
    """(N, C) softmax or sigmoid of the logits, on the CPU."""
    model.eval()
    logits = torch.cat([model(normalized(x.to(device))).cpu() for x in images.x.split(1000)])
    return logits.sigmoid() if loss.sigmoid else logits.softmax(1)


def run(job: Record, data: Path, device: str, threads: int, quiet: bool) -> Record:
    """Train and test one loss with one seed; "error" in %, all else as `evaluate` has it."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    loss, on, start = LOSSES[job["loss"]], torch.device(device), time.perf_counter()
    split = long_tailed_split(job["dataset"], data, job["imbalance"], job["seed"])
    model = train(loss, split, job["seed"], job["epochs"], on, quiet)
    probability = probabilities(model, loss, split.test, on)
    wrong = (probability.argmax(1) != split.test.y).double().mean()
    return {
        "error": round(100 * float(wrong), 4),
        **evaluate(probability, split.test.y, split.counts)._asdict(),
        "seconds": round(time.perf_counter() - start),
        "device": device,
        "versions": {"torch": torch.__version__, "cbloss_fused": __version__},
    }


def jobs(options: argparse.Namespace) -> list[Record]:
    """One run of each dataset, imbalance, loss and seed, the first seed of all first."""
    of_seed = product(options.dataset, options.imbalance, options.losses)
    return [
        {
            "dataset": dataset, "imbalance": imbalance, "loss": loss, "seed": seed,
            "epochs": options.epochs, "batch": BATCH, "rate": LEARNING_RATE,
        }
        for seed, (dataset, imbalance, loss) in product(range(options.seeds), list(of_seed))
    ]  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before the work."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser = Parser(
        prog="python -m cbloss_fused.experiments.cifar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the archives")
    add("--dataset", nargs="+", choices=DATASETS, default=["cifar10"], help="(default cifar10)")
    add("--imbalance", nargs="+", type=int, choices=IMBALANCES, default=[50], help="(default 50)")
    add("--losses", nargs="+", metavar="LOSS", choices=LOSSES, default=list(LOSSES),
        help=f"(default: all {len(LOSSES)} of the paper's search) {', '.join(LOSSES)}")  # fmt: skip
    add("--seeds", type=int, default=3, help="runs of each (default 3)")
    add("--epochs", type=int, default=EPOCHS, help=f"of a run (default {EPOCHS}, the paper's)")
    add("--output", type=Path, default=Path("cifar-results"), help="folder (cifar-results)")
    add("--device", default=gpu, help=f"(default {gpu})")
    add("--workers", type=int, default=1, help="runs side by side, for CPUs (default 1)")
    options = parser.parse_args(argv)
    parser.check_at_least_one(options, "seeds", "epochs", "workers")
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    try:
        for dataset in options.dataset:
            find_cifar(dataset, options.data)
    except DataError as error:
        parser.error(f"--data {error}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train what has not been trained, print our error rates beside the paper's."""
    if MISSING:
        raise SystemExit(MISSING)
    options = parse(argv)
    try:
        for dataset in options.dataset:
            long_tailed_split(dataset, options.data, options.imbalance[0], seed=0)
    except DataError as error:
        raise SystemExit(str(error)) from None
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    options.output.mkdir(parents=True, exist_ok=True)
    path, quiet = options.output / "runs.jsonl", options.workers > 1
    one = partial(run, data=options.data, device=options.device, threads=threads, quiet=quiet)
    records = run_missing(path, jobs(options), one, options.workers)
    for dataset in options.dataset:
        print(f"\nError rates in % on {DATASETS[dataset].title} by imbalance, ResNet-32,")
        print(f"mean ± deviation of {options.seeds} seeds after {options.epochs} epochs, and")
        print(f"the paper's after {EPOCHS} (Cui et al., arXiv 1901.05555, Figures 8 to 10)\n")
        print(error_table(records, dataset))
    print(f"\nRuns: {path}")


if __name__ == "__main__":
    main()
