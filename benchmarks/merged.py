"""What could be saved by one pass where there are two: python -m benchmarks.merged [--device cuda --resolution 480]

A block's clean pass and the first step of the next could share one forward over the tokens of both: the step needs the
clean keys of the same layer only. No operation is saved by that, and attentions stay two; only what lies between them
could run better on twice the tokens, and weights be read once. This measures that part both ways, all layers of it,
compiled as the engine compiles it: two calls over a block's tokens against one over two blocks' tokens. Their
difference is the most that a block could gain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.arguments import device_here, multiple_of, result_file, store
from benchmarks.dit import BLOCK, LATENT_SIZES, model_config
from benchmarks.machine import facts, seconds
from benchmarks.steady import build_model
from utils import command
from wan.transformer.layers import TransformerBlock
from wan.transformer.model import CausalWanModel

LayerPass = Callable[[TransformerBlock, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def around_attention(
    block: TransformerBlock, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor, attended: Tensor
) -> tuple[Tensor, ...]:
    """A layer with `attended` [1, L, H, D] for what its attentions return; x [1, L, dim]."""
    q, k, v = block.before_attention(x, time, cos, sin)
    x, cross = block.between_attentions(x, attended, time)
    return q, k, v, cross, block.after_attention(x, attended, time)


def layers_seconds(model: CausalWanModel, layer: LayerPass, grid: tuple[int, int], frames: int, repeat: int) -> float:
    """Seconds of all layers over `frames` latent frames."""
    config, device, dtype = model.config, model.device, model.dtype
    latents = torch.empty(1, frames, config.in_dim, *grid, device="meta")
    turn = model.rotation(latents, 0)
    tokens = turn.cos.shape[0]
    x = torch.randn(1, tokens, config.dim, device=device, dtype=dtype)
    attended = torch.randn(1, tokens, config.num_heads, config.head_dim, device=device, dtype=dtype)
    time = torch.randn(6, config.dim, device=device, dtype=dtype)

    def run() -> None:
        for block in model.layers():
            layer(block, x, time, turn.cos, turn.sin, attended)

    return seconds(run, device, repeat)


@torch.inference_mode()
def measure(model: CausalWanModel, grid: tuple[int, int], repeat: int) -> dict[str, float]:
    layer = torch.compile(around_attention, fullgraph=True, dynamic=False, options={"triton.cudagraphs": False})
    one, two = (1000 * layers_seconds(model, layer, grid, count * BLOCK, repeat) for count in (1, 2))
    return {"apart_ms": 2 * one, "merged_ms": two, "ratio": 2 * one / two, "most_saved_ms": 2 * one - two}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolution", default="480", choices=LATENT_SIZES)
    parser.add_argument("--layers", type=command.count, help="of a reduced model")
    parser.add_argument("--dim", type=multiple_of(64), help="of a reduced model, a multiple of 64")
    parser.add_argument("--repeat", type=command.count, default=5)
    parser.add_argument("--json", type=result_file, help="store the result here")
    arguments = parser.parse_args(argv)
    device: torch.device = arguments.device
    config = model_config(arguments, device)
    made = measure(build_model(config, device), LATENT_SIZES[arguments.resolution], arguments.repeat)
    given = ["benchmarks.merged", *(sys.argv[1:] if argv is None else argv)]
    sizes = {"resolution": arguments.resolution, "layers": config.num_layers, "dim": config.dim}
    content = {**facts(device, given), **sizes, **made}
    print("\n".join(f"{name}: {value}" for name, value in content.items()))
    store(content, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
