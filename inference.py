"""Text to video: python inference.py --config_path configs/self_forcing_inference.yaml [key=value ...]

Reads a configuration and a file of prompts (or storyboards, if it ends in .jsonl) and writes one mp4 a prompt and
sample, with a JSON of its settings and timings beside it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from utils.errors import InputError

if TYPE_CHECKING:
    import torch

    from pipeline.config import InferenceConfig
    from pipeline.jobs import VideoJob

SHOWN_JOBS = 10  # in a dry run


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", "--config_file", dest="config_path", required=True, metavar="YAML")
    parser.add_argument("--dry_run", action="store_true", help="check the files, print the plan, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Make every video that is missing. Returns the exit status; raises InputError for what the user must mend."""
    from pipeline.config import load_config
    from pipeline.jobs import read_jobs, stale_reason
    from pipeline.loading import choose_device, require_files
    from utils.files import ensure_writable_folder, remove_stale_partials

    config = load_config(arguments.config_path, arguments.overrides)
    jobs = read_jobs(config)
    device = choose_device(config)
    if arguments.dry_run:
        return dry_run(config, jobs, device)
    folder = Path(config.output_folder)
    ensure_writable_folder(folder, "output_folder")
    remove_stale_partials(folder)
    missing = [job for job in jobs if config.overwrite or not job.path.exists()]
    for job in jobs:
        if job not in missing:
            print(f"{job.path} exists and is kept{stale_reason(job)}")
    if missing:
        require_files(config)
        make_videos(config, missing, device)
    return 0


def dry_run(config: InferenceConfig, jobs: Sequence[VideoJob], device: torch.device) -> int:
    """Print what a run would do and take; 0 if every file is there, 2 if not."""
    from pipeline.loading import generator_settings, needed_files, require_files
    from pipeline.plan import plan_lines, planner_for

    planner = planner_for(config, device)
    print("\n".join(plan_lines(config, generator_settings(config, planner.sizes), planner)))
    print("Files:")
    for path in needed_files(config):
        print(f"  {'ok     ' if path.exists() else 'MISSING'} {path}")
    print(f"Videos: {len(jobs)}")
    for job in jobs[:SHOWN_JOBS]:
        state = "kept" if job.path.exists() and not config.overwrite else "new "
        more = f" and {len(job.prompts) - 1} more" if len(job.prompts) > 1 else ""
        print(f"  {state} {job.path}  <- {job.prompts[0][:60]!r}{more}")
    if len(jobs) > SHOWN_JOBS:
        print(f"  ... and {len(jobs) - SHOWN_JOBS} more")
    require_files(config)
    return 0


def make_videos(config: InferenceConfig, jobs: Sequence[VideoJob], device: torch.device) -> None:
    """Encode all prompts, load the model, and make one video after the other."""
    import torch
    from tqdm import tqdm

    from pipeline.generator import BlockGenerator
    from pipeline.loading import (
        choose_dtype,
        encode_prompts,
        generator_settings,
        load_transformer,
        load_vae,
        model_sizes,
    )
    from pipeline.remedies import is_out_of_memory, out_of_memory
    from pipeline.video_pipeline import VideoPipeline

    sizes = model_sizes(config)
    settings = generator_settings(config, sizes)
    try:
        embeds = encode_prompts(config, [prompt for job in jobs for prompt in job.prompts], device)
        dtype = choose_dtype(config, device)
        generator = BlockGenerator(load_transformer(config, sizes, device, dtype), settings)
        pipeline = VideoPipeline(generator, load_vae(config, device, dtype), config)
        for job in tqdm(jobs, desc="videos", unit="video", disable=None):
            with tqdm(total=config.num_blocks, desc=job.path.name, unit="block", leave=False, disable=None) as bar:
                profile = pipeline.write([job], embeds, lambda _: bar.update())
            tqdm.write(profile.format())
            tqdm.write(f"{job.path}")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, device) from error
        raise


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Let a polite kill end the run as Ctrl-C does: the unfinished file is removed."""
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Returns the exit status: 0 done, 2 for input that must be mended, 130 when interrupted."""
    arguments = parse_arguments(argv, description)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished videos are kept, the unfinished one is removed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
