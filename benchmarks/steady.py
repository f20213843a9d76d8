"""A steady block as the generator makes it, on a model with random weights: what the benchmarks have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.counting import clean_pass_operations, forward_operations
from dummy.config import DummyForcingConfig
from dummy.policy import ContextPolicy, policy_from_config
from pipeline.generator import BlockGenerator, GeneratorSettings, Rollout, Segment
from pipeline.plan import assumed_roles
from pipeline.schedule import DenoisingSchedule
from utils.seed import NoiseStream
from wan.attention import AttentionName, attention_backend
from wan.config import ModelConfig, ModelKwargs
from wan.geometry import LatentGeometry
from wan.model import CausalWanModel

POLICIES = ("full", "window", "prune", "packed")
STEPS = (1000, 750, 500, 250)


def build_model(
    config: ModelConfig, device: torch.device, engine: str = "eager", attention: AttentionName = "auto"
) -> CausalWanModel:
    """Random weights of the full size: speed does not depend on them."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = CausalWanModel(config).to(dtype)
    model = model.to_empty(device=device).random_()
    model.attention = attention_backend(attention, device, dtype)
    if engine == "compiled":
        model.compile_layers()
    return model


def make_policy(name: str, config: ModelConfig, block: int) -> ContextPolicy:
    """Policies of the published settings; half of the heads dummy, the others sink and neighbour in equal parts."""
    enabled = name in ("prune", "packed")
    num_dummy = config.num_layers * config.num_heads // 2
    dummy = DummyForcingConfig(enabled, name if name == "prune" else "packed", num_dummy=num_dummy)
    window = ModelKwargs(local_attn_size=12 if name == "window" else -1, sink_size=3 if name == "window" else 0)
    policy = policy_from_config(window, dummy, block)
    if policy.split is None:
        return policy
    return policy_from_config(window, dummy, block, assumed_roles(config, policy.split))


@dataclass
class SteadyBlock:
    """The last but one block of a video under one policy, its cache full of random keys and values."""

    model: CausalWanModel
    geometry: LatentGeometry
    policy: str

    def __post_init__(self) -> None:
        block = self.geometry.frames_per_block
        settings = GeneratorSettings(
            DenoisingSchedule.build(STEPS, 5.0, warp=True), make_policy(self.policy, self.model.config, block)
        )
        self._generator = BlockGenerator(self.model, settings)
        config = self.model.config
        with torch.inference_mode():
            self._text = self.model.encode_text(torch.zeros(1, config.text_len, config.text_dim))
        self.start = self.geometry.num_frames - 2 * block
        self.rollout = self.prepare()

    def prepare(self) -> Rollout:
        """A new rollout with the cache as the earlier blocks of a video leave it."""
        rollout = self._generator.start(self.geometry, [Segment(0, self._text)], NoiseStream([0]))
        generator = torch.Generator(self.model.device).manual_seed(0)
        config = self.model.config
        shape = (1, self.geometry.tokens_per_block, config.num_heads, config.head_dim)
        with torch.inference_mode():
            for start in range(0, self.start, self.geometry.frames_per_block):
                frames = range(start, start + self.geometry.frames_per_block)
                for layer in rollout.cache.layers:
                    k, v = (torch.randn(shape, generator=generator, device=self.model.device) for _ in "kv")
                    layer.commit(k.to(self.model.dtype), v.to(self.model.dtype), frames)
        return rollout

    @torch.inference_mode()
    def run(self) -> None:
        """The steps and the clean pass; afterwards the rollout is spent."""
        latents = self.rollout.denoise(self._text, self.start)
        self.rollout.clean_pass(latents, self._text, self.start, self.start // self.geometry.frames_per_block)

    def time_ms(self) -> tuple[float, float]:
        """Milliseconds of one block on a fresh cache: until the device is done, and until the host is."""
        self.rollout = self.prepare()
        self._warm_up()
        self._synchronise()
        begin = time.perf_counter()
        self.run()
        host = time.perf_counter()
        self._synchronise()
        return (time.perf_counter() - begin) * 1000, (host - begin) * 1000

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """One pass, so that new memory is touched and kernels are chosen before the clock starts."""
        latents = torch.zeros(1, *self.geometry.block_shape, device=self.model.device)
        self.model(latents, self._generator.steps[0], self._text, self.rollout.cache, self.start)

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    @property
    def head_frames(self) -> int:
        """Visible frames in the block, its own included, summed over the heads of all layers."""
        own = self.geometry.frames_per_block
        groups = [group for layer in self.prepare().cache.layers for group in layer.groups]
        return sum((len(g.frames) + own) * (g.heads.stop - g.heads.start) for g in groups)

    @property
    def operations(self) -> float:
        frames, config = self.head_frames, self.model.config
        steps = len(STEPS) * forward_operations(config, self.geometry, frames)
        return steps + clean_pass_operations(config, self.geometry, frames)
