"""Names in LoRA files: which layer a tensor belongs to, and what it is of it.

Known are the names of Wan itself, of peft (`base_model.model.`), of Diffusers (`transformer.`, attn1.to_q), of ComfyUI
(`diffusion_model.`) and of kohya's trainers (`lora_unet_blocks_0_self_attn_q`, dots written as underscores), with A/B
or down/up for the two factors. This file knows no arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from wan.checkpoints.diffusers_layout import diffusers_layer, wan_name
from wan.checkpoints.state import strip_wrappers

Role = Literal["A", "B", "alpha", "diff", "diff_b"]

# Prefixes of names, and who writes them.
PREFIXES = {
    "base_model.model.": "peft",
    "diffusion_model.": "ComfyUI",
    "transformer.": "Diffusers",
    "unet.": "Diffusers",
}
KOHYA = re.compile(r"(?:lora_unet|lora_transformer|lora_dit|lycoris)_+(?P<layer>[^.]+)")
# `.lora_A.weight`, with the adapter's name between (`.lora_A.default.weight`), or bare; `.lora.down.weight`.
PART = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<factor>A|B|down|up)(?:(?:\.[^.]+)?\.weight)?"
    r"|lora(?:_linear_layer)?\.(?P<older>down|up)\.weight"
    r"|(?P<other>alpha|diff|diff_b))"
)
# What other methods store beside or instead of the two factors, and their names.
OTHER_METHODS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a Tucker decomposition",
    "lora_B.bias": "biases of factors",
    "lora_embedding": "a LoRA of an embedding",
    "oft_": "OFT",
    "lora_te": "a LoRA of the text encoder",
}


@dataclass(frozen=True)
class Part:
    """One tensor of a LoRA: A [rank, in], B [out, rank], alpha [], or a difference of a weight or a bias."""

    layer: str
    role: Role


@dataclass(frozen=True)
class LayerNames:
    """The layers of a model (names without `.weight`) under the names that LoRA files have for them."""

    layers: frozenset[str]
    flat: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> LayerNames:
        """From the names of a model's tensors."""
        layers = frozenset(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
        flat = {spelt.replace(".", "_"): layer for layer in layers for spelt in (layer, diffusers_layer(layer))}
        return cls(layers, flat)

    def part(self, name: str) -> Part | None:
        """What a tensor of this name is, or None if the name is not known; its layer may be none of the model's."""
        match = PART.fullmatch(name)
        if match is None:
            return None
        factor = match["factor"] or match["older"] or match["other"]
        roles: dict[str, Role] = {"down": "A", "up": "B", "A": "A", "B": "B", "alpha": "alpha"}
        role = roles.get(factor, "diff" if factor == "diff" else "diff_b")
        return Part(self._layer(match["layer"]), role)

    def _layer(self, name: str) -> str:
        kohya = KOHYA.fullmatch(name)
        if kohya is not None:
            return self.flat.get(kohya["layer"], kohya["layer"])
        bare = _bare(name)
        return bare if bare in self.layers else wan_name(f"{bare}.weight").removesuffix(".weight")


def _bare(name: str) -> str:
    """A layer's name without the prefixes of LoRA files and the wrappers around and inside it."""
    stripped = strip_wrappers(name)
    for prefix in PREFIXES:
        stripped = stripped.removeprefix(prefix)
    return stripped if stripped == name else _bare(stripped)


def naming(names: Iterable[str]) -> str:
    """Whose names these are, by the first of them that tells."""
    for name in names:
        if KOHYA.match(name):
            return "kohya"
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            return PREFIXES[prefix]
    return "Diffusers without a prefix" if any(".attn1." in name for name in names) else "Wan"


def other_method(names: Iterable[str]) -> str | None:
    """The method other than LoRA that one of the names shows, or None."""
    return next((method for name in names for mark, method in OTHER_METHODS.items() if mark in name), None)
