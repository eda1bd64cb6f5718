"""Typefaces that can draw kanji: fetched from Debian, found in a folder, split by design."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..parser import Parser

# Debian packages, 138 MB in all, of 22 designs; all are free to use and to embed.
PACKAGES = [
    "aoyagi-kouzan-t",
    "aoyagi-soseki",
    "arphic-ukai",
    "arphic-uming",
    "dejima-mincho",
    "dotgothic16",
    "droid-fallback",
    "horai-umefont",
    "ipaexfont-gothic",
    "ipaexfont-mincho",
    "kiloji",
    "konatu",
    "kouzan-mouhitsu",
    "migmix",
    "monapo",
    "morisawa-bizud-gothic",
    "morisawa-bizud-mincho",
    "motoya-l-cedar",
    "motoya-l-maruberi",
    "oradano-mincho-gsrr",
    "reggae",
    "sawarabi-gothic",
    "sawarabi-mincho",
    "seto",
    "vlgothic",
    "wqy-microhei",
    "wqy-zenhei",
    "yusei-magic",
]
SAMPLE = "人日大国明技話東語愛海駅無夢議論機"  # by which designs are compared
CANVAS = 64  # pixels a side, before an image is made smaller
SIZE = 46  # of a character on it
NO_CHARACTER = "\U000f1234"  # what a face draws for a code point that it does not have
SAME_DESIGN = 0.92  # overlap of two faces; of designs drawn apart it is 0.91 at most
NEAR_COPY = 0.95
HELD_OUT = 3  # one design of three is for the test
FEWEST_DESIGNS = 9
ADVICE = (
    "on Debian or Ubuntu `python -m cbloss_fused.experiments.fonts FOLDER` fetches them; elsewhere"
    " put .ttf, .otf or .ttc files of Japanese families there, for example from fonts.google.com:"
    " Zen Kaku Gothic, Shippori Mincho, Klee One, Kiwi Maru, Yusei Magic, Reggae One, DotGothic16"
)


class Face(NamedTuple):
    """A font file; faces of one design are weights, widths or near copies of each other."""

    path: Path
    design: str
    held_out: bool


def draw(character: str, font: ImageFont.FreeTypeFont, dx: int = 0, dy: int = 0) -> Image.Image:
    """White on black, in the middle or (dx, dy) pixels from it."""
    image = Image.new("L", (CANVAS, CANVAS))
    at = (CANVAS // 2 + dx, CANVAS // 2 + dy)
    ImageDraw.Draw(image).text(at, character, 255, font=font, anchor="mm")
    return image


def draws(character: str, font: ImageFont.FreeTypeFont, blank: bytes) -> bool:
    """Whether a face has a glyph: some claim glyphs that are empty, or a box (blank)."""
    pixels = bytes(font.getmask(character))
    return any(pixels) and pixels != blank


def find_faces(folder: Path) -> list[Face]:
    """The faces below a folder that draw SAMPLE, one of several near copies, by design.

    Faces of one font package (a folder) and faces that overlap are one design. Designs are in the
    order of their first file's name, and every third is held out for the test.

    Raises: ValueError: there is no such folder, or it has too few designs.
    """
    paths = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf", ".ttc")),
        key=lambda p: (p.name, str(p)),
    )
    drawn = [(path, _sample(path)) for path in paths if not path.is_symlink()]
    faces = [(path, sample) for path, sample in drawn if sample is not None]
    first: list[int] = []  # of each face, the first one of its design
    kept = []
    for i, (path, sample) in enumerate(faces):
        overlaps = [float((sample * other).sum(1).mean()) for _, other in faces[:i]]
        same = [
            j for j in range(i) if overlaps[j] >= SAME_DESIGN or faces[j][0].parent == path.parent
        ]
        roots = {first[j] for j in same} | {i}
        first.append(i)
        first = [min(roots) if root in roots else root for root in first]
        if all(overlap < NEAR_COPY for overlap in overlaps):
            kept.append(i)
    designs = sorted(set(first))
    if len(designs) < FEWEST_DESIGNS:
        raise ValueError(
            f"{folder}: expected fonts of at least {FEWEST_DESIGNS} designs with kanji, found"
            f" {len(designs)} in {len(paths)} files; {ADVICE}"
        )
    held_out = set(designs[1::HELD_OUT])
    return [Face(faces[i][0], faces[first[i]][0].stem, first[i] in held_out) for i in kept]


def _sample(path: Path) -> np.ndarray | None:
    """SAMPLE's images as unit vectors, or None if the face does not draw all of it."""
    try:
        font = ImageFont.truetype(path, SIZE)
        blank = bytes(font.getmask(NO_CHARACTER))
        if not all(draws(c, font, blank) for c in SAMPLE):
            return None
        pixels = np.stack([_ink(draw(c, font)) for c in SAMPLE])
    except OSError:  # FreeType cannot read or run it
        return None
    return pixels / np.sqrt((pixels * pixels).sum(1, keepdims=True))


def _ink(image: Image.Image) -> np.ndarray:
    """What is drawn, in a square of 32 pixels wherever and however large it was drawn."""
    square = image.crop(image.getbbox()).resize((32, 32), Image.Resampling.BOX)
    return np.asarray(square, dtype=np.float32).ravel()


def fetch(folder: Path) -> None:
    """Download the Debian packages and unpack them below the folder, without root.

    Raises: OSError: no apt-get or dpkg-deb. subprocess.CalledProcessError: a download failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        names = [f"fonts-{package}" for package in PACKAGES]
        subprocess.run(["apt-get", "-qq", "download", *names], cwd=downloads, check=True)
        for package in sorted(Path(downloads).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch what is not there yet."""
    parser = Parser(prog="python -m cbloss_fused.experiments.fonts")
    parser.add_argument("folder", type=Path, help="where the fonts are, or are to be")
    folder = parser.parse_args(argv).folder
    try:
        faces = find_faces(folder)
    except ValueError:
        try:
            fetch(folder)
            faces = find_faces(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"cannot fetch fonts ({error}): {ADVICE}") from None
        except ValueError as error:
            raise SystemExit(str(error)) from None
    designs = {face.design: face.held_out for face in faces}
    held_out = sum(designs.values())
    print(f"{folder}: {len(faces)} faces of {len(designs)} designs, {held_out} held out")


if __name__ == "__main__":
    main()
