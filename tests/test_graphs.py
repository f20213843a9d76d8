"""Recorded passes compute what the model computes; when they are recorded; and that a mistake would be seen."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dummy.roles import HeadRoles
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings, Passes
from tests import conformance
from tests.graph_recorder import OperatorRecorder
from tests.test_generator import GEOMETRY, ROLES, SCHEDULE, NoHostReads, generator, latents, start
from tests.test_online import online
from tests.tiny import segments, tiny_model
from utils.seed import NoiseStream
from wan.transformer.graphs import GraphedPasses, StaticInputs
from wan.transformer.model import CausalWanModel, TextContext

VECTORS = Path(__file__).parent / "data" / "vectors"
CASES = sorted(path for path in VECTORS.glob("*.safetensors") if not path.name.endswith("_a.safetensors"))
ROLLOUTS = [path for path in CASES if path.stem not in ("text_encoder", "vae")]


@dataclass(frozen=True)
class Recording(conformance.Machine):
    """Passes are recorded and replayed on a CPU."""

    recorder: OperatorRecorder = field(default_factory=OperatorRecorder)

    def passes(self, model: CausalWanModel) -> Passes:
        return GraphedPasses(model, self.recorder)


@pytest.mark.parametrize("path", ROLLOUTS, ids=lambda path: path.stem)
def test_a_vector_from_recordings(path: Path) -> None:
    machine = Recording(torch.device("cpu"), torch.float32)
    result, expected = conformance.compute(path, machine)
    for name, difference in conformance.differences(result, expected).items():
        assert difference <= conformance.TOLERANCES.get(name, conformance.TOLERANCE), name
    assert (machine.recorder.replays > 0) == (path.stem != "rolling_window")  # which runs without


def recording(eager: BlockGenerator, **options: object) -> tuple[BlockGenerator, GraphedPasses]:
    """A generator with the same model and settings whose passes are recorded."""
    passes = GraphedPasses(eager.model, OperatorRecorder(), **options)
    return BlockGenerator(eager.model, eager.settings, passes), passes


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


SETTINGS: list[tuple[str, HeadRoles | None, dict[str, object]]] = [
    ("full", None, {}),
    ("window", None, {"window": 9}),
    ("window", None, {"window": 9, "relative_rope": True}),
    ("prune", None, {}),
    ("prune", ROLES, {}),
    ("packed", None, {}),
    ("packed", ROLES, {}),
    ("packed", ROLES, {"window": 9, "relative_rope": True, "global_sink": True}),
    ("packed", None, {"window": 9, "reclassify_on_switch": True}),
    ("packed", ROLES, {"teacache_threshold": 80.0}),
]


@pytest.mark.parametrize(("kind", "roles", "settings"), SETTINGS)
def test_videos_are_those_of_the_model(kind: str, roles: HeadRoles | None, settings: dict[str, object]) -> None:
    """One after the other, alone and in a batch, given a beginning, with prompts of their own, one or several."""
    eager = generator(tiny_model(), kind, roles, **settings)
    graphed, _ = recording(eager)
    geometry = replace(GEOMETRY, num_frames=21)
    for seeds, starts in (((1,), (0,)), ((2,), (0, 3, 12)), ((3, 4), (0, 3, 12)), ((6,), (0,)), ((5,), (0, 3, 12))):
        videos = []
        for made in (eager, graphed):
            texts = segments(made.model, starts, len(seeds))
            texts = [replace(part, text=_stirred(part.text, seeds[0])) for part in texts]
            given = torch.ones(1, 6, 16, 4, 6) if seeds == (5,) else None
            videos.append(latents(made.start(geometry, texts, NoiseStream(seeds), len(seeds), prefix_latents=given)))
        same(videos[1], videos[0])


@pytest.mark.parametrize("threshold", [None, 80.0])
def test_videos_that_calibrate_themselves_are_those_of_the_model(threshold: float | None) -> None:
    """Passes are recorded once heads have parted; steps that TeaCache leaves out are not observed."""
    eager = BlockGenerator(tiny_model(), GeneratorSettings(SCHEDULE, online(), teacache_threshold=threshold))
    graphed, passes = recording(eager)
    same(latents(start(graphed, 1)), latents(start(eager, 1)))
    assert passes.num_graphs == 2


def _stirred(text, seed: int):  # type: ignore[no-untyped-def]
    return replace(text, keys=tuple(seed * key for key in text.keys))


def test_videos_in_turns_do_not_disturb_each_other() -> None:
    eager = generator(tiny_model(), "window")
    graphed, _ = recording(eager)
    alone = [latents(start(eager, seed)) for seed in (7, 8)]
    together = zip(start(graphed, 7).blocks(), start(graphed, 8).blocks(), strict=True)
    for index, pair in enumerate(together):
        for block, whole in zip(pair, alone, strict=True):
            same(block.latents, whole[:, 3 * index : 3 * index + 3])


@pytest.mark.parametrize(
    ("kind", "roles", "short", "long", "storyboard", "again"),
    [
        ("full", None, 13, 64, 13, 0),  # two for each number of earlier frames, up to the most there may be
        ("window", None, 6, 6, 6, 0),  # 0, 3 and 6 earlier frames
        ("packed", ROLES, 4, 4, 4, 0),  # 0 earlier frames, and what the roles keep
        ("packed", None, 2, 2, 2, 2),  # after the observation, over buffers for the roles of this video
    ],
)
def test_recordings_are_few_and_none_more_for_a_second_video(
    kind: str, roles: HeadRoles | None, short: int, long: int, storyboard: int, again: int
) -> None:
    made = generator(tiny_model(), kind, roles, window=9 if kind == "window" else None)
    for frames, starts, expected in ((21, (0,), short), (102, (0,), long), (21, (0, 12), storyboard)):
        graphed, passes = recording(made)
        geometry = replace(GEOMETRY, num_frames=frames)
        latents(start(graphed, 1, geometry=geometry, starts=starts))
        assert passes.captures == expected
        latents(start(graphed, 2, geometry=geometry, starts=starts))
        assert passes.captures == expected + again
        assert passes.num_graphs == min(expected, passes.captures)


@pytest.mark.parametrize(("kind", "roles", "again"), [("full", None, 0), ("window", None, 0), ("packed", None, 2)])
def test_with_lengths_as_data_two_recordings_do(kind: str, roles: HeadRoles | None, again: int) -> None:
    """With all heads in one launch, a flow and a clean pass serve all states of a cache."""
    model = tiny_model()
    dense = generator(model, kind, roles)
    expected = [latents(start(dense, seed, starts=(0, 12))) for seed in (1, 2)]
    model.use_attention("varlen")
    graphed, passes = recording(generator(model, kind, roles))
    for seed, video in zip((1, 2), expected, strict=True):
        same(latents(start(graphed, seed, starts=(0, 12))), video)
        assert passes.captures == 2 + again * (seed - 1)


def test_recordings_go_with_the_buffers_they_work_on() -> None:
    graphed, passes = recording(generator(tiny_model(), "window"))
    latents(start(graphed, 1))
    assert passes.num_graphs == 6
    latents(start(graphed, 1, 2))
    assert (passes.num_graphs, passes.captures) == (6, 12)
    graphed._spare = None
    assert passes.num_graphs == 0


def test_beyond_the_most_recordings_passes_run_without(caplog: pytest.LogCaptureFixture) -> None:
    eager = generator(tiny_model(), "full")
    graphed, passes = recording(eager, most=3)
    with caplog.at_level(logging.INFO):
        for seed in (1, 2):
            same(latents(start(graphed, seed)), latents(start(eager, seed)))
    assert passes.captures == passes.num_graphs == 3
    assert [record.message for record in caplog.records] == [
        "engine: 3 passes are recorded, the most at once; others run without"
    ]


class NoRecorder(OperatorRecorder):
    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore that nobody reads")


def test_what_cannot_be_recorded_is_said_once_or_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    eager = generator(tiny_model(), "window")
    passes = GraphedPasses(eager.model, NoRecorder(), required=False)
    same(latents(start(BlockGenerator(eager.model, eager.settings, passes), 1)), latents(start(eager, 1)))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.endswith("cannot record them (operation not permitted when stream is capturing)")
    passes = GraphedPasses(eager.model, NoRecorder())
    with pytest.raises(RuntimeError, match="not permitted"):
        latents(start(BlockGenerator(eager.model, eager.settings, passes), 1))


def test_the_recorded_loop_reads_no_value_from_the_device() -> None:
    graphed, passes = recording(generator(tiny_model(), "packed", ROLES))
    latents(start(graphed, 1))
    captures = passes.captures
    with NoHostReads():
        latents(start(graphed, 2))
    assert passes.captures == captures


def moved(inputs: StaticInputs, name: str) -> StaticInputs:
    """The same inputs but for one, which is a copy elsewhere."""
    new = copy.copy(inputs)
    if name == "latents":
        new.latents = inputs.latents.clone()
    elif name in ("layers", "head"):
        new.time = replace(inputs.time, **{name: getattr(inputs.time, name).clone()})
    elif name in ("cos", "sin"):
        new.rotation = replace(inputs.rotation, **{name: getattr(inputs.rotation, name).clone()})
    else:
        new.text = TextContext(*(tuple(t.clone() for t in part) for part in (inputs.text.keys, inputs.text.values)))
    return new


@pytest.mark.parametrize("stale", ["nothing", "latents", "layers", "head", "cos", "sin", "text"])
def test_a_stale_input_would_be_seen(stale: str) -> None:
    """Recordings read their inputs where they were; what is copied elsewhere afterwards is missed."""
    eager = generator(tiny_model(), "window")
    graphed, passes = recording(eager)
    latents(start(graphed, 1))
    expected = latents(start(eager, 2, starts=(0, 6)))
    rollout = start(graphed, 2, starts=(0, 6))
    recorded = passes._captured[rollout.cache.buffer_epoch]
    if stale != "nothing":
        recorded.inputs = moved(recorded.inputs, stale)
    assert torch.allclose(latents(rollout), expected, atol=1e-4) == (stale == "nothing")
