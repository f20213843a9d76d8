"""The moving picture of the README: videos side by side, each above its caption.

python -m shapes.demo_picture demo/shapes/*.mp4 --out docs/demo.webp
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils import command
from utils.errors import InputError
from utils.user_paths import read_json
from utils.video import read_frames

SCALE = 2
CAPTION = 34  # pixels
PAPER, INK = (250, 250, 248), (40, 40, 40)


def tile(frame: Image.Image, caption: str) -> Image.Image:
    """A frame, enlarged, above its caption."""
    width, height = frame.width * SCALE, frame.height * SCALE
    picture = Image.new("RGB", (width + 8, height + CAPTION + 8), PAPER)
    picture.paste(frame.resize((width, height), Image.Resampling.BICUBIC), (4, 4))
    lines = textwrap.fill(caption, 42)
    ImageDraw.Draw(picture).multiline_text((6, height + 6), lines, INK, ImageFont.load_default(11), spacing=1)
    return picture


def picture(paths: Sequence[Path], columns: int) -> list[Image.Image]:
    """Every frame of all videos side by side, `columns` a row, each with the caption in its metadata."""
    videos = [[Image.fromarray(frame) for frame in read_frames(path)] for path in paths]
    captions = [_captions(path.with_suffix(".json")) for path in paths]
    lengths = [len(frames) for frames in videos]
    if len(set(lengths)) > 1:
        raise InputError(f"videos: they have {', '.join(map(str, lengths))} frames; give videos of one length")
    frames = []
    for moment in zip(*videos, strict=True):
        tiles = [tile(frame, " / ".join(caption)) for frame, caption in zip(moment, captions, strict=True)]
        width, height = tiles[0].size
        sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), PAPER)
        for index, one in enumerate(tiles):
            sheet.paste(one, (index % columns * width, index // columns * height))
        frames.append(sheet)
    return frames


def _captions(path: Path) -> list[str]:
    """The prompts in a video's metadata. Raises InputError."""
    content = read_json(path, "videos", "metadata file of a video")
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, list):
        raise InputError(f"videos: {path} has no prompts; give videos of inference.py with the JSON beside them")
    return list(map(str, prompts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="a .webp or .gif")
    parser.add_argument("--columns", type=command.count, default=3)
    arguments = parser.parse_args(argv)
    if arguments.out.suffix not in (".webp", ".gif"):
        parser.error(f"--out: {arguments.out} is neither a .webp nor a .gif")
    first, *others = picture(arguments.videos, arguments.columns)
    first.save(arguments.out, save_all=True, append_images=others, duration=62, loop=0, quality=60, method=4)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
