"""Class-balanced losses on long-tailed digits: accuracies, loss times and a figure.

    python -m cbloss_fused.demo

The data are scikit-learn's 8x8 digits, made long-tailed by the paper's rule; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from . import ClassBalancedLoss, backends, class_counts, effective_number, init_head_bias_

MISSING = ""
try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # without pyplot it draws by Agg and needs no display
    from sklearn.datasets import load_digits
    from tabulate import tabulate
    from tqdm import tqdm
except ImportError as error:
    MISSING = f'the demo needs more packages ({error}): pip install "cbloss_fused[demo]"'

C = 10
N_MAX = 120  # images of the most frequent class; digits has 174 to 183 of each
TEST_PER_CLASS = 50
IMBALANCES = (20, 50)  # most to least frequent class, 1 / mu
BATCH = 64
# Of the paper's 0.9, 0.99, 0.999, 0.9999 the one whose N = 1 / (1 - beta) = 100 prototypes are nearest
# to N_MAX: 0.9 no longer tells 30 images from 120, 0.999 is inverse frequency within 6 %.
BETA = 0.99
SECONDS_PER_TIMING = 1.0
BETAS = (0.9, 0.99, 0.999, 0.9999)
PLAIN = "softmax"
LOSSES: dict[str, dict[str, Any]] = {
    PLAIN: {"beta": 0},  # all weights 1
    "CB softmax": {"beta": BETA},
    "CB sigmoid": {"beta": BETA, "activation": "sigmoid"},
    "CB focal": {"beta": BETA, "activation": "sigmoid", "gamma": 0.5},
}
COLORS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # Okabe and Ito: told apart by the colour-blind
MARKERS = "osD^"

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Results: TypeAlias = dict[tuple[int, str], Tensor]  # (imbalance, loss): accuracies (seeds, C)


class Split(NamedTuple):
    """Images (N, 1, 8, 8) and labels; label 0 is the most frequent class, C - 1 the rarest."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor  # TEST_PER_CLASS images of every class, sorted by class
    counts: Tensor


def long_tailed_counts(n_max: int, imbalance: float, num_classes: int) -> list[int]:
    """The paper's rule, n_i = int(n_max mu^(i / (C - 1))) with mu = 1 / imbalance."""
    return [int(n_max * (1 / imbalance) ** (i / (num_classes - 1))) for i in range(num_classes)]


def load_images() -> tuple[Tensor, Tensor]:
    """All digits: images (1797, 1, 8, 8) in [0, 1] and which digit each is."""
    digits = load_digits()
    return torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)


def long_tailed_split(images: Tensor, digits: Tensor, imbalance: float, seed: int) -> Split:
    """A balanced test set and a long-tailed training set; the seed draws images and class order.

    Digits are not equally hard: were the order fixed, "tail" would mean 7, 8 and 9.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(C, generator=generator)[digits]
    order = torch.randperm(len(labels), generator=generator)
    train, test = [], []
    for c, n in enumerate(long_tailed_counts(N_MAX, imbalance, C)):
        of_class = order[labels[order] == c]
        test.append(of_class[:TEST_PER_CLASS])
        train.append(of_class[TEST_PER_CLASS : TEST_PER_CLASS + n])
    i = torch.cat(train)
    return Split(images[i], labels[i], images[torch.cat(test)], class_counts(labels[i], C))


def make_model(sigmoid: bool) -> nn.Sequential:
    """A small convolutional network; with sigmoid it starts at p = 1 / C, as the paper's do."""
    head = nn.Linear(32 * 2 * 2, C)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        init_head_bias_(head) if sigmoid else head,
    )


def fused_loss(name: str, counts: Tensor) -> LossFn:
    """One of LOSSES by the library's kernels."""
    return ClassBalancedLoss(counts, **LOSSES[name])


def eager_loss(name: str, counts: Tensor) -> LossFn:
    """The same loss as PyTorch operators; the plain one is PyTorch's own."""
    if name == PLAIN:
        return nn.CrossEntropyLoss()
    return ClassBalancedLoss(counts, **LOSSES[name], backend="reference")


