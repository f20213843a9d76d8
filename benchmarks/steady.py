"""A steady block as the generator makes it, on a model with random weights: what the benchmarks have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.machine import elapsed
from dummy.config import DummyForcingConfig
from dummy.policies.calibrated import policy_of_table
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy
from dummy.retentions import RetentionTable
from pipeline.planning.cost import assumed_roles, block_operations
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings, Passes, Segment
from pipeline.runtime.schedule import DenoisingSchedule
from pipeline.runtime.speed import fill
from utils.seed import NoiseStream
from wan.attention.backends import AttentionName
from wan.attention.head_group import UNBOUNDED, Retention
from wan.config import ModelConfig, ModelKwargs
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

POLICIES = ("full", "window", "prune", "packed", "long", "calibrated")
STEPS = (1000, 750, 500, 250)
# First and last frames that heads keep in layers that need little, some and much: together 1.5 frames a head, which is
# what `packed` keeps, as unevenly as the small model's calibration at 1.33 has it: almost half of the heads nothing, a
# few most, two to six lengths in a layer.
_SPREAD = (
    (*((0, 0),) * 9, (0, 1), (0, 1), (0, 4)),
    (*((0, 0),) * 5, (0, 1), (0, 1), (1, 0), (0, 2), (0, 3), (1, 3), (0, 6)),
    (*((0, 1),) * 3, *((0, 2),) * 5, (0, 3), (1, 2), (1, 4), (1, 5)),
)


def build_model(config: ModelConfig, device: torch.device, attention: AttentionName = "auto") -> CausalWanModel:
    """Random weights of the full size: speed does not depend on them."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = CausalWanModel(config).to(dtype)
    model = model.to_empty(device=device).random_()
    model.use_attention(attention)
    return model


def make_policy(name: str, config: ModelConfig, block: int) -> ContextPolicy:
    """Policies of the published settings; half of the heads dummy, the others sink and neighbour in equal parts.

    "long" is packed with as much history for neighbour heads as makes it cost what "window" does, "calibrated" a table
    of typical spread.
    """
    assert name in POLICIES  # else it would be full history under another name
    if name == "calibrated":
        return policy_of_table(typical_table(config))
    enabled = name in ("prune", "packed", "long")
    num_dummy = config.num_layers * config.num_heads // 2
    dummy = DummyForcingConfig(
        enabled,
        "prune" if name == "prune" else "packed",
        num_dummy=num_dummy,
        equal_cost="window" if name == "long" else None,
    )
    windowed = name in ("window", "long")
    window = ModelKwargs(local_attn_size=12 if windowed else -1, sink_size=3 if windowed else 0)
    policy = policy_from_config(window, dummy, block)
    if policy.split is None:
        return policy
    return policy_from_config(window, dummy, block, assumed_roles(config, policy.split))


def typical_table(config: ModelConfig) -> RetentionTable:
    """What a calibration may give every head, by _SPREAD; heads of equal length do not stand together."""

    def kept(layer: int, head: int) -> Retention:
        spread = _SPREAD[layer % len(_SPREAD)]
        turned = (5 * head + layer) % config.num_heads
        return Retention(*spread[(2 * turned + 1) * len(spread) // (2 * config.num_heads)])

    layers, heads = range(config.num_layers), range(config.num_heads)
    return RetentionTable.of([[kept(layer, head) for head in heads] for layer in layers])


def long_enough(geometry: LatentGeometry, policy: ContextPolicy) -> LatentGeometry:
    """The video, made longer where its last but one block comes before heads have all the frames that they may keep;
    heads that keep everything do not count."""
    split, block = policy.split, geometry.frames_per_block
    kept = [policy.initial]
    if split is not None:
        assert split.roles is not None
        kept = list(split.retentions(split.roles).values())
    most = max((retention.total for retention in kept if retention.total < UNBOUNDED), default=0)
    needed = -(-most // block) * block + 2 * block
    return replace(geometry, num_frames=max(geometry.num_frames, needed))


@dataclass
class SteadyBlock:
    """The last but one block of a video under one policy, its cache full of random keys and values.

    The video has the length of `geometry`, or more if it takes more to fill a history of bounded length.
    """

    model: CausalWanModel
    geometry: LatentGeometry
    policy: str
    passes: Passes | None = None  # what runs the model's passes, the model itself by default

    def __post_init__(self) -> None:
        block = self.geometry.frames_per_block
        policy = make_policy(self.policy, self.model.config, block)
        self.geometry = long_enough(self.geometry, policy)
        settings = GeneratorSettings(DenoisingSchedule.build(STEPS, 5.0, warp=True), policy)
        self._generator = BlockGenerator(self.model, settings, self.passes)
        config = self.model.config
        with torch.inference_mode():
            self._text = self.model.encode_text(torch.zeros(1, config.text_len, config.text_dim))
        self.start = self.geometry.num_frames - 2 * block
        self.rollout = self._generator.start(self.geometry, [Segment(0, self._text)], NoiseStream([0]))
        self.prepare()
        own = self.geometry.frames_per_block
        heads = self.model.config.num_layers * self.model.config.num_heads
        # Visible frames in the block, its own included, summed over the heads of all layers.
        self.head_frames = round((self.rollout.cache.frames_per_head + own) * heads)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Fill the cache as the earlier blocks of a video leave it; anew, since a block moves into it."""
        self.rollout.cache.forget()
        fill(self.rollout, range(self.start), self.model)

    @torch.inference_mode()
    def run(self) -> None:
        """The steps and the clean pass, after which the cache has to be prepared again."""
        block = self.start // self.geometry.frames_per_block
        self.rollout.clean_pass(self.rollout.denoise(self._text, block), self._text, self.start, block)

    @torch.inference_mode()
    def flow(self) -> Tensor:
        """One pass over random latents, the same for every model of these sizes; the cache is full afterwards."""
        self.prepare()
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, *self.geometry.block_shape, generator=generator).to(self.model.device)
        first = self._generator.usual.steps[0]
        return self._generator.passes(latents, first, self._text, self.rollout.cache, self.start)

    def time_ms(self) -> tuple[float, float]:
        """Milliseconds of one block: until the device is done, and until the host is."""
        self.prepare()
        done, host = elapsed(self.run, self.model.device)
        return done * 1000, host * 1000

    @property
    def operations(self) -> float:
        config = self.model.config
        kept = self.head_frames / (config.num_layers * config.num_heads) - self.geometry.frames_per_block
        return block_operations(config, self.geometry, kept, len(STEPS))
