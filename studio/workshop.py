"""What all sessions share: the pipeline, the threads in which its work is done, the folders, the counters."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipeline import Pipeline, Session, SessionBlock
from studio.choices import Choice, Choices
from studio.generator_thread import GeneratorThread
from studio.metrics import Metrics
from studio.reports import Heads, heads_of
from studio.settings import Folders, StudioSettings
from studio.take import Take, TakeNotes
from utils.profiler import resident_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """A block, what its heads hold after it, and how long the transformer took for the last one that is done."""

    block: SessionBlock
    scenes: int  # prompts that have taken effect by now
    heads: Heads
    transformer_s: float | None


class Workshop:
    """One pipeline and everything around it."""

    def __init__(
        self,
        pipeline: Pipeline,
        generator: GeneratorThread,
        choices: Choices,
        settings: StudioSettings,
        folders: Folders,
        metrics: Metrics,
    ) -> None:
        self.pipeline = pipeline
        self.generator = generator
        self.choices = choices
        self.settings = settings
        self.folders = folders
        self.metrics = metrics
        self._texts = ThreadPoolExecutor(1, "texts")
        self._pictures = ThreadPoolExecutor(max(2, min(4, (os.cpu_count() or 2) - 1)), "pictures")
        self._files = ThreadPoolExecutor(1, "files")
        block = pipeline.config.num_frame_per_block
        self.first_frames = pipeline.pixel_frames(block)
        self.block_frames = pipeline.pixel_frames(2 * block) - self.first_frames

    async def open(self, choice: Choice) -> tuple[Session, Take]:
        """A session that has its prompt, and its recording. Raises InputError."""
        overrides = self.choices.overrides(choice)
        session = await self.generator.run(lambda: self.pipeline.session(seed=choice.seed, overrides=overrides))
        name = f"studio-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        frames = self.first_frames, self.block_frames, self.pipeline.config.num_frame_per_block
        notes = TakeNotes(name, choice.seed, overrides, *frames)
        try:
            await self.encode(session, choice.prompt)
            most = int(self.settings.record_gib * 2**30)
            return session, await self.picture(lambda: Take(self.folders.takes / name, notes, most))
        except BaseException:
            await self.shut(session)
            raise

    async def make(self, session: Session) -> Made:
        """The session's next block."""
        return await self.generator.run(lambda: _next_block(session))

    async def shut(self, session: Session) -> None:
        await self.generator.run(session.close)

    async def encode(self, session: Session, prompt: str) -> None:
        """Give the session a prompt. Raises InputError."""
        await asyncio.get_running_loop().run_in_executor(self._texts, session.prompt, prompt)

    async def picture(self, work: Callable[[], T]) -> T:
        """Work on frames that many sessions may do at the same time."""
        return await asyncio.get_running_loop().run_in_executor(self._pictures, work)

    async def file(self, work: Callable[[], T]) -> T:
        """Work on a whole video, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._files, work)

    def memory(self) -> dict[str, int | None]:
        """Bytes in use now, of the process and of the GPU."""
        cuda = self.pipeline.device.type == "cuda"
        return {"resident": resident_bytes(), "gpu": torch.cuda.memory_allocated() if cuda else None}

    def close(self) -> None:
        """Let the threads end; what is queued is dropped."""
        self.generator.close()
        for executor in (self._texts, self._pictures, self._files):
            executor.shutdown(cancel_futures=True)
        self.pipeline.close()


def _next_block(session: Session) -> Made:
    block = next(session, None)
    assert block is not None, "a session without end has a next block"
    spans = [session.profiler.latest_ms(name) for name in ("denoise", "clean")]
    transformer = sum(ms for ms in spans if ms is not None) / 1000 if spans[0] is not None else None
    return Made(block, len(session.storyboard), heads_of(session), transformer)
