"""Videos that calibrate themselves: what they show in one block decides what heads keep from the next one on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dummy.calibration.candidates import CANDIDATES
from dummy.calibration.dial import Dial
from dummy.calibration.measured import Calibration, Subject
from dummy.calibration.recorder import HeadErrors
from dummy.policies.calibrated import OBSERVED_AFTER, online_policy
from dummy.policy import ContextPolicy
from dummy.retentions import RetentionTable
from pipeline import Pipeline
from pipeline.config.config import load_config
from pipeline.planning.stages import StagePlanner
from pipeline.runtime.generator import BlockGenerator, Rollout
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import generator_settings
from tests.conftest import ROOT, Program
from tests.test_generator import GEOMETRY, SCHEDULE, latents, policy, segments, start
from tests.test_together import made
from tests.thread_exchange import together
from tests.tiny import CONFIG, tiny_model
from utils.errors import InputError
from utils.seed import NoiseStream
from wan.attention.exchange import PlannedExchange
from wan.attention.head_group import FULL_HISTORY, Retention
from wan.attention.held import held_by_head
from wan.config import WAN_1_3B

SUBJECT = Subject(CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim, 4, 6, 3, 15, "")
HEADS = CONFIG.num_layers, CONFIG.num_heads


def online(frames: float = 2.5, block: int = 2, window: int | None = None) -> ContextPolicy:
    """Observed in that block, in videos of up to 24 frames."""
    nothing = torch.zeros(1, 1, *HEADS, len(CANDIDATES)), torch.zeros(1, 1, *HEADS)
    calibration = Calibration(CANDIDATES, *nothing, (0,), ("denoising",), ("its own",), SUBJECT)
    return online_policy(Dial(calibration, 21, None, window), frames, block)


def settings(policy: ContextPolicy | None = None) -> GeneratorSettings:
    return GeneratorSettings(SCHEDULE, policy or online())


def begun(policy: ContextPolicy, *seeds: int) -> Rollout:
    return start(BlockGenerator(tiny_model(), settings(policy)), *seeds)


def kept(rollout: Rollout) -> list[list[Retention]]:
    """By layer and head."""
    rows = []
    for layer in rollout.cache.layers:
        by_place = [group.retention for group in layer.groups for _ in range(*group.heads.indices(CONFIG.num_heads))]
        order = range(CONFIG.num_heads) if layer.head_order is None else layer.head_order.inverse.tolist()
        rows.append([by_place[place] for place in order])
    return rows


def test_heads_keep_what_costs_least_in_the_observed_block() -> None:
    """The same errors, measured from outside over full history; until then nothing differs from that."""
    full, policy = begun(ContextPolicy("full", FULL_HISTORY), 7), online()
    watch = HeadErrors(GEOMETRY.tokens_per_frame, CANDIDATES, BlockGenerator(tiny_model(), settings()).output_grams, 99)
    blocks = full.blocks()
    expected = [next(blocks).latents, next(blocks).latents]

    def in_denoising(layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        if len(context) == 6:  # else it is block 1's clean pass
            watch(layer, q, keys, context, values)

    with full.cache.observed(in_denoising):
        expected.append(next(blocks).latents)
    assert policy.dial is not None
    errors, outputs = watch.errors()[None, None], watch.outputs()[None, None]
    measured = replace(policy.dial.calibration, errors=errors, outputs=outputs)
    chosen = replace(policy.dial, calibration=measured).choose(2.5).table
    rollout, found = begun(policy, 7), []
    for block in rollout.blocks():
        found.append(block.latents)
        assert rollout.parting.pending == (block.index <= 2)
    assert [list(row) for row in chosen.rows] == kept(rollout)
    assert chosen.mean_frames(21) <= 2.5 and len(chosen.counts()) > 1
    expected += [block.latents for block in blocks]
    same = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
    assert same == [True, True, True, False, False]


def test_videos_decide_for_themselves_and_a_batch_by_those_that_are_meant() -> None:
    def table(*seeds: int, videos: int | None = None) -> list[list[Retention]]:
        generator = BlockGenerator(tiny_model(), settings())
        texts = segments(generator.model, (0,), len(seeds))
        rollout = generator.start(GEOMETRY, texts, NoiseStream(seeds), len(seeds), videos=videos)
        latents(rollout)
        return kept(rollout)

    alone = table(1)
    assert table(1, 9, videos=1) == alone
    assert table(1) == alone


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes_decides_alike(ranks: int) -> None:
    alone, (whole, _, _), held = made(settings(), None, starts=[0])
    results = together(ranks, lambda exchange: made(settings(), exchange, starts=[0]))
    for video, _, known in results:
        torch.testing.assert_close(video, alone, atol=1e-4, rtol=1e-4)
        assert known == held
    assert sum(numbers[0] for _, numbers, _ in results) == whole


def test_a_given_beginning_is_not_observed_but_the_block_after_it() -> None:
    generator = BlockGenerator(tiny_model(), settings(online(block=1)))
    given = torch.ones(1, 6, *GEOMETRY.block_shape[1:])
    text = segments(generator.model, (0,), 1)
    rollout = generator.start(GEOMETRY, text, NoiseStream([3]), prefix_latents=given)
    pending = {block.index: rollout.parting.pending for block in rollout.blocks()}
    assert pending == {0: True, 1: True, 2: True, 3: False, 4: False}
    assert max(one.total for row in kept(rollout) for one in row) > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_plan_of_several_processes_watches_the_heads_of_each(ranks: int) -> None:
    model = tiny_model().to("meta")
    peaks = []
    for exchange in (None, *(PlannedExchange(rank, ranks) for rank in range(ranks))):
        model.exchange = exchange
        before = StagePlanner(model, GEOMETRY, settings(online(block=1))).stages().before_split
        assert before is not None
        peaks.append(before.activations)
    assert max(peaks[1:]) < peaks[0]


@pytest.mark.parametrize("frames", [2, 12, 21])
def test_what_is_left_of_a_budget_goes_to_heads_that_keep_all_that_they_were_seen_with(frames: int) -> None:
    """Three frames tell nothing of longer memories; a budget above that, or full history, is spent all the same."""
    rollout = begun(online(frames, block=1), 1)
    latents(rollout)
    assert frames - 0.5 < RetentionTable.of(kept(rollout)).mean_frames(21) <= frames


def test_a_given_beginning_is_kept_until_heads_part() -> None:
    generator = BlockGenerator(tiny_model(), settings(online(block=1)))
    given = torch.ones(1, 9, *GEOMETRY.block_shape[1:])
    text = segments(generator.model, (0,), 1)
    rollout = generator.start(GEOMETRY, text, NoiseStream([3]), prefix_latents=given)
    frames = [sorted(held_by_head(rollout.cache)[0][0].frames) for block in rollout.blocks() if block.index == 3]
    assert frames == [list(range(9))]


@pytest.mark.parametrize(("kind", "parted_after"), [("online", 2), ("roles", 1)])
def test_what_an_early_switch_lets_be_observed(kind: str, parted_after: int) -> None:
    """Roles in the new prompt's first clean pass, before `ar_start` too; errors not before there is enough to see."""
    split = policy("packed", None).split
    assert split is not None
    roles = replace(policy("packed", None), split=replace(split, ar_start=2))
    early = replace(settings(online(block=2) if kind == "online" else roles), window=9, reclassify_on_switch=True)
    generator = BlockGenerator(tiny_model(), early)
    rollout = generator.start(GEOMETRY, segments(generator.model, (0, 3), 1), NoiseStream([3]))
    pending = {block.index: rollout.parting.pending for block in rollout.blocks()}
    assert [index for index, still in pending.items() if still] == list(range(parted_after + 1))


