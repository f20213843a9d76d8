"""What a program drives: sessions, each a video (or a batch of them) that is made block by block.

    pipeline = Pipeline.from_config("configs/longlive_inference.yaml", ["seed=1"])
    with pipeline.session(frames=120) as session:
        session.prompt("A cat walks in the snow.")
        for block in session:
            ...  # block.frames; session.prompt() at any time

Sessions of one pipeline may be open at the same time, in one thread or in several: each has its own cache, order of
heads, decoder and noise; the weights are shared, and blocks are made one at a time. This file knows no files and no
settings.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from dummy.roles import HeadRoles
from pipeline.config.arguments import given_prompt, given_storyboard
from pipeline.runtime.decoding import BlockDecoder, HostFrames
from pipeline.runtime.generator import BlockGenerator, Rollout
from pipeline.runtime.inputs import NoiseSource
from pipeline.runtime.outputs import CleanBlock
from pipeline.runtime.turns import Due, Prompt, Turn, Turns
from utils.errors import InputError
from utils.profiler import Profiler
from utils.transfer import to_device
from wan.attention.held import HeldFrames, held_by_head
from wan.geometry import ENDLESS, LatentGeometry
from wan.text import pad
from wan.transformer.model import TextContext

logger = logging.getLogger(__name__)

TIMED_BLOCKS = 256  # the last ones, of which a session without end keeps the times


@dataclass
class SessionBlock:
    """Block `index` of a session's videos, of the latent frames from `start_frame` on.

    `latents` [B, n, C, h, w] are float32 on the model's device, `roles` what the heads are by now, if that is known.
    """

    index: int
    start_frame: int
    prompt: Prompt
    latents: Tensor
    roles: HeadRoles | None
    _host: HostFrames | None
    _began: float
    seconds_to_host: float | None = field(default=None, init=False)

    @property
    def videos(self) -> Tensor:
        """uint8 [B, frames, H, W, 3] on the host; waits until they are there."""
        assert self._host is not None, "this session does not decode"
        videos: Tensor = self._host.wait()
        if self.seconds_to_host is None:
            self.seconds_to_host = time.perf_counter() - self._began
        return videos

    @property
    def frames(self) -> Tensor:
        """uint8 [frames, H, W, 3] of the session's only video, on the host; waits until they are there. Raises
        InputError for a session of several."""
        videos = self.videos
        if len(videos) > 1:
            raise InputError(f"frames: the session makes {len(videos)} videos at once; use `videos`, which has all")
        return videos[0]

    @property
    def seconds(self) -> float:
        """From when the block was asked for until its frames were on the host; waits for them."""
        if self.seconds_to_host is None:
            _ = self.videos
        assert self.seconds_to_host is not None
        return self.seconds_to_host


class Session:
    """A video, or a batch of videos with common head roles, in the making. Iterate over it for its blocks.

    A prompt may come at any time, from any thread, and takes effect with the next block that begins, as a switch of a
    storyboard does. Close a session, or use it as a context, to free what it holds.
    """

    def __init__(
        self,
        generator: BlockGenerator,
        geometry: LatentGeometry,
        noise: NoiseSource,
        embed: Callable[[str], Tensor],
        decoder: Callable[[Profiler], BlockDecoder] | None = None,
        *,
        batch: int = 1,
        filled_up: int = 0,
        prefix_latents: Tensor | None = None,
        lock: AbstractContextManager[object] | None = None,
        live: bool = True,
        keep_buffers: bool = False,
        turns: Turns | None = None,
        number: int = 0,
    ) -> None:
        """`embed` gives a prompt's embedding [length, text_dim]; without a `decoder` blocks have latents alone.
        `filled_up`: so many videos more are made, which nobody gets, since the engine is ready for such a batch.

        `prefix_latents` [1 or B, F, C, h, w] are whole blocks that the videos begin with. While the `lock` is held, by
        this session or by others of the same model, a block is made. Sessions that are not `live` take no prompts
        beyond those that are planned before the first block. `keep_buffers` leaves the cache and what was captured over
        it to the next session of the same sizes. Every block, and the end, is one of the `turns`, in which the session
        has a `number`.
        """
        self._generator = generator
        self._geometry = geometry
        self._embed = embed
        self._batch = batch
        self._filled_up = filled_up
        self._lock = nullcontext() if lock is None else lock
        self._live = live
        self._keep_buffers = keep_buffers
        self._turns = turns or Turns(None)
        self._number = number
        self.prefix_blocks = 0 if prefix_latents is None else prefix_latents.shape[1] // geometry.frames_per_block
        self._typed: Due | None = None
        self._typing = threading.Lock()
        self._scenes: list[tuple[int, Prompt]] = []
        self.closed = False
        self._broken_off: str | None = None  # by what, if a block was
        endless = geometry.num_frames >= ENDLESS - geometry.frames_per_block
        self.profiler = Profiler(generator.model.device, keep=TIMED_BLOCKS if endless else None)
        with self._lock, torch.inference_mode():
            if prefix_latents is not None:
                prefix_latents = to_device(prefix_latents, generator.model.device).expand(batch, -1, -1, -1, -1)
                prefix_latents = torch.cat((prefix_latents, *[prefix_latents[-1:]] * filled_up))
            size = batch + filled_up
            self.rollout: Rollout = generator.start(
                geometry, [], noise, size, self.profiler, prefix_latents, live=True, videos=batch
            )
            self._decoder = decoder(self.profiler) if decoder is not None else None
        self._blocks = self.rollout.blocks()
        self._next_frame = 0
        self._planned: list[tuple[int, Prompt, bool]] = []
        self.cuts: list[int] = []
        """Latent frames of the storyboard at which another scene begins."""

    def prompt(self, text: str | Sequence[str], *, cut: bool = False) -> None:
        """Let a prompt, or one for each video, take effect with the next block that begins; with `cut` as another
        scene. Of several that come while one block is made, the last counts. Encodes it, so it may take as long as the
        text encoder does.

        Raises InputError for an empty prompt, one that the settings leave no place for, after the last block, or if the
        session is closed.
        """
        given = given_prompt(text, self._batch)
        self._check_open_to("prompt")
        self._generator.settings.check_switch(self._next_frame, cut)
        embeds = self._embedded(given)
        with self._typing:
            if self.closed:
                raise InputError("prompt: the session is closed; open another one")
            self._typed = Due(given, embeds, cut)

    def plan(self, storyboard: Sequence[tuple[int, str | Sequence[str]]], cuts: Collection[int] = ()) -> None:
        """Let prompts take effect at the blocks that begin at or after the given latent frames; those of the frames
        `cuts` begin another scene. Raises InputError as `prompt` does, and for frames that do not ascend or at or after
        which no block begins."""
        whole, frames = self._geometry.frames_per_block, self._geometry.num_frames
        planned = given_storyboard(storyboard, cuts, self._batch, whole, frames)
        self._check_open_to("storyboard")
        for frame, text, cut in planned:
            self._generator.settings.check_switch(frame, cut)
            self._embedded(text)  # what is wrong with a prompt is told now
        self._planned = sorted([*self._planned, *planned], key=lambda one: one[0])

    def _check_open_to(self, what: str) -> None:
        """Raises InputError if a prompt that is given now, as `what`, could take no effect."""
        if self.closed:
            raise InputError(f"{what}: the session is closed; open another one")
        if self._next_frame >= self._geometry.num_frames:
            raise InputError(f"{what}: the video of {self._next_frame} latent frames is complete; open another session")
        if self._next_frame and not self._live:
            raise InputError(f"{what}: a session with live=False takes prompts before its first block; use live=True")

    def _embedded(self, prompt: Prompt) -> list[Tensor]:
        texts = [prompt] * self._batch if isinstance(prompt, str) else list(prompt)
        return [self._embed(text) for text in texts]

    def _due(self) -> Due | None:
        """The prompt that takes effect with the next block, if there is a new one."""
        # A prompt that takes effect now or later needs the clean frames of the block before it.
        self.rollout.keep_past = self._live or bool(self._planned)
        now = [one for one in self._planned if one[0] <= self._next_frame]
        planned = [Due(prompt, self._embedded(prompt), cut) for _, prompt, cut in now[-1:]]
        del self._planned[: len(now)]
        with self._typing:
            typed, self._typed = self._typed, None
        return planned[0] if planned else typed

    def _text(self, embeds: Sequence[Tensor]) -> TextContext:
        model = self._generator.model
        with self.profiler.span("init"), torch.inference_mode():
            every = [*embeds, *[embeds[-1]] * self._filled_up]
            return model.encode_text(pad(every, model.config.text_len))

    def __iter__(self) -> Iterator[SessionBlock]:
        return self

    def __next__(self) -> SessionBlock:
        """The next block. Raises StopIteration after the last one, and when the session is closed; InputError if there
        is no prompt yet, or if a block was broken off by an exception, after which the video cannot go on."""
        began = time.perf_counter()
        with self._lock:
            if self.closed:
                raise StopIteration
            self._check_whole()
            due = self._due()
            if due is None and not self._scenes:
                raise InputError(
                    "prompt: the session has none yet; call session.prompt(text) before the first block, or let the "
                    "storyboard begin at latent frame 0"
                )
            with self._turns.taken(Turn(self._number, due)), self._noticed():
                block = self._advance(due)
                host = None if block is None or self._decoder is None else self._decoder.decode(block.latents)
            if block is None:
                raise StopIteration
            self._note(block, due)
        return self._finished(block, host, began)

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        """Remember what breaks off a block: of the loop nothing is left then, as if the video were complete."""
        try:
            yield
        except BaseException as error:
            self._broken_off = type(error).__name__
            raise

    def _check_whole(self) -> None:
        if self._broken_off is not None:
            raise InputError(
                f"session: the block at latent frame {self._next_frame} was broken off ({self._broken_off}), and the "
                "video cannot go on; open another session with the same seed and plan(storyboard)"
            )

    def follow(self, due: Due | None) -> None:
        """Make the next block, whose latents another process takes; where tiles are dealt, decode one's own."""
        self.rollout.keep_past = True
        block = self._advance(due)
        if block is not None and self._decoder is not None:
            self._decoder.assist(block.latents)

    def _advance(self, due: Due | None) -> CleanBlock | None:
        """The next block, with the prompt that takes effect with it; None after the last one."""
        if due is not None:
            self.rollout.prompt(self._text(due.embeds), due.cut)
        return next(self._blocks, None)

    def _note(self, block: CleanBlock, due: Due | None) -> None:
        """Count a block that is made, with the prompt that took effect with it."""
        if due is not None:
            self._scenes.append((block.start_frame, due.prompt))
            self.cuts += [block.start_frame] * due.cut
        self._next_frame = block.start_frame + self._geometry.frames_per_block

    def _finished(self, block: CleanBlock, host: HostFrames | None, began: float) -> SessionBlock:
        prompt, roles = self._scenes[-1][1], self.rollout.roles
        latents = block.latents[: self._batch]
        made = SessionBlock(block.index, block.start_frame, prompt, latents, roles, host, began)
        if host is None:
            made.seconds_to_host = time.perf_counter() - began
        return made

    @property
    def storyboard(self) -> list[tuple[int, Prompt]]:
        """The prompts that took effect, each with the latent frame that its first block begins at.

        As a line of a storyboard file, with the same settings and seed, it gives the same video again.
        """
        return list(self._scenes)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self._generator.model.device

    @property
    def frames_made(self) -> int:
        """Latent frames of the blocks so far."""
        return self._next_frame

    @property
    def roles(self) -> HeadRoles | None:
        """What the heads are, if the policy has roles and they are known by now."""
        return self.rollout.roles

    def held(self) -> list[list[HeldFrames]]:
        """What every head of every layer keeps, and which earlier latent frames it holds now; between blocks. Raises
        InputError if the session is closed."""
        if self.closed:
            raise InputError("held: the session is closed and holds nothing; ask before close()")
        return held_by_head(self.rollout.cache)

    def close(self) -> None:
        """Free the cache, the decoder's memory and what was captured over them. A block at work is finished first."""
        with self._typing:
            already, self.closed = self.closed, True
        if already:
            return
        with self._lock:
            self._turns.end(Turn(self._number, ended=True))
            self._blocks.close()
            if self._decoder is not None:
                self._decoder.close()
            if not self._keep_buffers:
                self._generator.drop_spare_cache()
                if self._decoder is not None:
                    self._decoder.forget()
            self._decoder = None
            del self.rollout.cache

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
