"""Going on from an image or a video, through the script and files."""

from __future__ import annotations

import json
import subprocess
import wave
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import inference
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import prefix_files
from pipeline.runtime.loading import load_vae
from pipeline.runtime.prefix import check_prefix, load_prefix
from tests.small_checkpoints import SmallCheckpoints
from utils.errors import InputError
from utils.video import VideoWriter, read_frames
from wan.vae.vae import VAE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def overrides(checkpoints: SmallCheckpoints, tmp_path: Path) -> list[str]:
    settings = {
        "model_root": checkpoints.root,
        "output_folder": tmp_path / "videos",
        "inference_iter": 1,
        "num_output_frames": 9,
        "resolution": "[32,48]",
        "dummy_forcing": "off",
        "adapter": "null",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def smooth_video(path: Path, frames: int, height: int = 32, width: int = 48, fps: float = 16) -> Path:
    y, x = np.mgrid[:height, :width]
    video = np.stack(
        [
            np.stack([128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos(y / 11) for c in range(3)], -1)
            for t in range(frames)
        ]
    )
    with VideoWriter(path, width, height, fps, crf=0) as writer:
        writer.write(video.astype(np.uint8))
    return path


def image(path: Path, height: int = 32, width: int = 48) -> Path:
    source = smooth_video(path.with_suffix(".mp4"), 1, height, width)
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-i", source, path], check=True)
    return path


def small_config(name: str, overrides: list[str], **changes: object) -> InferenceConfig:
    return replace(load_config(ROOT / "configs" / f"{name}.yaml", overrides), **changes)


def roundtrip(vae: VAE, frames: np.ndarray) -> np.ndarray:
    video = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    decoded = vae.decoder().decode(vae.encode(video))[0]
    return ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).numpy()


def test_a_video_goes_on(overrides: list[str], tmp_path: Path) -> None:
    source = smooth_video(tmp_path / "given.mp4", 9)
    arguments = ["--config_path", str(ROOT / "configs/self_forcing_inference.yaml"), *overrides]
    assert inference.main([*arguments, f"start_from={source}", "video_crf=0"]) == 0
    (made,) = (tmp_path / "videos").glob("*.mp4")
    frames = read_frames(made)
    assert len(frames) == 33
    timings = json.loads(made.with_suffix(".json").read_text())["timings"]
    assert (timings["frames"], timings["generated_frames"], timings["prefix_blocks"]) == (33, 24, 1)
    assert timings["end_to_end_fps"] == pytest.approx(24 / timings["total_ms"] * 1000)
    config = small_config("self_forcing_inference", overrides)
    expected = roundtrip(load_vae(config, torch.device("cpu"), torch.float32), read_frames(source))
    with VideoWriter(tmp_path / "expected.mp4", 48, 32, crf=0) as writer:  # the same loss of colour resolution
        writer.write(np.floor(np.clip(expected, 0, 255) + 0.5).astype(np.uint8))
    assert np.abs(frames[:9].astype(int) - read_frames(tmp_path / "expected.mp4")).max() <= 2
    assert np.abs(frames[9:18].astype(int) - frames[:9]).mean() > 10


def test_an_image_begins_a_framewise_video(overrides: list[str], tmp_path: Path) -> None:
    source = image(tmp_path / "given.png")
    arguments = ["--config_path", str(ROOT / "configs/causal_forcing_framewise_inference.yaml"), *overrides]
    assert inference.main([*arguments, f"start_from={source}", "num_output_frames=4"]) == 0
    (made,) = (tmp_path / "videos").glob("*.mp4")
    assert len(read_frames(made)) == 13


