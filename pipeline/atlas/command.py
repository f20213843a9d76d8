"""The head atlas of a model: python -m pipeline.atlas --config_path YAML [--out FILE] [key=value ...] [PROMPT ...]

Makes videos as inference.py does, without decoding them, and records what every head looks at in chosen blocks and
passes. Stores it (--out), draws it (--plot, --report), and turns it into a roles file (--roles). Prompts are those of
the configuration's data_path, of --prompts FILE, or texts on the command line. With --atlas FILE a stored one is drawn
without a model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dummy.atlas.plots import save_all
from dummy.atlas.report import facts, write_report
from dummy.atlas.stability import consensus, require_role_pass
from dummy.atlas.table import Atlas
from pipeline.atlas.arguments import check_arguments, check_outputs, expand_paths, parse_arguments
from pipeline.atlas.cost import cost_lines
from pipeline.atlas.query_sampling import sampling_table
from pipeline.atlas.recording import Recording, choose_passes, jobs_of, record, role_settings
from pipeline.atlas.stored import load_stored, run_facts
from pipeline.config.config import InferenceConfig, as_dict, load_config
from pipeline.planning.plan import planned_sizes
from pipeline.runtime.loading import check_before_loading, choose_device, model_sizes, require_files
from utils import command
from utils.config import text_override
from utils.errors import InputError
from utils.files import write_atomic
from utils.user_paths import require_file


def run(arguments: argparse.Namespace, command: str) -> int:
    """Returns the exit status; raises InputError."""
    expand_paths(arguments)
    check_arguments(arguments)
    if arguments.atlas is not None:
        require_file(arguments.atlas, "--atlas", "stored atlas")
        atlas, config = load_stored(arguments.atlas, arguments.overrides)
        if arguments.roles is not None:
            require_role_pass(atlas.blocks, atlas.passes, atlas.forcing.ar_start)
        check_outputs(arguments)
    else:
        data = [] if arguments.prompts is None else [text_override("data_path", arguments.prompts)]
        config = load_config(arguments.config_path, [*arguments.overrides, *data])
        if config.start_from is not None:
            raise InputError(
                f"start_from: {config.start_from} would be ignored, since videos are recorded from noise on; remove it"
            )
        if arguments.sampling is not None:
            return write_sampling(config, arguments, command)
        plan = plan_recording(config, arguments)
        if arguments.dry_run:
            return dry_run(plan)
        atlas = make(plan, arguments, command)
    failed = store(atlas, arguments)
    for name, value in [*facts(atlas), *run_facts(atlas, config)]:
        sys.stdout.write(f"{name:32}{value}\n")
    if failed:
        raise InputError("\n".join(failed))
    return 0


def plan_recording(config: InferenceConfig, arguments: argparse.Namespace) -> Recording:
    """What is to be recorded. Raises InputError for what a video of this configuration does not have."""
    passes = choose_passes(config, arguments.blocks, arguments.steps)
    if arguments.roles is not None:
        require_role_pass(passes.blocks, [name for _, name in passes.passes], role_settings(config).ar_start)
    share = config.dummy_forcing.score_query_share if arguments.query_share is None else arguments.query_share
    if not 0 < share <= 1:
        raise InputError(f"--query_share: must be above 0 and at most 1 (all queries), got {share}")
    return Recording(config, passes, share, arguments.context or "dense", tuple(arguments.texts))


def dry_run(recording: Recording) -> int:
    """Print what recording would cost; then raises InputError if a file is missing or does not fit."""
    config = recording.config
    device = choose_device(config)
    sizes = planned_sizes(config)
    role_settings(config).budget.check(sizes.num_layers, sizes.num_heads)
    sys.stdout.write("\n".join(cost_lines(recording, sizes, device)) + "\n")
    jobs = jobs_of(config, recording.texts)
    sys.stdout.write(f"Videos: {len(jobs)}\n")
    require_files(config)
    check_before_loading(config, device)
    return 0


def make(recording: Recording, arguments: argparse.Namespace, command: str) -> Atlas:
    """Record a new atlas. Raises InputError, before that, for whatever could keep it from being made or stored."""
    config = recording.config
    device = choose_device(config)
    require_files(config)
    sys.stderr.write("\n".join(cost_lines(recording, model_sizes(config), device)) + "\n")
    check_outputs(arguments)
    about: dict[str, object] = {"model": config.model_name, "config": as_dict(config), "context": recording.context}
    about |= {"query_share": recording.query_share, "command": command, "torch": torch.__version__}
    return record(recording, device, about)


def store(atlas: Atlas, arguments: argparse.Namespace) -> list[str]:
    """Write what was asked for, and say what was written; returns why the rest was not (a disk that is full by now), so
    that one file does not cost the others."""
    writers: list[Callable[[], list[Path]]] = []
    if arguments.out is not None:
        writers.append(lambda: write_atlas(atlas, arguments.out))
    if arguments.roles is not None:
        writers.append(lambda: write_roles(atlas, arguments.roles))
    if arguments.plot is not None:
        writers.append(lambda: save_all(atlas, arguments.plot))
    if arguments.report is not None:
        writers.append(lambda: write_report(atlas, arguments.report))
    failed = []
    for write in writers:
        try:
            sys.stdout.writelines(f"{path}\n" for path in write())
        except InputError as error:
            failed.append(str(error))
    return failed


def write_atlas(atlas: Atlas, path: Path) -> list[Path]:
    atlas.save(path)
    return [path]


def write_roles(atlas: Atlas, path: Path) -> list[Path]:
    about = {"model": atlas.about.get("model"), "command": atlas.about.get("command")}
    write_atomic(path, json.dumps(consensus(atlas).to_json(about), indent=1) + "\n")
    return [path]


def write_sampling(config: InferenceConfig, arguments: argparse.Namespace, command: str) -> int:
    """Print the table of `--sampling`, and store it if a file is named."""
    device = choose_device(config)
    require_files(config)
    check_outputs(arguments)
    table = sampling_table(config, device, jobs_of(config, arguments.texts))
    sys.stdout.write(table.text())
    if arguments.sampling:
        content = {"command": command, "torch": torch.__version__, **table.as_dict()}
        write_atomic(arguments.sampling, json.dumps(content, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for input that must be mended, which is said on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(given, __doc__)
    line = shlex.join(["python", "-m", "pipeline.atlas", *given])
    return command.run(lambda: run(arguments, line), log_format="%(message)s")
