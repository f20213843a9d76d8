"""Names in drawings stand where there is room."""

from __future__ import annotations

import itertools

from utils.labels import NEAR, Box, place_labels

ROOM = Box(0, 0, 200, 120)


def apart(one: Box, other: Box) -> bool:
    return one.right <= other.left or other.right <= one.left or one.bottom <= other.top or other.bottom <= one.top


def test_names_of_near_points_do_not_cover_each_other() -> None:
    points = [(100.0 + number, 60.0 + number % 2) for number in range(8)]
    sizes = [(50.0, 12.0)] * len(points)
    boxes = place_labels(points, sizes, ROOM, [])
    assert all(apart(one, other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.left >= 0 and box.top >= 0 and box.right <= 200 and box.bottom <= 120 for box in boxes)
    assert all((box.right - box.left, box.bottom - box.top) == (50, 12) for box in boxes)


def test_a_name_stands_beside_its_point() -> None:
    (box,) = place_labels([(50.0, 50.0)], [(30.0, 10.0)], ROOM, [])
    x, y = box.nearest((50.0, 50.0))
    assert NEAR <= ((x - 50) ** 2 + (y - 50) ** 2) ** 0.5 < NEAR + 3


def test_a_name_goes_where_nothing_is_drawn() -> None:
    everything_but_the_right = Box(0, 0, 140, 120)
    (box,) = place_labels([(50.0, 50.0)], [(30.0, 10.0)], ROOM, [(everything_but_the_right, 500.0)])
    assert box.left >= 140


def test_lines_to_names_do_not_run_through_names() -> None:
    points = [(40.0, 60.0), (44.0, 60.0)]
    crowd = [(Box(0, 0, 120, 120), 500.0)]  # both names have to go to the right
    first, second = place_labels(points, [(60.0, 12.0)] * 2, ROOM, crowd)
    assert apart(first, second) and first.left >= 120 and second.left >= 120
    end = second.nearest(points[1])
    along = [(44 + (end[0] - 44) * part / 50, 60 + (end[1] - 60) * part / 50) for part in range(51)]
    assert not any(first.left < x < first.right and first.top < y < first.bottom for x, y in along)
