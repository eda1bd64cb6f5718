"""Printed kanji as often as Japanese has them: images rendered once, kept in a file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor
from tqdm import tqdm
from wordfreq import get_frequency_dict

from .fonts import NO_CHARACTER, SIZE, Face, draw, draws, find_faces

PIXELS = 32  # a side of the images
SIZES = (38, 42, 46, 50)  # of training characters, on a canvas of 64 pixels
SHIFT, DEGREES = 4, 8  # training characters are moved and turned by at most this
TRAIN_FACES, TEST_FACES = 8, 4  # that draw a character, at least, or it is no class
FORMAT = 1  # of the file


class Kanji(NamedTuple):
    """Images (N, 1, 32, 32) uint8 and labels; label 0 is the most frequent character."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor  # each class once in each held-out design
    test_y: Tensor
    counts: Tensor  # (C,) of the training set
    characters: str  # (C,)


def kanji_frequencies() -> tuple[list[str], np.ndarray]:
    """Characters of Japanese, the most frequent first, and their shares, from wordfreq."""
    shares = defaultdict[str, float](float)
    for word, share in get_frequency_dict("ja", wordlist="large").items():
        for character in word:
            if "\u4e00" <= character <= "\u9fff":
                shares[character] += share
    characters = sorted(shares, key=lambda c: (-shares[c], c))
    p = np.array([shares[c] for c in characters])
    return characters, p / p.sum()


def render_kanji(fonts: Path, cache: Path, samples: int, most_classes: int | None = None) -> Path:
    """A file of the dataset of a text of so many kanji, rendered if the cache lacks it.

    Classes are the characters of the text that enough faces draw, or the most frequent of them;
    counts are therefore natural ones. The images of a class differ in typeface, size, place and
    angle. The test shows each class in every held-out design, upright and in the middle.

    Raises: ValueError: too few fonts, see find_faces.
    """
    faces = find_faces(fonts)
    drawn = [(f.path.name, f.path.stat().st_size, f.held_out) for f in faces]
    key = hashlib.sha256(repr((FORMAT, samples, most_classes, drawn)).encode()).hexdigest()[:12]
    path = cache / f"kanji-{samples}-{key}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        data = _render(faces, samples, most_classes)
        torch.save(dict(data._asdict()), unfinished := path.with_suffix(".tmp"))
        unfinished.replace(path)
    return path


@lru_cache(1)
def load_kanji(path: Path) -> Kanji:
    """What render_kanji wrote."""
    return Kanji(**torch.load(path, weights_only=True))


def _render(faces: list[Face], samples: int, most_classes: int | None) -> Kanji:
    rng = np.random.default_rng(0)
    characters, p = kanji_frequencies()
    text = rng.choice(len(characters), samples, p=p)
    counts = np.bincount(text, minlength=len(characters))
    test_faces = list({f.design: f for f in reversed(faces) if f.held_out}.values())[::-1]
    train_faces = [face for face in faces if not face.held_out]
    in_train = _covers(train_faces, characters, counts)
    in_test = _covers(test_faces, characters, counts)
    classes = np.flatnonzero((in_train.sum(0) >= TRAIN_FACES) & (in_test.sum(0) >= TEST_FACES))
    classes = classes[np.argsort(-counts[classes], kind="stable")][:most_classes]
    label = np.full(len(characters), -1)
    label[classes] = np.arange(len(classes))
    text = text[label[text] >= 0]

    fonts = {(f, size): ImageFont.truetype(f.path, size) for f in train_faces for size in SIZES}
    train = np.empty((len(text), 1, PIXELS, PIXELS), np.uint8)
    for i, k in enumerate(tqdm(text, desc="rendering", unit="image")):
        face = train_faces[rng.choice(np.flatnonzero(in_train[:, k]))]
        dx, dy = rng.integers(-SHIFT, SHIFT + 1, 2)
        image = draw(characters[k], fonts[face, SIZES[rng.integers(len(SIZES))]], dx, dy)
        image = image.rotate(rng.uniform(-DEGREES, DEGREES), Image.Resampling.BILINEAR)
        train[i, 0] = _reduced(image)
    test = [
        (_reduced(draw(characters[k], font)), label[k])
        for j, face in enumerate(test_faces)
        for font in [ImageFont.truetype(face.path, SIZE)]
        for k in classes
        if in_test[j, k]
    ]
    return Kanji(
        torch.from_numpy(train),
        torch.from_numpy(label[text]),
        torch.from_numpy(np.stack([image for image, _ in test])).unsqueeze(1),
        torch.tensor([y for _, y in test]),
        torch.from_numpy(counts[classes]),
        "".join(characters[k] for k in classes),
    )


def _covers(faces: list[Face], characters: list[str], counts: np.ndarray) -> np.ndarray:
    """(faces, characters): which face draws which of the characters that occur."""
    covers = np.zeros((len(faces), len(characters)), bool)
    for j, face in enumerate(faces):
        font = ImageFont.truetype(face.path, SIZE)
        blank = bytes(font.getmask(NO_CHARACTER))
        for k in np.flatnonzero(counts):
            covers[j, k] = draws(characters[k], font, blank)
    return covers


def _reduced(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BOX))
