"""How far a transformer in training obeys each kind of command.

    python -m shapes.obedience --work FOLDER --clips 192

After true frames the model draws two blocks under a command, as the product does. Their latents are compared with what
the command makes of the film, and with the film in which nobody has said anything. It takes a minute, and tells which
commands are not understood yet long before storyboards come out right. The clips are of training's combinations, by a
seed of their own.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shapes.data import BLOCK, Clip, as_video, make_clip, pixel_frame
from shapes.dit import Flow, TextEncoder
from shapes.drawing import render
from shapes.film import film
from shapes.forward import Plan
from shapes.linear import LinearCode
from shapes.reading import trained_text_encoder
from shapes.rollout import draw
from shapes.runs import Stage, averaged
from shapes.vae import fit_linear_code
from utils import command
from wan.transformer.model import CausalWanModel

SEED = 51
BLOCKS = 2
BATCH = 16


@torch.no_grad()
def errors(
    model: CausalWanModel, code: LinearCode, text: TextEncoder, clips: Sequence[Clip], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean square errors [clips, BLOCKS] of what is drawn against the film and against the one without the command, and
    of these against each other. All clips have their only switch at the same latent frame."""
    (switch,) = clips[0].switches
    told = code.encode(torch.stack([as_video(clip.video) for clip in clips]))
    untold = code.encode(torch.stack([as_video(render(film(clip.scene, clip.hidden, clip.frames))) for clip in clips]))
    plan, generator = Plan(BLOCKS, prefix=switch), torch.Generator().manual_seed(seed)
    *_, drawn = draw(model, told[:, :switch], text([clip.captions[1] for clip in clips]), plan, generator)
    told, untold = told[:, switch:], untold[:, switch:]
    pairs = ((drawn, told), (drawn, untold), (told, untold))
    found = ((a - b).square().unflatten(1, (BLOCKS, BLOCK)).flatten(2).mean(2) for a, b in pairs)
    return cast("tuple[Tensor, Tensor, Tensor]", tuple(found))


def table(rows: dict[str, list[Tensor]]) -> str:
    """`rows`: errors [3, BLOCKS] of every clip, by verb."""
    lines = [
        "command     clips   from the film   from the film without it   between the films   (mean square, by block)"
    ]
    for verb, found in [*sorted(rows.items()), ("all", [one for some in rows.values() for one in some])]:
        pairs = ["  ".join(f"{value:.2f}" for value in row) for row in torch.stack(found).mean(0).tolist()]
        lines.append(f"{verb:12}{len(found):5}   {pairs[0]:16}{pairs[1]:27}{pairs[2]}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("demo/shapes_training"), help="where training keeps its states"
    )
    parser.add_argument("--clips", type=command.count, default=192)
    parser.add_argument("--switch", type=command.count, default=2 * BLOCK, help="latent frame")
    parser.add_argument("--threads", type=command.count, default=2)
    args = parser.parse_args(argv)
    if args.switch % BLOCK:
        parser.error(f"--switch {args.switch}: a switch is at the first frame of a later block, a multiple of {BLOCK}")
    torch.set_num_threads(args.threads)
    text, code = trained_text_encoder(args.work), fit_linear_code(args.work)
    model = cast(Flow, averaged(Stage(args.work, "dit", 0).path, Flow())).model
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for first in range(0, args.clips, BATCH):
        numbers = range(first, min(first + BATCH, args.clips))
        frames = pixel_frame(args.switch + BLOCKS * BLOCK)
        clips = [make_clip(SEED, number, (args.switch,), frames) for number in numbers]
        for clip, *found in zip(clips, *errors(model, code, text, clips, first), strict=True):
            rows[clip.commands[0].verb].append(torch.stack(found))
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
