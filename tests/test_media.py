"""Pictures and videos that a user gives come as they are shown, and what is neither is called what it is."""

from __future__ import annotations

import os
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageCms

from utils.errors import InputError
from utils.media import open_media
from utils.pictures import read_picture
from utils.video import Frames, VideoWriter
from utils.video_probe import probe

WIDTH, HEIGHT = 48, 32


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Frames:
    """uint8 [H, W, 3], smooth, each corner of another colour."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 90)], -1).astype(np.uint8)


def moving(frames: int = 9) -> Frames:
    """uint8 [frames, H, W, 3]: the red of a frame says which it is."""
    shown = np.stack([picture()] * frames)
    shown[..., 0] = np.arange(frames)[:, None, None] * 24
    return shown


def write_video(path: Path, frames: Frames) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], crf=0) as writer:
        writer.write(frames)
    return path


def shown(path: Path) -> Frames:
    """What is read, once it has the size that was announced."""
    media = open_media(path)
    frames = media.read()
    assert frames.shape == (media.frames, media.height, media.width, 3)
    assert frames.dtype == np.uint8
    return frames


def same(frames: Frames, expected: Frames, tolerance: float = 4) -> bool:
    """On the whole: the resolution of colour suffers where videos are written."""
    assert frames.shape == expected.shape
    return bool(abs(frames.astype(int) - expected).mean() <= tolerance)


@pytest.mark.parametrize("flips", [(), ("-display_hflip",), ("-display_vflip",)], ids=["", "hflip", "vflip"])
@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_videos_are_upright(tmp_path: Path, angle: int, flips: tuple[str, ...]) -> None:
    plain = write_video(tmp_path / "plain.mp4", moving(2))
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", angle, *flips, "-i", plain, "-c", "copy", turned)
    expected = np.rot90(moving(2), angle // 90, (1, 2))  # counter-clockwise, as ffmpeg's
    for flip in flips:
        expected = np.flip(expected, 2 if flip == "-display_hflip" else 1)
    assert same(shown(turned), expected)
    assert (probe(turned).height, probe(turned).width) == expected.shape[1:3]


ORIENTATIONS: dict[int, Callable[[Frames], Frames]] = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(33, 47)
    for suffix, options in {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"quality": 95}}.items():
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(image).save(path, exif=exif, **options)
        assert same(shown(path)[0], ORIENTATIONS[orientation](image), 2 if suffix == "jpg" else 0), suffix
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.tif", exif=exif)
    assert same(shown(tmp_path / "grey.tif")[0, ..., 0], ORIENTATIONS[orientation](image)[..., 0], 0)


def test_deep_pictures_are_upright_and_not_clipped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.linspace(0, 65535, 33 * 47).reshape(33, 47).astype(np.uint16)
    expected = np.rot90(np.round(grey / 257).astype(int), -1)
    for suffix in ("png", "tif"):
        Image.fromarray(grey).save(tmp_path / f"a.{suffix}", exif=exif)
        frames = shown(tmp_path / f"a.{suffix}")
        assert abs(frames[0].astype(int) - expected[..., None]).max() <= 1
    colour = tmp_path / "colour.png"
    Image.fromarray(picture()).save(tmp_path / "eight.png")
    ffmpeg("-i", tmp_path / "eight.png", "-pix_fmt", "rgb48be", colour)
    assert same(shown(colour)[0], picture(), 1)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("P", "png", 12),
        ("P", "gif", 12),
        ("CMYK", "jpg", 2),
        ("CMYK", "tif", 1),
        ("YCbCr", "jpg", 2),
        ("RGB", "bmp", 0),
        ("RGB", "ppm", 0),
    ],
)
def test_colours_of_all_kinds(tmp_path: Path, mode: str, suffix: str, tolerance: float) -> None:
    image = Image.fromarray(picture(33, 47))
    path = tmp_path / f"a.{suffix}"
    (image.quantize(256) if mode == "P" else image.convert(mode)).save(path, **({"quality": 95} if mode != "P" else {}))
    assert same(shown(path)[0], picture(33, 47), tolerance)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_is_grey_in_all_channels(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "a.png")
    assert same(shown(tmp_path / "a.png")[0], np.stack([np.asarray(image.convert("L"))] * 3, -1), 0)


@pytest.mark.parametrize("name", ["rgba.png", "la.png", "palette.png", "palette.gif", "rgba.webp"])
def test_what_is_transparent_is_white(tmp_path: Path, name: str) -> None:
    """Not the colour that happens to stand there, which no viewer shows."""
    image = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).convert("RGBA")
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, :20] = 0
    image.putalpha(Image.fromarray(alpha))
    if name.startswith("la"):
        image = image.convert("LA")
    if name == "palette.png":
        image = image.quantize(4)
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    frames = shown(tmp_path / name)[0]
    assert (frames[:, :20] == 255).all() and (frames[:, 20:] == 0).all()


def test_colour_profiles_are_followed(tmp_path: Path) -> None:
    """One in which red and blue are the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    named = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")).replace(b"sRGB", b"test")
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 0] = 255
    Image.fromarray(image).save(tmp_path / "swapped.png", icc_profile=named)
    Image.fromarray(image).save(tmp_path / "plain.png", icc_profile=profile)
    Image.fromarray(image).save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert same(shown(tmp_path / "swapped.png")[0], image[..., ::-1], 3)
    assert same(shown(tmp_path / "plain.png")[0], image, 0)
    assert same(shown(tmp_path / "broken.png")[0], image, 0)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_are_videos(tmp_path: Path, suffix: str) -> None:
    frames = moving()
    first, *others = [Image.fromarray(frame) for frame in frames]
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=others, duration=[100] * 3 + [300] + [100] * 5, loop=0, lossless=True)
    media = open_media(path)
    assert media.fps == pytest.approx(10)
    # The one that stays three times as long is there three times.
    assert same(shown(path), frames[[0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]], 12 if suffix == "gif" else 0)


