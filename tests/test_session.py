"""`Pipeline` and `Session` (pipeline/session.py): what is typed is a storyboard, sessions do not know of each other,
and nothing stays behind."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Sequence

import pytest
import torch

import interactive_inference
from dummy.roles import Role
from pipeline import Pipeline, Session
from pipeline.config.config import load_config
from pipeline.config.jobs import read_jobs
from pipeline.video_files import write_videos
from tests.conftest import PROMPTS, Pipelines, Program
from utils.errors import InputError
from utils.video import VideoWriter

FOX, BIRD, FISH = PROMPTS
WINDOW = ("dummy_forcing.enabled=false", "model_kwargs.local_attn_size=9", "rope=relative")
PACKED = ("dummy_forcing.enabled=true", "model_kwargs.local_attn_size=9", "rope=relative", "dummy_forcing.ar_start=1")


def take(session: Session, blocks: int, prompts: dict[int, str]) -> torch.Tensor:
    """The frames of the next blocks; `prompts` come before the blocks that they are numbered with."""
    frames = []
    for index in range(blocks):
        if index in prompts:
            session.prompt(prompts[index])
        frames.append(next(session).frames)
    return torch.cat(frames)


@pytest.mark.parametrize("policy", [WINDOW, PACKED], ids=["window", "packed"])
@pytest.mark.parametrize("global_sink", ["true", "false"])
def test_what_was_typed_is_a_storyboard(
    program: Program, pipeline_of: Pipelines, policy: Sequence[str], global_sink: str
) -> None:
    """Made by interactive_inference.py it is the same file; a switch before the roles are known, and after."""
    settings = (*policy, f"global_sink={global_sink}", "seed=5", "num_output_frames=18")
    pipeline = pipeline_of(*settings)
    with pipeline.session() as session:
        frames = take(session, 6, {0: FOX, 1: BIRD, 4: FISH})
        assert session.storyboard == [(0, FOX), (3, BIRD), (12, FISH)]
        assert session.frames_made == 18
    line = json.dumps({"prompts": [FOX, BIRD, FISH], "switch_frame_indices": [3, 12]})
    board = program.file("board.jsonl", line + "\n")
    assert interactive_inference.main(program.arguments(f"data_path={board}", *settings)) == 0
    (made,) = program.mp4s.values()
    typed = program.folder / "typed.mp4"
    with VideoWriter(typed, 48, 32) as writer:
        writer.write(frames)
    assert typed.read_bytes() == made
    assert torch.equal(pipeline.generate([(0, FOX), (3, BIRD), (12, FISH)]), frames)


def test_a_cut_that_was_typed_is_that_of_a_storyboard(
    program: Program, pipeline_of: Pipelines, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metadata has it, so that a storyboard that cuts elsewhere is seen to make another video."""
    window = ("dummy_forcing=off", "model_kwargs.local_attn_size=6", "model_kwargs.sink_size=1", "rope=relative")
    settings = (*window, "kv_flush=true", "num_output_frames=15", "vae_tile=never", "low_memory=false")
    pipeline = pipeline_of(*settings)
    made = []
    for cut in (True, False):
        with pipeline.session() as session:
            frames = [take(session, 1, {0: FOX})]
            with pytest.raises(InputError, match="comes before the window of 6 frames is full"):
                session.prompt(BIRD, cut=True)
            frames.append(take(session, 1, {0: BIRD}))
            session.prompt(FISH, cut=cut)
            frames.append(take(session, 3, {}))
            assert session.cuts == [6] * cut
        made.append(torch.cat(frames))
    assert not torch.equal(made[0], made[1])
    line = {"prompts": [FOX, BIRD, FISH], "switch_frame_indices": [3, 6], "scene_cuts": [False, True]}
    board = program.file("board.jsonl", json.dumps(line) + "\n")
    run = program.arguments(f"data_path={board}", *settings)
    assert interactive_inference.main(run) == 0
    (video,) = program.mp4s.values()
    typed = program.folder / "typed.mp4"
    with VideoWriter(typed, 48, 32) as writer:
        writer.write(made[0])
    assert typed.read_bytes() == video
    (metadata,) = program.videos.glob("*.json")
    assert json.loads(metadata.read_text())["scene_cuts"] == [6]
    program.file("board.jsonl", json.dumps({**line, "scene_cuts": [False, False]}) + "\n")
    capsys.readouterr()
    assert interactive_inference.main(run) == 0
    assert "although it was made with other scene_cuts;" in capsys.readouterr().out


