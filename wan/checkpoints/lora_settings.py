"""How strong a LoRA is by what is stored beside its tensors: peft's adapter_config.json, or a safetensors header."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, shown
from wan.checkpoints.files import container_of, read_json
from wan.checkpoints.headers import safetensors_header

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # Diffusers' key in the header: peft's settings as JSON, with the model as prefix


@dataclass(frozen=True)
class LoraSettings:
    """peft's settings: r, lora_alpha, and patterns of layer names with values of their own."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rslora: bool  # the scale is alpha / sqrt(rank) (arXiv 2312.03732)
    source: Path

    @classmethod
    def beside(cls, path: Path) -> LoraSettings | None:
        """The settings beside the tensors of the file (or folder) `path`, or None. Raises InputError."""
        config = (path if path.is_dir() else path.parent) / CONFIG
        if config.is_file():
            return cls.from_mapping(read_json(config), config)
        if not path.is_file() or container_of(path) != "safetensors":
            return None
        stored = safetensors_header(path).metadata.get(METADATA)
        try:
            content = json.loads(stored) if stored is not None else None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            return None
        mapping = {key.removeprefix("transformer."): value for key, value in content.items()}
        return cls.from_mapping(mapping, path) if "lora_alpha" in mapping else None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], source: Path) -> LoraSettings:
        """From peft's keys. Raises InputError for another method than LoRA, or values that make no sense."""
        method = mapping.get("peft_type", "LORA")
        other = "DoRA" if mapping.get("use_dora") else None if method == "LORA" else shown(method, 40)
        if other is not None:
            raise InputError(f"{shown(source)}: the adapter is {other}; a LoRA is wanted.")
        rank, alpha = _number(mapping, "r", source), _number(mapping, "lora_alpha", source)
        patterns = [_pattern(mapping, key, source) for key in ("rank_pattern", "alpha_pattern")]
        return cls(int(rank), alpha, patterns[0], patterns[1], mapping.get("use_rslora") is True, source)

    def fits(self, ranks: Mapping[str, int]) -> bool:
        """Whether these ranks of layers are those of the settings; an adapter_config.json may be another file's."""
        return all(rank == _of(self.rank_pattern, layer, self.rank) for layer, rank in ranks.items())

    def scale(self, layer: str, rank: int) -> float:
        """By what B·A of a layer is multiplied."""
        alpha = _of(self.alpha_pattern, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _number(mapping: Mapping[str, object], key: str, source: Path) -> float:
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{shown(source)}: {key} must be a number above 0, got {shown(repr(value), 40)}.")
    return float(value)


def _pattern(mapping: Mapping[str, object], key: str, source: Path) -> dict[str, float]:
    pattern = mapping.get(key) or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{shown(source)}: {key} must map names of layers to numbers.")
    return {str(name): _number(pattern, name, source) for name in pattern}


def _of(pattern: Mapping[str, float], layer: str, default: float) -> float:
    """The value of the first name that the layer's ends with, as peft matches them, else the default."""
    return next((value for name, value in pattern.items() if re.search(rf"(^|\.){re.escape(name)}$", layer)), default)
