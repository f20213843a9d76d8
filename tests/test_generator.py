"""The loop: what it reads, what it keeps, and that a video depends on its own seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dummy.config import DummyForcingConfig
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy, HeadSplit
from dummy.roles import HeadRoles, Role
from pipeline.runtime.generator import BlockGenerator, Rollout
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.schedule import DenoisingSchedule
from tests.tiny import random_embeds, segments, tiny_model
from utils.meta_results import result_of
from utils.seed import NoiseStream
from wan.config import ModelKwargs
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

SCHEDULE = DenoisingSchedule.build([1000, 750, 500, 250], 5.0, warp=True)
GEOMETRY = LatentGeometry(4, 6, 15, 3)
ROLES = HeadRoles.from_codes([[2, 0, 1, 2], [0, 2, 2, 1], [2, 2, 1, 0]])


def policy(kind: str, roles: HeadRoles | None = None, **dummy: object) -> ContextPolicy:
    enabled = kind in ("packed", "prune")
    settings = {"num_dummy": 6, "score_query_share": 1.0, "ar_start": 1, **dummy}
    config = DummyForcingConfig(enabled, kind if enabled else "packed", **settings)
    return policy_from_config(ModelKwargs(9 if kind == "window" else -1, sink_size=3), config, 3, roles)


def generator(model: CausalWanModel, kind: str, roles: HeadRoles | None = None, **settings: object) -> BlockGenerator:
    return BlockGenerator(model, GeneratorSettings(SCHEDULE, policy(kind, roles), **settings))


def start(
    made: BlockGenerator, *seeds: int, geometry: LatentGeometry = GEOMETRY, starts: tuple[int, ...] = (0,)
) -> Rollout:
    return made.start(geometry, segments(made.model, starts, len(seeds)), NoiseStream(seeds), len(seeds))


def latents(rollout: Rollout) -> Tensor:
    return torch.cat([block.latents for block in rollout.blocks()], dim=1)


class NoHostReads(TorchDispatchMode):
    """Raises where a value of a tensor would travel to the host, as .item(), bool(tensor) and nonzero do."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} reads a value in the loop"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["full", "window", "prune", "packed"])
def test_the_loop_reads_no_value_from_the_device(kind: str) -> None:
    roles = ROLES if kind in ("prune", "packed") else None
    rollout = start(generator(tiny_model(), kind, roles), 1)
    with NoHostReads():
        assert latents(rollout).shape == (1, 15, 16, 4, 6)


def test_the_forbidden_reads_are_noticed() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        torch.ones(1).item()


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "reordered"), [("window", 0), ("packed", 4 * 3 * 4 + 2 * 4 + 2)])
def test_steady_blocks_concatenate_nothing_and_move_only_what_is_reordered(kind: str, reordered: int) -> None:
    """Where heads keep differently much, q, k, v and the result of 3 layers in 4 steps, and of all but the last layer
    in the clean pass, change their order; of the last layer k and v do."""
    rollout = start(generator(tiny_model(), kind), 1, geometry=replace(GEOMETRY, num_frames=21))
    blocks = rollout.blocks()
    for _ in range(5):
        next(blocks)
    with Operators() as seen:
        next(blocks)
    assert seen.names.count("linear") > 80
    assert not {"gather", "scatter", "index_select", "index_put", "index_put_", "index_copy_", "roll"} & set(seen.names)
    assert seen.names.count("index") == reordered
    # The one concatenation is the block's position table, three axes of angles side by side.
    assert seen.names.count("cat") == 1


@pytest.mark.parametrize("kind", ["full", "window", "prune", "packed"])
def test_same_bytes_first_last_alone_and_in_a_batch(kind: str) -> None:
    model = tiny_model()
    made = generator(model, kind, ROLES if kind in ("prune", "packed") else None)
    first = latents(start(made, 7))
    latents(start(made, 8))
    again = latents(start(made, 7))
    assert torch.equal(first, again)
    assert torch.equal(first, latents(start(generator(tiny_model(), kind, made.settings.policy.split and ROLES), 7)))
    both = latents(start(made, 8, 7))
    torch.testing.assert_close(both[1:], first, atol=1e-4, rtol=1e-4)  # products of a batch may round otherwise