def test_extra_leading_frames_are_left_out(
    overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config("self_forcing_inference", overrides)
    vae = load_vae(config, torch.device("cpu"), torch.float32)
    source = smooth_video(tmp_path / "given.mp4", 12)
    latents = load_prefix(source, config, vae)
    assert latents.shape == (1, 3, 16, 4, 6)
    assert "the first 3 frames" in caplog.text
    shorter = torch.from_numpy(read_frames(source)[3:].copy()).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    torch.testing.assert_close(latents, vae.encode(shorter))


@pytest.mark.parametrize(
    ("frames", "size", "changes", "message"),
    [
        (1, (32, 48), {}, "blocks of num_frame_per_block 3 need 9 or more; an image starts a video with frame-wise"),
        (33, (32, 48), {}, "leaves nothing to make of num_output_frames 9; use num_output_frames=12 or more"),
        (9, (48, 32), {}, "is 48 x 32 pixels .* set start_from_fit=true"),
    ],
)
def test_what_does_not_fit_is_refused(
    overrides: list[str], tmp_path: Path, frames: int, size: tuple[int, int], changes: dict[str, object], message: str
) -> None:
    config = small_config("self_forcing_inference", overrides, **changes)
    source = smooth_video(tmp_path / "given.mp4", frames, *size)
    with pytest.raises(InputError, match=f"start_from: .*{message}"):
        load_prefix(source, config, load_vae(config, torch.device("cpu"), torch.float32))


def test_another_size_is_fitted_on_request(overrides: list[str], tmp_path: Path) -> None:
    config = small_config("self_forcing_inference", overrides, start_from_fit=True)
    vae = load_vae(config, torch.device("cpu"), torch.float32)
    assert load_prefix(smooth_video(tmp_path / "given.mp4", 9, 96, 64), config, vae).shape == (1, 3, 16, 4, 6)


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_what_is_turned_begins_upright(overrides: list[str], tmp_path: Path, angle: int) -> None:
    """Phones write frames as the sensor has them, and how they are to be turned."""
    height, width = (48, 32) if angle % 180 else (32, 48)
    config = small_config("self_forcing_inference", overrides, resolution=(height, width))
    vae = load_vae(config, torch.device("cpu"), torch.float32)
    plain, turned, upright = (tmp_path / f"{name}.mp4" for name in ("plain", "turned", "upright"))
    smooth_video(plain, 9)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    subprocess.run([*command, "-display_rotation", str(angle), "-i", plain, "-c", "copy", turned], check=True)
    frames = np.rot90(read_frames(plain), angle // 90, (1, 2))
    with VideoWriter(upright, width, height, crf=0) as writer:
        writer.write(np.ascontiguousarray(frames))
    latents = load_prefix(turned, config, vae)
    assert latents.shape == (1, 3, 16, height // 8, width // 8)
    torch.testing.assert_close(latents, load_prefix(upright, config, vae), atol=0.05, rtol=0.05)


def test_another_speed_is_told(overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config("self_forcing_inference", overrides)
    vae = load_vae(config, torch.device("cpu"), torch.float32)
    load_prefix(smooth_video(tmp_path / "same.mp4", 9), config, vae)
    assert "times its speed" not in caplog.text
    load_prefix(smooth_video(tmp_path / "fast.mp4", 9, fps=30), config, vae)
    assert "fast.mp4 has 30 frames a second, the video 16, so that it begins at 0.53 times its speed" in caplog.text


def test_1080_rows_are_padded_to_1088() -> None:
    from pipeline.runtime.prefix import _padded

    video = torch.rand(1, 3, 1080, 32)
    padded = _padded(video, InferenceConfig(resolution=1080))
    assert padded.shape == (1, 3, 1088, 32)
    assert torch.equal(padded[:, :, 1087], video[:, :, 1079])


def test_files_that_cannot_be_used(overrides: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    config = small_config("self_forcing_inference", overrides)
    with pytest.raises(InputError, match=r"start_from: .*broken.mp4"):
        load_prefix(broken, config, load_vae(config, torch.device("cpu"), torch.float32))
    with pytest.raises(InputError, match=r"start_from: .*broken.mp4: is a text file"):
        check_prefix(broken, config)
    with pytest.raises(InputError, match=r"start_from: .* is a folder; give the image or video file in it"):
        prefix_files(replace(config, start_from=str(tmp_path)), 1)
    with pytest.raises(InputError, match=r"start_from: .*none.mp4 does not exist"):
        prefix_files(replace(config, start_from=str(tmp_path / "none.mp4")), 1)


def test_one_file_a_prompt(overrides: list[str], tmp_path: Path) -> None:
    source = image(tmp_path / "a.png")
    listed = tmp_path / "list.json"
    config = small_config("self_forcing_inference", overrides, start_from=str(listed))
    listed.write_text(json.dumps([str(source), None]))
    assert prefix_files(config, 2) == [source, None]
    with pytest.raises(InputError, match="names 2 files for 3 prompts"):
        prefix_files(config, 3)
    listed.write_text("{}")
    with pytest.raises(InputError, match="is not a list"):
        prefix_files(config, 1)


def test_a_file_that_cannot_be_used_is_told_before_anything_is_loaded(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with wave.open(str(tmp_path / "song.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    arguments = ["--config_path", str(ROOT / "configs/self_forcing_inference.yaml"), *overrides]
    for more in ([], ["--dry_run"]):
        assert inference.main([*arguments, *more, f"start_from={tmp_path / 'song.wav'}"]) == 2
        said = capsys.readouterr().err
        assert "error: start_from: " in said and "song.wav: holds sound and no moving picture" in said
        assert "elete" not in said and "missing" not in said
