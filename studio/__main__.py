"""The live studio: python -m studio --config_path configs/longlive_interactive_inference.yaml [key=value ...]

A page on which a video goes on without end and does what is typed, and the server behind it; docs/studio.md. Heads must
keep a bounded number of frames: a window, or Dummy Forcing.
"""

from __future__ import annotations

from utils import interrupts

if __name__ == "__main__":
    interrupts.answer_at_once()

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from utils import command

if TYPE_CHECKING:
    from studio.settings import StudioSettings


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m studio", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_path", required=True, metavar="YAML")
    parser.add_argument("--host", default="127.0.0.1", help="another than the loopback asks for a token")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--token", help="what clients must know; made and printed for other hosts if none is given")
    parser.add_argument("--max_sessions", type=int, default=2, help="videos at once, each with a cache of its own")
    parser.add_argument("--absence_s", type=float, default=60.0, help="after which a session without viewers is freed")
    parser.add_argument("--record_gib", type=float, default=2.0, help="disk for a session's frames, for Save")
    parser.add_argument("--calibration", metavar="FILE", help="offers the policy calibrated and its dial")
    parser.add_argument("--allow_origin", action="append", default=[], metavar="URL", help="pages that may connect")
    parser.add_argument("--allow_host", action="append", default=[], metavar="NAME", help="names of this server")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return command.parse(parser, argv)


def settings_from(arguments: argparse.Namespace) -> StudioSettings:
    """Raises InputError for values out of range."""
    from studio.security import new_token
    from studio.settings import StudioSettings

    values = {field.name: getattr(arguments, field.name) for field in fields(StudioSettings) if field.name in arguments}
    values["allowed_origins"], values["allowed_hosts"] = tuple(arguments.allow_origin), tuple(arguments.allow_host)
    settings = StudioSettings(**values)
    if settings.token is None and not settings.is_loopback:
        settings = StudioSettings(**{**values, "token": new_token()})
    return settings


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes. Raises InputError for what the user must mend."""
    from pipeline.config.config import load_config
    from pipeline.runtime.loading import require_files
    from studio.serving import serve

    settings = settings_from(arguments)
    config = load_config(arguments.config_path, arguments.overrides)
    require_files(config)
    return serve(config, settings, arguments.open)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see utils/command.py."""
    arguments = parse_arguments(argv)
    return command.run(lambda: run(arguments), ["studio.serving"])


if __name__ == "__main__":
    sys.exit(main())
