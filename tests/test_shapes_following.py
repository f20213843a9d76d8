"""Where drawn things are, and stories that go on from there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shapes.drawing import render
from shapes.film import Film, film
from shapes.following import FAR, LAST, Shift, moved, shifted
from shapes.world import BESIDE, HEIGHT, WIDTH, Command, Hidden, Scene, Thing

BALL, BOX = Thing("disc", "red"), Thing("square", "blue")
HERE = (0.0, 0.0)


def told(*commands: tuple[int, Command], things: tuple[Thing, ...] = (BALL,), motion: str = "right") -> Film:
    return film(Scene(things, motion), Hidden(), 80, commands)


BROUGHT = told((20, Command("bring", new=BOX)))
PASSING = told(things=(BALL, BOX), motion="pass")


@pytest.mark.parametrize(
    ("seen", "moves"),
    [
        (told(), [(5.0, -3.0)]),
        (told(motion="up"), [(-8.0, 12.0)]),  # across an edge
        (BROUGHT, [(5.0, 2.0), (-4.0, -6.0)]),
        (PASSING.cut(0, 20), [(2.0, 1.0), (-3.0, 4.0)]),
    ],
)
def test_it_is_seen_how_far_things_have_moved(seen: Film, moves: list[Shift]) -> None:
    found = moved(seen, render(shifted(seen, moves)))
    assert found is not None and np.abs(np.subtract(found, moves)).max() < 0.6
    assert moved(seen, render(seen)[-LAST:]) == pytest.approx(np.zeros((len(moves), 2)), abs=0.6)


def test_shifted_things_are_in_the_picture_and_otherwise_the_same() -> None:
    (track,), (other,) = told().tracks, shifted(told(), [(100.0, -70.0)]).tracks
    assert ((other.x >= 0) & (other.x < WIDTH) & (other.y >= 0) & (other.y < HEIGHT)).all()
    assert np.allclose((other.x - track.x - 100) % WIDTH, 0, atol=1e-3)
    assert np.array_equal(other.radius, track.radius) and np.array_equal(other.colour, track.colour)


def test_what_is_not_there_moves_like_the_first_that_is() -> None:
    """So that a second thing comes beside where the first one has been drawn."""
    before, gone = BROUGHT.cut(0, 20), told((20, Command("bring", new=BOX)), (40, Command("remove", thing=0)))
    assert len(before.tracks) == 2 and before.tracks[1].radius.max() == 0
    first, second = moved(before, render(shifted(before, [(6.0, 3.0), HERE]))) or ()
    assert first == second == pytest.approx((6.0, 3.0), abs=0.6)
    x = [track.x[-1] for track in shifted(BROUGHT, [first, second]).tracks]
    assert (x[1] - x[0]) % WIDTH == pytest.approx(BESIDE)
    first, second = moved(gone, render(shifted(gone, [HERE, (-5.0, 4.0)]))) or ()
    assert first == second == pytest.approx((-5.0, 4.0), abs=0.6)


def test_things_that_touch_stay_where_they_are() -> None:
    meeting = PASSING.cut(0, 41)
    low, high = (track.cut(-1, None) for track in meeting.tracks)
    near = shifted(meeting, [HERE, (0.0, float(low.y[0] - high.y[0]) + 15)])
    assert moved(near, render(shifted(near, [HERE, (3.0, 0.0)]))) == [HERE, HERE]


@pytest.mark.parametrize(
    "other",
    [
        replace(BROUGHT, tracks=BROUGHT.tracks[:1]),
        replace(BROUGHT, tracks=()),
        shifted(BROUGHT, [HERE, (0.0, FAR + 2)]),
    ],
)
def test_a_thing_that_is_missing_or_far_away_is_lost(other: Film) -> None:
    assert moved(BROUGHT, render(other)) is None
