"""The world is deterministic and does what captions say; the measures are right on it and fall on what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shapes.captions import caption, held_out, random_scene
from shapes.commands import is_common, random_command, sentence, subject
from shapes.data import Clip, make_clip, pixel_frame
from shapes.drawing import background, render
from shapes.drift import MELTED, SWOLLEN, TINTED, drifted
from shapes.film import Film, film, tracks, world_at
from shapes.measure import drift, seam, see, which_background
from shapes.score import Score, borders, score
from shapes.tokenizer import MAX_TOKENS, build_tokenizer
from shapes.world import (
    BACKGROUNDS,
    COLOURS,
    COMMANDS,
    FAST,
    FRAMES,
    HEIGHT,
    LARGEST,
    MOTIONS,
    SHAPES,
    SWIFT,
    WIDTH,
    Command,
    Floats,
    Hidden,
    Scene,
    Thing,
    Track,
    begin,
)

CLIPS = [make_clip(101, index, held=None) for index in range(16)]
SHARES = ("colour", "shape", "motion", "background", "mark", "way")


def test_a_clip_is_decided_by_its_seed_and_number() -> None:
    first, again, other = make_clip(5, 3), make_clip(5, 3), make_clip(5, 4)
    assert first.captions == again.captions and np.array_equal(first.video, again.video)
    assert not np.array_equal(first.video, other.video)
    assert first.video.shape == (FRAMES, HEIGHT, WIDTH, 3) and first.video.dtype == np.float32
    assert first.video.min() >= 0 and first.video.max() <= 1


def test_a_shorter_clip_begins_like_a_longer_one() -> None:
    assert np.array_equal(make_clip(5, 3, frames=33).video, make_clip(5, 3).video[:33])


BALL = Scene((Thing("disc", "red"),), "right")
START = pixel_frame(9)


def after(*commands: Command, scene: Scene = BALL, frames: int = 141) -> Film:
    """What becomes of a scene under commands, the first at START, each two blocks after the one before."""
    script = [(START + 2 * SWIFT * i, command) for i, command in enumerate(commands)]
    return film(scene, Hidden(background=1), frames, script)


def test_a_command_changes_what_follows_and_nothing_before() -> None:
    plain, turned = after(), after(Command("up"))
    assert np.array_equal(render(turned)[:START], render(plain)[:START])
    (track,) = turned.tracks
    assert np.allclose(track.x[START:], track.x[START]) and track.y[START + 20] < track.y[START] - 10


def steps(track: Track) -> tuple[Floats, Floats]:
    """Pixels from frame to frame, across the edges."""
    dx, dy = np.diff(track.x), np.diff(track.y)
    return (dx + WIDTH / 2) % WIDTH - WIDTH / 2, (dy + HEIGHT / 2) % HEIGHT - HEIGHT / 2


@pytest.mark.parametrize(
    ("commands", "speed"),
    [
        ([Command("reverse")], (-1.0, 0.0)),
        ([Command("fast")], (FAST, 0.0)),
        ([Command("fast"), Command("slow")], (1.0, 0.0)),
        ([Command("fast"), Command("reverse")], (-FAST, 0.0)),
        ([Command("fast"), Command("left")], (-1.0, 0.0)),  # a new direction has the usual speed
        ([Command("still")], (0.0, 0.0)),
        ([Command("turn", target="blue")], (1.0, 0.0)),  # what is not named goes on
        ([Command("morph", target="cross")], (1.0, 0.0)),
        ([Command("background", target="land")], (1.0, 0.0)),
    ],
)
def test_what_commands_do_to_a_motion(commands: list[Command], speed: tuple[float, float]) -> None:
    (track,) = after(*commands).tracks
    dx, dy = steps(track)
    assert np.allclose(dx[-30:], speed[0], atol=1e-3) and np.allclose(dy[-30:], speed[1], atol=1e-3)


def test_a_command_changes_looks_within_a_block() -> None:
    (track,) = after(Command("turn", target="blue"), Command("morph", target="cross")).tracks
    assert np.allclose(track.colour[START], COLOURS["red"]) and np.allclose(
        track.colour[START + SWIFT], COLOURS["blue"]
    )
    assert track.shape == "cross" and track.morph[-1] == 1
    shown = after(Command("background", target="land"))
    assert which_background(render(shown.cut(START + SWIFT, START + SWIFT + 4))) == BACKGROUNDS.index("land")
    (track,) = after(Command("grow")).tracks
    assert track.radius[-1] == LARGEST


def test_a_second_thing_comes_moves_along_and_goes() -> None:
    new = Thing("square", "green", "small")
    first, second = after(Command("bring", new=new), Command("up"), Command("remove", thing=0)).tracks
    assert not second.radius[:START].any() and second.radius[START + SWIFT] == 12 and second.shape == "square"
    there = slice(START, START + 4 * SWIFT)
    assert np.allclose((second.x[there] - first.x[there]) % WIDTH, WIDTH / 2, atol=1e-3)
    assert first.radius[-1] == 0 and second.radius[-1] == 12


def test_what_is_there_becomes_a_new_scene() -> None:
    new = Thing("cross", "blue", "large")
    (track,) = after(Command("describe", target="up", new=new)).tracks
    (dx, dy), plain = steps(track), film(BALL, Hidden(), START + 1).tracks[0]
    assert np.allclose(track.x[START:], plain.x[START]) and np.allclose(dy[START + 1 :], -0.55, atol=1e-3)
    assert not dx[START:].any() and track.shape == "cross"
    assert track.radius[START] == 15 and track.radius[START + SWIFT] == 18
    assert np.allclose(track.colour[START + SWIFT], COLOURS["blue"])


def test_of_two_things_the_one_of_its_colour_becomes_the_new_scene() -> None:
    rng = np.random.default_rng(0)
    world = begin(Scene((Thing("disc", "red", "small"), Thing("square", "blue", "small")), "pass"), Hidden())
    commands = [random_command(rng, world) for _ in range(400)]
    scenes = [command for command in commands if command.verb == "describe" and command.new is not None]
    assert {command.thing for command in scenes if command.new and command.new.colour == "blue"} == {1}
    assert {command.thing for command in scenes if command.new and command.new.colour != "blue"} == {0}
    left, stays = world.obey(Command("describe", 1, "still", Thing("cross", "blue"))).bodies
    assert left.leaving and not stays.leaving and (stays.shape, stays.path.motion) == ("cross", "still")
    assert world.obey(Command("describe", 1, "still", Thing("cross", "blue"))).later(SWIFT).there == (
        stays.later(SWIFT),
    )


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion not in ("grow", "shrink", "turn", "still")])
def test_things_go_on_moving_for_minutes(motion: str) -> None:
    things = (Thing("square", "blue"), Thing("disc", "red"))[: 2 if motion == "pass" else 1]
    for track in tracks(Scene(things, motion), Hidden(), 16 * 120):
        dx, dy = steps(track)
        assert np.hypot(dx, dy)[-40:].max() > 0.5
        assert track.x.min() >= 0 and track.x.max() < WIDTH and track.y.min() >= 0 and track.y.max() < HEIGHT


def test_what_leaves_on_one_side_comes_in_on_the_other() -> None:
    scene = Scene((Thing("square", "blue"),), "right")
    shown = film(scene, Hidden(background=1), 200)
    frame = int(np.abs(shown.tracks[0].x - WIDTH + 4).argmin())
    picture = render(shown.cut(frame, frame + 1))[0]
    assert picture[40, 2, 2] > 0.8 and picture[40, -2, 2] > 0.8 and picture[40, WIDTH // 2, 2] < 0.5
    seen = see(render(shown))
    off = (seen.x - shown.tracks[0].x + WIDTH / 2) % WIDTH - WIDTH / 2
    assert seen.shape == "square" and np.abs(off).max() < 0.5


def test_a_long_films_frames_can_be_drawn_alone() -> None:
    clip = make_clip(5, 1, (9, 18, 30), 200)
    assert np.array_equal(render(clip.film.cut(100, 140)), clip.video[100:140])


def test_the_world_at_a_frame_goes_on_like_the_film() -> None:
    script = [(START, Command("reverse")), (80, Command("grow"))]
    (whole,) = film(BALL, Hidden(), 160, script).tracks
    (rest,) = (body.track(40) for body in world_at(BALL, Hidden(), script, 120).bodies)
    assert np.allclose(rest.x, whole.x[120:], atol=1e-3) and np.allclose(rest.radius, whole.radius[120:], atol=1e-3)


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


def test_every_command_has_sentences_that_fit() -> None:
    rng, tokenizer = np.random.default_rng(0), build_tokenizer()
    unknown = {tokenizer.token_to_id(letter) for letter in "bcdefghijklmnopqrstuvwxyz"}
    told = set()
    for _ in range(120):
        world = begin(random_scene(rng), Hidden()).later(30)
        for _ in range(8):
            command = random_command(rng, world)
            text = sentence(command, world, rng)
            ids = tokenizer.encode(text).ids
            assert len(ids) <= MAX_TOKENS and not unknown & set(ids), text
            assert "{" not in text and not any(wrong in text for wrong in ("they is", "they does", "both is", "it are"))
            if is_common(command.verb) and len(world.there) == 2:
                assert "the red" not in text.lower()
            told.add(command.verb)
            world = world.obey(command).later(SWIFT)
            assert 1 <= len(world.there) <= 2 and len({body.colour for body in world.there}) == len(world.there)
    assert told == set(COMMANDS)


def about(held: bool) -> set[tuple[str, str, str]]:
    """Shape, colour and verb of commands that are drawn for training, or held out."""
    found = set()
    for index in range(40):
        clip = make_clip(5, index, (9,), held=held)
        found.add(subject(clip.commands[0], world_at(clip.scene, clip.hidden, (), START)))
    return found


def test_no_training_command_is_held_out() -> None:
    seen, held = about(False), about(True)
    assert len(seen) > 20 and len(held) > 20 and not seen & held


@pytest.mark.parametrize("motion", MOTIONS)
def test_things_stay_in_the_picture(motion: str) -> None:
    things = (Thing("square", "blue", "large"),) if motion != "pass" else (Thing("disc", "red"), Thing("disc", "blue"))
    for hidden in (Hidden(way=0), Hidden(way=1)):
        for track in tracks(Scene(things, motion, "red" if motion == "turn" else None), hidden):
            assert track.x.min() > 12 and track.x.max() < WIDTH - 12
            assert track.y.min() >= 0 and track.y.max() < HEIGHT


def test_measures_are_right_on_the_world_itself() -> None:
    scores = [score(clip.video, clip.scene) for clip in CLIPS]
    for name in SHARES:
        assert np.nanmean([getattr(one, name) for one in scores]) == 1.0, name
    assert np.mean([one.position for one in scores]) < 0.5
    assert min(one.drift for one in scores) > 45
    assert all(which_background(background(index)[None]) == index for index in range(len(BACKGROUNDS)))


def swapped_channels(clip: Clip) -> Floats:
    return np.ascontiguousarray(clip.video[..., ::-1])


def reversed_in_time(clip: Clip) -> Floats:
    return np.ascontiguousarray(clip.video[::-1])


def frozen(clip: Clip) -> Floats:
    return np.repeat(clip.video[:1], FRAMES, axis=0)


def empty(clip: Clip) -> Floats:
    return np.repeat(background(clip.hidden.background)[None], FRAMES, axis=0)


def new_background_half_way(clip: Clip) -> Floats:
    other = (clip.hidden.background + 1) % len(BACKGROUNDS)
    hidden = Hidden(other, clip.hidden.mark, clip.hidden.way)
    return np.concatenate((clip.video[:40], render(film(clip.scene, hidden))[40:]))


def new_mark_half_way(clip: Clip) -> Floats:
    hidden = Hidden(clip.hidden.background, (clip.hidden.mark + 1) % 3, clip.hidden.way)
    return np.concatenate((clip.video[:40], render(film(clip.scene, hidden))[40:]))


def other_way_half_way(clip: Clip) -> Floats:
    hidden = Hidden(clip.hidden.background, clip.hidden.mark, 1 - clip.hidden.way)
    return np.concatenate((clip.video[:40], render(film(clip.scene, hidden))[40:]))


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
    clips = [clip for clip in CLIPS if clip.scene.motion in ("right", "left", "up", "down", "pass", "grow")]
    assert len(clips) >= 6
    values = [getattr(score(spoil(clip), clip.scene), metric) for clip in clips[:6]]
    assert np.nanmean(values) < 0.5


def test_position_counts_a_path_that_is_left() -> None:
    clip = next(clip for clip in CLIPS if clip.scene.motion in ("right", "left"))
    assert score(frozen(clip), clip.scene).position > 20


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


def test_things_drift_towards_others_and_can_still_be_told() -> None:
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        film = after(scene=Scene((Thing(shape, "red"),), "right"))
        worn = [drifted(film, 100, rng) for _ in range(8)]
        (true,) = film.tracks
        for other in worn:
            (track,) = other.tracks
            assert track.morph[0] < track.morph[50] < track.morph[100] == track.morph[-1] <= MELTED
            swollen = np.abs(track.radius / true.radius - 1)
            assert swollen[0] < swollen[100] == swollen[-1] <= SWOLLEN
            assert np.array_equal(track.x, true.x) and np.array_equal(track.colour, true.colour)
            tint = np.abs(other.backdrop - film.backdrop).max(1)
            assert tint[0] <= tint[50] <= tint[100] == tint[-1] <= TINTED
            assert np.allclose(other.backdrop.sum(1), 1)
        assert any((other.backdrop[100] != film.backdrop[100]).any() for other in worn)
        assert len({SHAPES[int(track.after[-1])] for (track,) in (other.tracks for other in worn)}) > 1
        seen = [see(render(other.cut(100, 141))).shape for other in worn if other.tracks[0].morph[-1] < MELTED / 2]
        assert seen == [shape] * len(seen)


def test_what_changes_its_shape_does_so_as_before() -> None:
    film = after(Command("morph", target="cross"), frames=START + SWIFT)
    (track,), (other,) = film.tracks, drifted(film, 20, np.random.default_rng(3)).tracks
    on_its_way = (track.before != track.after) & (track.morph < 1)
    assert on_its_way.sum() == SWIFT
    for name in ("before", "after", "morph"):
        assert np.array_equal(getattr(track, name)[on_its_way], getattr(other, name)[on_its_way])
