"""Figures: the house style, files that are the same each time, names beside points."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from utils.errors import InputError
from utils.plots import house_style, name_points, new_figure, save, svg


@house_style()
def drawing() -> Figure:
    figure = new_figure(3, 2, "a < b & $5")
    axes = figure.subplots()
    axes.plot([1, 2, 3], [4, 5, 7], "o", clip_on=True)
    return figure


def test_a_second_drawing_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        assert save(drawing(), tmp_path / folder, "x") == [tmp_path / folder / "x.svg", tmp_path / folder / "x.png"]
    for name in ("x.svg", "x.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    root = ET.parse(tmp_path / "one" / "x.svg").getroot()
    assert "a < b & $5" in [element.text for element in root.iter() if element.tag.endswith("}text")]
    with Image.open(tmp_path / "one" / "x.png") as image:
        assert image.size == (600, 400) and not image.info.keys() & {"Software", "Creation Time"}
    assert "matplotlib.pyplot" not in sys.modules


def test_ids_in_a_page_are_those_of_one_figure() -> None:
    one, other = ({line for line in svg(drawing(), name).split() if "url(#" in line} for name in "ab")
    assert one and other and not one & other


def test_the_style_is_ours_and_the_users_settings_are_left_alone() -> None:
    first = svg(drawing(), "x")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "axes.spines.top": True}):
        before = dict(matplotlib.rcParams)
        assert svg(drawing(), "x") == first
        assert dict(matplotlib.rcParams) == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        save(drawing(), tmp_path / "none", "x")


def named(points: dict[str, tuple[float, float]]) -> tuple[list[Text], list[Bbox], int]:
    """The names, their boxes in pixels, and how many are joined to their points, in a figure of 0..10 both ways."""
    with house_style():
        figure = new_figure(4, 3)
        axes = figure.subplots()
        axes.set(xlim=(0, 10), ylim=(0, 10))
        axes.vlines([4], 2, 8)
        axes.plot(*np.array(list(points.values())).T, "o")
    name_points(figure, {axes: points})
    boxes = [text.get_window_extent() for text in axes.texts]
    room = axes.get_window_extent()
    assert all(room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1 for box in boxes)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 10), (0, 10))
    return list(axes.texts), boxes, len(axes.lines) - 1


@pytest.mark.parametrize("place", [(5.0, 5.0), (0.0, 0.0), (10.0, 10.0), (4.0, 5.0)])
def test_a_name_stands_beside_its_point(place: tuple[float, float]) -> None:
    (text,), (box,), joined = named({"a name": place})
    x, y = text.axes.transData.transform(place)
    away = np.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))
    assert 4 < away < 14 and joined == 0  # pixels, 100 an inch
    bar = text.axes.transData.transform((4, 0))[0]
    assert not box.x0 < bar < box.x1


@pytest.mark.parametrize("step", [0.0, 0.05])
def test_names_of_near_points_do_not_cover_each_other(step: float) -> None:
    texts, boxes, joined = named({f"point {number}": (5 + step * number, 5.0) for number in range(8)})
    assert {text.get_text() for text in texts} == {f"point {number}" for number in range(8)}
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2)) and joined > 1


def test_what_has_no_place_has_no_name() -> None:
    texts, _, _ = named({"nowhere": (float("nan"), 1.0), "somewhere": (1.0, 1.0)})
    assert [text.get_text() for text in texts] == ["somewhere"]
