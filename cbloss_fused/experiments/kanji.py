"""Long-tail losses on some 2,350 kanji at their natural frequency: which one pays, and where."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import ClassBalancedLoss, __version__
from ..parser import Parser
from .settings import ALL_SETTINGS, DEFERRED_FROM, Setting

MISSING = ""
try:
    from .evaluation import bin_sums, evaluate
    from .kanji_data import Kanji, load_kanji, render_kanji
    from .kanji_figures import draw_figures
    from .kanji_sample import sample
    from .kanji_tables import description, results_table
    from .runs import Record, read_runs, run_missing
except ImportError as error:
    extra = 'pip install "cbloss_fused[experiments]"'
    MISSING = f"the experiment needs more packages ({error}): {extra}"

BATCH = 256
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-3
FALLS = (DEFERRED_FROM, 0.9)  # of the epochs: there the learning rate falls to a tenth
FEATURES = 256
History: TypeAlias = list[dict[str, list[float]]]


def make_model(setting: Setting, C: int) -> nn.Sequential:
    """A small convolutional network for images (N, 1, 32, 32)."""

    def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    model = nn.Sequential(
        *convolution(1, 16, 5, stride=2),
        *convolution(16, 32, 3, stride=2),
        *convolution(32, 64, 3, stride=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, FEATURES, bias=False),
        nn.BatchNorm1d(FEATURES),
        nn.ReLU(),
        setting.make_head(FEATURES, C),
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def images(x: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]."""
    return (x.float() / 255).to(memory_format=torch.channels_last)


def rate_factor(batch: int, batches: int, epochs: int) -> float:
    """Of LEARNING_RATE, by batches done of so many an epoch: a warm-up of one epoch, then steps."""
    falls = sum(batch >= int(fall * epochs) * batches for fall in FALLS)
    return float(min(1.0, (batch + 1) / batches) * 0.1**falls)


def train(
    setting: Setting, data: Kanji, seed: int, epochs: int
) -> tuple[nn.Module, ClassBalancedLoss, History]:
    """The model, its loss, and of each epoch the shares of the bins of classes in the loss and in
    the gradient at the targets."""
    torch.manual_seed(seed)
    model = make_model(setting, C := len(data.counts))
    loss_fn, reweighting = setting.make_loss(data.counts, epochs)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    factor = partial(rate_factor, batches=-(-len(data.train_y) // BATCH), epochs=epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history: History = []
    for _ in range(epochs):
        model.train()
        sums = {name: torch.zeros(C, dtype=torch.float64) for name in ("loss", "gradient")}
        for i in torch.split(torch.randperm(len(data.train_y)), BATCH):
            logits = model(images(data.train_x[i]))
            loss, stats = loss_fn(logits, data.train_y[i], return_stats=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for name, of_class in sums.items():
                of_class += getattr(stats, name)
        if reweighting is not None:
            reweighting.step()
        history.append({name: _shares(sums[name], data.counts) for name in sums})
    return model, loss_fn, history


def _shares(of_class: Tensor, counts: Tensor) -> list[float]:
    of_bin = bin_sums(of_class, counts)
    return [round(share, 5) for share in (of_bin / of_bin.sum()).tolist()]


@torch.no_grad()
def probabilities(model: nn.Module, loss_fn: ClassBalancedLoss, x: Tensor) -> Tensor:
    """(N, C) softmax or sigmoid of the logits; of LDAM's cosines scaled as in training."""
    model.eval()
    logits = torch.cat([model(images(part)) for part in x.split(1000)])
    logits *= loss_fn.options.logit_scale
    return logits.sigmoid() if loss_fn.options.activation == "sigmoid" else logits.softmax(1)


def run(job: Record, data: Path, threads: int) -> Record:
    """Train and test one loss with one seed."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # AdamW's moments of what is not used grow denormal
    kanji, start = load_kanji(data), time.perf_counter()
    setting = ALL_SETTINGS[job["loss"]]
    model, loss_fn, history = train(setting, kanji, job["seed"], job["epochs"])
    probability = probabilities(model, loss_fn, kanji.test_x)
    return {
        **evaluate(probability, kanji.test_y, kanji.counts)._asdict(),
        "history": history,
        "seconds": round(time.perf_counter() - start),
        "versions": {"torch": torch.__version__, "cbloss_fused": __version__},
    }


def protocol(epochs: int, data: Path) -> Record:
    """What all runs that are compared have in common."""
    return {"epochs": epochs, "batch": BATCH, "rate": LEARNING_RATE, "data": data.stem}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before the work."""
    cores = os.cpu_count() or 1
    parser = Parser(prog="python -m cbloss_fused.experiments.kanji", description=__doc__)
    add = parser.add_argument
    add("--fonts", type=Path, default=Path("build/fonts"), help="folder (default build/fonts)")
    add("--cache", type=Path, default=Path("build/kanji"), help="of images (default build/kanji)")
    add("--output", type=Path, default=Path("kanji-results"), help="folder (kanji-results)")
    add("--losses", nargs="+", metavar="LOSS", choices=ALL_SETTINGS, help="(default: all)")
    add("--seeds", type=int, help="runs of each loss (default 3)")
    add("--epochs", type=int, help="of a run (default 8)")
    add("--samples", type=int, help="training images, about (default 60000)")
    add("--classes", type=int, help="the most frequent ones at most (default: all)")
    add("--workers", type=int, default=cores, help=f"runs side by side (default {cores})")
    add("--quick", action="store_true", help="one seed, 4 epochs, 10000 images: minutes")
    options = parser.parse_args(argv)
    seeds, epochs, samples = (1, 4, 10_000) if options.quick else (3, 8, 60_000)
    options.losses = options.losses or list(ALL_SETTINGS)
    options.seeds = seeds if options.seeds is None else options.seeds
    options.epochs = epochs if options.epochs is None else options.epochs
    options.samples = samples if options.samples is None else options.samples
    parser.check_at_least_one(options, "seeds", "epochs", "samples", "classes", "workers")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Render, train what has not been trained, print the table, draw the figures."""
    if MISSING:
        raise SystemExit(MISSING)
    options = parse(argv)
    try:
        data = render_kanji(options.fonts, options.cache, options.samples, options.classes)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    options.output.mkdir(parents=True, exist_ok=True)
    same = protocol(options.epochs, data)
    jobs = [
        {"loss": loss, "seed": seed, **same}
        for seed in range(options.seeds)  # the first seed of all losses first
        for loss in options.losses
    ]
    path = options.output / "runs.jsonl"
    run_missing(path, jobs, partial(run, data=data, threads=threads), options.workers)
    records = [record for record in read_runs(path) if same.items() <= record.items()]
    kanji = load_kanji(data)
    report = f"{description(kanji, records)}\n\n{results_table(records)}\n"
    (options.output / "results.md").write_text(report, encoding="utf-8")
    print(report)
    counts = zip(kanji.characters, kanji.counts.tolist(), strict=True)
    lines = [f"{character},{count}" for character, count in counts]
    (options.output / "counts.csv").write_text("\n".join(["kanji,count", *lines, ""]), "utf-8")
    sample(kanji).savefig(options.output / "sample.png", dpi=120)
    draw_figures(records, options.output)
    print(f"Table, figures and runs: {options.output}")


if __name__ == "__main__":
    main()
