"""TrueType fonts for tests: each character a few rectangles of its own, each design its own way."""

from pathlib import Path
from random import Random

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen


def rectangles(boxes):
    pen = TTGlyphPen(None)
    for left, bottom, right, top in boxes:
        pen.moveTo((left, bottom))
        pen.lineTo((left, top))
        pen.lineTo((right, top))
        pen.lineTo((right, bottom))
        pen.closePath()
    return pen.glyph()


def boxes_of(character, design, weight):
    """A frame, so that all designs fill the same square, and six strokes."""
    places = Random(f"{character} {design}")
    boxes = [(50, 50, 50 + weight, 950), (950 - weight, 50, 950, 950)]
    for _ in range(6):
        x, y = places.randrange(100, 800), places.randrange(100, 800)
        length = places.randrange(100, 900)
        upright = places.random() < 0.5
        right, top = (x + weight, y + length) if upright else (x + length, y + weight)
        boxes.append((x, y, min(right, 900), min(top, 900)))
    return boxes


def make_font(path: Path, characters: str, design: int, weight: int = 60, empty: str = "") -> None:
    """Write a font that draws the characters; it claims those of `empty` and draws nothing."""
    names = {ord(c): f"u{ord(c):X}" for c in characters + empty}
    glyphs = {".notdef": rectangles([(100, 0, 900, 800)])}
    for c in characters + empty:
        drawn = [] if c in empty else boxes_of(c, design, weight)
        glyphs[names[ord(c)]] = rectangles(drawn)
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(names)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=950, descent=-50)
    builder.setupNameTable({"familyName": f"Test {design}", "styleName": str(weight)})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
