"""The benchmarks of the decoder, of whole clips and of memory print and store what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, memory, tables, vae, writer
from pipeline.planning.plan import Planner
from tests.conftest import ROOT
from utils.video import probe
from wan.config import WAN_1_3B
from wan.vae.vae import VAE

SMALL = ["--device", "cpu", "--resolution", "tiny", "--width", "8", "--repeat", "1"]


def test_the_decoder_against_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae.main([*SMALL, "--frames", "6", "--json", str(tmp_path / "vae.json")]) == 0
    content = json.loads((tmp_path / "vae.json").read_text())
    theirs, ours = content["rows"]
    assert (theirs["decoder"], ours["decoder"]) == ("Diffusers", "ours")
    assert theirs["decibel"] > 110 and ours["decibel"] > 100
    assert ours["ratio"] == pytest.approx(theirs["clip_ms"] / ours["clip_ms"])
    assert ours["peak_bytes"] < theirs["peak_bytes"]
    assert content["device"] and content["torch"] == torch.__version__
    assert tables.vae(content).splitlines()[3].startswith("| tiny | ours | eager | float32 |")
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_writer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = writer.moving_frames(13, 64, 96)
    assert frames.shape == (13, 64, 96, 3)
    assert all(not torch.equal(one, other) for one, other in pairwise(frames))
    made = writer.write_file(frames, "ultrafast", False, tmp_path)
    assert probe(tmp_path / "clip.mp4").frames == 13 and made.size == (tmp_path / "clip.mp4").stat().st_size
    assert made.fps > 0 and (sys.platform == "win32" or made.cpu_ms > 0)
    assert writer.main(["--resolution", "480", "--preset", "ultrafast", "--frames", "2"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [["480", "ultrafast"]]


def test_random_weights_give_a_video_within_its_range() -> None:
    made = vae.random_vae(8, torch.device("cpu"), torch.float32)
    video = made.decoder().decode(torch.randn(1, 3, 16, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert 0.05 < video.std() < 0.6
    assert (video.abs() == 1).float().mean() < 0.05


def test_whole_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--frames", "9", "--dim", "64", "--layers", "1", "--policy", "packed", "--profile"]
    assert end_to_end.main([*SMALL, *given, "--json", str(tmp_path / "clip.json")]) == 0
    content = json.loads((tmp_path / "clip.json").read_text())
    without, overlapped = content["rows"]
    assert tables.end_to_end(content).splitlines()[3].startswith("| tiny | packed | eager | yes |")
    assert (without["overlap"], overlapped["overlap"]) == (False, True)
    assert without["won_ms"] is None
    assert overlapped["won_ms"] == pytest.approx(without["total_ms"] - overlapped["total_ms"])
    for row in (without, overlapped):
        assert row["fps"] == pytest.approx(33 / row["total_ms"] * 1000)
        assert 0 < row["first_frame_ms"] < row["total_ms"]
        assert row["steady_fps"] > 0
    assert "overlap saved" in capsys.readouterr().out


ALONE = """
import sys
for name in ("transformers", "imageio_ffmpeg", "omegaconf", "diffusers"):
    sys.modules[name] = None
from benchmarks import end_to_end
arguments = "--device cpu --resolution tiny --width 8 --repeat 1 --frames 6 --dim 64 --layers 1 --policy full"
sys.exit(end_to_end.main(arguments.split()))
"""


def test_whole_clips_without_text_encoder_and_video_encoder() -> None:
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no file" in done.stdout


def test_what_fits_which_card() -> None:
    planner = Planner(WAN_1_3B, VAE.published(torch.bfloat16), torch.bfloat16)
    small, large = memory.rows(planner, [480], [4, 80])
    assert not small.fits and large.fits and large.strategy.on_side_stream
    assert small.peak_gib < large.peak_gib
    header, _, body = memory.table([small, large]).splitlines()
    assert header == "| rows of pixels | 4 GB | 80 GB |"
    assert body.startswith("| 480 | no (") and body.endswith("GiB, fast |")
