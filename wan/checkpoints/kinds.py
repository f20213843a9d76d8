"""What names and shapes say of a file: which model it is of, of what sizes, and whether any of its tensors are missing.

This file reads no file; see `wan.checkpoints.identify`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from torch import Tensor

from utils.errors import InputError, shown
from wan.checkpoints.diffusers_layout import to_wan
from wan.checkpoints.files import identify_hint
from wan.checkpoints.published import BACKBONES
from wan.checkpoints.text_names import WAN_IN_BLOCK, to_transformers
from wan.checkpoints.vae_names import to_diffusers
from wan.config import ModelConfig

Model = Literal["transformer", "VAE", "text encoder", "preview decoder"]
Shapes = Mapping[str, Sequence[int]]

VAE_TENSORS = 194
PUBLISHED = {(one.sizes.dim, one.sizes.ffn_dim, one.sizes.num_layers): one.name for one in BACKBONES}
PUBLISHED[3072, 14336, 30] = "Wan 2.2 TI2V 5B"  # which is not supported
HEAD_DIM = 128  # of all published transformers; no tensor's shape shows it
# Names that other models of the same family have beside the text-to-video model's, and what they are.
OTHER_TRANSFORMERS = {
    "img_emb.": "image to video",
    "condition_embedder.image_embedder.": "image to video",
    "vace_": "VACE",
    "control_adapter.": "camera control",
    "ref_conv.": "a reference image",
    "motion_encoder.": "Animate",
    "face_adapter.": "Animate",
    "audio_": "speech to video",
}
BLOCK_NUMBER = re.compile(r"(?:blocks|encoder\.block)\.(\d+)\.")


@dataclass(frozen=True)
class ModelFile:
    """The model whose tensors a file holds; names are those that the loaders use, whatever the file has."""

    model: Model
    layout: str  # whose names the file has
    sizes: Mapping[str, int]
    missing: Sequence[str]
    unexpected: Sequence[str]
    published: str | None  # which published model has these sizes
    variant: str | None = None  # what makes it another model than the text-to-video one

    @property
    def usable(self) -> bool:
        """Whether the loaders take it."""
        return not self.missing and not self.unexpected and self.variant is None


def model_file(shapes: Shapes) -> ModelFile | None:
    """The model whose tensors have these bare names and shapes (scales left out), or None."""
    wan = to_wan(shapes)
    if "patch_embedding.weight" in wan and any(name.startswith("blocks.") for name in wan):
        return _transformer(shapes, wan)
    if {"decoder.conv1.weight", "decoder.conv_in.weight"} & set(shapes) and len(shapes) > VAE_TENSORS // 2:
        return _vae(shapes)
    text = to_transformers(shapes)
    if any(name.startswith("encoder.block.") for name in text):
        return _text_encoder(shapes, text)
    if "decoder.1.weight" in shapes and "decoder.22.weight" in shapes:
        wide = "decoder.1.weight"
        sizes = {"latent channels": shapes[wide][1] if len(shapes[wide]) > 1 else 0}
        return ModelFile(
            "preview decoder", "TAEHV", sizes, (), (), "taew2_1" if sizes["latent channels"] == 16 else None
        )
    return None


def transformer_sizes(shapes: Shapes) -> dict[str, int]:
    """What Wan's names and shapes show of a transformer's sizes, under the names of ModelConfig."""
    axes = {
        "dim": ("patch_embedding.weight", 0),
        "in_dim": ("patch_embedding.weight", 1),
        "ffn_dim": ("blocks.0.ffn.0.weight", 0),
        "freq_dim": ("time_embedding.0.weight", 1),
        "text_dim": ("text_embedding.0.weight", 1),
    }
    sizes = {size: int(shapes[name][axis]) for size, (name, axis) in axes.items() if axis < len(shapes.get(name, ()))}
    sizes["num_layers"] = blocks_in(shapes)
    head, patch = shapes.get("head.head.weight", ()), shapes.get("patch_embedding.weight", ())[2:]
    if head and patch and math.prod(patch):
        sizes["out_dim"] = head[0] // math.prod(patch)
    return sizes


def blocks_in(shapes: Shapes) -> int:
    """The number of transformer blocks that names tell of."""
    return len({match[1] for match in map(BLOCK_NUMBER.match, shapes) if match is not None})


def require_sizes(state: Mapping[str, Tensor], sizes: ModelConfig, source: Path, said_by: str) -> None:
    """Raises InputError where a file is of another model, or of other sizes than the transformer's configuration says.

    A model is built only after that, so that a size that was mistyped does not take minutes to be found out.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    held = model_file(shapes)
    if held is not None and (held.model != "transformer" or held.variant is not None):
        what = held.variant or f"a {held.model}"
        raise InputError(
            f"{shown(source)} is of another model ({what}); wanted is a text-to-video transformer of Wan 2.1. "
            f"{identify_hint(source)}"
        )
    found = transformer_sizes(shapes)
    other = [name for name, size in found.items() if size and size != getattr(sizes, name)]
    if other:
        told = "; ".join(f"{name} is {getattr(sizes, name)} there and {found[name]} in the file" for name in other)
        raise InputError(
            f"{shown(source)} does not fit {said_by}: {told}. Check that the file and the model (its config.json, "
            f"model_name) belong together. {identify_hint(source)}"
        )


