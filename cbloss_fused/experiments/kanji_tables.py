"""The table of the kanji experiment."""

from __future__ import annotations

import torch
from tabulate import tabulate

from .evaluation import mean_and_deviation
from .kanji_data import Kanji
from .long_tail import frequency_groups
from .runs import Record
from .settings import ALL_SETTINGS

COLUMNS = ("seeds", "all", "many", "medium", "few", "one", "natural", "ECE", "natural ECE")


def results_table(records: list[Record]) -> str:
    """Percentages by loss, mean ± deviation over the seeds; the order is that of the settings."""
    rows = []
    for name, setting in ALL_SETTINGS.items():
        runs = [record for record in records if record["loss"] == name]
        if runs:
            values = [
                [*run["groups"].values(), run["natural"], run["ece"], run["natural_ece"]]
                for run in runs
            ]
            cells = map(mean_and_deviation, zip(*values, strict=True))
            rows.append([setting.title, len(runs), *cells])
    return tabulate(rows, ["loss", *COLUMNS], tablefmt="github", disable_numparse=True)


def description(data: Kanji, records: list[Record]) -> str:
    """Of the data, the columns of the table and the runs."""
    groups = {name: int(mask.sum()) for name, mask in frequency_groups(data.counts).items()}
    counts, epochs = data.counts, sorted({record["epochs"] for record in records})
    seconds = torch.tensor([float(record["seconds"]) for record in records])
    versions = sorted({record["versions"]["torch"] for record in records})
    return f"""\
{len(counts)} kanji, {len(data.train_y):,} training images: {int(counts.max())} of the most frequent character,
{int(counts.median())} of the median one. {len(data.test_y):,} test images, in designs that the training set has not.
{", ".join(map(str, epochs))} epochs; mean ± deviation of the seeds (of weights and batches). In percent:

- accuracy, the mean over classes: all, many ({groups["many"]} classes with more than 100 training
  images), medium ({groups["medium"]}), few ({groups["few"]} with at most 20), one ({groups["one"]} with one)
- natural: accuracy where classes are as frequent as in training
- ECE: expected calibration error of the test set, 15 bins of the predicted class's probability
  (softmax or sigmoid); natural ECE: with classes as frequent as in training

A run took {seconds.median():.0f} s (median); torch {", ".join(versions)}."""  # noqa: E501
