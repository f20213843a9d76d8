"""A deeper transformer that computes what a shallower one does, to go on training from.

Block expansion (LLaMA Pro, arXiv 2401.02415): between the layers come copies of them whose outputs are zero, so that
at first nothing is added to what passes through; training fills them. A copy knows already what to look at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

OUTPUTS = ("self_attn.o.", "cross_attn.o.", "ffn.2.")  # of a layer, which add to what passes through


def layers_of(weights: Mapping[str, Tensor]) -> int:
    """How many layers a transformer's tensors are of."""
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in weights)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def deepened(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The tensors of a transformer of `layers` layers with the same function; the new ones stand evenly among the old,
    each behind the one that it is a copy of."""
    old = layers_of(weights)
    order = [layer for layer in range(old) for _ in range(_copies(layer, old, layers - old))]
    found = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    for place, layer in enumerate(order):
        prefix, new = f"blocks.{layer}.", place > 0 and order[place - 1] == layer
        for name, value in weights.items():
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                zero = new and inner.startswith(OUTPUTS)
                found[f"blocks.{place}.{inner}"] = torch.zeros_like(value) if zero else value.clone()
    return found


def _copies(layer: int, old: int, more: int) -> int:
    """How often a layer stands in the deeper transformer."""
    return 1 + (layer + 1) * more // old - layer * more // old
