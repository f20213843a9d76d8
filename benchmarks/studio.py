"""The live studio, measured: python -m benchmarks.studio [--minutes 30 --prompts 20 --part rate --json FILE]

Starts a server with the small model in a process of its own and prints what its visitors see: frames a second end to
end with one viewer who takes all there are, the rate of eight and of twenty viewers, memory over minutes of video, and,
in a real Chromium at the video's own rate, the time to the first picture and from Enter to the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from benchmarks.arguments import result_file, store
from studio.protocol import HEADER
from utils import command
from utils.errors import ToldElsewhere

ROOT = Path(__file__).parents[1]
CONFIG = "configs/shapes_studio.yaml"
SENTENCES = ("It turns blue.", "The ball turns green.", "It grows.", "Now the other way.")


@contextmanager
def server(overrides: Sequence[str]) -> Iterator[str]:
    """The address of a studio that is ready."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--config_path", CONFIG, "--port", "0", *overrides, f"output_folder={folder}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "studio", *given], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            while words and process.poll() is None and not _is_ready(words[-1]):
                time.sleep(0.2)
            if not words or process.poll() is not None:
                raise ToldElsewhere("the studio has not started")
            yield words[-1]
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}readyz") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Watcher:
    """A viewer without a screen: `paced` at the video's rate, else as fast as frames come."""

    def __init__(self, url: str, paced: bool) -> None:
        self._url = url.replace("http", "ws") + "ws"
        self._paced = paced
        self.watch_key: str | None = None
        self.frames = 0
        self.started = 0.0
        self.memory: list[tuple[int, int]] = []  # frames, bytes

    async def run(
        self, until: Callable[[Watcher], bool], join: str | None = None, ready: asyncio.Event | None = None
    ) -> None:
        async with connect(self._url, max_size=None, compression=None) as socket:
            await socket.send(json.dumps({"type": "hello", **({"join": join} if join else {})}))
            fps, steers = 16, True
            async for message in socket:
                if isinstance(message, bytes):
                    _, _, take, _, frame, _ = HEADER.unpack_from(message)
                    self.started = self.started or time.monotonic()
                    self.frames += 1
                    if self._paced and steers:
                        await asyncio.sleep(max(0.0, self.started + frame / fps - time.monotonic()))
                    if steers and frame % 4 == 0:
                        await socket.send(json.dumps({"type": "at", "take": take, "frame": frame + 1}))
                else:
                    event = json.loads(message)
                    if event["type"] == "session":
                        self.watch_key, steers = event["watch"], event["steers"]
                        if ready is not None:
                            ready.set()
                    elif event["type"] == "numbers":
                        self.memory.append((event["frames"], event["memory"]["resident"]))
                if until(self):
                    break
            if steers:
                await socket.send(json.dumps({"type": "bye"}))

    @property
    def rate(self) -> float:
        return self.frames / (time.monotonic() - self.started)


def seconds(count: float) -> Callable[[Watcher], bool]:
    return lambda viewer: bool(viewer.started) and time.monotonic() - viewer.started > count


def measure_rate(url: str) -> dict[str, Any]:
    """One viewer who takes all that there is."""
    viewer = Watcher(url, paced=False)
    asyncio.run(viewer.run(seconds(20)))
    return {"frames a second, one viewer, end to end": round(viewer.rate, 1)}


def measure_viewers(url: str, count: int) -> dict[str, Any]:
    """Viewers of one session, of whom one steers, at the video's rate."""

    async def all_of_them() -> list[float]:
        owner, ready = Watcher(url, paced=True), asyncio.Event()
        tasks = [asyncio.create_task(owner.run(seconds(20), ready=ready))]
        await ready.wait()
        guests = [Watcher(url, paced=False) for _ in range(count - 1)]
        tasks += [asyncio.create_task(guest.run(seconds(15), owner.watch_key)) for guest in guests]
        rates = []
        for guest, task in zip(guests, tasks[1:], strict=True):
            await task
            rates.append(guest.frames / 15)
        await tasks[0]
        return [owner.rate, *rates]

    rates = asyncio.run(all_of_them())
    return {f"frames a second, {count} viewers of one session, the slowest": round(min(rates), 1)}


def measure_memory(url: str, minutes: float) -> dict[str, Any]:
    """Resident memory of the server after each tenth of the video."""
    viewer, most = Watcher(url, paced=False), minutes * 60 * 16
    asyncio.run(viewer.run(lambda one: one.frames >= most))
    tenths = [next(size for made, size in viewer.memory if made >= most * part / 11) for part in range(1, 11)]
    return {
        "minutes of video": minutes,
        "MiB after each tenth": [round(size / 2**20) for size in tenths],
        "frames a second meanwhile": round(viewer.rate, 1),
    }


def measure_browser(url: str, prompts: int) -> dict[str, Any]:
    """What a visitor sees in Chromium: seconds to the first picture, from Enter to the screen, frames a second."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("STUDIO_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        first, rates = [], []
        for _ in range(5):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            asked = time.monotonic()
            page.goto(url)
            while not page.evaluate("window.studio && studio.player.shown > 0"):
                page.wait_for_timeout(10)
            first.append(time.monotonic() - asked)
            if len(first) < 5:
                page.evaluate("studio.bye()")
                page.context.close()
        page.wait_for_timeout(4000)
        for number in range(prompts):
            page.fill("#prompt", SENTENCES[number % len(SENTENCES)])
            page.press("#prompt", "Enter")
            while page.evaluate("studio.state.latencies.length") <= number:
                page.wait_for_timeout(20)
            page.wait_for_timeout(1100 + 137 * (number % 5))
            rates.append(page.evaluate("studio.player.rate()"))
        latencies = page.evaluate("studio.state.latencies")
        browser.close()
    return {
        "seconds to the first picture, median of 5": round(statistics.median(first), 2),
        f"seconds from Enter to the screen, median of {prompts}": round(statistics.median(latencies), 2),
        "and the slowest": round(max(latencies), 2),
        "frames a second on the screen, median": round(statistics.median(rates), 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parts = ("rate", "viewers", "browser", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=parts)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--json", type=result_file)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = command.parse(parser, argv)
    found: dict[str, Any] = {}
    with server(arguments.overrides) as url:
        for part in arguments.part or parts:
            if part == "rate":
                found |= measure_rate(url)
            elif part == "viewers":
                found |= measure_viewers(url, 8) | measure_viewers(url, 20)
            elif part == "browser":
                found |= measure_browser(url, arguments.prompts)
            else:
                found |= measure_memory(url, arguments.minutes)
    for name, value in found.items():
        print(f"{name}: {value}")
    store(found, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
