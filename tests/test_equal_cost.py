"""Long context at the cost of a dense setting: by counting, and by a measured speed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import pytest
import torch

from dummy.config import DummyForcingConfig
from dummy.equal_cost import EqualCost, mean_frames
from dummy.policies.registry import policy_from_config
from dummy.roles import HeadRoles, Role
from pipeline.assembly import assemble
from pipeline.config.config import check_against_model, load_config
from pipeline.planning import plan
from pipeline.planning.cost import block_operations, cost_lines, kept_frames
from pipeline.planning.plan import planner_for
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import generator_settings
from pipeline.runtime.speed import at_speed, block_seconds, frames_in_time
from tests.conftest import ROOT, Program
from tests.test_generator import SCHEDULE, start
from tests.tiny import tiny_model
from utils.errors import InputError
from wan.attention.head_group import UNBOUNDED, Retention
from wan.config import WAN_1_3B, ModelKwargs
from wan.geometry import LatentGeometry

CPU = torch.device("cpu")
LONG = ROOT / "configs" / "longlive_long_context.yaml"
WINDOW = ModelKwargs(local_attn_size=12, sink_size=3)
PAPER = {Role.SINK: Retention(1, 0), Role.NEIGHBOR: Retention(0, 3), Role.DUMMY: Retention(0, 1)}


def test_the_paper_s_long_context() -> None:
    """36 cached pixel frames (9 latent ones) to about 237 (60), with few neighbour heads at an unchanged cost."""
    counts = {Role.SINK: 131, Role.NEIGHBOR: 49, Role.DUMMY: 180}
    by_role = EqualCost(9).fit(PAPER, counts)
    assert by_role[Role.NEIGHBOR] == Retention(0, 59)
    assert by_role[Role.SINK] == PAPER[Role.SINK] and by_role[Role.DUMMY] == PAPER[Role.DUMMY]


@pytest.mark.parametrize("counts", [(90, 90, 180), (10, 350, 0), (1, 1, 358), (60, 120, 180)])
@pytest.mark.parametrize("neighbor_sink", [0, 1])
def test_the_cost_is_met_from_below(counts: tuple[int, int, int], neighbor_sink: int) -> None:
    heads = dict(zip(Role, counts, strict=True))
    by_role = EqualCost(9).fit({**PAPER, Role.NEIGHBOR: Retention(neighbor_sink, 3)}, heads)
    kept = mean_frames(by_role, heads)
    assert kept <= 9 < kept + counts[1] / sum(counts)
    assert by_role[Role.NEIGHBOR].sink == neighbor_sink


def test_no_neighbors_and_no_room_and_no_bound() -> None:
    none = {Role.SINK: 4, Role.NEIGHBOR: 0, Role.DUMMY: 4}
    assert EqualCost(9).fit(PAPER, none) == PAPER
    some = {Role.SINK: 4, Role.NEIGHBOR: 4, Role.DUMMY: 4}
    assert EqualCost(0.1).fit(PAPER, some)[Role.NEIGHBOR] == Retention(0, 0)
    assert EqualCost(UNBOUNDED).fit(PAPER, some)[Role.NEIGHBOR] == Retention(0, UNBOUNDED)


def test_counted_operations_are_those_of_the_window() -> None:
    config = load_config(LONG)
    policy = generator_settings(config, WAN_1_3B).policy
    dense = policy_from_config(WINDOW, DummyForcingConfig(enabled=False), 3)
    geometry = LatentGeometry(60, 104, 240, 3)
    costs = [block_operations(WAN_1_3B, geometry, kept_frames(p, WAN_1_3B, 200)[0], 4) for p in (policy, dense)]
    assert costs[0] == pytest.approx(costs[1], rel=0.02) and costs[0] <= costs[1]
    paper = generator_settings(load_config(LONG, ["dummy_forcing.equal_cost=null"]), WAN_1_3B).policy
    (kept,) = kept_frames(paper, WAN_1_3B, 200)
    assert block_operations(WAN_1_3B, geometry, kept, 4) / 1e12 == pytest.approx(90.5, rel=0.01)
    (line, *_) = cost_lines(config, policy, WAN_1_3B, geometry)
    assert "9.00 earlier frames a head on average, 141 TFLOP a block, 100 % of that without" in line


def test_neighbor_heads_keep_what_their_number_allows() -> None:
    """In a whole run: the number of neighbour heads is known only when they are observed."""
    settings = DummyForcingConfig(num_dummy=8, equal_cost="window", score_query_share=1.0)
    policy = policy_from_config(ModelKwargs(local_attn_size=9, sink_size=1), settings, 3)
    geometry = LatentGeometry(4, 6, 45, 3)
    rollout = start(BlockGenerator(tiny_model(), GeneratorSettings(SCHEDULE, policy)), 7, geometry=geometry)
    for _ in rollout.blocks():
        pass
    assert rollout.roles is not None and policy.split is not None
    counts = rollout.roles.counts()
    wanted = policy.split.retentions(rollout.roles)[Role.NEIGHBOR].recent
    assert counts[Role.NEIGHBOR] and wanted == (12 * 6 - 8 - counts[Role.SINK]) // counts[Role.NEIGHBOR]
    groups = [group for layer in rollout.cache.layers for group in layer.groups]
    assert max(len(group.frames) for group in groups) == min(wanted, 42)
    kept = sum(len(group.frames) * (group.heads.stop - group.heads.start) for group in groups)
    assert kept <= 6 * 12


def test_until_the_split_all_heads_keep_what_there_is() -> None:
    settings = DummyForcingConfig(ar_start=2, equal_cost="window")
    assert policy_from_config(WINDOW, settings, 3).initial == Retention(1, 9)
    assert policy_from_config(WINDOW, DummyForcingConfig(ar_start=2), 3).initial == Retention(1, 3)


def test_frames_in_a_given_time() -> None:
    assert frames_in_time(2.0, (3, 0.5), (12, 1.4)) == pytest.approx(18.0)
    assert frames_in_time(0.1, (3, 0.5), (12, 1.4)) < 0
    assert frames_in_time(2.0, (3, 0.5), (12, 0.4)) == UNBOUNDED
    assert frames_in_time(0.1, (3, 0.5), (12, 0.4)) < 0


def test_a_measured_speed_sets_the_frames(caplog: pytest.LogCaptureFixture) -> None:
    settings = GeneratorSettings(SCHEDULE, policy_from_config(ModelKwargs(), DummyForcingConfig(num_dummy=6), 3))
    made = BlockGenerator(tiny_model(), settings)
    geometry = LatentGeometry(8, 12, 30, 3)
    assert block_seconds(made, geometry, 3) > 0
    with caplog.at_level(logging.INFO):
        fitted = at_speed(made, geometry, 1e-3)  # 12000 s a block
    split = fitted.policy.split
    assert split is not None and split.equal_cost is not None and split.equal_cost.frames == 27  # all there are
    assert "earlier frames a head" in caplog.text
    with pytest.raises(InputError, match="equal_cost: 1e\\+09 pixel frames a second cannot be had here"):
        at_speed(made, geometry, 1e9)


def test_a_speed_in_a_whole_run(program: Program) -> None:
    assert program("num_output_frames=15", "inference_iter=1", "dummy_forcing.equal_cost=0.01") == 0
    assert len(program.mp4s) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model_kwargs.local_attn_size=-1"], "equal_cost: window is the cost of model_kwargs.local_attn_size"),
        (["dummy_forcing.equal_cost=0"], "equal_cost: must be full, window, or a speed above 0"),
        (["dummy_forcing.equal_cost=windows"], "equal_cost: expected one of full, window or a number or null"),
        (["dummy_forcing.policy=prune"], "equal_cost: policy prune would ignore it"),
    ],
)
def test_costs_that_make_no_sense_are_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(LONG, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("overrides", [["num_dummy=1.0"], ["num_dummy=360"], ["num_dummy=auto", "max_loss=1"]])
def test_a_cost_that_no_head_takes_is_refused(overrides: Sequence[str]) -> None:
    config = load_config(LONG, [f"dummy_forcing.{override}" for override in overrides])
    with pytest.raises(InputError, match=r"equal_cost: window gives .* but all 360 heads are dummy with num_dummy"):
        check_against_model(config, WAN_1_3B)


def test_given_roles_without_neighbors_take_no_equal_cost(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    roles = program.file("roles.json", json.dumps({"roles": [[0, 2, 0, 2]] * 3}))
    arguments = [f"dummy_forcing.roles={roles}", "dummy_forcing.equal_cost=full", "num_output_frames=15"]
    assert program(*arguments) == 2
    assert f"but in dummy_forcing.roles {roles} no head is one" in capsys.readouterr().err


def test_decoding_is_planned_for_the_cache_that_a_speed_allows(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has room for the fastest way only beside the smaller cache that neighbour heads have anyway."""
    slow = ["dummy_forcing.equal_cost=0.01", "num_output_frames=60", "vae_tile=auto", "low_memory=auto"]
    arguments = program.arguments(*slow, "resolution=[64,64]", "dummy_forcing.num_dummy=2", prompts=["A fox."])
    config = load_config(arguments[1], arguments[2:])
    planner = planner_for(config, CPU)
    plain = planner.memory(config, generator_settings(config, planner.sizes))
    monkeypatch.setattr(plan, "memory_of", lambda device: int(plain.peak / (1 - plan.RESERVE)) + 1)
    pipeline = assemble(config, ["A fox."], CPU)
    fitted = planner.memory(config, pipeline.generator.settings)
    assert fitted.cache.total > plain.cache.total and fitted.peak > plain.peak
    assert planner.strategy(config, generator_settings(config, planner.sizes), plan.memory_of(CPU)) != pipeline.strategy
    assert pipeline.strategy == planner.strategy(config, pipeline.generator.settings, plan.memory_of(CPU))


