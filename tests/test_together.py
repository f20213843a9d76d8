"""One video by several processes: the same results, heads balanced by what they keep, clear ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dummy.policies.calibrated import policy_of_table
from dummy.retentions import RetentionTable
from dummy.roles import HeadRoles, Role
from pipeline import Pipeline
from pipeline.config.config import as_dict, load_config
from pipeline.planning.scale import block_bytes
from pipeline.runtime.company import Company, Leaving, LostProcess
from pipeline.runtime.decoding import BlockDecoder, DecodeStrategy
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings, Passes
from pipeline.runtime.together import _refusal, checked_by_all, require_equal, require_world
from pipeline.runtime.turns import Turn, Turns
from pipeline.vbench.sampling import team_size
from tests import conformance
from tests.studio_server import until
from tests.test_conformance import ROLLOUTS
from tests.test_generator import SCHEDULE, policy
from tests.thread_exchange import ThreadExchange, together
from tests.tiny import CONFIG, segments, tiny_model
from utils.distributed import World
from utils.errors import InputError, ToldElsewhere
from utils.media import open_media
from utils.profiler import Profiler
from utils.prompts import read_prompts
from utils.seed import NoiseStream
from wan.attention.exchange import HeadExchange, HeadShares, share
from wan.attention.head_group import UNBOUNDED, HeadLayout, Retention
from wan.attention.held import HeldFrames, held_by_head
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel
from wan.vae.vae import VAE

ROOT = Path(__file__).parents[1]
LIVE = [
    "resolution=[32,48]",
    "model_kwargs.local_attn_size=6",
    "rope=relative",
    "num_output_frames=9",
    "dummy_forcing=off",
]
GEOMETRY = LatentGeometry(8, 12, 15, 3)


@dataclass(frozen=True)
class OneOf(conformance.Machine):
    exchange: ThreadExchange | None = None

    def passes(self, model: CausalWanModel) -> Passes:
        model.exchange = self.exchange
        return model


@pytest.mark.parametrize("path", ROLLOUTS, ids=lambda path: path.stem)
def test_a_vector_by_three(path: Path) -> None:
    def one(exchange: ThreadExchange) -> dict[str, float]:
        machine = OneOf(torch.device("cpu"), torch.float32, exchange=exchange)
        return conformance.differences(*conformance.compute(path, machine))

    for errors in together(3, one):
        for name, error in errors.items():
            assert error <= conformance.TOLERANCES.get(name, conformance.TOLERANCE), name


def made(
    settings: GeneratorSettings, exchange: ThreadExchange | None, batch: int = 1, starts: Sequence[int] = (0, 6)
) -> tuple[torch.Tensor, list[int], list[list[HeldFrames]]]:
    """Latents, the bytes of the cache and what was sent by the end, and what heads hold then."""
    model = tiny_model()
    model.exchange = exchange
    generator = BlockGenerator(model, settings)
    rollout = generator.start(GEOMETRY, segments(model, starts, batch), NoiseStream([0, 1][:batch]), batch)
    latents = torch.cat([block.latents for block in rollout.blocks()], 1)
    numbers = [rollout.cache.bytes().total, 0 if exchange is None else exchange.sent, rollout.forwards]
    return latents, numbers, held_by_head(rollout.cache)


KEPT = st.builds(Retention, st.integers(0, 3), st.integers(0, 7) | st.just(UNBOUNDED))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(KEPT, min_size=4, max_size=4), min_size=3, max_size=3),
    st.integers(2, 4),
    st.integers(1, 2),
    st.booleans(),
)
def test_any_table_by_any_number(rows: list[list[Retention]], ranks: int, batch: int, relative: bool) -> None:
    settings = GeneratorSettings(SCHEDULE, policy_of_table(RetentionTable.of(rows)), window=9, relative_rope=relative)
    alone, (whole, _, forwards), held = made(settings, None, batch)
    results = together(ranks, lambda exchange: made(settings, exchange, batch))
    for latents, _, known in results:
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=1e-4)
        assert torch.equal(latents, results[0][0])  # all go on from the same numbers
        assert known == held  # by all, of the others' heads too
    assert sum(numbers[0] for _, numbers, _ in results) == whole  # every head is somewhere, and none twice
    if ranks in (2, 3, 4) and 72 % ranks == 0:
        sent = sum(numbers[1] for _, numbers, _ in results)
        assert sent == expected_bytes(ranks, batch, forwards)


def expected_bytes(ranks: int, batch: int, forwards: int) -> int:
    """Of passes over a block: q, k, v and the result once a layer, of which a rank's own part stays; the outputs of all
    tokens to all ranks once a flow. The prompt switch encodes six frames, and a clean pass has no result in its last
    layer."""
    block, width = 72, CONFIG.dim
    clean, encoded = GEOMETRY.num_blocks - 1, 1
    flows = forwards - clean - encoded
    layer = 4 * batch * width * 4 * (ranks - 1) // ranks  # bytes a token
    short = layer // 2  # keys and values alone
    outputs = batch * 64 * 4 * (ranks - 1)
    tokens = flows * block * 3 + clean * block * 2 + 144 * 2
    return tokens * layer + (clean * block + 144) * short + flows * block * outputs


@pytest.mark.parametrize("kind", ["packed", "prune"])
def test_observed_roles_move_heads_to_where_they_cost_least(kind: str) -> None:
    settings = GeneratorSettings(SCHEDULE, policy(kind, num_dummy=6))
    alone, _, held = made(settings, None)
    for latents, _, known in together(2, lambda exchange: made(settings, exchange)):
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=1e-4)
        assert known == held


@given(st.lists(KEPT, min_size=1, max_size=16), st.integers(1, 16))
def test_heads_are_dealt_by_what_they_cost(kept: list[Retention], ranks: int) -> None:
    ranks = min(ranks, len(kept))
    layout = HeadLayout([list(range(len(kept)))[::-1]], [[(1, one) for one in kept]])
    costs = [3 + min(one.total, 18) for one in kept]
    shares = HeadShares.balanced(layout, ranks, lambda one: 3 + min(one.total, 18))
    assert sorted(shares.orders[0]) == list(range(len(kept)))
    loads = []
    for rank in range(ranks):
        places = range(len(kept))[shares.heads(0, rank)]
        heads = [shares.orders[0][place] for place in places]
        assert heads and [shares.kept[0][place] for place in places] == [kept[::-1][head] for head in heads]
        assert sum(count for count, _ in shares.segments(0, rank)) == len(heads)
        assert all(shares.owner(0)[head] == rank for head in heads)
        loads.append(sum(costs[::-1][head] for head in heads))
    least = max(max(costs), sum(costs) / ranks)  # no deal can do better
    assert max(loads) <= 2 * least
    if len(kept) % ranks == 0 and len(set(costs)) == 1:
        assert max(loads) == least


def test_eight_ranks_serve_twelve_heads_of_the_paper() -> None:
    """Heads of half the model are dummy: no rank has more than two of the dear ones, and each has one at least."""
    roles = HeadRoles(((Role.DUMMY,) * 6 + (Role.SINK,) * 2 + (Role.NEIGHBOR,) * 4,))
    split = policy("packed", roles).split
    assert split is not None
    shares = HeadShares.balanced(split.layout(roles), 8, lambda kept: 3 + kept.total)
    assert sorted(shares.counts[0]) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert HeadShares.even(2, 12, 8, Retention(0, 1)).counts[1] == [1, 2, 1, 2, 1, 2, 1, 2]
    assert [len(share(10, 4, rank)) for rank in range(4)] == [2, 3, 2, 3]


def test_what_processes_must_agree_on() -> None:
    config = load_config({})
    require_world(config, World())
    require_world(load_config({}, ["parallel=heads"]), World(1, 3, 1, 3))
    with pytest.raises(InputError, match="parallel: torchrun has started 2 processes, each of which would make the"):
        require_world(config, World(0, 2, 0, 2))
    with pytest.raises(InputError, match="parallel: heads:4 is for 4 processes, and there are 2; use torchrun --nproc"):
        require_world(load_config({}, ["parallel=heads:4"]), World(0, 2, 0, 2))
    with pytest.raises(InputError, match="seed, fps: process 1 has other values than process 0"):
        require_equal(replace(config, seed=1, fps=8), as_dict(config), World(1, 2, 1, 2))
    for wrong in ("head", "heads:0", "heads:x", "tokens"):
        with pytest.raises(InputError, match="parallel: expected heads, or heads:N for N processes"):
            load_config({}, [f"parallel={wrong}"])
    with pytest.raises(InputError, match="equal_cost: a speed is measured by each process for itself"):
        load_config({}, ["parallel=heads", "dummy_forcing.enabled=true", "dummy_forcing.equal_cost=16.0"])


def launched(processes: int, *words: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_make_a_video_and_one_that_is_killed_ends_both(tmp_path: Path) -> None:
    """Files under the usual names, frames as of one process; a killed process is told within seconds."""
    words = ["inference.py", "--config_path", "configs/shapes_demo.yaml", "inference_iter=1", "parallel=heads"]
    whole = launched(2, *words, f"output_folder={tmp_path}", "num_output_frames=9")
    told, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, told
    (video,) = tmp_path.glob("*.mp4")
    frames = torch.tensor(open_media(video).read())
    alone = Pipeline.from_config("configs/shapes_demo.yaml", ["num_output_frames=9"])
    (prompt, *_) = read_prompts(Path(alone.config.data_path))
    expected = alone.generate(prompt)
    assert frames.shape == expected.shape
    assert (frames.float() - expected.float()).abs().mean() < 3  # what the file's compression takes
    long = launched(2, *words, f"output_folder={tmp_path / 'long'}", "num_output_frames=6000")
    children = wait_for_children(long.pid, 2, tmp_path / "long")
    os.kill(children[-1], signal.SIGKILL)
    begin = time.monotonic()
    told, _ = long.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert long.returncode != 0 and told.count("error: ") <= 1, told
    assert not list((tmp_path / "long").glob("*.mp4"))


def wait_for_children(pid: int, count: int, folder: Path) -> list[int]:
    """The processes that torchrun has started, once a video has begun in `folder`."""
    begin = time.monotonic()
    while time.monotonic() - begin < 100:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(listed) >= count and folder.is_dir() and any(folder.iterdir()):
            return [int(child) for child in listed][:count]
        time.sleep(0.1)
    raise AssertionError("no video was begun")


def test_teams_of_a_larger_job() -> None:
    teams = load_config({}, ["parallel=heads:2"])
    assert team_size(teams, World(3, 4, 3, 4)) == 2
    assert team_size(load_config({}, ["parallel=heads"]), World(3, 4, 3, 4)) == 4
    assert team_size(load_config({}), World(3, 4, 3, 4)) == 1
    with pytest.raises(InputError, match="heads:2 makes teams of 2 processes, and there are 3; use a multiple"):
        team_size(teams, World(0, 3, 0, 3))


def test_what_travels_is_what_the_formula_says() -> None:
    """Also of uneven parts, and of heads that were dealt by what they cost."""
    rows = [[Retention(0, 3), Retention(1, 0), Retention(0, 0), Retention(0, 9)]] * 3
    settings = GeneratorSettings(SCHEDULE, policy_of_table(RetentionTable.of(rows)))
    shares = HeadShares.balanced(RetentionTable.of(rows).layout(), 3, lambda kept: 3 + min(kept.total, 12))
    sent = [numbers[1] for _, numbers, _ in together(3, lambda exchange: made(settings, exchange, starts=(0,)))]
    block = block_bytes(shares, CONFIG, GEOMETRY, len(SCHEDULE), 4)
    last = block_bytes(shares, CONFIG, GEOMETRY, len(SCHEDULE), 4, clean=False)
    assert sent == [4 * one + end for one, end in zip(block, last, strict=True)]


@pytest.mark.parametrize(
    ("leaver", "how", "tellers"),
    [
        (1, Leaving.DONE, []),
        (1, Leaving.TOLD, []),
        (1, Leaving.BEREFT, [0]),  # whom it has lost does not tell
        (0, Leaving.DONE, []),
        (0, Leaving.TOLD, []),
        (0, Leaving.BEREFT, []),
    ],
)
def test_how_a_process_leaves_the_others_hear(
    leaver: int, how: Leaving, tellers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are left at most one tells the user."""
    monkeypatch.setattr("pipeline.runtime.company._LAST_WORDS_S", 0.2)
    store = dist.HashStore()

    def one(there: ThreadExchange) -> LostProcess | None:
        exchange = HeadExchange(there.rank, there.ranks)
        company = Company(exchange, dist.ProcessGroupGloo(store, there.rank, there.ranks, timedelta(seconds=30)))
        if there.rank == leaver:
            company.leave(how)
            return None
        if how is not Leaving.DONE:
            until(lambda: exchange.fault is not None, "word of it")
        loss = company.loss()
        company.leave(Leaving.DONE if loss is None else Leaving.BEREFT)
        return loss

    found = together(3, one)
    assert [rank for rank, loss in enumerate(found) if loss is not None and loss.tells] == tellers
    refusals = [_refusal(loss, None) for loss in found if loss is not None]
    assert [type(refusal) for refusal in refusals].count(InputError) == len(tellers)


