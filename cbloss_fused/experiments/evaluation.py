"""What is told of a trained model: accuracy by class frequency, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from .long_tail import frequency_groups

BIN_EDGES = (1, 2, 3, 6, 11, 21, 51, 101, 201)  # counts at which a bin of classes begins
CALIBRATION_BINS = 15


class Evaluation(NamedTuple):
    """Percentages; accuracies are means over classes unless weighted by their frequency."""

    groups: dict[str, float | None]  # accuracy in frequency_groups; None: no class
    bins: list[float | None]  # accuracy of the classes of each of BIN_EDGES; None: no class
    natural: float  # accuracy where classes are as frequent as in training
    ece: float  # expected calibration error of the balanced test
    natural_ece: float  # where classes are as frequent as in training


def by_bin(counts: Tensor) -> Tensor:
    """(C,) int64: the bin of each class, a class without samples in the first."""
    return (torch.bucketize(counts, torch.tensor(BIN_EDGES), right=True) - 1).clamp(min=0)


def bin_sums(values: Tensor, counts: Tensor) -> Tensor:
    """(bins,) float64: the sum over the classes of each bin."""
    sums = torch.zeros(len(BIN_EDGES), dtype=torch.float64)
    return sums.index_add_(0, by_bin(counts), values.double())


def evaluate(probability: Tensor, target: Tensor, counts: Tensor) -> Evaluation:
    """Accuracies and calibration on a test set.

    probability: (N, C), softmax or sigmoid: of the predicted class it is the confidence. target:
    (N,); counts: (C,) of the training set. Classes without a test image count nowhere.
    """
    counts = counts.double()
    C = len(counts)
    confidence, predicted = probability.max(1)
    correct = (predicted == target).double()
    images = torch.bincount(target, minlength=C).double()
    accuracy = 100 * torch.zeros_like(images).index_add_(0, target, correct) / images
    tested = images > 0

    def of_classes(classes: Tensor) -> float | None:
        return float(accuracy[classes].mean()) if classes.any() else None

    of_bin = by_bin(counts)
    share = torch.where(tested, counts / images, 0.0)  # of one test image, in nature
    return Evaluation(
        {name: of_classes(mask & tested) for name, mask in frequency_groups(counts).items()},
        [of_classes((of_bin == b) & tested) for b in range(len(BIN_EDGES))],
        float((accuracy * counts)[tested].sum() / counts[tested].sum()),
        calibration_error(confidence, correct, (tested / images)[target]),
        calibration_error(confidence, correct, share[target]),
    )


def calibration_error(confidence: Tensor, correct: Tensor, weight: Tensor) -> float:
    """Expected calibration error in %: |accuracy - confidence| over bins of equal width.

    confidence: (N,) in [0, 1]; correct: (N,) 0 or 1; weight: (N,) of each sample, need not add
    up to 1. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.

    >>> half = torch.tensor([0.5, 0.5])
    >>> calibration_error(half, torch.tensor([1.0, 1.0]), torch.ones(2))
    50.0
    """
    index = (confidence.double() * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = weight * (correct.double() - confidence.double())
    sums = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, index, gap.double())
    return float(100 * sums.abs().sum() / weight.sum())


def mean_and_deviation(values: Sequence[float | None], digits: int = 1) -> str:
    """For a table: one value has no deviation, no class (None) no mean.

    >>> mean_and_deviation([25.0, 26.0]), mean_and_deviation([25.0]), mean_and_deviation([None])
    ('25.5 ± 0.7', '25.0', '-')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation}"
