"""The world is deterministic and does what captions say; the measures are right on it and fall on what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shapes.captions import caption, held_out, random_scene
from shapes.data import Clip, make_clip, pixel_frame
from shapes.measure import drift, seam, see, which_background
from shapes.score import Score, borders, score, score_later
from shapes.tokenizer import MAX_TOKENS, build_tokenizer
from shapes.world import (
    BACKGROUNDS,
    DIRECTIONS,
    FRAMES,
    HEIGHT,
    MOTIONS,
    WIDTH,
    Floats,
    Hidden,
    Scene,
    Thing,
    background,
    render,
    story,
    tracks,
)

CLIPS = [make_clip(101, index, held=None) for index in range(24)]
SHARES = ("colour", "shape", "motion", "background", "mark", "way")


def test_a_clip_is_decided_by_its_seed_and_number() -> None:
    first, again, other = make_clip(5, 3), make_clip(5, 3), make_clip(5, 4)
    assert first.captions == again.captions and np.array_equal(first.video, again.video)
    assert not np.array_equal(first.video, other.video)
    assert first.video.shape == (FRAMES, HEIGHT, WIDTH, 3) and first.video.dtype == np.float32
    assert first.video.min() >= 0 and first.video.max() <= 1


def test_a_shorter_clip_begins_like_a_longer_one() -> None:
    assert np.array_equal(make_clip(5, 3, frames=33).video, make_clip(5, 3).video[:33])


def test_a_second_caption_changes_what_follows_and_nothing_before() -> None:
    thing, hidden = Thing("disc", "red"), Hidden(background=1)
    plain = render(tracks(Scene((thing,), "right"), hidden), hidden)
    start = pixel_frame(9)
    switched = story(((0, Scene((thing,), "right")), (start, Scene((thing,), "up"))), hidden)
    assert np.array_equal(render(switched, hidden)[:start], plain[:start])
    (track,) = switched
    assert np.allclose(track.x[start:], track.x[start]) and track.y[-1] < track.y[start] - 15


def test_no_training_scene_is_held_out() -> None:
    rng = np.random.default_rng(0)
    assert not any(held_out(random_scene(rng, held=False)) for _ in range(200))
    assert all(held_out(random_scene(rng, held=True)) for _ in range(50))


def test_captions_are_plain_and_fit() -> None:
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    unknown = {tokenizer.token_to_id(letter) for letter in "bcdefghijklmnopqrstuvwxyz"}
    for _ in range(300):
        scene = random_scene(rng)
        text = caption(scene, rng)
        ids = tokenizer.encode(text).ids
        assert len(ids) <= MAX_TOKENS and not unknown & set(ids), text  # no word is spelt in letters
        assert all(thing.colour in text for thing in scene.things)


@pytest.mark.parametrize("motion", MOTIONS)
def test_things_stay_in_the_picture(motion: str) -> None:
    things = (Thing("square", "blue", "large"),) if motion != "pass" else (Thing("disc", "red"), Thing("disc", "blue"))
    for hidden in (Hidden(way=0), Hidden(way=1)):
        for track in tracks(Scene(things, motion, "red" if motion == "turn" else None), hidden):
            assert track.x.min() > 12 and track.x.max() < WIDTH - 12
            assert track.y.min() > 0 and track.y.max() < HEIGHT


def test_measures_are_right_on_the_world_itself() -> None:
    scores = [score(clip.video, clip.scenes[0]) for clip in CLIPS]
    for name in SHARES:
        assert np.nanmean([getattr(one, name) for one in scores]) == 1.0, name
    assert np.mean([one.position for one in scores]) < 0.5
    assert min(one.drift for one in scores) > 45
    assert all(which_background(background(index)[None]) == index for index in range(BACKGROUNDS))


def test_storyboard_measures_are_right_on_the_world_itself() -> None:
    for index in range(8):
        clip = make_clip(102, index, 9, held=None)
        scenes = [(pixel_frame(start), scene) for start, scene in zip(clip.starts, clip.scenes, strict=True)]
        assert score_later(clip.video, scenes)["later_right"] == 1.0
        stopped = clip.video.copy()
        stopped[scenes[1][0] :] = stopped[scenes[1][0]]
        if clip.scenes[1].motion in DIRECTIONS:
            assert score_later(stopped, scenes)["later_right"] == 0.0


def swapped_channels(clip: Clip) -> Floats:
    return np.ascontiguousarray(clip.video[..., ::-1])


def reversed_in_time(clip: Clip) -> Floats:
    return np.ascontiguousarray(clip.video[::-1])


def frozen(clip: Clip) -> Floats:
    return np.repeat(clip.video[:1], FRAMES, axis=0)


def empty(clip: Clip) -> Floats:
    return np.repeat(background(clip.hidden.background)[None], FRAMES, axis=0)


def new_background_half_way(clip: Clip) -> Floats:
    other = (clip.hidden.background + 1) % BACKGROUNDS
    hidden = Hidden(other, clip.hidden.mark, clip.hidden.way)
    return np.concatenate((clip.video[:40], render(tracks(clip.scenes[0], hidden), hidden)[40:]))


def new_mark_half_way(clip: Clip) -> Floats:
    hidden = Hidden(clip.hidden.background, (clip.hidden.mark + 1) % 3, clip.hidden.way)
    return np.concatenate((clip.video[:40], render(tracks(clip.scenes[0], hidden), hidden)[40:]))


def other_way_half_way(clip: Clip) -> Floats:
    hidden = Hidden(clip.hidden.background, clip.hidden.mark, 1 - clip.hidden.way)
    return np.concatenate((clip.video[:40], render(tracks(clip.scenes[0], hidden), hidden)[40:]))


@pytest.mark.parametrize(
    ("spoil", "metric"),
    [
        (swapped_channels, "colour"),
        (reversed_in_time, "motion"),
        (frozen, "motion"),
        (empty, "shape"),
        (empty, "colour"),
        (new_background_half_way, "background"),
        (new_mark_half_way, "mark"),
        (other_way_half_way, "way"),
    ],
)
def test_measures_fall_on_what_is_wrong(spoil: Callable[[Clip], Floats], metric: str) -> None:
    clips = [clip for clip in CLIPS if clip.scenes[0].motion in ("right", "left", "up", "down", "pass", "grow")]
    assert len(clips) >= 6
    values = [getattr(score(spoil(clip), clip.scenes[0]), metric) for clip in clips]
    assert np.nanmean(values) < 0.5


def test_position_counts_a_path_that_is_left() -> None:
    clip = next(clip for clip in CLIPS if clip.scenes[0].motion in ("right", "left"))
    assert score(frozen(clip), clip.scenes[0]).position > 20


def test_drift_and_seams_are_seen() -> None:
    clip = CLIPS[0]
    darker = clip.video * np.linspace(1, 0.8, FRAMES, dtype=np.float32)[:, None, None, None]
    assert drift(darker, 0, FRAMES - 1) < drift(clip.video, 0, FRAMES - 1) - 15
    jumping = clip.video.copy()
    for number, border in enumerate(borders(FRAMES)):
        jumping[border:] = np.clip(jumping[border:] + (0.1 if number % 2 else -0.1), 0, 1)
    assert borders(FRAMES)[:2] == [9, 21]
    assert seam(jumping, borders(FRAMES)) > 3 * seam(clip.video, borders(FRAMES))


def test_nothing_is_seen_in_nothing() -> None:
    seen = see(empty(CLIPS[0]))
    assert seen.shape is None and seen.colour(0, FRAMES) is None and np.isnan(seen.x).all()
    assert set(Score.names()) >= set(SHARES)