def transformer_names(layers: int) -> list[str]:
    """The names of all tensors of a text-to-video transformer."""
    both, linear = ("weight", "bias"), ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    tops = [
        f"{layer}.{leaf}" for layer in ("patch_embedding", *linear, "time_projection.1", "head.head") for leaf in both
    ]
    within = [f"{layer}.{leaf}" for layer in ("ffn.0", "ffn.2", "norm3") for leaf in both] + ["modulation"]
    for attention in ("self_attn", "cross_attn"):
        within += [f"{attention}.{part}.{leaf}" for part in "qkvo" for leaf in both]
        within += [f"{attention}.{part}.weight" for part in ("norm_q", "norm_k")]
    return [*tops, "head.modulation", *(f"blocks.{i}.{name}" for i, name in product(range(layers), within))]


def _transformer(shapes: Shapes, wan: Shapes) -> ModelFile:
    sizes = transformer_sizes(wan)
    wanted = transformer_names(sizes["num_layers"])
    missing, unexpected = _differences(wan, wanted)
    key = sizes.get("dim", 0), sizes.get("ffn_dim", 0), sizes["num_layers"]
    variant = next((kind for mark, kind in OTHER_TRANSFORMERS.items() if any(mark in name for name in shapes)), None)
    channels = [sizes[name] for name in ("in_dim", "out_dim") if name in sizes]
    if variant is None and len(set(channels)) == 2:
        variant = f"a model with {channels[0]} latent channels in and {channels[1]} out"
    layout = "Wan" if wan.keys() == shapes.keys() else "Diffusers"
    published = PUBLISHED.get(key)
    return ModelFile("transformer", layout, sizes, missing, unexpected, published, variant)


def _vae(shapes: Shapes) -> ModelFile:
    names = to_diffusers(shapes)
    sizes: dict[str, int] = {}
    for size, name, axis in (("width", "encoder.conv_in.weight", 0), ("latent channels", "decoder.conv_in.weight", 1)):
        if axis < len(names.get(name, ())):
            sizes[size] = names[name][axis]
    few = VAE_TENSORS - len(names)
    missing = [f"{few} of its {VAE_TENSORS} tensors"] if few > 0 else []
    extra = [f"{-few} more than its {VAE_TENSORS} tensors"] if few < 0 else []
    published = "Wan 2.1's" if tuple(sizes.values()) == (96, 16) else None
    variant = "Wan 2.2's VAE" if sizes.get("latent channels") == 48 else None
    layout = "Diffusers" if "decoder.conv_in.weight" in shapes else "Wan"
    return ModelFile("VAE", layout, sizes, missing, extra, published, variant)


def _text_encoder(shapes: Shapes, text: Shapes) -> ModelFile:
    layers = blocks_in(text)
    leaves = [f"{name}.weight" for name in WAN_IN_BLOCK.values()]
    wanted = [f"encoder.block.{i}.{leaf}" for i, leaf in product(range(layers), leaves)]
    wanted += ["shared.weight", "encoder.embed_tokens.weight", "encoder.final_layer_norm.weight"]
    missing, unexpected = _differences(text, wanted)
    embedding = text.get("shared.weight", ())
    sizes = {"layers": layers}
    if len(embedding) == 2:
        sizes |= {"tokens": embedding[0], "width": embedding[1]}
    published = "UMT5-XXL" if tuple(sizes.values()) == (24, 256384, 4096) else None
    layout = "transformers" if any(name.startswith("encoder.") for name in shapes) else "Wan"
    variant = "a T5 without a table of positions in every layer (not UMT5)" if _is_plain_t5(missing) else None
    return ModelFile("text encoder", layout, sizes, missing, unexpected, published, variant)


def _is_plain_t5(missing: Sequence[str]) -> bool:
    return bool(missing) and all("relative_attention_bias" in name for name in missing)


def _differences(found: Shapes, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    known = set(wanted)
    return [name for name in wanted if name not in found], [name for name in found if name not in known]
