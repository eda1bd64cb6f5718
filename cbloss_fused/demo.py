"""Class-balanced losses on scikit-learn's digits, made long-tailed; nothing is downloaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from . import backends, class_counts, effective_number
from .experiments.evaluation import mean_and_deviation
from .experiments.long_tail import long_tailed_counts
from .experiments.settings import Setting
from .parser import Parser
from .plain import plain_formulas

MISSING = ""
try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from tabulate import tabulate
    from tqdm import tqdm

    from .experiments.figures import STYLES, panels
except ImportError as error:
    MISSING = f'the demo needs more packages ({error}): pip install "cbloss_fused[demo]"'

C = 10
N_MAX = 120  # images of the most frequent class: scikit-learn has 174 to 183 of each digit
TEST_IMAGES = 50  # of every class
IMBALANCES = (20, 50)  # 1 / mu: images of the most frequent class for one of the rarest
BATCH = 64
TIMING_SECONDS = 0.6  # for each loss, at least
BETAS = (0.9, 0.99, 0.999, 0.9999)  # the paper's
BETA = 0.99  # N = 1 / (1 - beta) = 100 ~ N_MAX; 0.9 is flat from n = 30, 0.999 nearly n
_SIGMOID: dict[str, Any] = {"beta": BETA, "activation": "sigmoid"}
LOSSES = {
    setting.title: setting
    for setting in (
        Setting("softmax", {"beta": 0.0}),  # all weights 1: cross entropy
        Setting("CB softmax", {"beta": BETA}),
        Setting("CB sigmoid", _SIGMOID),
        Setting("CB focal", _SIGMOID | {"gamma": 0.5}),
        Setting("CB softmax, deferred", {"beta": BETA}, deferred=True),
        Setting("logit adjustment", {"beta": 0.0}, adjusted=True),
    )
}
WHEN = """\
Weights from the first epoch on pay here, with ten classes. On 2,349 kanji at their natural
frequency they cost 14 to 22 points of accuracy, deferred weights cost nothing, and logit adjustment
gains 7: docs/choosing.md, `make experiment`."""
TIMED = tuple(LOSSES)[:4]  # the others take the same kernels
CLASSES = range(1, C + 1)
Results: TypeAlias = dict[tuple[int, str], Tensor]  # (imbalance, loss): accuracies (seeds, C)


class Split(NamedTuple):
    """Images (N, 1, 8, 8) and labels; label 0 is the most frequent class, C - 1 the rarest."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor  # sorted by class
    counts: Tensor


def long_tailed_split(imbalance: float, seed: int) -> Split:
    """A balanced test set and a long-tailed training set; the seed draws images and class order."""
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    images = torch.tensor(digits.images).float().unsqueeze(1) / 16
    # Digits are not equally hard: were the order fixed, "tail" would mean 7, 8 and 9.
    labels = torch.randperm(C, generator=generator)[torch.tensor(digits.target)]
    order = torch.randperm(len(labels), generator=generator)
    of_class = [order[labels[order] == c] for c in range(C)]
    counts = long_tailed_counts(N_MAX, imbalance, C)
    test = torch.cat([i[:TEST_IMAGES] for i in of_class])
    train = torch.cat([i[TEST_IMAGES:][:n] for i, n in zip(of_class, counts, strict=True)])
    return Split(images[train], labels[train], images[test], class_counts(labels[train], C))


def make_model(setting: Setting = LOSSES["softmax"]) -> nn.Sequential:
    """A small convolutional network; with sigmoid it starts at p = 1 / C, as the paper's do."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        setting.make_head(32 * 2 * 2, C),
    )


def train(name: str, split: Split, seed: int, epochs: int) -> nn.Module:
    """A model trained with one loss; all losses of a seed share initial weights and batches."""
    torch.manual_seed(seed)
    model = make_model(LOSSES[name])
    loss_fn, schedule = LOSSES[name].make_loss(split.counts, epochs)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)  # steps free of a loss's scale
    for _ in range(epochs):
        for i in torch.split(torch.randperm(len(split.train_y)), BATCH):
            optimizer.zero_grad()
            loss_fn(model(split.train_x[i]), split.train_y[i]).backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
    return model


@torch.no_grad()
def class_accuracies(model: nn.Module, split: Split) -> Tensor:
    """Test accuracy (C,) of every class, head to tail."""
    predicted = model(split.test_x).argmax(1).view(C, TEST_IMAGES)
    return (predicted == torch.arange(C).unsqueeze(1)).float().mean(1)


def run_all(seeds: int, epochs: int) -> Results:
    """Train with every loss, imbalance and seed."""
    runs = [(m, name, s) for m in IMBALANCES for name in LOSSES for s in range(seeds)]
    results: dict[tuple[int, str], list[Tensor]] = {}
    for imbalance, name, seed in (bar := tqdm(runs, desc="training", unit="run")):
        bar.set_postfix_str(f"1/{imbalance} {name}")
        split = long_tailed_split(imbalance, seed)
        accuracies = class_accuracies(train(name, split, seed, epochs), split)
        results.setdefault((imbalance, name), []).append(accuracies)
    return {key: torch.stack(accuracies) for key, accuracies in results.items()}


def accuracy_table(results: Results, imbalance: int) -> str:
    """Accuracy by loss over all classes and over the most and the least frequent third."""
    rows = []
    for name in LOSSES:
        accuracy = results[imbalance, name]
        parts = accuracy, accuracy[:, : C // 3], accuracy[:, -(C // 3) :]
        rows.append([name, *(mean_and_deviation((100 * p.mean(1)).tolist()) for p in parts)])
    return tabulate(rows, ["loss", "overall %", "head %", "tail %"], tablefmt="github")


def milliseconds(loss_fn: Callable[..., Tensor], *args: Any) -> float:
    """Median time of forward and backward of the loss alone, in one thread."""
    statement = "args[0].grad = None; loss_fn(*args).backward()"
    timer = Timer(statement, globals={"loss_fn": loss_fn, "args": args})
    return 1e3 * timer.blocked_autorange(min_run_time=TIMING_SECONDS / 3).median


def time_losses(counts: list[int], N: int) -> list[list[Any]]:
    """A table row for every loss on random logits (N, C): the faster plain formula counts."""
    target = torch.randint(len(counts), (N,))
    logits = torch.randn(N, len(counts), requires_grad=True)
    rows = []
    for name in TIMED:
        loss_fn, _ = LOSSES[name].make_loss(torch.tensor(counts), 1)
        formulas = plain_formulas(loss_fn.options.activation, gamma := loss_fn.options.gamma)
        plain = [milliseconds(f, logits, target, loss_fn.weight, gamma) for f in formulas]
        if name == "softmax":
            plain.append(milliseconds(nn.CrossEntropyLoss(), logits, target))
        fused = milliseconds(loss_fn, logits, target)
        rows.append([f"{(N, len(counts))}", name, fused, min(plain), min(plain) / fused])
    return rows


def timing_table() -> str:
    """Loss times on the demo's batches and on a batch of iNaturalist 2018: 8142 classes, 1/500."""
    small, large = long_tailed_counts(N_MAX, 20, C), long_tailed_counts(1000, 500, 8142)
    rows = time_losses(small, BATCH) + time_losses(large, 256)
    header = ["logits", "loss", "fused ms", "plain ms", "plain / fused"]
    return tabulate(rows, header, tablefmt="github", floatfmt=("", "", ".3f", ".3f", ".1f"))