def test_observed_roles_do_not_depend_on_earlier_videos_nor_on_the_global_generator() -> None:
    made = BlockGenerator(tiny_model(), GeneratorSettings(SCHEDULE, policy("packed", score_query_share=0.25)))
    one = start(made, 7)
    first = latents(one)
    torch.manual_seed(123)
    latents(start(made, 9))
    other = start(made, 7)
    assert torch.equal(latents(other), first)
    assert one.roles is not None and one.roles == other.roles
    assert one.roles.counts()[Role.DUMMY] == 6


def test_two_videos_may_be_made_in_turns() -> None:
    made = generator(tiny_model(), "packed")
    alone = latents(start(made, 7))
    turns: list[Iterator[object]] = []
    parts: list[Tensor] = []
    one, other = start(made, 7).blocks(), start(made, 8).blocks()
    turns.extend([one, other])
    for block in one:
        parts.append(block.latents)
        next(other)
    assert torch.equal(torch.cat(parts, dim=1), alone)


def test_a_longer_video_begins_like_a_shorter_one() -> None:
    made = generator(tiny_model(), "packed")
    short = latents(start(made, 7))
    long = latents(start(made, 7, geometry=replace(GEOMETRY, num_frames=24)))
    torch.testing.assert_close(long[:, :15], short, atol=1e-6, rtol=1e-6)


def test_given_roles_hold_from_the_first_block_and_save_the_observation() -> None:
    made = generator(tiny_model(), "packed", ROLES)
    rollout = start(made, 7)
    assert len(rollout.cache.layers[0].groups) == 3
    latents(rollout)
    assert rollout.frame_attention is None
    assert rollout.roles == ROLES


def test_a_block_is_yielded_before_its_clean_pass_and_the_last_has_none() -> None:
    rollout = start(generator(tiny_model(), "window"), 1)
    counts = [rollout.forwards for _ in rollout.blocks()]
    assert counts == [4, 9, 14, 19, 24]
    assert rollout.forwards == 24


def test_context_noise_writes_the_cache() -> None:
    plain, noisy = (latents(start(generator(tiny_model(), "full", context_noise=c), 1)) for c in (0.0, 100.0))
    assert torch.equal(plain[:, :3], noisy[:, :3])
    assert not torch.allclose(plain[:, 3:], noisy[:, 3:], atol=1e-3)


