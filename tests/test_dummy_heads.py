"""Observation, roles, policies and TeaCache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dummy.budget import DummyBudget
from dummy.config import DummyForcingConfig
from dummy.frame_attention import FrameAttention, sampled
from dummy.policies.registry import policy_from_config
from dummy.roles import HeadRoles, Role
from dummy.teacache import computed_steps
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from tests.test_generator import SCHEDULE, start
from tests.tiny import tiny_model
from utils.errors import InputError
from utils.memory import PeakTracker
from wan.attention.head_group import FULL_HISTORY, Retention
from wan.config import ModelKwargs

TOKENS = 4


def observed(
    share: float, piece_bytes: int = 1 << 20, frames: tuple[int, ...] = (5, 0, 3, 4)
) -> tuple[FrameAttention, Tensor]:
    """An observer after one layer, and the mean softmax attention [heads, frames] over all queries."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 12, 3, 8, generator=generator)
    keys = torch.randn(2, (3 + len(frames)) * TOKENS, 3, 8, generator=generator)
    observer = FrameAttention(TOKENS, share, piece_bytes)
    observer(0, q, keys, frames)
    scores = torch.einsum("blhd,bshd->bhls", q.double(), keys.double()) * 8**-0.5
    by_frame = scores.softmax(-1).unflatten(-1, (-1, TOKENS)).sum(-1)
    return observer, by_frame.mean(dim=(0, 2))


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
def test_frame_attention_is_the_mean_of_the_softmax_by_frame(piece_bytes: int) -> None:
    observer, mass = observed(1.0, piece_bytes)
    regions = observer.regions(sink_frames=1)
    # Kept frames stand in slots 3 to 6 as 5, 0, 3, 4: the sink is frame 0.
    expected = torch.stack((mass[:, 4], mass[:, 3] + mass[:, 5] + mass[:, 6], mass[:, :3].sum(-1)), -1)
    torch.testing.assert_close(regions[0].double(), expected, atol=1e-6, rtol=1e-5)
    assert regions.sum(-1).numpy() == pytest.approx(1)


def test_sink_frames_are_the_oldest() -> None:
    observer, mass = observed(1.0)
    assert observer.regions(sink_frames=3)[0, :, 1].tolist() == pytest.approx(mass[:, 3].tolist(), abs=1e-6)


def test_sampled_queries_are_fixed_and_even() -> None:
    torch.manual_seed(1)
    first = observed(0.25)[0].regions(1)
    torch.manual_seed(2)
    assert torch.equal(first, observed(0.25)[0].regions(1))
    assert FrameAttention(TOKENS, 0.25)._sample(12).tolist() == [2, 4, 10]
    assert FrameAttention(TOKENS, 1.0)._sample(12).tolist() == list(range(12))
    # Every fourth query of a grid with eight columns would see two of them.
    assert len(set((FrameAttention(TOKENS, 0.25)._sample(240) % 8).tolist())) == 8
    assert (FrameAttention(TOKENS, 0.25)._sample(240) // 4).tolist() == list(range(60))
    # The error depends on their number: of a large block no more than are needed, unless all are asked for.
    assert [sampled(4680, share) for share in (0.01, 0.25, 1.0)] == [47, 256, 4680]
    assert FrameAttention(TOKENS, 0.25)._sample(4680).diff().max() < 40
    assert not torch.allclose(first, observed(1.0)[0].regions(1))


def test_memory_of_the_scores_is_bounded_at_1080p() -> None:
    """24,480 queries and 57,120 keys of 12 heads would be 62 GiB of scores at once."""
    tokens = 8160
    q = torch.empty(1, 3 * tokens, 12, 128, device="meta", dtype=torch.bfloat16)
    keys = torch.empty(1, 7 * tokens, 12, 128, device="meta", dtype=torch.bfloat16)
    with PeakTracker() as tracker:
        FrameAttention(tokens, 0.25, with_entropy=True)(0, q, keys, [0, 1, 2, 3])
    assert tracker.peak < 1.3 * (1 << 30)


@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_entropy_is_that_of_the_softmax(piece_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(2, length * TOKENS, 3, 8, generator=generator) for length in (3, 7))
    observer = FrameAttention(TOKENS, 1.0, piece_bytes, with_entropy=True)
    observer(0, q, keys, [5, 0, 3, 4])
    shares = (torch.einsum("blhd,bshd->bhls", q.double(), keys.double()) * 8**-0.5).softmax(-1)
    expected = -(shares * shares.log()).sum(-1).mean(dim=(0, 2))
    torch.testing.assert_close(observer.entropy()[0].double(), expected, atol=1e-5, rtol=1e-5)
    # Recording it changes nothing else.
    plain = FrameAttention(TOKENS, 1.0, piece_bytes)
    plain(0, q, keys, [5, 0, 3, 4])
    assert torch.equal(plain.by_frame(), observer.by_frame())


def test_frames_come_oldest_first_and_the_block_last() -> None:
    observer, mass = observed(1.0)
    expected = torch.stack((mass[:, 4], mass[:, 5], mass[:, 6], mass[:, 3], mass[:, :3].sum(-1)), -1)  # 0, 3, 4, 5, own
    torch.testing.assert_close(observer.by_frame()[0].double(), expected, atol=1e-6, rtol=1e-5)


def test_roles_follow_the_normalised_shares() -> None:
    attention = torch.tensor([[[0.4, 0.1, 0.5], [0.1, 0.6, 0.3]], [[0.05, 0.05, 0.9], [0.02, 0.3, 0.68]]])
    # sink / 0.57: .70 .18 .09 .04; neighbour / 1.05: .10 .57 .05 .29
    assert HeadRoles.from_frame_attention(attention, DummyBudget(1)).codes() == [[0, 1], [2, 1]]
    assert HeadRoles.from_frame_attention(attention, DummyBudget(2)).codes() == [[0, 1], [2, 2]]
    assert HeadRoles.from_frame_attention(attention, DummyBudget(0)).codes() == [[0, 1], [0, 1]]
    assert HeadRoles.from_frame_attention(attention, DummyBudget(4)).codes() == [[2, 2], [2, 2]]


def test_ties_go_by_layer_and_head() -> None:
    attention = torch.full((2, 3, 3), 1 / 3)
    assert HeadRoles.from_frame_attention(attention, DummyBudget(4)).codes() == [[2, 2, 2], [2, 0, 0]]


def test_roles_survive_a_file(tmp_path: Path) -> None:
    roles = HeadRoles.from_codes([[0, 1, 2], [2, 2, 1]])
    path = tmp_path / "roles.json"
    for content in (roles.to_json(), {"prompts": ["x"], "head_roles": roles.to_json()}):
        path.write_text(json.dumps(content))
        assert HeadRoles.load(path, 2, 3) == roles


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", 'has no "roles"'),
        ('{"roles": [[0, 1, 2]]}', "is for 1 layers of 3 heads, the model has 2 of 3"),
        ('{"roles": [[0, 1, 2], [0, 1]]}', "has layers of [2, 3] heads"),
        ('{"roles": [[], []]}', "has layers of [0] heads"),
        ('{"layers": 3, "roles": [[0, 1, 2], [0, 1, 2]]}', "says layers: 3, but its table has 2"),
        ('{"counts": {"dummy": 3}, "roles": [[0, 1, 2], [0, 1, 2]]}', "says counts: {'dummy': 3}, but its table"),
        ('{"roles": [[0, 1, 2], [0, 1, 3]]}', "3 is no code; codes are 0 sink, 1 neighbor, 2 dummy"),
        ('{"roles": [[0, 1, 2], [0, 1, 1.0]]}', "1.0 is no code"),
        ('{"roles": [[0, 1, 2], [0, 1, true]]}', "True is no code"),
        ('{"roles": [[0, 1, 2], [0, 1, "2"]]}', "'2' is no code"),
        ('{"roles": [[0, 1, 2], [0, 1, null]]}', "None is no code"),
        ('{"confidence": 0.5, "roles": [[0, 1, 2], [0, 1, 2]]}', "confidence is no number from 0 to 1 for each head"),
        ('{"confidence": [[1, 1, 1]], "roles": [[0, 1, 2], [0, 1, 2]]}', "confidence is no number from 0 to 1"),
        ('{"confidence": [[1, 1, 1], [1, 1, 2]], "roles": [[0, 1, 2], [0, 1, 2]]}', "confidence is no number"),
    ],
)
def test_a_roles_file_that_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "roles.json"
    path.write_text(content)
    with pytest.raises(InputError, match="dummy_forcing\\.roles") as error:
        HeadRoles.load(path, 2, 3)
    assert message in str(error.value)


