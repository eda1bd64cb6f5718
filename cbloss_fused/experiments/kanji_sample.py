"""A picture of the kanji: what is trained on, and what is tested."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from .figures import panels
from .kanji_data import PIXELS, Kanji

SAMPLE_ROWS = 12
SAMPLE_COLUMNS = 8


def sample(data: Kanji) -> Figure:
    """Test images on the left, all or the first eight training images on the right."""
    ranks = np.linspace(0, len(data.counts) - 1, SAMPLE_ROWS).astype(int)
    blank = torch.zeros(SAMPLE_COLUMNS, PIXELS, PIXELS, dtype=torch.uint8)
    figure, axes = panels(2, width=4, height=6.2)
    for ax, x, y, title in (
        (axes[0], data.test_x, data.test_y, "test: designs never trained on"),
        (axes[1], data.train_x, data.train_y, f"training, {SAMPLE_COLUMNS} at most"),
    ):
        rows = [torch.cat([x[y == c, 0], blank])[:SAMPLE_COLUMNS] for c in ranks]
        image = torch.cat([torch.cat(list(row), 1) for row in rows])
        ax.imshow(255 - image.numpy(), cmap="gray", vmin=0, vmax=255)
        ax.set(title=title, xticks=[], yticks=(np.arange(SAMPLE_ROWS) + 0.5) * PIXELS)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[0].set_yticklabels([f"{int(data.counts[c])}" for c in ranks])
    axes[0].set_ylabel("training images of the class")
    axes[1].set_yticklabels([])
    return figure
