"""The moving picture of the README (shapes/demo_picture.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shapes.demo_picture import main
from utils.errors import InputError
from utils.video import VideoWriter


def test_videos_stand_side_by_side_above_their_captions(tmp_path: Path) -> None:
    paths = []
    for number, colour in enumerate(((250, 0, 0), (0, 0, 250))):
        path = tmp_path / f"{number}.mp4"
        with VideoWriter(path, 48, 32) as writer:
            writer.write(np.full((5, 32, 48, 3), colour, np.uint8))
        path.with_suffix(".json").write_text(json.dumps({"prompts": ["A ball.", "It grows."]}))
        paths.append(str(path))
    out = tmp_path / "demo.webp"
    assert main([*paths, "--out", str(out), "--columns", "2"]) == 0
    picture = Image.open(out)
    assert picture.n_frames == 5 or picture.n_frames == 1  # equal frames may be joined
    left, right = (picture.convert("RGB").getpixel((x, 30)) for x in (picture.width // 4, 3 * picture.width // 4))
    assert left[0] > 200 > left[2] and right[2] > 200 > right[0]
    (tmp_path / "0.json").write_text("{}")
    with pytest.raises(InputError, match=r"videos: .*0.json has no prompts"):
        main([*paths, "--out", str(out)])
    (tmp_path / "0.json").write_text('{"prompts": []}')
    with VideoWriter(tmp_path / "1.mp4", 48, 32) as writer:
        writer.write(np.zeros((4, 32, 48, 3), np.uint8))
    with pytest.raises(InputError, match=r"videos: they have 5, 4 frames; give videos of one length"):
        main([*paths, "--out", str(out)])