def test_what_one_process_lacks_one_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.together.TELL_S", 0)

    def check(exchange: ThreadExchange) -> InputError | None:
        try:
            with checked_by_all(exchange):
                if exchange.rank == 1:
                    raise InputError("model_name: it is not here")
        except InputError as error:
            return error
        return None

    first, *others = together(3, check)
    assert str(first) == "process 1: model_name: it is not here" and not isinstance(first, ToldElsewhere)
    assert all(isinstance(other, ToldElsewhere) for other in others)


def test_after_a_turn_that_fails_there_is_none() -> None:
    """Whatever has failed, the others are somewhere else now; what has to end does so alone."""

    def take(exchange: ThreadExchange) -> str:
        turns = Turns(exchange)
        if exchange.rank:
            return "" if exchange.from_first(None) == Turn(0) else "another"
        with pytest.raises(MemoryError), turns.taken(Turn(0)):
            raise MemoryError("it is full")
        with pytest.raises(MemoryError, match="it is full"):
            turns.taken(Turn(1)).__enter__()
        turns.end(None)
        return str(exchange.fault)

    assert together(2, take) == ["it is full", ""]


def test_a_session_is_driven_by_the_first_process() -> None:
    """Prompts that are typed on the way, two sessions in turns, an image to go on from: as by one process."""

    def drive(exchange: ThreadExchange | None) -> list[torch.Tensor]:
        pipeline = Pipeline.from_config("configs/shapes_demo.yaml", LIVE, exchange=exchange)
        if pipeline.follows:
            pipeline.follow()
            return []
        with pytest.raises(InputError, match="frames: 4 is no positive multiple"):
            pipeline.session(frames=4)  # of which nobody hears
        with pipeline.session(seed=3, frames=9) as one, pipeline.session(seed=4) as other:
            one.prompt("A red ball moves to the right.")
            other.prompt("A green square stands still.")
            made = []
            for index in range(3):
                made += [next(one).latents, next(other).latents]
                if index == 0:
                    other.prompt("A blue ball moves to the left.")
            assert next(one, None) is None
        pipeline.close()
        return made

    alone = drive(None)
    together_made, nothing = together(2, drive)
    assert nothing == []
    for one, other in zip(together_made, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "tile", "size"), [(2, 32, (6, 8)), (3, 32, (5, 9)), (5, 32, (8, 8)), (3, 64, (8, 8))]
)
def test_dealt_tiles_are_the_bytes_of_one_process(ranks: int, tile: int, size: tuple[int, int]) -> None:
    """Whatever the number of processes, also where some have no tile; frames may be cropped."""
    height, width = size
    latents = torch.randn(2, 5, 16, height, width, generator=torch.Generator().manual_seed(0))
    weights = load_file(ROOT / "tests" / "data" / "vectors" / "vae.safetensors")
    state = {name.removeprefix("weights."): one for name, one in weights.items() if name.startswith("weights.")}

    def decoded(exchange: ThreadExchange | None) -> torch.Tensor | None:
        vae = VAE.from_state(state, None, torch.float32, "cpu")
        vae.exchange = exchange
        strategy = DecodeStrategy(2, tile, frame_chunk=2, dealt=exchange is not None)
        decoder = BlockDecoder(vae, (8 * height - 6, 8 * width), Profiler(vae.device), strategy)
        if exchange is not None and exchange.rank:
            for part in latents.split([3, 2], dim=1):
                decoder.assist(part)
            return None
        return torch.cat([decoder.decode(part).wait() for part in latents.split([3, 2], dim=1)], dim=1)

    alone, (gathered, *nothing) = decoded(None), together(ranks, decoded)
    assert alone is not None and gathered is not None and torch.equal(gathered, alone)
    assert nothing == [None] * (ranks - 1)


def test_a_session_with_dealt_tiles() -> None:
    def drive(exchange: ThreadExchange | None) -> torch.Tensor | None:
        words = ["vae_tile=128", "resolution=[128,144]", "num_output_frames=6", "dummy_forcing=off", "low_memory=false"]
        words += ["denoising_step_list=[1000]"]
        with Pipeline.from_config("configs/shapes_demo.yaml", words, exchange=exchange) as pipeline:
            assert pipeline.strategy.dealt == (exchange is not None)
            if pipeline.follows:
                pipeline.follow()
                return None
            return pipeline.generate("A red ball moves to the right.")

    alone, (gathered, _) = drive(None), together(2, drive)
    assert alone is not None and gathered is not None
    assert (gathered.float() - alone.float()).abs().max() <= 1  # latents of several processes differ in their last bits