@pytest.mark.parametrize("global_sink", [False, True])
@pytest.mark.parametrize("kind", ["full", "window", "prune", "packed"])
@pytest.mark.parametrize("switch", [3, 4, 9])  # before the roles exist, between blocks, and after
def test_a_prompt_switch_changes_what_follows_alone(kind: str, global_sink: bool, switch: int) -> None:
    made = generator(tiny_model(), kind, global_sink=global_sink, window=9 if kind != "full" else None)
    plain = latents(start(made, 7))
    switched = latents(start(made, 7, starts=(0, switch)))
    effect = -(-switch // 3) * 3
    assert torch.equal(plain[:, :effect], switched[:, :effect])
    assert not torch.allclose(plain[:, effect:], switched[:, effect:], atol=1e-3)


def test_roles_are_found_anew_on_request() -> None:
    made = BlockGenerator(
        tiny_model(), GeneratorSettings(SCHEDULE, policy("packed"), window=9, reclassify_on_switch=True)
    )
    rollout = start(made, 7, geometry=replace(GEOMETRY, num_frames=24), starts=(0, 12))
    found = []
    for block in rollout.blocks():
        found.append((block.index, rollout.roles, len(rollout.cache.layers[0].groups)))
    assert found[3][1] is not None
    assert found[4][1] is None  # unknown again while the new prompt's first block is made
    assert found[4][2] == 1
    assert found[5][1] is not None


def test_given_blocks_are_passed_on_and_seen_by_what_follows() -> None:
    made = generator(tiny_model(), "packed")
    plain = latents(start(made, 7))
    given = plain[:, :6] + 0.1
    rollout = made.start(GEOMETRY, segments(made.model), NoiseStream([7]), prefix_latents=given)
    going_on = latents(rollout)
    assert torch.equal(going_on[:, :6], given)
    assert going_on.shape == plain.shape
    assert rollout.forwards == 2 + 5 + 5 + 4  # two clean passes, then two whole blocks and the last
    again = made.start(GEOMETRY, segments(made.model), NoiseStream([7]), prefix_latents=plain[:, :6])
    assert not torch.allclose(latents(again)[:, 6:], going_on[:, 6:], atol=1e-3)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", ["window", "packed"])
def test_a_video_given_its_own_beginning_goes_on_as_it_did(kind: str, relative: bool) -> None:
    """Past the window too, where relative positions turn the sinks in every block, given or made."""
    geometry = replace(GEOMETRY, num_frames=24)
    made = generator(tiny_model(), kind, window=9, relative_rope=relative)
    plain = latents(start(made, 7, geometry=geometry))
    noise = NoiseStream([7])
    for _ in range(5 * len(SCHEDULE)):  # what the five given blocks would have drawn
        noise.normal(geometry.block_shape)
    rollout = made.start(geometry, segments(made.model), noise, prefix_latents=plain[:, :15])
    assert torch.equal(latents(rollout), plain)


def test_until_roles_are_known_there_is_room_for_what_there_is_by_then() -> None:
    """All heads keep the 3 frames before the block that is observed; its own join when each head has its place."""
    for kind in ("packed", "prune"):
        rollout = start(generator(tiny_model(), kind), 7, geometry=replace(GEOMETRY, num_frames=60))
        frame = 3 * 4 * 12 * 6 * 2 * 4  # layers, heads, channels, tokens, keys and values, bytes
        sizes = [rollout.cache.bytes().kept // frame for _ in rollout.blocks()]
        assert sizes[:2] == [3, 3]
        # 6 of 12 heads dummy; packed heads keep 1, 1 or 3 frames, with prune half of the heads keep all.
        assert sizes[2] == (1 if kind == "packed" else 57 // 2)


def test_what_fills_a_batch_up_has_no_part_in_the_videos() -> None:
    """Nor in the roles that they share, whatever it is."""
    made = generator(tiny_model(), "packed")
    alone = start(made, 7, 8)
    expected = latents(alone)
    text, noise = segments(made.model, batch=4), NoiseStream((7, 8, 9, 9))
    filled = made.start(GEOMETRY, text, noise, 4, videos=2)
    torch.testing.assert_close(latents(filled)[:2], expected, atol=1e-4, rtol=1e-4)
    assert filled.roles == alone.roles
    torch.testing.assert_close(filled.frame_attention, alone.frame_attention)


class _NoBlockingCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = result_of(func, args, kwargs)
        name = func.overloadpacket.__name__
        if name in ("to", "_to_copy", "copy_"):  # in inference mode `to` is not taken apart
            names = (argument.name for argument in func._schema.arguments)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            source = given["src"] if name == "copy_" else given["self"]
            blocking = source.device.type == "cpu" and result.device.type == "meta" and not given.get("non_blocking")
            assert not blocking, f"{name} of {tuple(source.shape)} to a device: the host waits"
        return result


class _NoNumbersToDevices(TorchFunctionMode):
    """torch.tensor and others like it copy out of sight of a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            assert result.device.type != "meta", f"{func.__name__} on a device: the host waits"
        return result


@contextmanager
def no_blocking_copies() -> Iterator[None]:
    """Raises where numbers of the host would be copied to a device while the host waits; `meta` is the device."""
    with _NoNumbersToDevices(), _NoBlockingCopies():
        yield


class KnownSplit(HeadSplit):
    """Observes, but takes the roles from here: on `meta` there are no values to be read."""

    def find_roles(self, by_frame: Tensor) -> tuple[HeadRoles, Tensor]:
        return ROLES, by_frame


def on_meta(kind: str, roles: HeadRoles | None, attention: str, **settings: object) -> BlockGenerator:
    model = tiny_model().to("meta")
    model.use_attention(attention)  # type: ignore[arg-type]
    settings_of = GeneratorSettings(SCHEDULE, policy(kind, roles, score_query_share=0.25), **settings)  # type: ignore[arg-type]
    split = settings_of.policy.split
    if split is not None and roles is None:
        known = KnownSplit(**{field.name: getattr(split, field.name) for field in fields(split)})
        settings_of = replace(settings_of, policy=replace(settings_of.policy, split=known))
    return BlockGenerator(model, settings_of)


@pytest.mark.parametrize(
    ("kind", "roles", "settings", "attention"),
    [
        ("full", None, {}, "sdpa"),
        ("window", None, {"window": 9, "relative_rope": True}, "sdpa"),
        ("packed", ROLES, {}, "sdpa"),
        ("packed", None, {"window": 9, "relative_rope": True, "global_sink": True}, "sdpa"),
        ("prune", None, {}, "sdpa"),
        ("packed", None, {"window": 9, "reclassify_on_switch": True}, "sdpa"),
        ("full", None, {}, "varlen"),
        ("packed", None, {"window": 9, "relative_rope": True, "reclassify_on_switch": True}, "varlen"),
    ],
)
def test_nothing_in_the_loop_makes_the_host_wait_for_a_copy(
    kind: str, roles: HeadRoles | None, settings: dict[str, object], attention: str
) -> None:
    """From the first video on, with roles that are observed and prompts that change."""
    made = on_meta(kind, roles, attention, **settings)
    texts = segments(made.model, (0, 6), 2)
    with no_blocking_copies():
        for _ in range(2):
            rollout = made.start(replace(GEOMETRY, num_frames=12), texts, NoiseStream((1, 2)), 2)
            assert latents(rollout).shape == (2, 12, 16, 4, 6)
            made.model.encode_text(random_embeds(batch=2))  # as a prompt that comes while a video is made


@pytest.mark.parametrize(
    "copy",
    [
        lambda: torch.ones(3).to("meta"),
        lambda: torch.tensor([1, 2], device="meta"),
        lambda: torch.empty(3, device="meta").new_tensor([1.0]),
        lambda: torch.empty(3, device="meta").copy_(torch.ones(3)),
        lambda: torch.ones(3).to("meta", torch.float64),
    ],
)
def test_copies_that_make_the_host_wait_are_noticed(copy: Callable[[], Tensor]) -> None:
    for inference in (False, True):
        with (
            torch.inference_mode(inference),
            no_blocking_copies(),
            pytest.raises(AssertionError, match="the host waits"),
        ):
            copy()
    with no_blocking_copies():
        torch.ones(3).to("meta", non_blocking=True)
        torch.empty(3, device="meta").copy_(torch.ones(3), non_blocking=True)


@pytest.mark.parametrize("kind", ["window", "packed"])
def test_caches_serve_inside_and_outside_of_inference_mode(kind: str) -> None:
    """Whichever they were made in; with lengths as data, and roles that are found anew."""
    made = generator(tiny_model(), kind, window=9, reclassify_on_switch=kind == "packed")
    made.model.use_attention("varlen")
    videos = []
    for inside in (False, True, True, False):
        with torch.inference_mode(inside):
            videos.append(latents(start(made, 7, starts=(0, 3))))
            made._spare[2].reset(made.settings.policy.initial, 3)  # type: ignore[index]
    assert all(torch.equal(video, videos[0]) for video in videos)
