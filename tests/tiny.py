"""Small models for tests: random weights, real classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.runtime.inputs import Segment
from wan.config import ModelConfig
from wan.transformer.model import CausalWanModel

CONFIG = ModelConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=3, freq_dim=32, text_dim=24, text_len=8)


def tiny_model(config: ModelConfig = CONFIG, seed: int = 0) -> CausalWanModel:
    """Weights of ordinary size (std 1 / sqrt(fan in)), so that attention is neither flat nor a delta."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalWanModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model.requires_grad_(False).eval()


def random_embeds(config: ModelConfig = CONFIG, batch: int = 1, seed: int = 1) -> Tensor:
    """One random prompt, the same for all of the batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.text_len, config.text_dim, generator=generator).expand(batch, -1, -1)


def segments(model: CausalWanModel, starts: Sequence[int] = (0,), batch: int = 1) -> list[Segment]:
    with torch.inference_mode():
        return [
            Segment(start, model.encode_text(random_embeds(model.config, batch, seed=i)))
            for i, start in enumerate(starts)
        ]
