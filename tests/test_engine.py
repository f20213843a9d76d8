"""Which engine runs where, what it compiles and when, and what happens if it cannot."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from pipeline.runtime import engine as engines
from pipeline.runtime.engine import choose_engine, prepare, start_engine, use_compile_cache, warmup
from tests.fake_streams import OrderedStreams, streams
from tests.graph_recorder import OperatorRecorder
from tests.test_generator import GEOMETRY, ROLES, generator, latents, start
from tests.tiny import tiny_model
from utils import command
from utils.errors import InputError
from wan.cuda_graphs import CudaRecorder
from wan.transformer.graphs import GraphedPasses
from wan.vae.modules import VAEConfig, VAEModule
from wan.vae.untiled import compiled_run
from wan.vae.vae import VAE

__all__ = ["streams"]  # a fixture
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


class Tool(Exception):
    """An error of a tool that a compiler starts."""


@pytest.mark.parametrize(
    "error",
    [FailOnRecompileLimitHit("recompile_limit reached with fullgraph=True"), Tool("\n  no Python.h\nmore"), KeyError()],
)
def test_no_error_of_a_compiler_ends_a_run(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    made = generator(tiny_model(), "window")
    monkeypatch.setattr(made.model, "compile_layers", lambda on: fail() if on else None)
    with caplog.at_level(logging.WARNING):
        assert not prepare(made, "compiled", GEOMETRY, 1, required=False)
    reason = str(error).strip().partition("\n")[0] or "KeyError"
    assert caplog.messages == [f"engine: eager, since compiled does not run here ({reason})"]
    assert made.passes is made.model
    with pytest.raises(InputError, match=r"engine: 'compiled' does not run here .*; use engine=eager"):
        prepare(made, "compiled", GEOMETRY, 1, required=True)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, InputError])
def test_what_is_no_fault_of_an_engine_goes_on(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(on: bool) -> None:
        raise error("too much")

    made = generator(tiny_model(), "window")
    monkeypatch.setattr(made.model, "compile_layers", fail)
    with pytest.raises(error):
        prepare(made, "compiled", GEOMETRY, 1, required=False)


@pytest.fixture
def strict_compiler(fresh_compiler: None) -> Iterator[None]:
    """One variant of a function is all that may be compiled, where PyTorch allows 8, and none anew."""
    with torch._dynamo.config.patch(recompile_limit=1, error_on_recompile=True):
        yield


def test_every_size_is_compiled_once_and_none_too_many(strict_compiler: None) -> None:
    model = tiny_model()
    model.compile_layers(backend="eager")
    made = generator(model, "window")
    for batch in (2, 1, 2):
        latents(start(made, *range(batch), geometry=replace(GEOMETRY, num_frames=6)))
    assert compiled() == 3 * 2


def test_the_decoders_stages_are_compiled_once_each(strict_compiler: None) -> None:
    """The same layers' code runs in all of them; batches of two sizes follow each other."""
    config = VAEConfig(base_dim=4)
    with torch.device("meta"):
        vae = VAE(VAEModule(config), config)
    vae.prepare(3, compiled_run("eager"))
    for batch in (2, 1, 2):
        decoder = vae.decoder(3)
        for _ in range(3):
            decoder.decode(torch.zeros(batch, 3, 16, 4, 4, device="meta"))
        decoder.close()
    assert compiled() == 3 * 2


class BrokenGraph:
    """A CUDA graph whose capture the driver ends with an error, before the allocator hears of the end."""

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.allocator.open += 1

    def capture_end(self) -> None:
        raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    allocator: Allocator


@dataclass
class Allocator:
    """PyTorch's, in what it says about captures."""

    deaf: bool  # it does not hear of the end otherwise either
    open: int = 0

    def end(self, device: int, pool: object) -> None:
        if self.deaf or not self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open -= 1

    def empty(self) -> None:
        if self.open:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("anchor", [False, True])
def test_a_capture_that_fails_gives_way_to_eager(
    deaf: bool, anchor: bool, streams: OrderedStreams, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the recorder of CUDA graphs: its first capture fails (the anchor), or that of the first pass; and what is
    left of it in the allocator may be all that there is to be had."""
    allocator = BrokenGraph.allocator = Allocator(deaf)
    for owner, name, fake in [
        (torch.cuda, "CUDAGraph", BrokenGraph),
        (torch.cuda, "graph_pool_handle", lambda: (0, 1)),
        (torch.cuda, "empty_cache", allocator.empty),
        (torch._C, "_cuda_endAllocateToPool", allocator.end),
        (torch._C, "_cuda_releasePool", lambda device, pool: None),
    ]:
        monkeypatch.setattr(owner, name, fake, raising=False)
    if not anchor:
        monkeypatch.setattr(CudaRecorder, "_hold_pool", lambda self: None)
    made = generator(tiny_model(), "window")
    with caplog.at_level(logging.WARNING):
        ready = prepare(made, "recorded", GEOMETRY, 1, required=False)
    assert ready == (not anchor and not deaf)
    assert all(message.startswith("engine: ") for message in caplog.messages)
    assert any("operation failed due to a previous error" in message for message in caplog.messages)
    assert allocator.open == (1 if deaf else 0)
    assert torch.equal(latents(start(made, 1)), latents(start(generator(tiny_model(), "window"), 1)))
    with pytest.raises(InputError, match=r"engine: 'recorded' does not run here \(CUDA error: operation failed"):
        prepare(made, "recorded", GEOMETRY, 1, required=True)


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


# Two processes, one after the other, for which modules are imported once.
FIRST_BLOCKS = """
import os, sys, torch, torch._inductor.compile_fx
from pathlib import Path
from pipeline.runtime.engine import start_engine, use_compile_cache
from tests.test_generator import GEOMETRY, generator
from tests.tiny import tiny_model
torch.set_num_threads(1)
use_compile_cache(Path(sys.argv[1]))
for _ in range(2):
    child = os.fork()
    if not child:
        start_engine(generator(tiny_model(), "window"), "compiled", GEOMETRY)
        counters = torch._dynamo.utils.counters["inductor"]
        print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"], flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "cache"
    arguments = [sys.executable, "-c", FIRST_BLOCKS, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=True)
    assert list(folder.rglob("*.py"))
    assert done.stdout.split("\n") == ["0 3", "3 0", ""]


def test_a_compile_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"compile_cache: .*file is a file, not a folder"):
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

    assert command.run(program) == 0
    assert caplog.messages == ["engine: getting ready"]
