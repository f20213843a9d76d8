"""A take under way: its blocks become pictures that go to the viewers, and frames that are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pipeline import Session, SessionBlock
from studio.choices import Choice
from studio.pace import Pace
from studio.pictures import Frame, jpeg
from studio.protocol import event, frame_message
from studio.reports import Heads, Numbers
from studio.take import Scene, Take
from studio.viewer import Viewer
from studio.workshop import Made, Workshop


@dataclass(frozen=True)
class Part:
    """A block on its way to the viewers: its first pixel frame, how many it has, its scene, and whether that is new."""

    block: SessionBlock
    first: int
    count: int
    scene: int
    begins: Scene | None


@dataclass(frozen=True)
class Said:
    """A prompt in effect from pixel frame `frame` on; `id` is what the viewer who typed it called it, or 0."""

    frame: int
    text: str
    id: int


@dataclass(eq=False)
class Showing:
    """`number` counts the takes of a session; `opened` is when it was asked for."""

    number: int
    choice: Choice
    session: Session
    take: Take
    workshop: Workshop
    opened: float
    made: int = 0  # pixel frames
    scenes: list[Said] = field(default_factory=list)
    heads: Heads | None = None
    first_frame_s: float | None = None
    transformer_s: float | None = None
    saves: set[asyncio.Task[None]] = field(default_factory=set)
    under_way: asyncio.Task[None] | None = None  # the last block, until its viewers and its recording have it
    _last_message: bytes | None = None

    def introduce(self, viewer: Viewer) -> None:
        """Tell a viewer all that the others know, and show the last frame."""
        scenes = [vars(said) for said in self.scenes]
        viewer.tell(event("take", take=self.number, made=self.made, scenes=scenes, **vars(self.choice)))
        if self.heads is not None:
            viewer.tell(self.heads.event(self.number))
        if self._last_message is not None:
            viewer.show(self._last_message)
        viewer.take, viewer.shown, viewer.heard = self.number, self.made, time.monotonic()

    def add(self, made: Made, prompted: dict[str, tuple[int, float]], viewers: Collection[Viewer]) -> Part:
        """Count a block, and tell of the scene that it begins, if it does; `prompted`: what waited for one, as number
        and time of arrival by text."""
        workshop, block = self.workshop, made.block
        self.transformer_s = made.transformer_s
        begins = None
        if made.scenes > len(self.scenes):
            assert isinstance(block.prompt, str)
            begins = Scene(block.start_frame, block.prompt)
            number, came = prompted.pop(block.prompt, (0, self.opened))
            for text in [text for text, (_, at) in prompted.items() if at < came]:
                del prompted[text]  # another came before its block did
            self.scenes.append(Said(self.made, block.prompt, number))
            _tell(viewers, self._scene_event(len(self.scenes) - 1))
            workshop.metrics.prompts.inc()
            workshop.metrics.prompt_seconds.observe(time.monotonic() - came)
        if made.heads != self.heads:
            self.heads = made.heads
            _tell(viewers, made.heads.event(self.number))
        count = workshop.block_frames if block.index else workshop.first_frames
        part = Part(block, self.made, count, len(self.scenes) - 1, begins)
        self.made += count
        return part

    async def publish(self, part: Part, viewers: Collection[Viewer]) -> Sequence[Frame]:
        """Send a block's frames to the viewers, each as soon as it is a picture; returns them."""
        loop = asyncio.get_running_loop()

        def show(message: bytes) -> None:
            self._last_message = message
            for viewer in viewers:
                viewer.show(message)

        def pictures() -> list[Frame]:
            frames = list(part.block.frames.numpy())
            for index, frame in enumerate(frames, part.first):
                message = frame_message(self.number, part.block.index, index, part.scene, jpeg(frame))
                loop.call_soon_threadsafe(show, message)
            return frames

        frames = await self.workshop.picture(pictures)
        assert len(frames) == part.count
        self.workshop.metrics.frames.inc(part.count)
        if self.first_frame_s is None:
            self.first_frame_s = time.monotonic() - self.opened
            self.workshop.metrics.first_frame_seconds.observe(self.first_frame_s)
        return frames

    async def record(self, part: Part, frames: Sequence[Frame]) -> None:
        """Keep a block's frames."""

        def keep() -> None:
            if part.begins is not None:
                self.take.begin_scene(part.begins)
            self.take.add(frames)

        await self.workshop.picture(keep)

    async def settled(self) -> None:
        """Until all blocks that have been made are with the viewers and recorded. Raises what kept one from that."""
        if self.under_way is not None:
            await asyncio.shield(self.under_way)

    async def end(self) -> None:
        """No more blocks come."""
        await self.workshop.shut(self.session)
        await self.workshop.picture(self.take.close)

    def numbers(self, pace: Pace, viewers: Collection[Viewer]) -> Numbers:
        workshop = self.workshop
        return Numbers(
            fps=float(workshop.pipeline.config.fps),
            transformer_fps=workshop.block_frames / self.transformer_s if self.transformer_s else None,
            end_to_end_fps=pace.capacity,
            playing_fps=pace.playing_fps,
            first_frame_s=self.first_frame_s,
            block_s=pace.block_s,
            frames=self.made,
            lead_frames=pace.lead,
            viewers=len(viewers),
            lost_frames=[viewer.lost_frames for viewer in viewers],
            memory=workshop.memory(),
            recording=self.take.fault,
        )

    def _scene_event(self, index: int) -> str:
        said = self.scenes[index]
        return event("scene", take=self.number, scene=index, **vars(said))


def _tell(viewers: Collection[Viewer], message: str) -> None:
    for viewer in viewers:
        viewer.tell(message)
