"""Videos under their final names, and what stands beside them: a JSON, a contact sheet, a growing file in the making.

A video gets its name last, so whatever was to stand beside it is there. This file does not make videos.
"""

from __future__ import annotations

import os

from pipeline.config.config import InferenceConfig
from pipeline.config.jobs import VideoJob
from utils.contact_sheet import sheet_path, write_contact_sheet
from utils.errors import InputError
from utils.files import write_error
from utils.growing import growing_path, remove_overtaken
from utils.video_probe import NotAWholeVideo, probe


def is_kept(config: InferenceConfig, job: VideoJob) -> bool:
    """Whether the job's file is there and stays; it is whole, since it gets its name only when it is complete."""
    return os.path.isfile(job.path) and not config.overwrite


def complete_kept(config: InferenceConfig, job: VideoJob) -> None:
    """Make the contact sheet of a video that is kept, if it is to have one and has none, as when it was made without;
    and remove the growing file that it was made of, if a kill came between the two.

    Raises InputError if the video is broken.
    """
    sheet = config.contact_sheet and not sheet_path(job.path).exists()
    if not sheet and not growing_path(job.path).exists():
        return
    try:
        frames = probe(job.path).frames
    except NotAWholeVideo as error:
        raise InputError(f"{error} Delete it and run again to make it anew.") from error
    if sheet:
        write_contact_sheet(job.path, frames)
    remove_overtaken(job.path, frames)


def remove_with_companions(job: VideoJob) -> None:
    """Remove the job's video, and, if there is one, what belongs to it, which would say something untrue of another.

    Raises InputError if that is not allowed.
    """
    if not job.path.exists():
        return
    for path in (job.path, job.metadata_path, sheet_path(job.path)):
        try:
            if path.is_file():
                path.unlink()
        except OSError as error:
            raise write_error(path, error) from error
