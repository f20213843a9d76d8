"""Record a video from a script of timed prompts: python -m studio.client --script FILE --out video.mp4 [--url URL]

A line of the script is a second of the video and the prompt from then on: `4.5 It turns blue.` The video is made block
by block on the server, as fast as it can, and a prompt takes effect with the first block that begins at its time or
later. What comes is the server's own file, with the storyboard and the settings that make it again beside it.
"""

from __future__ import annotations

from utils import interrupts

if __name__ == "__main__":
    interrupts.answer_at_once()

import argparse
import json
import logging
import math
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils import command
from utils.errors import InputError, quoted
from utils.files import ensure_writable, write_atomic
from utils.user_paths import read_text, user_path

logger = logging.getLogger(__name__)

_LINE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s+(\S.*)")
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Cue:
    """A prompt from second `second` of the video on."""

    second: float
    prompt: str


def read_script(path: Path) -> list[Cue]:
    """Raises InputError, which names the line, for anything but lines of a second and a prompt, in order."""
    cues: list[Cue] = []
    for number, line in enumerate(read_text(path, "script", "script of timed prompts").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise InputError(f"script: {path}, line {number}: expected a second and a prompt, got {quoted(line)}")
        cue = Cue(float(match[1]), match[2])
        if cues and cue.second <= cues[-1].second:
            raise InputError(f"script: {path}, line {number}: {cue.second:g} s is not after {cues[-1].second:g} s")
        cues.append(cue)
    if not cues or cues[0].second != 0:
        raise InputError(f"script: {path}: the first prompt must be at second 0")
    return cues


class StudioClient:
    """A session on a server, steered block by block. Raises InputError for what the server says is wrong."""

    def __init__(self, url: str, token: str | None = None) -> None:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"url: expected an address such as http://127.0.0.1:7860, got {quoted(url)}")
        self._base, self._token = f"{parts.scheme}://{parts.netloc}", token
        with ExitStack() as opened:
            try:
                address = f"ws{parts.scheme[4:]}://{parts.netloc}/ws"
                self._socket = opened.enter_context(connect(address, max_size=None, compression=None))
            except (OSError, ValueError, WebSocketException) as error:  # ValueError: a port that cannot be
                why = f"no studio answers at {self._base} ({error}); start one, or mend the url"
                raise InputError(f"url: {why}") from error
            opened.callback(self._say_goodbye)
            self.say("hello", token=token)
            self.welcome = self.wait_for("welcome")
            self.wait_for("session")
            self._open = opened.pop_all()

    def say(self, kind: str, **fields: object) -> None:
        """Send a message; what is None is left out."""
        given = {name: value for name, value in fields.items() if value is not None}
        self._socket.send(json.dumps({"type": kind, **given}))

    def wait_for(self, kind: str, **fields: object) -> dict[str, Any]:
        """The next event of that kind with these fields; what comes before it is passed over."""
        while True:
            message = self._receive()
            if isinstance(message, dict) and message["type"] == kind and fields.items() <= message.items():
                return message
            if isinstance(message, dict) and message["type"] == "waiting":
                logger.info("all sessions are taken: place %d of %d in the line", message["place"], message["of"])

    def wait_for_frames(self, take: int, count: int) -> None:
        """Until so many frames of the take have come."""
        from studio.protocol import HEADER

        while count:
            message = self._receive()
            count -= isinstance(message, bytes) and HEADER.unpack_from(message)[2] == take % 2**16

    def _receive(self) -> dict[str, Any] | bytes:
        from websockets.exceptions import ConnectionClosed

        try:
            message = self._socket.recv(_PATIENCE_S)
        except ConnectionClosed as error:
            raise InputError(f"the studio has ended the connection ({error})") from error
        except TimeoutError as error:
            raise InputError(f"the studio has said nothing for {_PATIENCE_S:g} s") from error
        if isinstance(message, bytes):
            return message
        event: dict[str, Any] = json.loads(message)
        if event["type"] in ("error", "ended"):
            raise InputError(f"the studio says: {event.get('message') or event.get('reason')}")
        return event

    def fetch(self, path: str) -> bytes:
        """A file of the server."""
        request = urllib.request.Request(f"{self._base}{path}")
        if self._token is not None:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
                data: bytes = answer.read()
        except urllib.error.URLError as error:
            raise InputError(f"{self._base}{path}: cannot be fetched ({error})") from error
        return data

    def close(self) -> None:
        """Free the session, which the server would else keep for one who may come back."""
        self._open.close()

    def _say_goodbye(self) -> None:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):  # the server has said it first
            self.say("bye")


def record(client: StudioClient, cues: Sequence[Cue], seconds: float, seed: int, policy: str | None) -> dict[str, Any]:
    """Make a video of so many seconds; returns the event that says where it is saved."""
    fps, first, block = (client.welcome[name] for name in ("fps", "first_block", "block"))
    client.say("restart", prompt=cues[0].prompt, seed=seed, policy=policy)
    client.say("pause", on=True)
    client.wait_for("paused", on=True)
    take = client.wait_for("take")  # the one that was asked for: no other begins after that
    made, waiting = 0, list(cues[1:])
    while made < seconds * fps:
        while waiting and made >= waiting[0].second * fps:
            client.say("prompt", text=waiting.pop(0).prompt, id=len(cues) - len(waiting))
            client.wait_for("prompted")
        client.say("step")
        client.wait_for_frames(take["take"], block if made else first)
        made += block if made else first
    client.say("save")
    return client.wait_for("saved")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m studio.client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--token")
    parser.add_argument("--script", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="MP4")
    parser.add_argument("--seconds", type=float, help="of video; by default 4 more than the last prompt's time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", help="of those that the server offers")
    return command.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see utils/command.py."""
    arguments = parse_arguments(argv)
    return command.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    cues, out = read_script(user_path(arguments.script, "script")), user_path(arguments.out, "out")
    if out.suffix != ".mp4":
        raise InputError(f"out: {out} must end in .mp4")
    seconds = cues[-1].second + 4 if arguments.seconds is None else arguments.seconds
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds: must be more than 0, got {seconds:g}")
    ensure_writable(out)
    with closing(StudioClient(arguments.url, arguments.token)) as client:
        saved = record(client, cues, seconds, arguments.seed, arguments.policy)
        for kind, path in saved["files"].items():
            write_atomic(out.with_suffix(f".{kind}"), client.fetch(path))
    print(f"{out}: {saved['frames']} frames; the same again, on the server's machine: {saved['command']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
