"""What tests/test_sharded.py runs by two processes: latents of a sharded model, eager and with compiled parts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from tests.test_generator import SCHEDULE, policy
from tests.tiny import CONFIG, segments, tiny_model
from utils import command
from utils.seed import NoiseStream
from wan.attention.exchange import HeadExchange
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel
from wan.transformer.sharded import load_sharded

CPU = torch.device("cpu")


def latents(model: CausalWanModel) -> torch.Tensor:
    generator = BlockGenerator(model, GeneratorSettings(SCHEDULE, policy("packed")))
    rollout = generator.start(LatentGeometry(8, 12, 6, 3), segments(model, (0, 3)), NoiseStream([0]), 1)
    return torch.cat([block.latents for block in rollout.blocks()], 1)


def main(folder: Path) -> int:
    command.end_at_once()
    dist.init_process_group("gloo")
    exchange = HeadExchange(dist.get_rank(), dist.get_world_size())
    with torch.device("meta"):
        model = CausalWanModel(CONFIG)
    load_sharded(model, dict(tiny_model().state_dict()), folder, torch.float32, CPU, exchange.mesh("cpu"))
    model.exchange = exchange
    made = {"eager": latents(model)}
    model.compile_layers(backend="eager")
    made["compiled"] = latents(model)
    held = sum(one.to_local().numel() if hasattr(one, "to_local") else one.numel() for one in model.parameters())
    made["output"] = model.layers()[1].self_attn.output_weight()
    torch.save({**made, "held": held}, folder / f"{exchange.rank}.pt")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(command.run(lambda: main(Path(sys.argv[1]))))