def test_a_whole_video_is_that_of_the_scripts(program: Program) -> None:
    arguments = program.arguments("inference_iter=1")
    config = load_config(arguments[1], arguments[2:])
    program.videos.mkdir()
    pipeline = Pipeline.from_config(config)
    (job,) = read_jobs(config)
    write_videos(pipeline, [job], lambda _: None)
    again = program.folder / "again.mp4"
    with VideoWriter(again, 48, 32) as writer:
        writer.write(pipeline.generate(FOX))
    assert again.read_bytes() == job.path.read_bytes()


@pytest.mark.parametrize("policy", [WINDOW, PACKED], ids=["window", "packed"])
def test_sessions_do_not_know_of_each_other(pipeline_of: Pipelines, policy: Sequence[str]) -> None:
    """In turns and from threads, with prompts and roles of their own: the bits that each has alone."""
    pipeline = pipeline_of(*policy)
    scripts = {1: {0: FOX, 2: BIRD}, 2: {0: FISH, 1: FOX, 4: BIRD}}
    alone = {}
    for seed, prompts in scripts.items():
        with pipeline.session(seed=seed) as session:
            alone[seed] = take(session, 5, prompts)
    with pipeline.session(seed=1) as one, pipeline.session(seed=2) as other:
        turns: dict[int, list[torch.Tensor]] = {1: [], 2: []}
        for index in range(5):
            for seed, session in ((1, one), (2, other)):
                if index in scripts[seed]:
                    session.prompt(scripts[seed][index])
                turns[seed].append(next(session).frames)
    threaded = {}

    def run(seed: int) -> None:
        with pipeline.session(seed=seed) as session:
            threaded[seed] = take(session, 5, scripts[seed])

    threads = [threading.Thread(target=run, args=(seed,)) for seed in scripts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in scripts:
        assert torch.equal(torch.cat(turns[seed]), alone[seed])
        assert torch.equal(threaded[seed], alone[seed])


def test_sessions_may_have_policies_of_their_own(pipeline_of: Pipelines) -> None:
    """Different policies, prompts and lengths of the same model, block by block: the bytes of each alone."""
    pipeline = pipeline_of(*PACKED)
    prune = ("dummy_forcing.policy=prune", "dummy_forcing.num_dummy=5")
    kinds = {"packed": (), "window": ("dummy_forcing=off",), "prune": prune}
    script = {0: FOX, 1: BIRD, 4: FISH}
    alone = {}
    for name, overrides in kinds.items():
        with pipeline.session(seed=3, overrides=overrides) as session:
            alone[name] = take(session, 5, script)
    assert not torch.equal(alone["packed"], alone["window"]) and not torch.equal(alone["packed"], alone["prune"])
    sessions = {name: pipeline.session(seed=3, overrides=overrides) for name, overrides in kinds.items()}
    made: dict[str, list[torch.Tensor]] = {name: [] for name in kinds}
    for index in range(5):
        for name, session in sessions.items():
            if index in script:
                session.prompt(script[index])
            made[name].append(next(session).frames)
    for name, session in sessions.items():
        session.close()
        assert torch.equal(torch.cat(made[name]), alone[name])
    with pytest.raises(InputError, match="resolution: a session cannot have its own"):
        pipeline.session(overrides=["resolution=480"])


def test_a_session_without_end_keeps_to_its_memory(pipeline_of: Pipelines) -> None:
    pipeline = pipeline_of(*WINDOW)
    with pipeline.session() as session:
        session.prompt(FOX)
        sizes = set()
        for block in session:
            if block.index >= 4:
                cache = session.rollout.cache
                sizes.add((cache.bytes(), cache.frames_per_head, len(session.rollout._past)))
            if block.index == 20:
                break
        assert len(sizes) == 1
        assert session.profiler.report().spans["denoise"]


def test_a_session_tells_what_its_heads_hold(pipeline_of: Pipelines) -> None:
    """In the order of the weights, before and after heads are split by their roles."""
    pipeline = pipeline_of(*PACKED)
    with pipeline.session() as session:
        take(session, 2, {0: FOX})
        assert {head.frames for row in session.held() for head in row} == {(0, 1, 2)}
        take(session, 3, {})
        held, roles = session.held(), session.roles
        assert roles is not None and (len(held), len(held[0])) == roles.shape
        for layer, row in zip(roles.table, held, strict=True):
            for role, head in zip(layer, row, strict=True):
                kept = {Role.SINK: (1, 0), Role.NEIGHBOR: (0, 3), Role.DUMMY: (0, 1)}[role]
                assert (head.retention.sink, head.retention.recent) == kept
                assert head.frames == {Role.SINK: (0,), Role.NEIGHBOR: (9, 10, 11), Role.DUMMY: (11,)}[role]


def test_close_frees_everything(pipeline_of: Pipelines) -> None:
    pipeline = pipeline_of(*PACKED)
    session = pipeline.session()
    take(session, 3, {0: FOX})
    buffers = [weakref.ref(buffer) for layer in session.rollout.cache.layers for buffer, _ in layer._buffers]
    decoder = weakref.ref(session._decoder)
    session.close()
    session.close()  # nothing happens
    gc.collect()
    assert not [buffer for buffer in buffers if buffer() is not None]
    assert decoder() is None
    assert pipeline.vae._spare is None and pipeline.generator._spare is None
    assert list(session) == []
    with pytest.raises(InputError, match="the session is closed"):
        session.prompt(BIRD)


def test_the_last_of_several_prompts_counts(pipeline_of: Pipelines) -> None:
    pipeline = pipeline_of(*WINDOW)
    with pipeline.session() as session:
        take(session, 1, {0: FOX})
        for prompt in (BIRD, FISH, BIRD, FISH):
            session.prompt(prompt)
        assert next(session).prompt == FISH
        assert session.storyboard == [(0, FOX), (3, FISH)]


def test_a_batch_with_a_prompt_for_each(pipeline_of: Pipelines) -> None:
    pipeline = pipeline_of(*WINDOW)
    with pipeline.session(noise_seeds=[1, 2], frames=6) as session:
        session.prompt((FOX, BIRD))
        blocks = list(session)
    with pytest.raises(InputError, match="frames: the session makes 2 videos at once; use `videos`"):
        _ = blocks[0].frames
    with pytest.raises(InputError, match="seed: noise_seeds says what each video's noise is"):
        pipeline.session(seed=1, noise_seeds=[1, 2], frames=6)
    videos = torch.cat([block.videos for block in blocks], dim=1)
    assert videos.shape == (2, 21, 32, 48, 3)
    for video, seed, prompt in zip(videos, (1, 2), (FOX, BIRD), strict=True):
        with pipeline.session(noise_seeds=[seed], frames=6) as session:
            session.prompt(prompt)
            alone = torch.cat([block.frames for block in session])
        assert (video.int() - alone.int()).abs().max() <= 2  # products of a batch may round otherwise


def test_what_cannot_be_is_told(pipeline_of: Pipelines) -> None:
    pipeline = pipeline_of("model_kwargs.local_attn_size=-1")  # a switch encodes all earlier frames anew
    with pytest.raises(InputError, match=r"frames: a session without end .* set model_kwargs.local_attn_size"):
        pipeline.session()
    with pytest.raises(InputError, match="frames: 4 is no positive multiple of the block's 3 latent frames"):
        pipeline.session(frames=4)
    with pipeline.session(frames=6) as session:
        with pytest.raises(InputError, match="the session has none yet"):
            next(session)
        for empty in ("", " \n"):
            with pytest.raises(InputError, match="prompt must be a text that is not blank"):
                session.prompt(empty)
        with pytest.raises(InputError, match="prompt: 2 prompts for 1 videos"):
            session.prompt((FOX, BIRD))
        assert len(take(session, 2, {0: FOX})) == 21  # and nothing is broken


def test_the_text_encoder_comes_and_goes(program: Program) -> None:
    arguments = program.arguments(*WINDOW)
    for low_memory, stays in (("auto", True), ("true", False)):
        pipeline = Pipeline.from_config(arguments[1], [*arguments[2:], f"low_memory={low_memory}"], prompts=[FOX])
        prompts = pipeline.prompts
        assert prompts._encoder is None  # type: ignore[attr-defined]
        with pipeline.session() as session:
            take(session, 1, {0: FOX})
            assert prompts._encoder is None  # type: ignore[attr-defined]  # the prompt was known
            session.prompt(BIRD)
            assert (prompts._encoder is not None) == stays  # type: ignore[attr-defined]
        pipeline.close()
        assert prompts._encoder is None  # type: ignore[attr-defined]


def test_a_batch_is_filled_up_to_what_the_engine_is_ready_for(pipeline_of: Pipelines) -> None:
    """And nobody gets what fills it up, nor do roles come from it."""
    with pipeline_of() as pipeline:
        made = []
        for pipeline.batch in (1, 4):
            with pipeline.session(noise_seeds=[5, 6], frames=9, live=False) as session:
                session.plan([(0, ("A red fox runs.", "A blue bird sings."))])
                blocks = list(session)
                assert session.rollout.cache._shape.batch == max(pipeline.batch, 2)
            assert all(len(block.videos) == len(block.latents) == 2 for block in blocks)
            made.append((torch.cat([block.latents for block in blocks], dim=1), session.roles))
    torch.testing.assert_close(made[1][0], made[0][0], atol=1e-4, rtol=1e-4)
    assert made[0][1] is not None and made[1][1] == made[0][1]
