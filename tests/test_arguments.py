"""What programs give to `Pipeline` and `Session`: wrong values are told, and nothing ends as if it were complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.arguments import (
    given_overrides,
    given_path,
    given_prompt,
    given_prompts,
    given_seeds,
    given_storyboard,
    whole_number,
)
from pipeline.config.config import load_config
from tests.conftest import PROMPTS, Pipelines
from utils.errors import InputError
from utils.video import VideoWriter

FOX, BIRD, FISH = PROMPTS
WINDOW = ("dummy_forcing.enabled=false", "model_kwargs.local_attn_size=9", "rope=relative")
ROLLING = (*WINDOW[:1], "model_kwargs.local_attn_size=-1", "rolling={max_attention: 15}", "rope=absolute")


@pytest.mark.parametrize("value", [6, np.int64(6), torch.tensor(6)])
def test_whole_numbers_of_any_library(value: object) -> None:
    assert whole_number("frames", value, 1, 10) == 6


def board(*entries: object, cuts: tuple[int, ...] = ()) -> object:
    return given_storyboard(list(entries), cuts, 1, 3, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[
            (lambda value=value: whole_number("seed", value, 0, 10), "seed: expected a whole number from 0 to 9, got")
            for value in ("3", 1.5, True, None, -1, 10, float("nan"))
        ],
        (lambda: given_seeds(5), "noise_seeds: expected a list of whole numbers"),
        (lambda: given_seeds([]), "noise_seeds: holds no seed"),
        (lambda: given_seeds([1, 2**64]), r"noise_seeds\[1\]: expected a whole number"),
        (lambda: given_overrides("seed=1"), "overrides: expected a list of .* got 'seed=1'"),
        (lambda: given_overrides({"seed": 1}), "overrides: expected a list"),
        (lambda: given_overrides([("seed", 1)]), "overrides: expected a list .* in it"),
        (lambda: given_prompts(FOX), "prompts: expected a list of prompts"),
        (lambda: given_prompt(5, 1), "prompt: expected a text, or a list of prompts, one for each video, got 5"),
        (lambda: given_prompt(b"A cat.", 1), "prompt: expected a text"),
        (lambda: given_prompt({FOX}, 1), "prompt: expected a text"),
        (lambda: given_prompt([5], 1), "prompt: expected a text.* got 5 in it"),
        (lambda: given_prompt("\u200b", 1), "prompt must be a text that is not blank"),
        (lambda: given_prompt("A \ud83d cat.", 1), "prompt holds half a character"),
        (lambda: given_path("start_from", 5), "start_from: expected the path of a file, got 5"),
        (lambda: given_path("start_from", ""), "start_from: expected the path of a file"),
        (lambda: board(FOX, BIRD), r"storyboard\[0\]: expected a pair \(latent frame, prompt\)"),
        (lambda: board((FOX, 0)), r"storyboard\[0\]: expected a whole number"),
        (lambda: board((0, FOX), (3.5, BIRD)), r"storyboard\[1\]: expected a whole number from 0 to 11, got 3.5"),
        (lambda: board((0, FOX), (12, BIRD)), r"storyboard\[1\]: expected a whole number from 0 to 11, got 12"),
        (lambda: board((0, FOX), (10, BIRD)), "storyboard: no block starts at or after frame 10 in frames 12"),
        (lambda: board((0, FOX), (6, BIRD), (3, FISH)), "storyboard: must be positive and strictly increasing"),
        (lambda: board((0, FOX), (4, BIRD), (5, FISH)), "storyboard: .* leave a prompt unseen"),
        (lambda: board((0, FOX), (6, BIRD), cuts=(9,)), r"cuts: no prompt of the storyboard begins at \[9\]"),
    ],
)
def test_what_is_none_is_told(given: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        given()


def test_a_prompt_is_what_a_file_would_hold() -> None:
    assert given_prompt(" A fox\r\nruns.\u200b ", 1) == "A fox runs."


def test_settings_that_are_read_take_changes_too() -> None:
    config = load_config("configs/shapes_demo.yaml")
    assert load_config(config) is config
    assert load_config(config, ["seed=5"]).seed == 5


def test_a_block_that_is_broken_off_is_no_end(pipeline_of: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of(*WINDOW)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pipeline.session(frames=9) as session:
        session.prompt(FOX)
        next(session)
        session.prompt(BIRD)
        with monkeypatch.context() as patch:
            patch.setattr(session.rollout, "_flow", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(session)
        with pytest.raises(InputError, match=r"block at latent frame 3 was broken off \(KeyboardInterrupt\)"):
            list(session)
        assert (session.storyboard, session.frames_made) == ([(0, FOX)], 3)
    assert len(pipeline.generate(FOX, frames=6)) == 21


def test_a_switch_whose_text_was_interrupted_still_comes(
    pipeline_of: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str) -> torch.Tensor:
        raise KeyboardInterrupt

    with pipeline_of(*WINDOW).session(frames=6) as session:
        session.plan([(0, FOX), (3, BIRD)])
        next(session)
        with monkeypatch.context() as patch:
            patch.setattr(session, "_embed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(session)
        assert next(session).prompt == BIRD


def test_a_prompt_that_could_take_no_effect(pipeline_of: Pipelines) -> None:
    pipeline = pipeline_of(*WINDOW)
    with pipeline.session(frames=6) as session:
        session.plan([(3, BIRD)])
        session.plan([(0, FOX)])
        assert len(list(session)) == 2
        with pytest.raises(InputError, match="prompt: the video of 6 latent frames is complete"):
            session.prompt(FISH)
        assert session.storyboard == [(0, FOX), (3, BIRD)]
    for tell in (session.prompt, lambda prompt: session.plan([(0, prompt)]), lambda _: session.held()):
        with pytest.raises(InputError, match="the session is closed"):
            tell(FOX)
    with pipeline.session(frames=6, live=False) as session:
        session.plan([(0, FOX)])
        next(session)
        with pytest.raises(InputError, match="prompt: a session with live=False"):
            session.prompt(BIRD)
        next(session)


def test_what_a_session_starts_from_goes_by_its_own_length(pipeline_of: Pipelines, tmp_path: Path) -> None:
    pipeline, given = pipeline_of(*WINDOW, "num_output_frames=12"), tmp_path / "given.mp4"
    with VideoWriter(given, 48, 32) as writer:
        writer.write(np.full((45, 32, 48, 3), 128, np.uint8))  # twelve latent frames
    with pipeline.session(frames=15, start_from=given) as session:
        session.prompt(FOX)
        assert len(list(session)) == 5
    pipeline.session(start_from=given).close()  # without end
    with pytest.raises(InputError, match="leaves nothing to make of frames 12; use frames=15 or more"):
        pipeline.session(frames=12, start_from=given)
    with pytest.raises(InputError, match="start_from: has no meaning with a rolling window"):
        pipeline.session(frames=15, start_from=given, overrides=ROLLING)
    with pytest.raises(InputError, match="frames: 6 are fewer than the 4 blocks of 3"):
        pipeline.session(frames=6, overrides=ROLLING)