def test_the_first_of_several_pages_views_and_covers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, *others = [Image.fromarray(frame) for frame in moving(3)]
    for name, kind in (("pages.tif", "TIFF"), ("phone.jpg", "MPO")):
        first.save(tmp_path / name, kind, save_all=True, append_images=others)
        assert same(shown(tmp_path / name), moving(1), 3)
    assert "pages.tif: has 3 pages, of which the first is taken" in caplog.text
    first.save(tmp_path / "a.png", save_all=True, append_images=others, default_image=True)
    assert same(shown(tmp_path / "a.png"), moving(3)[1:], 0)


def test_frames_at_uneven_times_are_shown_at_theirs(tmp_path: Path) -> None:
    plain = write_video(tmp_path / "plain.mp4", moving(9))
    uneven = tmp_path / "uneven.mkv"  # the fourth and fifth are left out, and those after the seventh come later
    change = "select='not(between(n,3,4))',setpts='if(gt(N,5),PTS+2/16/TB,PTS)'"
    ffmpeg("-i", plain, "-vf", change, "-fps_mode", "passthrough", "-crf", 0, uneven)
    assert same(shown(uneven), moving(9)[[0, 1, 2, 2, 2, 5, 6, 7, 7, 7, 8]])


@pytest.mark.parametrize(("aspect", "width"), [("2", 96), ("1/2", 24), ("16/15", 51), ("40/39", 48), ("0", 48)])
def test_pixels_are_square(tmp_path: Path, aspect: str, width: int) -> None:
    """What scaling 16:9 to 832 x 480 leaves behind, 40/39, is taken as square."""
    plain = write_video(tmp_path / "plain.mp4", moving(2))
    ffmpeg("-i", plain, "-vf", f"setsar={aspect}", "-crf", 0, tmp_path / "wide.mp4")
    expected = np.stack([np.asarray(Image.fromarray(frame).resize((width, HEIGHT))) for frame in moving(2)])
    assert same(shown(tmp_path / "wide.mp4"), expected)


def test_odd_sides(tmp_path: Path) -> None:
    Image.fromarray(picture(33, 47)).save(tmp_path / "a.png")
    ffmpeg("-loop", 1, "-i", tmp_path / "a.png", "-frames:v", 2, "-pix_fmt", "yuv444p", "-crf", 0, tmp_path / "a.mp4")
    assert same(shown(tmp_path / "a.mp4"), np.stack([picture(33, 47)] * 2))


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return path


def with_cover(path: Path) -> None:
    Image.fromarray(picture()).save(path.with_suffix(".jpg"))
    target = ("-c:v", "copy", "-disposition:v", "attached_pic", path)
    ffmpeg("-i", sound(path.with_suffix(".wav")), "-i", path.with_suffix(".jpg"), "-map", 0, "-map", 1, *target)


def without_frames(path: Path) -> None:
    ffmpeg("-i", write_video(path.with_name("plain.mp4"), moving(1)), "-c", "copy", "-frames:v", 0, path)


def cut(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
OTHERS: dict[str, tuple[str, bytes | Callable[[Path], object], str]] = {
    "sound": ("a.wav", sound, r"holds sound and no moving picture\. Give an image"),
    "sound with a cover": ("a.mp3", with_cover, r"holds sound and no moving picture\. Give"),
    "text": ("a.txt", "ein Fuchs läuft\n".encode() * 500, "is a text file"),
    "text under another name": ("a.mp4", b"#EXTM3U\nhttp://example.com/a.ts\n", "is a text file"),
    "text that begins as a picture does": ("a.ppm", b"P3 is a prompt of mine", "cannot be read|is a text file"),
    "art of terminals": ("a.ans", b"\x1b[31mred\xb0\xb1\xb2", r"no moving picture|is not a whole video"),
    "nothing": ("a.png", b"", "is an empty file"),
    "a document": ("a.pdf", b"%PDF-1.7\n\xff\xff", "is a PDF document"),
    "an archive": ("a.docx", b"PK\x03\x04\0\0", "is a ZIP archive or an office document"),
    "no frames": ("a.mp4", without_frames, "no moving picture|holds no frames"),
    "noise": ("a.bin", np.random.default_rng(0).bytes(20000), r"is not a whole video \(.*Give an image"),
    "a phone's picture": ("a.heic", HEIC + bytes(100), "is a HEIC picture, .* convert it to JPEG or PNG"),
    "a cut picture": ("a.png", cut, r"the picture cannot be read \(broken"),
    "a cut photo": ("a.jpg", cut, r"the picture cannot be read \(broken"),
    "a folder": ("a", os.mkdir, "is a folder"),
    "not there": ("a.png", lambda path: None, r"cannot be read \(No such file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_neither_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    name, content, message = OTHERS[kind]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*(?:{message})") as caught:
        open_media(path)
    assert "elete" not in str(caught.value)  # the file is the user's
    assert "\n" not in str(caught.value)


def test_numbers_that_are_no_colours(tmp_path: Path) -> None:
    for values, message in ((np.float32(0.5), "floating-point"), (np.int32(1 << 20), "more than 16 bits")):
        Image.fromarray(np.full((HEIGHT, WIDTH), values)).save(tmp_path / "a.tif")
        with pytest.raises(InputError, match=rf"a\.tif: holds .*{message}.*Convert it to a PNG"):
            open_media(tmp_path / "a.tif")


def test_too_large_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"a\.png: a picture of more than 200 pixels is not read\. Scale it down"):
        read_picture(tmp_path / "a.png")
