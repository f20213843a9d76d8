"""The live studio: python -m studio --config_path configs/longlive_interactive_inference.yaml [key=value ...]

A page on which a video goes on without end and does what is typed, and the server behind it; docs/studio.md. Heads must
keep a bounded number of frames: a window, or Dummy Forcing.
"""

from __future__ import annotations

from utils import interrupts

if __name__ == "__main__":
    interrupts.answer_at_once()

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

from utils import command
from utils.distributed import World, stop_with_launcher
from utils.errors import ToldElsewhere

if TYPE_CHECKING:
    from pipeline.config.config import InferenceConfig
    from studio.serving import Place
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


@contextmanager
def prepared(arguments: argparse.Namespace, world: World) -> Iterator[Place]:
    """The server's settings and its place. Raises InputError for what the user must mend."""
    from pipeline.config.config import load_config
    from pipeline.runtime.loading import require_files
    from pipeline.runtime.together import rank_device, require_world
    from studio.serving import taken
    from utils.user_paths import require_file, user_path

    settings = settings_from(arguments)
    config = load_config(arguments.config_path, arguments.overrides)
    require_world(config, world)
    rank_device(config, world)
    require_files(config)
    if settings.calibration is not None:
        require_file(user_path(settings.calibration, "--calibration"), "--calibration", "calibration")
    with taken(config, settings) as place:
        yield place


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes; processes that make blocks together with the first one follow it. Raises InputError
    for what the user must mend."""
    from pipeline.config.config import as_dict, load_config
    from pipeline.runtime.together import require_equal

    world, place = World.from_environment(), None
    with ExitStack() as stack:

        def decide() -> str:
            nonlocal place
            place = stack.enter_context(prepared(arguments, world))
            return json.dumps(as_dict(place.config))

        told = json.loads(world.agree(decide))
        if place is not None:
            return lead(place, world, arguments.open)
        config = load_config(arguments.config_path, arguments.overrides)
        require_equal(config, told, world)
        return follow(config, world)


def lead(place: Place, world: World, show: bool) -> int:
    from pipeline import Pipeline
    from pipeline.runtime.together import joined, rank_device
    from studio.serving import serve

    device = rank_device(place.config, world)
    with joined(world, device) as exchange:
        return serve(place, lambda: Pipeline.from_config(place.config, device=device, exchange=exchange), show)


def follow(config: InferenceConfig, world: World) -> int:
    """Make blocks together with the first process until that ends: it alone talks, and answers to signals, which all
    processes get, so that sessions come to their end."""
    from pipeline import Pipeline
    from pipeline.runtime.together import joined, rank_device

    logging.disable(logging.WARNING)
    device = rank_device(config, world)
    try:
        with joined(world, device) as exchange:
            pipeline = Pipeline.from_config(config, device=device, exchange=exchange)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            pipeline.follow()
    except KeyboardInterrupt as error:
        raise ToldElsewhere("interrupted") from error
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see utils/command.py."""
    stop_with_launcher()
    arguments = parse_arguments(argv)

    def program() -> int:
        from studio.serving import StillLoading

        try:
            return run(arguments)
        except StillLoading:
            sys.stdout.flush()
            os._exit(0)  # an orderly exit would wait for that thread, or break it off where it must not be

    return command.run(program, ["studio.serving"])


if __name__ == "__main__":
    sys.exit(main())
