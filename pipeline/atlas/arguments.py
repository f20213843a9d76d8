"""The command line of `python -m pipeline.atlas`: what it takes, and what does not go together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from utils.command import parse
from utils.errors import InputError, quoted
from utils.files import ensure_writable, ensure_writable_folder
from utils.prompts import clean_line
from utils.user_paths import user_path

OF_RECORDING = ("prompts", "texts", "blocks", "steps", "context", "query_share", "dry_run")
OF_AN_ATLAS = ("out", "plot", "report", "roles")


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """`overrides` are the words that are key=value, `texts` the others, which are prompts."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.atlas", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config_path", "--config_file", dest="config_path", metavar="YAML")
    source.add_argument("--atlas", metavar="FILE", help="a stored atlas, instead of recording one")
    parser.add_argument("--prompts", metavar="FILE", help="instead of data_path; of a storyboard the first prompt")
    parser.add_argument(
        "--blocks", help="numbers such as 1,3,5 (default: all that see earlier ones and have all passes)"
    )
    parser.add_argument("--steps", help="denoising steps from 0 on, and clean, such as 0,3,clean (default: all)")
    parser.add_argument(
        "--context",
        choices=("dense", "initial"),
        help="what heads may look at: what the setting without Dummy Forcing keeps (the default), or what a run keeps "
        "until it knows the roles",
    )
    parser.add_argument("--query_share", type=float, help="queries that are sampled (default: score_query_share)")
    parser.add_argument("--dry_run", action="store_true", help="say what recording would cost, check the files, stop")
    parser.add_argument("--out", metavar="FILE", help="store the atlas (safetensors)")
    parser.add_argument("--plot", metavar="FOLDER", help="draw it, SVG and PNG")
    parser.add_argument("--report", metavar="HTML", help="one page with all of it")
    parser.add_argument("--roles", metavar="JSON", help="a roles file that all videos agree on")
    parser.add_argument(
        "--sampling", nargs="?", const="", metavar="JSON", help="how far sampled queries are from all queries"
    )
    parser.add_argument(
        "words", nargs="*", metavar="key=value or prompt", help="settings that replace those of the file, and prompts"
    )
    arguments = parse(parser, argv)
    arguments.overrides = [word for word in arguments.words if is_setting(word)]
    arguments.texts = [clean_line(word) for word in arguments.words if not is_setting(word)]
    return arguments


def expand_paths(arguments: argparse.Namespace) -> None:
    """Turn the options that name files and folders into paths. Raises InputError for what cannot be one."""
    for name in ("atlas", "prompts", "out", "plot", "report", "roles", "sampling"):
        value = getattr(arguments, name)
        if value:  # --sampling may stand without a file
            setattr(arguments, name, user_path(value, f"--{name}"))


def is_setting(word: str) -> bool:
    """Whether it is key=value and no prompt: there is no white space within the key."""
    key, equals, _ = word.partition("=")
    return bool(equals) and len(key.split()) <= 1


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises InputError for options of which one would be ignored, and for texts that are no prompts."""
    if "" in arguments.texts:
        raise InputError("a prompt on the command line is blank; write some text or leave it out")
    if arguments.texts and arguments.prompts is not None:
        raise InputError(f"--prompts: {arguments.prompts} and prompts on the command line; give one of them")
    if arguments.atlas is not None:
        reason = "of a stored atlas it would be ignored; give --config_path to record one"
        _refuse(arguments, (*OF_RECORDING, "sampling"), reason)
        _refuse(arguments, ("out",), f"{arguments.atlas} is stored already; copy the file instead")
    if arguments.sampling is not None:
        if is_setting(str(arguments.sampling)):
            raise InputError(
                f"--sampling: {quoted(str(arguments.sampling))} is a setting, and would be the name of the file; write "
                "settings before --sampling, or name the file"
            )
        reason = "--sampling makes a table alone, over the passes in which roles are found, and would ignore it"
        ignored = [name for name in OF_RECORDING if name not in ("prompts", "texts")]
        _refuse(arguments, (*ignored, *OF_AN_ATLAS), f"{reason}; give one of both")
    if arguments.dry_run:
        _refuse(arguments, OF_AN_ATLAS, "--dry_run records nothing, so nothing can be written; give one of both")


def _refuse(arguments: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False and value != []:
            said = f"the prompt {value[0]!r} (no key=value)" if name == "texts" else f"--{name}"
            raise InputError(f"{said}: {reason}")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Make the folders that are written to. Raises InputError if a file or folder cannot be, or is asked for twice."""
    files = {f"--{name}": getattr(arguments, name) for name in ("out", "report", "roles")}
    files["--sampling"] = arguments.sampling or None
    given = {option: path for option, path in files.items() if path is not None}
    taken: dict[str, str] = {}
    for option, path in given.items():
        ensure_writable_folder(path.parent, option)
        try:
            ensure_writable(path)
        except InputError as error:
            raise InputError(f"{option}: {error}") from error
        first = taken.setdefault(os.path.realpath(path), option)
        if first != option:
            raise InputError(f"{option}: {path} is what {first} is to write; give them different names")
    if arguments.plot is not None:
        ensure_writable_folder(arguments.plot, "--plot")
