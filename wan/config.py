"""Sizes of a Wan 2.1 text-to-video transformer, and the few settings that published YAML files pass to it.

`ModelConfig` describes weights: it comes from the `config.json` beside them or from a preset. `ModelKwargs` and
`AdapterConfig` are YAML sections: how those weights are used, and what a LoRA's factors mean. None of them knows of
head roles, prompts, files or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from utils.config import build
from utils.errors import InputError, require_range, shown
from wan.geometry import MOST_FRAMES

MOST_RANK = 65536  # wider than any layer
MOST_ALPHA = 1e6  # a LoRA's strength; far beyond, its weights leave the range of bf16
MOST_STRENGTH = 100.0  # times the LoRA as it was trained
MOST_SHIFT = 1000.0  # all steps are noise from there on, and clean below its inverse

# The largest sizes of any model that could be meant: what lies beyond is a slip or an attack, and to build such a model
# would take minutes.
_LARGEST = {
    **{"dim": 1 << 16, "ffn_dim": 1 << 18, "num_heads": 1024, "num_layers": 256, "in_dim": 4096, "out_dim": 4096},
    **{"freq_dim": 1 << 16, "text_dim": 1 << 16, "text_len": 1 << 16, "patch_size": 1 << 16, "eps": 1.0},
}
# Diffusers' names in transformer/config.json -> Wan's names.
_DIFFUSERS_NAMES = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the DiT (Wan 2.1, arXiv 2503.20314); the defaults are common to all its text-to-video models.

    Raises:
        InputError: a size below 1 or absurdly large, `dim` not divisible by `num_heads`, or an odd head width.
    """

    dim: int  # channels of a token
    ffn_dim: int  # inner width of the feed-forward part
    num_heads: int
    num_layers: int
    in_dim: int = 16  # latent channels in
    out_dim: int = 16  # latent channels out
    freq_dim: int = 256  # width of the sinusoidal time embedding
    text_dim: int = 4096  # width of the text encoder's output
    text_len: int = 512  # tokens of a prompt, padding included
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of the latent in one token
    eps: float = 1e-6  # of all normalisations

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), _LARGEST[field.name]
            entries = value if isinstance(value, tuple) else (value,)
            if min(entries) <= 0:
                raise InputError(f"model.{field.name}: must be positive, got {shown(value, 40)}")
            if max(entries) > most:
                raise InputError(f"model.{field.name}: must be at most {most}, got {shown(value, 40)}")
        if self.dim % self.num_heads:
            raise InputError(f"model.dim: {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.patch_size != (1, 2, 2):
            raise InputError(f"model.patch_size: must be [1, 2, 2], as of all Wan 2.1, got {list(self.patch_size)}")
        if self.freq_dim % 2:
            raise InputError(f"model.freq_dim: must be even (sines and cosines), got {self.freq_dim}")
        if self.head_dim % 2:
            raise InputError(
                f"model.dim: {self.dim} / num_heads {self.num_heads} gives the odd head width {self.head_dim}; "
                "rotary positions turn pairs of channels, so it must be even"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, D."""
        return self.dim // self.num_heads

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], where: str = "model") -> ModelConfig:
        """Reads Wan's `config.json` (or Diffusers' `transformer/config.json`), already parsed.

        Keys that are left out (Wan's file lacks patch_size and text_dim) take the defaults; keys that are not sizes
        (`_class_name` and the like) are ignored. `where` is the prefix of field names in messages.

        Raises:
            InputError: another model type than t2v, normalisations switched off, or a size missing or of a wrong type.
        """
        _refuse_other_models(mapping, where)
        sizes = {_DIFFUSERS_NAMES.get(key, key): value for key, value in mapping.items()}
        width = mapping.get("attention_head_dim")
        heads = sizes.get("num_heads")
        if "dim" not in sizes and isinstance(width, int) and isinstance(heads, int):
            sizes["dim"] = width * heads
        names = {field.name for field in fields(cls)}
        return build(cls, {key: value for key, value in sizes.items() if key in names}, where)


def _refuse_other_models(mapping: Mapping[str, object], where: str) -> None:
    model_type = mapping.get("model_type", "t2v")
    if model_type != "t2v" or mapping.get("added_kv_proj_dim") is not None:
        found = repr(model_type) if model_type != "t2v" else "an image-to-video transformer"
        raise InputError(f"{where}.model_type: got {found}; only text-to-video models (t2v) are supported")
    for name in ("qk_norm", "cross_attn_norm"):
        if not mapping.get(name, True):
            raise InputError(f"{where}.{name}: got {mapping[name]}; only models with {name} are supported")


# Wan-AI/Wan2.1-T2V-1.3B and Wan-AI/Wan2.1-T2V-14B.
WAN_1_3B = ModelConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


@dataclass(frozen=True)
class ModelKwargs:
    """The YAML section `model_kwargs`: attention window, schedule shift and sinks.

    Raises:
        InputError: a value out of range; what a window must hold beside its sinks is checked where blocks are known.
    """

    local_attn_size: int = -1  # latent frames that a block sees, sinks and itself included; -1: all
    timestep_shift: float = 5.0  # s in sigma = s u / (1 + (s - 1) u)
    sink_size: int = 0  # first latent frames of the video that stay in the window
    ema_sink_alpha: float | None = None  # what sinks keep of themselves as frames leave (Reward Forcing: 0.999)
    rolling_sink: bool = False  # old frames give way to the first ones, to and fro (Rolling Sink)

    def __post_init__(self) -> None:
        if self.local_attn_size != -1 and self.local_attn_size < 1:
            raise InputError(
                f"model_kwargs.local_attn_size: got {self.local_attn_size}; use -1 (all frames) or a positive number "
                "of latent frames"
            )
        if self.timestep_shift <= 0:
            raise InputError(
                f"model_kwargs.timestep_shift: must be above 0 (published: 5.0), got {self.timestep_shift}"
            )
        if not 1 / MOST_SHIFT <= self.timestep_shift <= MOST_SHIFT:
            raise InputError(
                f"model_kwargs.timestep_shift: must be from {1 / MOST_SHIFT:g} to {MOST_SHIFT:g} (published: 5.0), got "
                f"{self.timestep_shift}"
            )
        require_range("model_kwargs.local_attn_size", self.local_attn_size, -1, MOST_FRAMES)
        if self.ema_sink_alpha is not None and not 0 < self.ema_sink_alpha < 1:
            raise InputError(
                f"model_kwargs.ema_sink_alpha: must be above 0 and below 1 (published: 0.999), got "
                f"{self.ema_sink_alpha}; or leave it out"
            )
        require_range("model_kwargs.sink_size", self.sink_size, 0, MOST_FRAMES, "latent frames")


@dataclass(frozen=True)
class AdapterConfig:
    """The YAML section `adapter`; dropout, dtype, verbose and apply_to_critic matter to training alone, since a LoRA
    is merged in float32 here."""

    type: Literal["lora"] = "lora"
    rank: int | None = None  # checked against the file's; None: whatever that is
    alpha: float | None = None  # the merged weight is W + alpha / rank * B A; None: the file's, or its rank
    dropout: float = 0.0
    dtype: str = "bfloat16"
    verbose: bool = False
    apply_to_critic: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None:
            require_range("adapter.rank", self.rank, 1, MOST_RANK)
        if self.alpha is not None and self.alpha <= 0:
            raise InputError(f"adapter.alpha: must be above 0, got {self.alpha}")
        if self.alpha is not None and self.alpha > MOST_ALPHA:
            raise InputError(f"adapter.alpha: must be {MOST_ALPHA:g} or less, got {self.alpha}")


@dataclass(frozen=True)
class LoraConfig:
    """An entry of the YAML list `loras`: one more LoRA to merge, with what its file says of rank and alpha."""

    path: str
    strength: float = 1.0  # times B A as the file has it; below 0 the other way

    def __post_init__(self) -> None:
        if not -MOST_STRENGTH <= self.strength <= MOST_STRENGTH:
            raise InputError(
                f"loras: strength must be from {-MOST_STRENGTH:g} to {MOST_STRENGTH:g} (1: as trained), got "
                f"{self.strength:g} for {shown(self.path)}"
            )