def test_a_switch_observes_again_where_that_is_asked_for() -> None:
    again = replace(settings(online(block=1)), window=9, reclassify_on_switch=True)
    generator = BlockGenerator(tiny_model(), again)
    rollout = generator.start(GEOMETRY, segments(generator.model, (0, 9), 1), NoiseStream([3]))
    pending = [rollout.parting.pending for _ in rollout.blocks()]
    assert pending == [True, True, False, True, False]


def test_a_session_without_end_has_flat_memory() -> None:
    given = ["enabled=true", "policy=calibrated", "calibration=online", "frames_per_head=2"]
    settings = [f"dummy_forcing.{one}" for one in given]
    with Pipeline.from_config("configs/shapes_studio.yaml", settings) as pipeline, pipeline.session(seed=1) as session:
        session.prompt("A large red ball moves from left to right.")
        held = []
        for block in session:
            held.append(sum(len(head.frames) for row in session.held() for head in row))
            if block.index == 8:
                break
    assert max(held) == 7 * 24 and 40 <= held[5] <= 48 and held[5:] == [held[5]] * 4


BAD = {
    ("num_output_frames=12",): "calibration: online sees heads' errors in block 3 .* num_output_frames=15 or more",
    ("dummy_forcing.options={observed_after: 0}",): "options.observed_after: must be 1 or more",
    ("dummy_forcing.options={after: 3}",): "options.*after",
    ("dummy_forcing.frames_per_head=400",): "frames_per_head: 400 is more than there is",
    ("dummy_forcing.calibration=c.safetensors", "dummy_forcing.options={observed_after: 3}"): "observed_after: a cali",
    ("rolling={max_attention: 21}",): "calibration: online sees the errors of a block that is denoised alone",
    ("dummy_forcing.policy=packed",): "calibration: policy packed would ignore it",
}


@pytest.mark.parametrize(("change", "message"), BAD.items())
def test_what_cannot_be_is_refused(change: tuple[str, ...], message: str) -> None:
    given = ["dummy_forcing.policy=calibrated", "dummy_forcing.calibration=online", "dummy_forcing.frames_per_head=2"]
    with pytest.raises(InputError, match=message):
        generator_settings(load_config(ROOT / "configs" / "self_forcing_inference.yaml", [*given, *change]), WAN_1_3B)


def test_the_program_needs_no_file(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["policy=calibrated", "calibration=online", "frames_per_head=1", "options={observed_after: 3}"]
    settings = [*(f"dummy_forcing.{one}" for one in given), "inference_iter=1", "num_output_frames=12"]
    assert program(*settings, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "blocks 0 to 1" in said and "by the errors in block 1; the run finds it out" in said
    assert program(*settings) == 0 and len(program.mp4s) == 1
    assert OBSERVED_AFTER == 9
