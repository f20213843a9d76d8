"""Scores of storyboards and of long videos: right on the world itself, and wrong on who does not listen or last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shapes.data import Clip, make_clip, pixel_frame
from shapes.drawing import render
from shapes.film import film
from shapes.measure import see, which_background
from shapes.story_score import score_long, score_scene, score_scenes
from shapes.world import MARKS, SHAPES, SIZES, Floats, Hidden, Scene, Thing, as_floats, begin
from utils.errors import InputError

START = pixel_frame(9)
STORIES = [make_clip(102, index, (9, 18), 141, held=None) for index in range(7)]


def test_storyboard_measures_are_right_on_the_world_itself() -> None:
    scores = [scene for clip in STORIES for scene in score_scenes(clip.video, clip)]
    assert len(scores) == 21 and all(one.right for one in scores)
    assert np.mean([one.position for one in scores]) < 0.5


@pytest.mark.parametrize(("source", "goal"), [("green", "purple"), ("blue", "yellow"), ("red", "blue")])
@pytest.mark.parametrize("stop", [21, 33, 45])
def test_a_colour_on_its_way_may_be_cut_by_a_switch(source: str, goal: str, stop: int) -> None:
    """Between complements it passes grey, which is nothing that can be seen."""
    scene, hidden = Scene((Thing("disc", source),), "turn", goal), Hidden()
    fine = score_scene(render(film(scene, hidden, stop)), begin(scene, hidden), known=True)
    assert fine.right == 1 and fine.position < 0.5
    other = render(film(Scene((Thing("disc", goal),), "still"), hidden, stop))
    assert score_scene(other, begin(scene, hidden), known=True).colour == (stop == 45)
    moving = render(film(Scene((Thing("disc", goal),), "right"), hidden, stop))
    assert not score_scene(moving, begin(scene, hidden), known=True).motion or stop < 45


def test_a_video_is_held_to_what_it_has_chosen_itself() -> None:
    """Captions do not say which background is there, nor which way round an orbit goes."""
    own = [Hidden((clip.hidden.background + 1) % 4, 0, 1 - clip.hidden.way) for clip in STORIES]
    others = [replace(clip, hidden=hidden) for clip, hidden in zip(STORIES, own, strict=True)]
    scores = [scene for clip, other in zip(STORIES, others, strict=True) for scene in score_scenes(other.video, clip)]
    assert all(one.right for one in scores)
    long = make_clip(103, 2, frames=241, held=None)
    assert score_long(replace(long, hidden=Hidden(3, 0, 1)).video, long).right == 1


def test_a_background_that_is_none_at_first_is_never_right() -> None:
    video = STORIES[0].video.copy()
    video[:9] *= 0.1
    assert not any(scene.background for scene in score_scenes(video, STORIES[0]))


def deaf(clip: Clip) -> Floats:
    """The first scene goes on for ever."""
    return render(film(clip.scene, clip.hidden, clip.frames))


def stopped(clip: Clip) -> Floats:
    video = clip.video.copy()
    video[START:] = video[START]
    return video


@pytest.mark.parametrize("spoil", [deaf, stopped])
def test_storyboard_measures_fall_on_who_does_not_listen(spoil: Callable[[Clip], Floats]) -> None:
    scores = [scene for clip in STORIES for scene in score_scenes(spoil(clip), clip)[1:]]
    assert np.mean([one.right for one in scores]) < 0.3


def blurred(video: Floats) -> Floats:
    """As a VAE may leave it, over three by three pixels."""
    for axis in (1, 2):
        video = as_floats(sum(np.roll(video, step, axis) for step in (-1, 0, 1)) / 3)
    return video


@pytest.mark.parametrize("mark", range(len(MARKS)))
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_read_off_soft_edges_too_and_no_other_one_is_right(shape: str, mark: int) -> None:
    hidden = Hidden(SHAPES.index(shape), mark)
    for size, colour in zip(SIZES, ("yellow", "purple", "green"), strict=True):
        scenes = {other: Scene((Thing(shape, colour, other),), "still") for other in SIZES}
        video = render(film(scenes[size], hidden, 16))
        soft = blurred(video)
        radii = [float(see(frames).radius[-1]) / SIZES[size] for frames in (video, soft)]
        assert max(abs(radius - 1) for radius in radii) < 0.06
        right = [other for other in SIZES if score_scene(soft, begin(scenes[other], hidden), known=True).motion]
        assert right == [size]


def test_long_videos_are_held_to_their_beginning() -> None:
    clip = make_clip(103, 2, frames=241, held=None)
    fine = score_long(clip.video, clip)
    assert fine.right == 1 and fine.still > 45 and fine.drift > 45 and fine.brightness < 0.1 and fine.hue < 1
    darker = clip.video * np.linspace(1, 0.8, len(clip.video), dtype=np.float32)[:, None, None, None]
    spoilt = score_long(darker, clip)
    assert spoilt.drift < 30 and spoilt.brightness > 3 and spoilt.hue > 3
    jumping = clip.video.copy()
    jumping[100:] += 0.1 * (which_background(clip.video) == 1) - 0.05
    assert score_long(jumping, clip).still < 32


@pytest.mark.parametrize("switches", [(3,), (6, 9), (18,)])
def test_a_scene_that_is_over_at_once_is_not_scored(switches: tuple[int, ...]) -> None:
    clip = make_clip(104, 0, switches, held=None)
    with pytest.raises(InputError, match="more than 12"):
        score_scenes(clip.video, clip)
