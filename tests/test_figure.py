"""Drawings: the same picture as SVG and as PNG."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from utils.errors import InputError
from utils.figure import Figure, shade, ticks


def drawing() -> Figure:
    figure = Figure(100, 80)
    figure.rectangle(10, 20, 30, 40, "#ff0000", tip='a < b & "c"')
    figure.line([(50, 10), (90, 10)], "#0000ff", 2)
    figure.line([(50, 30), (92, 30)], "#0000ff", 2, dashed=True)
    figure.circle(70, 60, 8, "#00ff00")
    figure.text(12, 75, "<words>", 10)
    figure.text(97, 40, "up", 10, "middle", upright=True)
    return figure


def test_the_svg_is_well_formed_and_escaped() -> None:
    root = ET.fromstring(drawing().svg())
    kinds = [element.tag.rpartition("}")[2] for element in root]
    assert kinds == ["rect", "rect", "path", "path", "circle", "text", "text"]
    assert root[1][0].text == 'a < b & "c"' and root[5].text == "<words>"
    assert "rotate(-90" in root[6].attrib["transform"]


def test_the_png_shows_what_the_svg_says(tmp_path: Path) -> None:
    svg, png = drawing().save(tmp_path, "x", scale=2)
    assert svg.read_text() == drawing().svg()
    with Image.open(png) as image:
        assert image.size == (200, 160)
        assert image.getpixel((20, 40)) == image.getpixel((78, 118)) == (255, 0, 0)
        assert image.getpixel((82, 100)) == (255, 255, 255)
        assert image.getpixel((140, 120)) == (0, 255, 0) and image.getpixel((126, 106)) == (255, 255, 255)
        assert image.getpixel((120, 20)) == (0, 0, 255)
        dashes = [image.getpixel((x, 60)) == (0, 0, 255) for x in range(100, 184)]
        assert 0.4 < sum(dashes) / len(dashes) < 0.75
        words = [image.getpixel((x, y)) for x in range(24, 90) for y in range(132, 156)]
        assert min(sum(colour) for colour in words) < 300
        upright = [(x, y) for x in range(176, 200) for y in range(50, 110) if sum(image.getpixel((x, y))) < 400]
        assert upright and max(y for _, y in upright) - min(y for _, y in upright) > 12


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        drawing().save(tmp_path / "none", "x")


def test_shades() -> None:
    assert shade(0.0) == "#ffffff" and shade(1.0, "#102030") == "#102030" and shade(2.0, "#102030") == "#102030"
    assert shade(0.5, "#000000") == "#808080"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (53.7, 100.0, [50, 60, 70, 80, 90, 100]),
        (0.782, 1.474, [0.6, 0.8, 1.0, 1.2, 1.4, 1.6]),
        (16.6, 47.5, [10, 20, 30, 40, 50]),
        (-0.3, 0.2, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2]),
        (1000.0, 1001.0, [1000, 1000.2, 1000.4, 1000.6, 1000.8, 1001]),
    ],
)
def test_ticks_are_round_and_hold_everything(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
    assert len(ticks(low, high, 4)) <= 4