def plot_effective_numbers(ax: Axes) -> None:
    """E_n over n for the paper's values of beta, the demo's own in bold."""
    n = torch.logspace(0, 5, 200, dtype=torch.float64)
    ax.axvspan(2, N_MAX, color="0.92")
    ax.text(15, 1, "classes of\nthis demo", ha="center")
    for beta in BETAS:
        E = effective_number(n, beta)
        color, width = ("#0072B2", 3) if beta == BETA else ("0.35", 1.5)
        ax.loglog(n, E, color=color, lw=width)
        ax.annotate(f"β = {beta}", (1e5, E[-1]), (0, 5), textcoords="offset points", ha="right")
    ax.set(title="Effective number", xlabel="images $n$", ylabel="$E_n$", ylim=(0.7, 2e4))


def plot_counts(ax: Axes) -> None:
    """Training images of every class in both imbalances."""
    for imbalance, style in zip(IMBALANCES, ("ko-", "ko--"), strict=True):
        counts = long_tailed_counts(N_MAX, imbalance, C)
        ax.semilogy(CLASSES, counts, style, mfc="w", label=f"μ = 1/{imbalance}")
    ax.set(title="Training images", xlabel="class, head to tail", xticks=CLASSES)
    ax.set_yticks(ticks := [2, 5, 10, 20, 50, 100], map(str, ticks))
    ax.minorticks_off()
    ax.legend()


def plot_accuracies(ax: Axes, results: Results, imbalance: int) -> None:
    """Mean test accuracy of every class by loss."""
    for name, style in zip(LOSSES, STYLES, strict=True):
        ax.plot(CLASSES, 100 * results[imbalance, name].mean(0), label=name, **style)
    title = f"Test accuracy in %, μ = 1/{imbalance}"
    ax.set(title=title, xlabel="class, head to tail", xticks=CLASSES)
    ax.legend(loc="lower left")


def draw_figure(results: Results) -> Figure:
    """The three panels."""
    figure, (left, middle, right) = panels(3, height=4.5)
    plot_effective_numbers(left)
    plot_counts(middle)
    plot_accuracies(right, results, IMBALANCES[-1])
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before the work."""
    parser = Parser(prog="python -m cbloss_fused.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of every loss (default 5)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of a run (default 40)")
    parser.add_argument("--output", type=Path, default="demo.png", help="figure (default demo.png)")
    options = parser.parse_args(argv)
    parser.check_at_least_one(options, "seeds", "epochs")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: there is no such folder")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the tables, write the figure."""
    if MISSING:
        raise SystemExit(MISSING)
    options = parse(argv)
    torch.set_num_threads(1)  # small batches gain nothing by more, and times are steadier
    results = run_all(options.seeds, options.epochs)
    for imbalance in IMBALANCES:
        counts = long_tailed_counts(N_MAX, imbalance, C)
        print(f"\nTest accuracy, mean ± deviation of {options.seeds} seeds; beta {BETA}")
        print(f"imbalance 1/{imbalance}, training images {counts}\n")
        print(accuracy_table(results, imbalance))
    print(f"\n{WHEN}")
    print("\nForward and backward of the loss alone, median, 1 thread")
    print(f"fused: {backends()['cpu']}")
    print("plain: the fastest of two formulas of PyTorch operators, as in bench/; of")
    print("nn.CrossEntropyLoss too for softmax. A loss is a small part of a training step.\n")
    print(timing_table())
    draw_figure(results).savefig(options.output, dpi=120, format="png")
    print(f"\nFigure: {options.output}")


if __name__ == "__main__":
    main()
