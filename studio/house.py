"""The server's parts and their order: loaded beside the event loop, ready one after the other, closed in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import Pipeline
from pipeline.config.config import InferenceConfig
from studio.choices import Choices
from studio.generator_thread import GeneratorThread
from studio.jobs import Jobs
from studio.keeper import Keeper
from studio.lobby import Lobby
from studio.metrics import Metrics
from studio.settings import Folders, StudioSettings
from studio.workshop import Workshop
from utils.files import ensure_writable_folder
from utils.prompts import is_storyboard_file, read_prompts, read_storyboards

logger = logging.getLogger(__name__)

_EXAMPLES = 12
_TICK_S = 1.0


def examples_of(config: InferenceConfig) -> list[str]:
    """The prompts that the page offers, from the configuration's file. Raises InputError if there is none."""
    path = Path(config.data_path)
    if is_storyboard_file(path):
        prompts = [prompt for board in read_storyboards(path, "data_path") for prompt in board.prompts]
    else:
        prompts = read_prompts(path, "data_path")
    return list(dict.fromkeys(prompts))[:_EXAMPLES]


class House:
    """`parts` are there once the model is loaded."""

    def __init__(
        self, config: InferenceConfig, settings: StudioSettings, examples: list[str], load: Callable[[], Pipeline]
    ) -> None:
        """`load` makes the pipeline. Raises InputError if the folder cannot be written."""
        self.config = config
        self._pipeline = load
        self.settings = settings
        self.examples = examples
        self.metrics = Metrics()
        self.folders = Folders(Path(config.output_folder))
        for folder in (self.folders.root, self.folders.takes, self.folders.saved, self.folders.jobs):
            ensure_writable_folder(folder, "output_folder")
        self.loaded = asyncio.Event()
        self.connections = 0
        self.failure: BaseException | None = None
        self._generator = GeneratorThread()  # which ends with the process, even in the middle of loading
        self._parts: Parts | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @contextmanager
    def one_more_connection(self) -> Iterator[None]:
        """Counts it."""
        self.connections += 1
        self.metrics.viewers.set(self.connections)
        try:
            yield
        finally:
            self.connections -= 1
            self.metrics.viewers.set(self.connections)

    @property
    def parts(self) -> Parts:
        assert self._parts is not None, "loaded comes first"
        return self._parts

    def open(self, on_failure: Callable[[], None]) -> None:
        """Begin to load; `on_failure` is called if that fails, or nothing more can be made, and `failure` says why."""
        self._tasks.append(asyncio.create_task(self._load(on_failure)))

    async def _load(self, on_failure: Callable[[], None]) -> None:
        try:
            pipeline = await self._generator.run(self._ready_pipeline)
            choices = Choices(pipeline, self.settings.calibration)
        except Exception as error:  # raised again where the server was started
            self.failure = error
            on_failure()
            return
        workshop = Workshop(pipeline, self._generator, choices, self.settings, self.folders, self.metrics)
        keeper = Keeper(workshop)
        self._parts = Parts(workshop, keeper, Lobby(workshop, keeper, self.examples[0]), Jobs(workshop))
        logger.info("ready: policies %s", ", ".join(choices.policies))
        self.loaded.set()
        for work in (self.parts.jobs.run(), self._tick(on_failure), keeper.recover()):
            self._tasks.append(asyncio.create_task(work))

    def _ready_pipeline(self) -> Pipeline:
        """Loaded, and warmed up by a first block, so that the first visitor need not wait for that."""
        pipeline = self._pipeline()
        with pipeline.session() as session:
            session.prompt(self.examples[0])
            _ = next(session).frames
        return pipeline

    async def _tick(self, on_failure: Callable[[], None]) -> None:
        pipeline = self.parts.workshop.pipeline
        while pipeline.fault is None:
            await asyncio.sleep(_TICK_S)
            self.parts.lobby.tick()
        on_failure()

    async def close(self) -> None:
        """End the sessions, save them, and free everything. Where processes that make blocks together are out of step,
        the next start saves them, as if this one had been killed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._parts is None:
            return
        pipeline = self.parts.workshop.pipeline
        await self.parts.lobby.close()
        if pipeline.fault is None:
            await self.parts.keeper.finish()
        await asyncio.to_thread(self.parts.workshop.close)
        self.failure = self.failure or pipeline.fault


class Parts:
    """What a loaded house has."""

    def __init__(self, workshop: Workshop, keeper: Keeper, lobby: Lobby, jobs: Jobs) -> None:
        self.workshop = workshop
        self.keeper = keeper
        self.lobby = lobby
        self.jobs = jobs
