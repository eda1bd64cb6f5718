"""ResNet-32 for 32 x 32 images, and the crops and flips that it is trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import init_head_bias_

BLOCKS = 5  # in each of the three stages: 6 * 5 + 2 = 32 layers
STAGES = ((16, 1), (32, 2), (64, 2))  # channels, stride
PADDING = 4


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A of He et al.).

    Where the shape changes the shortcut is averaged over 2 x 2 pixels and gets channels of zeros
    on either side.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) to (N, outputs, h / stride, w / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The paper's network for CIFAR: images (N, 3, 32, 32) to logits (N, C).

    BatchNorm's defaults are the paper's: a moving average with a decay of 0.9, eps 1e-5. Layers
    start as TensorFlow's do, with Glorot's uniform distribution and biases of zero; for a sigmoid
    the head's bias starts at p = 1 / C.
    """

    def __init__(self, C: int, sigmoid: bool) -> None:
        super().__init__()
        layers, width = [], STAGES[0][0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        for channels, stride in STAGES:
            for i in range(BLOCKS):
                layers.append(Block(width, channels, 1 if i else stride))
                width = channels
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, C)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.head.bias)
        if sigmoid:
            init_head_bias_(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; x as `normalized` gives it."""
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def normalized(x: Tensor) -> Tensor:
    """uint8 as float32 in [-1, 1), channels last: on a CPU a step then takes two thirds."""
    return (x.float() / 128 - 1).contiguous(memory_format=torch.channels_last)


def crop_and_flip(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image moved by up to 4 pixels, with zeros beyond its edge, and half of them mirrored.

    x: (N, channels, h, w) of any dtype and device. The generator is the CPU's.
    """
    N, channels, h, w = x.shape
    down, right = torch.randint(2 * PADDING + 1, (2, N, 1), generator=generator)
    mirrored = torch.rand(N, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, torch.arange(w).flip(0), torch.arange(w))
    rows, columns = ((i.to(x.device)) for i in (down + torch.arange(h), right + columns))
    image = torch.arange(N, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    padded = F.pad(x, (PADDING,) * 4)
    return padded[image, channel, rows.view(N, 1, h, 1), columns.view(N, 1, 1, w)]