def test_a_missing_roles_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such roles file"):
        HeadRoles.load(tmp_path / "none.json", 2, 3)


def test_policies_are_those_of_the_table() -> None:
    window = ModelKwargs(local_attn_size=12, sink_size=3)
    off = DummyForcingConfig(enabled=False)
    assert policy_from_config(ModelKwargs(), off, 3).initial == FULL_HISTORY
    assert policy_from_config(window, off, 3).initial == Retention(3, 6)
    packed = policy_from_config(window, DummyForcingConfig(local_context_length=2), 3)
    assert packed.initial == Retention(1, 6)
    assert packed.split is not None
    by_role = {Role.SINK: Retention(1, 0), Role.NEIGHBOR: Retention(0, 6), Role.DUMMY: Retention(0, 1)}
    assert packed.split.by_role == by_role
    prune = policy_from_config(window, DummyForcingConfig(policy="prune"), 3)
    assert prune.initial == Retention(3, 6)
    assert prune.split is not None
    assert prune.split.by_role[Role.DUMMY] == Retention(0, 0)
    assert prune.split.by_role[Role.SINK] == Retention(3, 6)


def test_sink_and_dummy_heads_share_one_attention_call() -> None:
    split = policy_from_config(ModelKwargs(), DummyForcingConfig(), 3).split
    assert split is not None
    orders, head_segments = split.layout(HeadRoles.from_codes([[1, 2, 0, 2, 1, 0]]))
    assert orders == [[2, 5, 1, 3, 0, 4]]
    assert head_segments == [[(2, Retention(1, 0)), (2, Retention(0, 1)), (2, Retention(0, 3))]]


def test_teacache_is_decided_from_the_modulations() -> None:
    steps = [torch.full((6,), value) for value in (1.0, 1.0, 1.0, 2.0)]
    assert computed_steps(steps, None) == (True, True, True, True)
    # Equal modulations: each step adds the polynomial's constant, 0.1379, until 0.2 is passed.
    assert computed_steps(steps, 0.2) == (True, False, True, True)
    assert computed_steps(steps, 1e9) == (True, False, False, False)


def test_a_batch_is_scored_as_the_mean_of_its_videos() -> None:
    settings = GeneratorSettings(SCHEDULE, policy_from_config(ModelKwargs(), DummyForcingConfig(num_dummy=6), 3))
    made = BlockGenerator(tiny_model(), settings)
    together, *alone = (start(made, *seeds) for seeds in ((8, 7), (8,), (7,)))
    for rollout in (together, *alone):
        for _ in rollout.blocks():
            pass
    mean = torch.stack([rollout.frame_attention for rollout in alone]).mean(0)
    torch.testing.assert_close(together.frame_attention, mean, atol=1e-4, rtol=1e-4)
    assert together.roles == HeadRoles.from_frame_attention(mean, DummyBudget(6))
