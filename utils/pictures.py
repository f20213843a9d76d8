"""Reading pictures as a viewer shows them: upright, in sRGB of 8 bits, what is transparent on white.

Animated GIF, WebP, PNG and AVIF files have several frames; of the pages of a TIFF and the views of a phone's JPEG the
first is meant. Pillow does the work. Files that are no pictures are not this file's business.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import InputError
from utils.video_probe import Frames, Times

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

logger = logging.getLogger(__name__)

# Named one by one: Pillow would also start Ghostscript for EPS, and knows formats that are no pictures.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_ANIMATED = frozenset({"AVIF", "GIF", "PNG", "WEBP"})
_DEEP = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})  # grey of more than 8 bits
_DEFAULT_MS, _SHORTEST_MS = 100, 10  # browsers show frames of no or too short a duration for this long
_UNKNOWN = "is not a picture"


def examine_picture(path: Path) -> tuple[int, int, Times] | None:
    """Height and width of the picture `path` as shown, and when each of its frames is, in seconds; None for a file that
    is no picture known here.

    Raises InputError if it is broken, too large, or cannot be read.
    """
    with _explained(path), _opened(path) as picture:
        if picture is None:
            return None
        frames = _frame_numbers(picture)
        picture.seek(frames[0])
        height, width, _ = _as_shown(path, picture).shape
        durations = []
        for number in frames[:-1]:
            picture.seek(number)
            picture.load()  # WebP says how long a frame stays only then
            duration = picture.info.get("duration") or _DEFAULT_MS
            durations.append(duration if duration > _SHORTEST_MS else _DEFAULT_MS)
        if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1:
            logger.warning("%s: has %d pages, of which the first is taken", path, getattr(picture, "n_frames", 1))
        return height, width, np.cumsum([0.0, *durations]) / 1000


def read_picture(path: Path) -> Frames:
    """The frames of the picture `path`, uint8 [frames, H, W, 3], red first. Raises InputError as `examine_picture`, and
    for a file that is no picture."""
    with _explained(path), _opened(path) as picture:
        if picture is None:
            raise InputError(f"{path}: {_UNKNOWN}.")
        shown = []
        for number in _frame_numbers(picture):
            picture.seek(number)
            shown.append(_as_shown(path, picture))
        return np.stack(shown)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile | None]:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    # A file, not a path: from a path Pillow maps grey TIFFs into memory with their sides the wrong way round.
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # the user knows the file; twice that is refused
        try:
            picture = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            yield None
            return
        with picture:
            yield picture


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Within the context what Pillow raises becomes an InputError. Its decoders raise whatever comes up in them."""
    from PIL.Image import MAX_IMAGE_PIXELS, DecompressionBombError

    try:
        yield
    except (InputError, MemoryError):
        raise
    except DecompressionBombError as error:
        most = 2 * (MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{path}: a picture of more than {most} pixels is not read. Scale it down first.") from error
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"broken: {error}"
        raise InputError(f"{path}: the picture cannot be read ({reason}).") from error


def _frame_numbers(picture: ImageFile) -> range:
    """The frames that an animation shows in turn, or the first one."""
    if picture.format not in _ANIMATED:
        return range(1)
    count = int(getattr(picture, "n_frames", 1))
    # A PNG may have a picture in front for programs that know no animation.
    return range(1 if count > 1 and getattr(picture, "default_image", False) else 0, count)


def _as_shown(path: Path, picture: Image) -> Frames:
    """uint8 [H, W, 3]."""
    from PIL import Image, ImageOps

    picture = _in_eight_bits(path, ImageOps.exif_transpose(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
    picture = _in_srgb(path, picture)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"), np.uint8)


def _in_eight_bits(path: Path, picture: Image) -> Image:
    """Pillow itself reads 16-bit colour as 8-bit, but not grey, which it would clip."""
    from PIL import Image

    if picture.mode == "F":
        raise InputError(f"{path}: holds floating-point numbers. Convert it to a PNG of 8 or 16 bits.")
    if picture.mode not in _DEEP:
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path}: holds whole numbers of more than 16 bits. Convert it to a PNG of 8 or 16 bits.")
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8))


def _in_srgb(path: Path, picture: Image) -> Image:
    """The colours that the picture's profile means (wide gamuts of phones, inks of printers)."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    if picture.mode in ("P", "1"):
        picture = picture.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("%s: its colour profile is not used (%s)", path, error)
        return picture
    assert converted is not None  # it is where nothing is done in place
    return converted
