"""Which engine runs where, what it compiles and when, and what happens if it cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import inference
from pipeline.runtime import engine as engines
from pipeline.runtime.engine import choose_engine, prepare, start_engine, use_compile_cache, warmup
from tests.graph_recorder import OperatorRecorder
from tests.test_generator import GEOMETRY, ROLES, generator, latents, start
from tests.tiny import tiny_model
from utils.errors import InputError
from wan.transformer.graphs import GraphedPasses

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_engines_of_a_cpu() -> None:
    assert choose_engine("auto", CPU) == "eager"
    assert choose_engine("compiled", CPU) == "compiled"
    with pytest.raises(InputError, match="engine: 'graphed' needs an NVIDIA GPU, this is cpu; use 'auto'"):
        choose_engine("graphed", CPU)


def compiled() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_all_is_compiled_at_the_start(fresh_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    """Five graphs: a layer before, between and after its attentions, and the first two for heads in an order of their
    own. Short and long videos, observed roles, another prompt, re-encoded frames, and a spare cache add none; another
    size of a block adds five."""
    made = generator(tiny_model(), "packed", window=9)
    with caplog.at_level(logging.INFO):
        start_engine(made, "compiled", GEOMETRY)
    assert caplog.records[0].message.startswith("engine: getting compiled ready")
    assert caplog.records[-1].message.startswith("engine: compiled is ready after ")
    assert compiled() == 5
    eager = generator(tiny_model(), "packed", window=9)
    for frames, starts in ((21, (0,)), (120, (0,)), (21, (0, 3, 12))):
        geometry = replace(GEOMETRY, num_frames=frames)
        videos = [latents(start(one, 1, geometry=geometry, starts=starts)) for one in (made, eager)]
        torch.testing.assert_close(videos[0], videos[1], atol=1e-4, rtol=1e-4)
    assert compiled() == 5
    latents(start(made, 1, geometry=replace(GEOMETRY, num_frames=6, frames_per_block=1)))
    assert compiled() == 10


def test_what_does_not_compile_gives_way_or_is_an_error(
    fresh_compiler: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        made = generator(tiny_model(), "window")
        with pytest.raises(InputError, match=r"engine: 'compiled' does not run here \(.+\); use engine=eager"):
            start_engine(made, "compiled", GEOMETRY)
        torch._dynamo.reset()
        prepare(made, "compiled", GEOMETRY, 1, required=False)
    (record,) = [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "pipeline.runtime.engine"  # the compiler has its own
    ]
    assert record.message.startswith("engine: eager, since compiled does not run here (")
    assert torch.equal(latents(start(made, 1)), latents(start(generator(tiny_model(), "window"), 1)))


@pytest.mark.parametrize("kind", ["full", "window", "prune", "packed"])
def test_after_a_rehearsal_the_first_video_records_nothing(kind: str) -> None:
    made = generator(tiny_model(), kind, ROLES if kind in ("prune", "packed") else None)
    passes = made.passes = GraphedPasses(made.model, OperatorRecorder())
    warmup(made, GEOMETRY)
    captures = passes.captures
    assert captures > 0
    expected = latents(start(generator(tiny_model(), kind, made.settings.policy.split and ROLES), 1))
    torch.testing.assert_close(latents(start(made, 1)), expected)
    assert passes.captures == captures


def test_a_rehearsal_before_roles_are_observed_is_short() -> None:
    made = generator(tiny_model(), "packed")
    counted = []
    made.model.register_forward_hook(lambda *_: counted.append(1))
    warmup(made, GEOMETRY)
    assert len(counted) == 16  # the steps of two blocks, with heads in the order of the weights and in one of their own


FIRST_BLOCK = """
import sys, time, torch
from pathlib import Path
from pipeline.runtime.engine import start_engine, use_compile_cache
from tests.test_generator import GEOMETRY, generator
from tests.tiny import tiny_model
torch.set_num_threads(1)
use_compile_cache(Path(sys.argv[1]))
start_engine(generator(tiny_model(), "window"), "compiled", GEOMETRY)
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "cache"
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_BLOCK, str(folder)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        counts.append(done.stdout.split())
    assert list(folder.rglob("*.py"))
    assert counts == [["0", "3"], ["3", "0"]]


def test_a_compile_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*cannot be written"):
        use_compile_cache(tmp_path / "file")


def test_no_compile_cache_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    use_compile_cache(None)
    assert "TORCHINDUCTOR_CACHE_DIR" not in engines.os.environ


def test_getting_ready_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Compiling takes a minute: nobody should wonder what the program is doing. Other libraries stay quiet."""

    def program() -> int:
        engines.logger.info("engine: getting ready")
        logging.getLogger("diffusers").info("something")
        return 0

    assert inference.exit_status(program) == 0
    assert caplog.messages == ["engine: getting ready"]
