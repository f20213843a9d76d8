"""What every head loses if it keeps less: python -m pipeline.calibrate --config_path YAML --out FILE [key=value ...]

Makes videos over full history as inference.py does, without decoding them, and measures for every layer, head and
candidate how far the head's output is from what it would be with all earlier frames. The file is what
dummy_forcing.policy=calibrated chooses by, at any number of frames a head. Stopped, it goes on where it was; with more
--videos it adds to what is there. With --curve FILE a stored calibration is shown as a table (and drawn, --plot): the
predicted error and the cost over frames a head.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from tqdm import tqdm

from dummy.calibration.candidates import CANDIDATES, named, parse_candidates
from dummy.calibration.recorder import QUERIES
from pipeline.calibrate.cost import cost_lines, memory_lines, products_a_second
from pipeline.calibrate.curve import show_curve
from pipeline.calibrate.recording import Recording, chosen_passes, over_full_history, record
from pipeline.config.config import InferenceConfig, load_config
from pipeline.planning.memory_advice import memory_explained
from pipeline.planning.plan import planner_for
from pipeline.runtime.loading import (
    check_before_loading,
    choose_device,
    choose_dtype,
    generator_settings,
    require_files,
)
from utils import command
from utils.config import text_override
from utils.errors import InputError
from utils.files import ensure_writable, ensure_writable_folder
from utils.lock import RunLock
from utils.profiler import device_name
from utils.user_paths import user_path

VIDEOS = 8
OF_RECORDING = ("prompts", "videos", "queries", "blocks", "steps", "candidates", "dry_run", "out")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config_path", "--config_file", dest="config_path", metavar="YAML")
    source.add_argument("--curve", metavar="FILE", help="show a stored calibration")
    parser.add_argument("--prompts", metavar="FILE", help="instead of data_path; of a storyboard the first prompt")
    parser.add_argument("--videos", type=int, help=f"prompts are taken again if there are fewer (default {VIDEOS})")
    parser.add_argument("--queries", type=int, help=f"of a pass that are looked at (default {QUERIES})")
    parser.add_argument("--blocks", help="numbers such as 2,4,6 (default: all from 1 on)")
    parser.add_argument("--steps", help="denoising steps from 0 on, and clean, such as 0,3,clean (default: denoising)")
    names = ",".join(map(named, CANDIDATES))
    parser.add_argument("--candidates", help=f"first and last frames that a head may keep (default {names})")
    parser.add_argument("--out", metavar="FILE", help="the calibration (safetensors)")
    parser.add_argument("--plot", metavar="FOLDER", help="draw the curve, SVG and PNG")
    parser.add_argument("--dry_run", action="store_true", help="say what it would take, check the files, stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return command.parse(parser, argv)


def _expand_paths(arguments: argparse.Namespace) -> None:
    """Turn the options that name what is read and written into paths. Raises InputError for what cannot be one."""
    for name in ("curve", "out", "plot"):
        value = getattr(arguments, name)
        if value is not None:
            setattr(arguments, name, user_path(value, f"--{name}"))


def run(arguments: argparse.Namespace, line: str) -> int:
    """Returns the exit status; raises InputError. `line`: what was typed."""
    _expand_paths(arguments)
    if arguments.curve is not None:
        for name in OF_RECORDING:
            if getattr(arguments, name) not in (None, False):
                raise InputError(f"--{name}: --curve shows a stored calibration and would ignore it; give one of both")
        if arguments.plot is not None:
            ensure_writable_folder(arguments.plot, "--plot")
        sys.stdout.write(show_curve(arguments.curve, arguments.overrides, arguments.plot))
        return 0
    if arguments.plot is not None:
        raise InputError("--plot: draws the curve of a stored calibration; give --curve FILE too, or leave it out")
    recording = planned(arguments)
    device = choose_device(recording.config)
    if arguments.dry_run:
        return dry_run(recording, device)
    if arguments.out is None:
        raise InputError("--out: missing; name the file that is to hold the calibration, or give --dry_run")
    require_files(recording.config)
    check_before_loading(recording.config, device)
    ensure_writable_folder(arguments.out.parent, "--out")
    ensure_writable(arguments.out)
    about = {"command": line, "torch": torch.__version__, "device": device_name(device)}
    busy = f"--out: another run writes {arguments.out}; wait for its end, or give another file."
    with (
        RunLock(arguments.out.with_name(f".{arguments.out.name}.lock"), busy) as lock,
        memory_explained(recording.config, device),
        tqdm(total=recording.videos, desc="videos", unit="video", disable=None) as bar,
    ):
        lock.begin(f"process {os.getpid()}")
        record(recording, device, arguments.out, about, bar.update)
    sys.stdout.write(f"{arguments.out}\n{show_curve(arguments.out, [], None)}")
    return 0


def planned(arguments: argparse.Namespace) -> Recording:
    """What is to be recorded. Raises InputError."""
    data = [] if arguments.prompts is None else [text_override("data_path", arguments.prompts)]
    config = load_config(arguments.config_path, [*arguments.overrides, *data])
    _refuse_ignored(config)
    counts = []
    for name, default in (("videos", VIDEOS), ("queries", QUERIES)):
        value = getattr(arguments, name)
        counts.append(default if value is None else value)
        if not 1 <= counts[-1] <= 100_000:
            raise InputError(f"--{name}: must be from 1 to 100000, got {value}")
    candidates = CANDIDATES
    if arguments.candidates is not None:
        candidates = parse_candidates([name.strip() for name in arguments.candidates.split(",")], "--candidates")
    config = over_full_history(config)
    return Recording(config, chosen_passes(config, arguments.blocks, arguments.steps), candidates, counts[1], counts[0])


def _refuse_ignored(config: InferenceConfig) -> None:
    if config.start_from is not None:
        raise InputError(
            f"start_from: {config.start_from} would be ignored, since videos are recorded from noise on; remove it"
        )


def dry_run(recording: Recording, device: torch.device) -> int:
    """Print what recording would take; then raises InputError if a file is missing or does not fit."""
    config = recording.config
    planner = planner_for(config, device)
    tokens = recording.config.num_frame_per_block * (config.latent_size[0] // 2) * (config.latent_size[1] // 2)
    rate = products_a_second(planner.sizes, tokens, device, choose_dtype(config, device))
    settings = generator_settings(config, planner.sizes)
    lines = [*cost_lines(recording, planner.sizes, rate), *memory_lines(recording, settings, planner)]
    sys.stdout.write("\n".join(lines) + "\n")
    for prompt, videos in Counter(job.prompts[0] for job in recording.jobs()).items():
        sys.stdout.write(f"  {prompt[:70]!r}{f', {videos} videos' if videos > 1 else ''}\n")
    require_files(config)
    check_before_loading(config, device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for input that must be mended, which is said on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(given)
    line = shlex.join(["python", "-m", "pipeline.calibrate", *given])
    return command.run(lambda: run(arguments, line), log_format="%(message)s")
