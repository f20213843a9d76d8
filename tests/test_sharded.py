"""Weights in shards over the processes of a video: the same latents, and a part of the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.sharded_ranks import latents
from tests.tiny import tiny_model
from wan.attention.exchange import HeadExchange
from wan.config import WAN_14B
from wan.transformer.model import CausalWanModel
from wan.transformer.sharded import shard

ROOT = Path(__file__).parents[1]


@pytest.fixture
def eight() -> Iterator[HeadExchange]:
    """Rank 3 of eight, of which the others are not there."""
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    try:
        yield HeadExchange(3, 8)
    finally:
        dist.destroy_process_group()


def test_an_eighth_of_14b(eight: HeadExchange) -> None:
    with torch.device("meta"):
        model = CausalWanModel(WAN_14B).to(torch.bfloat16)
    whole = sum(one.numel() for one in model.parameters())
    for block in model.layers():
        shard(block, eight.mesh("cpu"))
    held = sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in model.parameters())
    assert whole / 8 < held < whole * (1 / 8 + 0.02)


def test_two_processes_with_sharded_weights(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "tests.sharded_ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model = tiny_model()
    alone, whole = latents(model), sum(one.numel() for one in model.parameters())
    for rank in range(2):
        made = torch.load(tmp_path / f"{rank}.pt")
        for way in ("eager", "compiled"):
            torch.testing.assert_close(made[way], alone, atol=1e-4, rtol=1e-4)
        assert torch.equal(made["output"], model.layers()[1].self_attn.output_weight())
        assert made["held"] < 0.75 * whole  # what is not in the layers is a good part of so small a model
