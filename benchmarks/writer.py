"""How fast frames become a file: python -m benchmarks.writer [--resolution 480,1080 --preset ultrafast,veryfast]

The writer alone, with moving content without noise; nothing is generated. `--stream` writes files that can be watched
while they grow. What writes faster than a model makes frames is never the bottleneck, since it works beside it. CPU
time is that of the encoder alone, over all its threads: it means something on a busy machine, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arguments import some_of
from benchmarks.dit import BLOCK
from benchmarks.machine import facts
from pipeline.config.config import InferenceConfig
from utils import command
from utils.video import VideoWriter, to_uint8
from wan.geometry import pixel_frames

PRESETS = "ultrafast,superfast,veryfast,faster"


def moving_frames(count: int, height: int, width: int) -> Tensor:
    """uint8 [count, H, W, 3]: a smooth picture under a camera that pans, 3 pixels a frame, and a square that moves the
    other way."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, height // 32, (width + 3 * count) // 32, generator=generator)
    scene = F.interpolate(coarse, size=(height, width + 3 * count), mode="bicubic").clamp(-1, 1)[0]
    views = torch.stack([scene[:, :, 3 * i : 3 * i + width] for i in range(count)])
    side = height // 4
    for i, view in enumerate(views):
        left = (width - side) * (count - i) // count
        view[:, side : 2 * side, left : left + side] = torch.tensor([0.8, -0.5, 0.1])[:, None, None]
    return to_uint8(views)


@dataclass(frozen=True)
class Written:
    """One file."""

    fps: float  # from the first frame to the name
    cpu_ms: float  # a frame
    size: int  # bytes


def write_file(frames: Tensor, preset: str, stream: bool, folder: Path) -> Written:
    """Write frames [count, H, W, 3] block by block."""
    _, height, width, _ = frames.shape
    path = folder / "clip.mp4"
    begun, before = time.perf_counter(), os.times()
    with VideoWriter(path, width, height, preset=preset, stream=stream) as writer:
        for block in frames.split(pixel_frames(BLOCK, first=False)):
            writer.write(block)
    after = os.times()
    work = after.children_user + after.children_system - before.children_user - before.children_system
    fps = len(frames) / (time.perf_counter() - begun)
    return Written(fps, 1000 * work / len(frames), path.stat().st_size)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--resolution",
        type=some_of(("480", "720", "1080")),
        default="480,1080",
        help="480, 720 or 1080; several with commas",
    )
    parser.add_argument("--preset", default=PRESETS, help="of x264; several with commas")
    parser.add_argument("--frames", type=command.count, default=81)
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args(argv)
    about = facts(torch.device("cpu"), ["benchmarks.writer", *(sys.argv[1:] if argv is None else argv)])
    print(f"{about['device']}: {arguments.frames} frames, {'growing' if arguments.stream else 'ordinary'} files")
    print(f"{'rows':6}{'preset':12}{'frames/s':>10}{'CPU ms':>9}{'MiB':>8}", flush=True)
    for resolution in arguments.resolution.split(","):
        height, width = InferenceConfig(resolution=int(resolution)).pixel_size
        frames = moving_frames(arguments.frames, height, width)
        for preset in arguments.preset.split(","):
            with tempfile.TemporaryDirectory() as folder:
                made = write_file(frames, preset, arguments.stream, Path(folder))
            print(f"{resolution:6}{preset:12}{made.fps:10.1f}{made.cpu_ms:9.1f}{made.size / 2**20:8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
