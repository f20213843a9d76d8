"""The head atlas of a model: python -m dummy.atlas --config_path YAML [--prompts FILE] [--out FILE] [key=value ...]

Makes videos as inference.py does, without decoding them, and records what every head looks at in chosen blocks and
passes. Stores it (--out), draws it (--plot, --report), and turns it into a roles file (--roles). With --atlas FILE a
stored one is drawn without a model.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dummy.atlas.plots import save_all
from dummy.atlas.report import facts, write_report
from dummy.atlas.stability import consensus
from dummy.atlas.table import Atlas, read_about
from pipeline.atlas_recording import choose_passes, cost_line, record, role_settings
from pipeline.atlas_sampling import sampling_table
from pipeline.config import InferenceConfig, as_dict, load_config
from pipeline.loading import choose_device, require_files
from utils.errors import InputError
from utils.files import ensure_writable_folder, write_atomic


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dummy.atlas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config_path", "--config_file", dest="config_path", metavar="YAML")
    source.add_argument("--atlas", type=Path, metavar="FILE", help="a stored atlas, instead of recording one")
    parser.add_argument("--prompts", metavar="FILE", help="instead of data_path; of a storyboard the first prompt")
    parser.add_argument(
        "--blocks", help="numbers such as 1,3,5 (default: all that see earlier ones and have all passes)"
    )
    parser.add_argument("--steps", help="denoising steps from 0 on, and clean, such as 0,3,clean (default: all)")
    parser.add_argument(
        "--context",
        choices=("dense", "initial"),
        default="dense",
        help="what heads may look at: what the setting without Dummy Forcing keeps, or what a run keeps until it knows "
        "the roles",
    )
    parser.add_argument("--query_share", type=float, help="queries that are sampled (default: score_query_share)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="store the atlas (safetensors)")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw it, SVG and PNG")
    parser.add_argument("--report", type=Path, metavar="HTML", help="one page with all of it")
    parser.add_argument("--roles", type=Path, metavar="JSON", help="a roles file that all videos agree on")
    parser.add_argument(
        "--sampling", nargs="?", const="", metavar="JSON", help="how far sampled queries are from all queries"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser.parse_intermixed_args(argv)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Returns the exit status; raises InputError."""
    for path in (arguments.out, arguments.report, arguments.roles):
        if path is not None:
            ensure_writable_folder(path.parent, "output folder")
    if arguments.plot is not None:
        ensure_writable_folder(arguments.plot, "--plot")
    if arguments.atlas is not None:
        if arguments.sampling is not None:
            raise InputError("--sampling: needs the model; give --config_path instead of --atlas")
        atlas = load_stored(arguments.atlas, arguments.overrides)
    else:
        data = [] if arguments.prompts is None else [f"data_path={arguments.prompts}"]
        config = load_config(arguments.config_path, [*arguments.overrides, *data])
        if arguments.sampling is not None:
            return write_sampling(config, arguments.sampling, command)
        atlas = make(config, arguments, command)
    for name, value in facts(atlas):
        sys.stdout.write(f"{name:28}{value}\n")
    store(atlas, arguments)
    return 0


def store(atlas: Atlas, arguments: argparse.Namespace) -> None:
    """Write what was asked for, and say what was written."""
    written: list[Path] = []
    if arguments.out is not None:
        atlas.save(arguments.out)
        written.append(arguments.out)
    if arguments.roles is not None:
        about = {"model": atlas.about.get("model"), "command": atlas.about.get("command")}
        content = consensus(atlas).to_json(about)
        write_atomic(arguments.roles, json.dumps(content, indent=1) + "\n")
        written.append(arguments.roles)
    if arguments.plot is not None:
        written += save_all(atlas, arguments.plot)
    if arguments.report is not None:
        write_report(atlas, arguments.report)
        written.append(arguments.report)
    sys.stdout.writelines(f"{path}\n" for path in written)


def make(config: InferenceConfig, arguments: argparse.Namespace, command: str) -> Atlas:
    """Record a new atlas."""
    passes = choose_passes(config, arguments.blocks, arguments.steps)
    share = config.dummy_forcing.score_query_share if arguments.query_share is None else arguments.query_share
    if not 0 < share <= 1:
        raise InputError(f"--query_share: must be above 0 and at most 1 (all queries), got {share}")
    device = choose_device(config)
    require_files(config)
    sys.stderr.write(cost_line(config, passes, share, arguments.context) + "\n")
    about = {"model": config.model_name, "config": as_dict(config), "context": arguments.context}
    about |= {"query_share": share, "command": command, "torch": torch.__version__}
    return record(config, passes, share, arguments.context, device, about)


def load_stored(path: Path, overrides: Sequence[str]) -> Atlas:
    """A stored atlas, whose roles are found with other settings of `dummy_forcing` if they are given."""
    about = read_about(path)
    for override in overrides:
        if not override.startswith("dummy_forcing."):
            raise InputError(f"override {override!r}: of a stored atlas only dummy_forcing settings can be changed")
    config = load_config(about["config"], overrides)
    return Atlas.load(path, role_settings(config), config.num_frame_per_block)


def write_sampling(config: InferenceConfig, path: str, command: str) -> int:
    """Print the table of `--sampling`, and store it if a file is named."""
    table = sampling_table(config, choose_device(config))
    sys.stdout.write(table.text())
    if path:
        content = {"command": command, "torch": torch.__version__, **table.as_dict()}
        write_atomic(Path(path), json.dumps(content, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for input that must be mended, which is said on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(arguments, shlex.join(["python", "-m", "dummy.atlas", *given]))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