def train(name: str, split: Split, seed: int, epochs: int) -> nn.Module:
    """A model trained with one loss; all losses of a seed share initial weights and batches.

    Adam, because the losses' gradients differ in scale and its steps do not.
    """
    torch.manual_seed(seed)
    model = make_model(sigmoid="activation" in LOSSES[name])
    loss_fn = (eager_loss if name == PLAIN else fused_loss)(name, split.counts)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(split.train_y)).split(BATCH):
            optimizer.zero_grad()
            loss_fn(model(split.train_x[i]), split.train_y[i]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def class_accuracies(model: nn.Module, split: Split) -> Tensor:
    """Test accuracy (C,) of every class, head to tail."""
    predicted = model(split.test_x).argmax(1).view(C, TEST_PER_CLASS)
    return (predicted == torch.arange(C).unsqueeze(1)).float().mean(1)


def run_all(seeds: int, epochs: int) -> Results:
    """Train with every loss, imbalance and seed."""
    images, digits = load_images()
    runs = [(m, name, s) for m in IMBALANCES for name in LOSSES for s in range(seeds)]
    results: dict[tuple[int, str], list[Tensor]] = {}
    for imbalance, name, seed in (bar := tqdm(runs, desc="training", unit="run")):
        bar.set_postfix_str(f"1/{imbalance} {name}")
        split = long_tailed_split(images, digits, imbalance, seed)
        accuracies = class_accuracies(train(name, split, seed, epochs), split)
        results.setdefault((imbalance, name), []).append(accuracies)
    return {key: torch.stack(accuracies) for key, accuracies in results.items()}


def accuracy_table(results: Results, imbalance: int) -> str:
    """Overall, head and tail accuracy by loss, in % ± standard deviation over the seeds."""
    third = C // 3
    parts = (slice(None), slice(third), slice(-third, None))
    rows = [
        [name, *(mean_and_deviation(results[imbalance, name][:, part].mean(1)) for part in parts)]
        for name in LOSSES
    ]
    return tabulate(rows, ["loss", "overall %", "head %", "tail %"], tablefmt="github")


def mean_and_deviation(values: Tensor) -> str:
    """Fractions (seeds,) as "mean ± standard deviation" in %; one seed has no deviation."""
    mean = f"{100 * values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * values.std():.1f}"


def forward_backward_seconds(loss_fn: LossFn, logits: Tensor, target: Tensor) -> float:
    """One forward and backward of the loss alone."""
    logits.grad = None
    start = perf_counter()
    loss_fn(logits, target).backward()
    return perf_counter() - start


def median_seconds(loss_fns: list[LossFn], logits: Tensor, target: Tensor) -> list[float]:
    """The median time of each loss; they take turns, so that other load meets them alike."""
    rounds: list[list[float]] = []
    deadline = perf_counter() + SECONDS_PER_TIMING
    while perf_counter() < deadline or len(rounds) < 5:
        rounds.append([forward_backward_seconds(f, logits, target) for f in loss_fns])
    return [median(times) for times in zip(*rounds, strict=True)]


def time_losses(counts: list[int], N: int) -> Iterator[list[str]]:
    """A table row for every loss on N random logits a class."""
    shape, count = (N, len(counts)), torch.tensor(counts)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(len(counts), (N,))
    for name in LOSSES:
        pair = [fused_loss(name, count), eager_loss(name, count)]
        fused, eager = median_seconds(pair, logits, target)
        yield [f"{shape}", name, f"{1e3 * fused:.3f}", f"{1e3 * eager:.3f}", f"{eager / fused:.1f}"]


def timing_table() -> str:
    """Loss times on the demo's batches and on a batch of iNaturalist 2018: 8142 classes, 1/500."""
    demo, inaturalist = (N_MAX, IMBALANCES[0], C), (1000, 500, 8142)
    rows = [
        *time_losses(long_tailed_counts(*demo), BATCH),
        *time_losses(long_tailed_counts(*inaturalist), 256),
    ]
    header = ["logits", "loss", "fused ms", "eager ms", "eager / fused"]
    align = ("left", "left", "right", "right", "right")
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)


def plot_effective_numbers(ax: Axes) -> None:
    """E_n over n for the paper's values of beta, each curve labelled at its end."""
    n = torch.logspace(0, 5, 200, dtype=torch.float64)
    for beta, color in zip(BETAS, COLORS, strict=True):
        E = effective_number(n, beta)
        ax.loglog(n, E, color=color, lw=3 if beta == BETA else 1.5)
        ax.annotate(f"β = {beta}", (n[-1], E[-1]), (-4, 4), textcoords="offset points", ha="right")
    ax.set(title="Effective number of samples", xlabel="images n", ylabel="E_n")


def plot_counts(ax: Axes) -> None:
    """Training images of every class in both imbalances."""
    for imbalance, color, marker in zip(IMBALANCES, COLORS[1:], MARKERS[1:], strict=False):
        counts = long_tailed_counts(N_MAX, imbalance, C)
        ax.semilogy(range(1, C + 1), counts, color=color, marker=marker, label=f"1/{imbalance}")
    ax.set(title="Training images", xlabel="class, head to tail", ylabel="images")
    ax.legend(title="imbalance μ")


def plot_accuracies(ax: Axes, results: Results, imbalance: int) -> None:
    """Mean test accuracy of every class by loss."""
    for name, color, marker in zip(LOSSES, COLORS, MARKERS, strict=True):
        accuracy = 100 * results[imbalance, name].mean(0)
        ax.plot(range(1, C + 1), accuracy, color=color, marker=marker, label=name)
    ax.set(title=f"Test accuracy, μ = 1/{imbalance}", xlabel="class, head to tail", ylabel="%")
    ax.legend()


def save_figure(results: Results, path: Path) -> None:
    """The three panels as a PNG."""
    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 4.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        plot_effective_numbers(left)
        plot_counts(middle)
        plot_accuracies(right, results, IMBALANCES[-1])
        figure.savefig(path, dpi=120, format="png")


@contextmanager
def one_thread() -> Iterator[None]:
    """Train in one thread: the batches are small, and results do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before minutes of work depend on it."""
    parser = argparse.ArgumentParser(
        prog="python -m cbloss_fused.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of every loss (default 5)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of a run (default 40)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the figure, a PNG")
    options = parser.parse_args(argv)
    if min(options.seeds, options.epochs) < 1:
        parser.error("expected --seeds and --epochs of at least 1")
    if not options.output.resolve().parent.is_dir():
        parser.error(f"there is no folder {options.output.parent} for --output")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the tables, write the figure."""
    if MISSING:
        sys.exit(MISSING)
    options = parse(argv)
    with one_thread():
        results = run_all(options.seeds, options.epochs)
    for imbalance in IMBALANCES:
        images = long_tailed_counts(N_MAX, imbalance, C)
        print(f"\nTest accuracy, imbalance 1/{imbalance}, beta {BETA}, {options.seeds} seeds")
        print(f"(training images {images}, head and tail: 3 classes)\n")
        print(accuracy_table(results, imbalance))
    print(f"\nForward and backward of the loss, median, {torch.get_num_threads()} threads")
    print(f"(fused: {backends()['cpu']}; eager: PyTorch operators)\n")
    print(timing_table())
    save_figure(results, options.output)
    print(f"\nFigure: {options.output}")


if __name__ == "__main__":
    main()
