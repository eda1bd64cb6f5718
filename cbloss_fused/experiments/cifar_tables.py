"""Our error rates beside the paper's."""

from __future__ import annotations

from statistics import mean

from tabulate import tabulate

from .cifar_data import DATASETS
from .evaluation import mean_and_deviation
from .paper import IMBALANCES, LOSSES, Loss, paper_error_rate
from .runs import Record


def error_table(records: list[Record], dataset: str) -> str:
    """Error rates of a dataset in %, for each imbalance ours and the paper's.

    The last row has of each column the lowest mean among losses with β > 0, as the row
    "Class-Balanced" of the paper's Table 2.
    """
    of_cell: dict[tuple[Loss, int], list[float]] = {}
    for r in records:
        if r["dataset"] == dataset:
            of_cell.setdefault((LOSSES[r["loss"]], r["imbalance"]), []).append(r["error"])
    losses = [loss for loss in LOSSES.values() if any(loss == key[0] for key in of_cell)]
    imbalances = [i for i in IMBALANCES if any(i == key[1] for key in of_cell)]
    title = DATASETS[dataset].title
    rows = []
    for loss in losses:
        row = [loss.title]
        for i in imbalances:
            ours = of_cell.get((loss, i))
            row.append(mean_and_deviation(ours, digits=2) if ours else "")
            row.append(f"{paper_error_rate(title, loss, i):.2f}")
        rows.append(row)
    balanced = [loss for loss in losses if loss.beta]
    if balanced:
        row = ["lowest with β > 0"]
        for i in imbalances:
            ours_of = [mean(of_cell[loss, i]) for loss in balanced if (loss, i) in of_cell]
            row.append(f"{min(ours_of):.2f}" if ours_of else "")
            row.append(f"{min(paper_error_rate(title, loss, i) for loss in balanced):.2f}")
        rows.append(row)
    header = [name for i in imbalances for name in (f"1/{i}", "paper")]
    return tabulate(
        rows, ["loss", *header], tablefmt="github", disable_numparse=True,
        colalign=("left", *["right"] * len(header)),
    )  # fmt: skip