def test_given_roles_set_the_frames_from_the_first_block_on() -> None:
    roles = HeadRoles.from_codes([[2, 0, 1, 2], [0, 2, 2, 1], [2, 2, 1, 0]])  # 6 dummy, 3 sink, 3 neighbour
    settings = DummyForcingConfig(num_dummy=6, equal_cost="window")
    policy = policy_from_config(ModelKwargs(local_attn_size=9, sink_size=1), settings, 3, roles)
    rollout = start(BlockGenerator(tiny_model(), GeneratorSettings(SCHEDULE, policy)), 7)
    kept = {group.retention for layer in rollout.cache.layers for group in layer.groups}
    assert kept == {Retention(1, 0), Retention(0, 1), Retention(0, (12 * 6 - 9) // 3)}


def test_roles_that_are_found_anew_set_the_frames_anew() -> None:
    settings = DummyForcingConfig(num_dummy=6, equal_cost="window", score_query_share=1.0)
    policy = policy_from_config(ModelKwargs(local_attn_size=9, sink_size=1), settings, 3)
    loop = GeneratorSettings(SCHEDULE, policy, window=9, reclassify_on_switch=True)
    geometry = LatentGeometry(4, 6, 24, 3)
    rollout = start(BlockGenerator(tiny_model(), loop), 7, geometry=geometry, starts=(0, 12))
    seen = []
    for _ in rollout.blocks():
        groups = [group for layer in rollout.cache.layers for group in layer.groups]
        seen.append((len(groups), max(group.retention.recent for group in groups)))
    assert seen[4] == (3, 6)  # alike again at the switch, with room for all that is there when roles are found
    assert policy.split is not None and rollout.roles is not None
    assert seen[-1][1] == policy.split.retentions(rollout.roles)[Role.NEIGHBOR].recent


def test_the_long_context_configuration_makes_a_video(program: Program) -> None:
    given = ["num_output_frames=15", "inference_iter=1", "lora_ckpt=null", "generator_ckpt=null"]
    assert program(*given, config="longlive_long_context") == 0
    assert len(program.mp4s) == 1
