"""Drawings of rectangles, lines, circles and words, as SVG (written out here) and as PNG (painted by Pillow).

Coordinates are pixels from the top left corner. Letters are a sans-serif of the viewer's in SVG, Pillow's own in PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.files import atomic_write, write_atomic

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Anchor = Literal["start", "middle", "end"]
_PILLOW_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


@dataclass(frozen=True)
class _Rectangle:
    x: float
    y: float
    width: float
    height: float
    fill: str
    tip: str


@dataclass(frozen=True)
class _Line:
    points: tuple[tuple[float, float], ...]
    stroke: str
    width: float
    dashed: bool


@dataclass(frozen=True)
class _Circle:
    x: float
    y: float
    radius: float
    fill: str
    tip: str


@dataclass(frozen=True)
class _Text:
    x: float
    y: float
    words: str
    size: float
    anchor: Anchor
    fill: str
    upright: bool


@dataclass
class Figure:
    """A drawing on white. Colours are #rrggbb; `tip` is shown by browsers when the pointer rests there."""

    width: int
    height: int
    _items: list[_Rectangle | _Line | _Circle | _Text] = field(default_factory=list)

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        self._items.append(_Rectangle(x, y, width, height, fill, tip))

    def line(
        self, points: Sequence[tuple[float, float]], stroke: str = "#888888", width: float = 1, dashed: bool = False
    ) -> None:
        self._items.append(_Line(tuple(points), stroke, width, dashed))

    def circle(self, x: float, y: float, radius: float, fill: str, tip: str = "") -> None:
        self._items.append(_Circle(x, y, radius, fill, tip))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 12,
        anchor: Anchor = "start",
        fill: str = "#222222",
        upright: bool = False,
    ) -> None:
        """`y` is the base line. `upright`: turned by a quarter, read from below, (x, y) its anchor."""
        self._items.append(_Text(x, y, words, size, anchor, fill, upright))

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="sans-serif">'
        )
        body = "\n".join(_svg(item) for item in self._items)
        return f'{head}\n<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n{body}\n</svg>\n'

    def save(self, folder: Path, name: str, scale: int = 2) -> list[Path]:
        """Write NAME.svg and NAME.png (`scale` times as many pixels). Raises InputError if the folder cannot be
        written."""
        svg, png = folder / f"{name}.svg", folder / f"{name}.png"
        write_atomic(svg, self.svg())
        with atomic_write(png) as partial:
            self._write_png(partial, scale)
        return [svg, png]

    def _write_png(self, path: Path, scale: int) -> None:
        from PIL import Image, ImageDraw

        fine = 2 * scale  # drawn at twice the size and shrunk, which smooths slanted lines
        image = Image.new("RGB", (self.width * fine, self.height * fine), "#ffffff")
        draw = ImageDraw.Draw(image)
        for item in self._items:
            _paint(draw, image, item, fine)
        image.resize((self.width * scale, self.height * scale), Image.Resampling.BOX).save(path, format="PNG")


def _svg(item: _Rectangle | _Line | _Circle | _Text) -> str:
    if isinstance(item, _Line):
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in item.points)
        dash = ' stroke-dasharray="4 3"' if item.dashed else ""
        return f'<path d="{path}" fill="none" stroke="{item.stroke}" stroke-width="{item.width:g}"{dash}/>'
    if isinstance(item, _Text):
        turn = f' transform="rotate(-90 {item.x:.1f} {item.y:.1f})"' if item.upright else ""
        place = f'x="{item.x:.1f}" y="{item.y:.1f}" font-size="{item.size:g}" text-anchor="{item.anchor}"'
        return f'<text {place} fill="{item.fill}"{turn}>{escape(item.words)}</text>'
    tip = f"<title>{escape(item.tip)}</title>" if item.tip else ""
    if isinstance(item, _Circle):
        return f'<circle cx="{item.x:.1f}" cy="{item.y:.1f}" r="{item.radius:g}" fill="{item.fill}">{tip}</circle>'
    size = f'width="{item.width:.2f}" height="{item.height:.2f}"'
    return f'<rect x="{item.x:.2f}" y="{item.y:.2f}" {size} fill="{item.fill}">{tip}</rect>'


def _paint(draw: ImageDraw, image: object, item: _Rectangle | _Line | _Circle | _Text, scale: int) -> None:
    if isinstance(item, _Rectangle):
        right, bottom = (item.x + item.width) * scale - 1, (item.y + item.height) * scale - 1
        if right >= item.x * scale and bottom >= item.y * scale:
            draw.rectangle((item.x * scale, item.y * scale, right, bottom), fill=item.fill)
    elif isinstance(item, _Circle):
        x, y, r = item.x * scale, item.y * scale, item.radius * scale
        draw.ellipse((x - r, y - r, x + r, y + r), fill=item.fill)
    elif isinstance(item, _Line):
        for stroke in _dashes(item.points) if item.dashed else [item.points]:
            flat = [(x * scale, y * scale) for x, y in stroke]
            draw.line(flat, fill=item.stroke, width=max(1, round(item.width * scale)), joint="curve")
    else:
        _paint_text(draw, image, item, scale)


def _dashes(points: Sequence[tuple[float, float]]) -> list[tuple[tuple[float, float], ...]]:
    """Four pixels of line and three of gap along every straight part."""
    strokes = []
    for (x0, y0), (x1, y1) in pairwise(points):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        for number in range(int(length // 7) + 1):
            first, last = 7 * number / max(length, 1e-9), min(1.0, (7 * number + 4) / max(length, 1e-9))
            if first < last:
                ends = [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (first, last)]
                strokes.append(tuple(ends))
    return strokes


def _paint_text(draw: ImageDraw, image: object, item: _Text, scale: int) -> None:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(item.size * scale)
    anchor = _PILLOW_ANCHORS[item.anchor]
    if not item.upright:
        draw.text((item.x * scale, item.y * scale), item.words, fill=item.fill, font=font, anchor=anchor)
        return
    assert isinstance(image, Image.Image)
    side = 2 * int(draw.textlength(item.words, font=font)) + 4 * scale
    ink = Image.new("L", (side, side), 0)
    ImageDraw.Draw(ink).text((side / 2, side / 2), item.words, fill=255, font=font, anchor=anchor)
    turned = ink.rotate(90, center=(side / 2, side / 2))
    corner = round(item.x * scale - side / 2), round(item.y * scale - side / 2)
    image.paste(Image.new("RGB", (side, side), item.fill), corner, turned)


def shade(share: float, colour: str = "#08519c") -> str:
    """From white (0) to `colour` (1)."""
    share = min(max(share, 0.0), 1.0)
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (channel - 255) * share):02x}" for channel in channels)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` (4 or more) round numbers, 1, 2 or 5 times a power of ten apart, of which the first is not above
    `low` and the last not below `high`; high must be above low."""
    assert high > low and most >= 4
    power = math.floor(math.log10((high - low) / most))
    for step in (factor * 10.0**exponent for exponent in (power, power + 1, power + 2) for factor in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return [round(number * step, 12) for number in range(first, last + 1)]
    raise AssertionError("no step is wide enough")
