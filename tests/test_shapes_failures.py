"""The tables of what goes wrong: nothing on the world itself, and the right reason for what is drawn wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shapes import failures
from shapes.data import Clip, make_clip
from shapes.drawing import render
from shapes.failures import Outcome, reasons, report
from shapes.film import Film
from shapes.story_score import last_scene, score_scenes
from shapes.world import SHAPES, as_floats
from utils import command
from utils.errors import InputError

CLIPS = [make_clip(105, index, (9,), held=True) for index in range(6)]


def outcome(clip: Clip, film: Film | None = None) -> Outcome:
    video = render(film or clip.film)
    found = Outcome(clip, *last_scene(video, clip))
    assert found.score == score_scenes(video, clip)[-1]
    return found


def drawn_wrong(clip: Clip, **changes: object) -> list[str]:
    """What is said of the first thing if its track has these values instead."""
    first, *others = clip.film.tracks
    wrong = replace(clip.film, tracks=(replace(first, **changes), *others))  # type: ignore[arg-type]
    return reasons(outcome(clip, wrong).things[0])


def test_nothing_is_wrong_with_the_world_itself() -> None:
    text = report([outcome(clip) for clip in CLIPS])
    assert text.count("| all | 6 | 100 | 100 | 100 | 100 |") == len(outcome(CLIPS[0]).kinds)
    assert text.endswith("|---|---|\n")  # of no reason


def test_every_fault_has_its_reason() -> None:
    clip = next(clip for clip in CLIPS if len(clip.film.tracks) == 1)
    track = clip.film.tracks[0]
    wrong = (int(track.after[-1]) + 1) % len(SHAPES)
    shapes = np.full_like(track.after, wrong)
    assert drawn_wrong(clip, before=shapes, after=shapes) == [
        f"{SHAPES[int(track.after[-1])]} drawn as {SHAPES[wrong]}"
    ]
    assert drawn_wrong(clip, radius=as_floats(1.3 * track.radius)) == ["too large"]
    assert drawn_wrong(clip, radius=as_floats(0.7 * track.radius)) == ["too small"]
    away = as_floats(track.x + np.maximum(np.arange(len(track.x)) - 50, 0))
    assert drawn_wrong(clip, x=away) == ["moves otherwise"]
    assert drawn_wrong(clip, radius=as_floats(0 * track.radius)) == ["missing in many frames"]


def test_it_asks_for_what_the_evaluation_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--threads", str(torch.get_num_threads())]
    assert command.run(lambda: failures.main(["--storyboards", "2", "--trained", *given]), log_format=None) == 0
    told = capsys.readouterr().out
    assert "| first caption's motion | storyboards | right % |" in told and "| all | 2 |" in told
    with pytest.raises(InputError, match="num_output_frames: storyboards switch at frame 12"):
        failures.main(["--set", "num_output_frames=15", *given])
    with pytest.raises(SystemExit):
        failures.main(["--policy", "truth"])
