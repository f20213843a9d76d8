"""Text to video: python inference.py --config_path configs/self_forcing_inference.yaml [key=value ...]

Reads a configuration and a file of prompts (or storyboards, if it ends in .jsonl) and writes one mp4 a prompt and
sample, with a JSON of its settings and timings beside it.
"""

from __future__ import annotations

from utils import interrupts

if __name__ == "__main__":
    interrupts.answer_at_once()

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils import command
from utils.distributed import World, stop_with_launcher
from utils.user_paths import exists

if TYPE_CHECKING:
    from pipeline.config.config import InferenceConfig
    from pipeline.config.jobs import VideoJob

SHOWN_JOBS = 10  # in a dry run


class Work(NamedTuple):
    """Settings, and the videos that are to be made under them."""

    config: InferenceConfig
    missing: list[VideoJob]


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", "--config_file", dest="config_path", required=True, metavar="YAML")
    parser.add_argument("--dry_run", action="store_true", help="check the files, print the plan, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return command.parse(parser, argv)


def run(arguments: argparse.Namespace) -> int:
    """Make every video that is missing. Returns the exit status; raises InputError for what the user must mend."""
    from pipeline.config.config import as_dict
    from pipeline.runtime.together import require_equal

    world = World.from_environment()
    if arguments.dry_run:
        return 0 if world.rank else dry_run(*load(arguments), world)
    work: Work | None = None

    def decide() -> str:
        nonlocal work
        work = begin(arguments, world)
        return json.dumps({"settings": as_dict(work.config), "videos": len(work.missing)})

    told = json.loads(world.agree(decide))
    if work is None:  # another process is the first, whose sessions this one follows
        config, _ = load(arguments)
        require_equal(config, told["settings"], world)
        work = Work(config, [])
    if told["videos"]:
        make_videos(work, world)
    return 0


def load(arguments: argparse.Namespace) -> tuple[InferenceConfig, list[VideoJob]]:
    from pipeline.config.config import load_config, warn_of_what_is_off
    from pipeline.config.jobs import read_jobs

    config = load_config(arguments.config_path, arguments.overrides)
    warn_of_what_is_off(config, arguments.overrides)
    return config, read_jobs(config)


def begin(arguments: argparse.Namespace, world: World) -> Work:
    """See what is to be made, and that it can be. Raises InputError."""
    from pipeline.config.jobs import stale_reason
    from pipeline.runtime.finished import complete_kept, is_kept
    from pipeline.runtime.prefix import check_start_files
    from pipeline.runtime.together import rank_device, require_world
    from utils.ffmpeg import check_codec
    from utils.files import ensure_writable_folder, remove_stale_partials

    config, jobs = load(arguments)
    require_world(config, world)
    rank_device(config, world)
    folder = Path(config.output_folder)
    ensure_writable_folder(folder, "output_folder")
    remove_stale_partials(folder)
    missing = []
    for job in jobs:
        if is_kept(config, job):
            print(f"{job.path} exists and is kept{stale_reason(config, job)}")
            complete_kept(config, job)
        else:
            missing.append(job)
    if missing:
        check_codec(config.video_codec)
        check_start_files(config, missing)
    return Work(config, missing)


def dry_run(config: InferenceConfig, jobs: Sequence[VideoJob], world: World, batch: int = 1) -> int:
    """Print what a run would do and take, with `batch` videos at a time; 0 if every file is there, 2 if not."""
    from pipeline.planning.plan import planner_for
    from pipeline.planning.report import plan_lines
    from pipeline.runtime.finished import is_kept
    from pipeline.runtime.loading import check_before_loading, generator_settings, needed_files, require_files
    from pipeline.runtime.prefix import check_start_files
    from pipeline.runtime.together import rank_device
    from utils.ffmpeg import check_codec

    device = rank_device(config, world)
    planner = planner_for(config, device)
    settings = generator_settings(config, planner.sizes)
    print("\n".join(plan_lines(config, settings, planner, device, batch, world.size)))
    print("Files:")
    for path, setting in needed_files(config).items():
        print(f"  {'ok     ' if exists(path, setting) else 'MISSING'} {path}")
    print(f"Videos: {len(jobs)}")
    for job in jobs[:SHOWN_JOBS]:
        state = "kept" if is_kept(config, job) else "new "
        more = f" and {len(job.prompts) - 1} more" if len(job.prompts) > 1 else ""
        print(f"  {state} {job.path}  <- {job.prompts[0][:60]!r}{more}")
    if len(jobs) > SHOWN_JOBS:
        print(f"  ... and {len(jobs) - SHOWN_JOBS} more")
    require_files(config)
    check_before_loading(config, device)
    check_codec(config.video_codec)
    check_start_files(config, jobs)
    return 0


def make_videos(work: Work, world: World) -> None:
    """Encode all prompts, load the model, and make one video after the other, together with other processes if there
    are any; the first of them writes."""
    from tqdm import tqdm

    from pipeline.assembly import Pipeline
    from pipeline.planning.memory_advice import memory_explained
    from pipeline.runtime.together import joined, rank_device
    from pipeline.video_files import write_videos

    config, jobs = work
    device = rank_device(config, world)
    prompts = [prompt for job in jobs for prompt in job.prompts]
    with memory_explained(config, device, ranks=world.size), joined(world, device) as exchange:
        pipeline = Pipeline.from_config(config, prompts=prompts, device=device, exchange=exchange)
        if pipeline.follows:
            pipeline.follow()
            return
        for job in tqdm(jobs, desc="videos", unit="video", disable=None):
            with tqdm(total=config.num_blocks, desc=job.path.name, unit="block", leave=False, disable=None) as bar:
                profile = write_videos(pipeline, [job], lambda _: bar.update())
            tqdm.write(profile.format())
            tqdm.write(f"{job.path}")
        pipeline.close()


def main(argv: Sequence[str] | None = None, description: str | None = __doc__) -> int:
    """Returns the exit status, see utils/command.py."""
    stop_with_launcher()
    arguments = parse_arguments(argv, description)
    return command.run(lambda: run(arguments), ["pipeline.assembly"])


if __name__ == "__main__":
    sys.exit(main())
