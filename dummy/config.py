"""The YAML section `dummy_forcing`: which attention heads lose their history, from when on, and what they keep.

Method: "Efficient Autoregressive Video Diffusion with Dummy Head" (arXiv 2601.20499); TeaCache: arXiv 2411.19108.
Conditions that involve the video's length, the model's size or the policy are not checked here: this file knows none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from dummy.budget import DummyBudget, Within
from dummy.presets import PRESETS, PresetName
from utils.errors import InputError, require_range
from wan.geometry import MOST_FRAMES

ONLINE = "online"  # the `calibration` of a video that calibrates itself


class HeadRetentions(NamedTuple):
    """What heads of each role keep of earlier frames, as (first frames, last frames) in latent frames."""

    sink: tuple[int, int]
    neighbor: tuple[int, int]
    dummy: tuple[int, int]


@dataclass(frozen=True)
class RetentionConfig:
    """`dummy_forcing.retention`: [sink, recent] latent frames a role; a role that is left out is as in the preset.

    Raises:
        InputError: a negative number.
    """

    sink: tuple[int, int] | None = None  # paper: [1, 0]
    neighbor: tuple[int, int] | None = None  # paper: [0, local_context_length * num_frame_per_block]
    dummy: tuple[int, int] | None = None  # paper: [0, 1]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and min(value) < 0:
                raise InputError(
                    f"dummy_forcing.retention.{field.name}: [sink, recent] must be 0 or more latent frames each, "
                    f"got {list(value)}"
                )
            if value is not None:
                require_range(f"dummy_forcing.retention.{field.name}", max(value), 0, MOST_FRAMES, "latent frames")


@dataclass(frozen=True)
class DummyForcingConfig:
    """Settings of Dummy Forcing; with `enabled: false` the others are not looked at.

    `equal_cost` lets neighbour heads keep as many recent frames as make a block cost what it does without Dummy
    Forcing: with all earlier frames (full), with the window of `local_attn_size` (window), both by counting; or as many
    as a speed in pixel frames a second leaves room for, which the run measures when it starts, so that such videos
    differ from machine to machine.

    Policy `calibrated` knows no roles: every head keeps what a calibration says costs it least, that of a file or, with
    `calibration: online`, of the video's own beginning. `frames_per_head` earlier frames are spent, as a mean over all
    heads, or as many as `full`, `window` or a speed (16fps) leave room for, which mean what they do in `equal_cost`.

    Raises:
        InputError: a value out of range.
    """

    enabled: bool = True
    policy: str = "packed"  # one of dummy/policies/registry.py: packed, prune, calibrated
    options: dict[str, object] | None = None  # of a policy that has keys of its own
    denoise_start: int = 0  # denoising step from which heads are split; published programs work with 0 alone
    ar_start: int = 1  # block, counted from 0, in whose clean pass the head roles are found
    local_context_length: int = 1  # L, blocks that neighbour heads (before the split: all heads) look back
    num_dummy: int | float | Literal["auto"] = 180  # heads made dummy, of layers x heads (360 in Wan 1.3B); 0.5: half
    num_dummy_within: Within = "model"  # layer: num_dummy heads (or that share) in each layer
    max_loss: float = 0.05  # num_dummy auto: of all heads' attention in block ar_start; later blocks lose more
    sink_score_frames: int = 1  # first context frames whose attention counts as sink
    score_query_share: float = 0.25  # of the block's queries are scored, below 1 at most 256; the paper takes 25 %
    preset: PresetName = "paper"  # what heads of each role keep; dummy/presets.py lists them with their sources
    retention: RetentionConfig | None = None
    equal_cost: Literal["full", "window"] | float | None = None  # see above
    roles: str | None = None  # file of saved head roles; null: observe them in every video
    reclassify_on_switch: bool = False  # find the roles anew after a prompt switch
    calibration: str | None = None  # for policy calibrated: file of python -m pipeline.calibrate, or online
    frames_per_head: float | str | None = None  # earlier latent frames, window, full, or a speed such as 16fps
    max_lengths: int | None = None  # different retentions in a layer, each an attention call (varlen: one for all)
    teacache_enabled: bool = False
    teacache_threshold: float = 0.2  # accumulated relative change below which a step is skipped

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        if self.denoise_start != 0:
            raise InputError(f"dummy_forcing.denoise_start: only 0 works, got {self.denoise_start}")
        if self.teacache_threshold < 0:
            raise InputError(f"dummy_forcing.teacache_threshold: must be 0 or more, got {self.teacache_threshold}")
        observing = ("ar_start", "sink_score_frames") if self.roles is None else ()
        for name in ("local_context_length", *observing):
            require_range(f"dummy_forcing.{name}", getattr(self, name), 1, MOST_FRAMES)
        self._check_budget()
        if not 0 < self.score_query_share <= 1:
            raise InputError(
                "dummy_forcing.score_query_share: must be above 0 and at most 1 (all queries), "
                f"got {self.score_query_share}"
            )
        if self.max_lengths is not None and self.max_lengths < 1:
            raise InputError(
                f"dummy_forcing.max_lengths: a layer's heads keep something, so it must be 1 or more, got "
                f"{self.max_lengths}; or leave it out"
            )
        if isinstance(self.equal_cost, float) and self.equal_cost <= 0:
            raise InputError(
                "dummy_forcing.equal_cost: must be full, window, or a speed above 0 in pixel frames a second, "
                f"got {self.equal_cost}"
            )

    @property
    def cost_key(self) -> str:
        """The key that says what blocks may cost."""
        return "equal_cost" if self.frames_per_head is None else "frames_per_head"

    @property
    def online(self) -> bool:
        """Whether every video calibrates itself."""
        return self.enabled and self.calibration == ONLINE

    @property
    def costs_window(self) -> bool:
        """Whether blocks may cost what the window of `local_attn_size` does."""
        return self.enabled and getattr(self, self.cost_key) == "window"

    @property
    def speed(self) -> float | None:
        """The pixel frames a second that the run is to measure and meet, if it is."""
        if isinstance(self.equal_cost, float):
            return self.equal_cost
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) *fps", str(self.frames_per_head), re.IGNORECASE)
        return float(match[1]) if match else None

    def _check_budget(self) -> None:
        amount = self.num_dummy
        if isinstance(amount, float) and not 0 <= amount <= 1:
            raise InputError(
                f"dummy_forcing.num_dummy: a share must be from 0.0 to 1.0, got {amount}; write a number of heads "
                "without a point"
            )
        if isinstance(amount, int) and amount < 0:
            raise InputError(f"dummy_forcing.num_dummy: must be 0 or more heads, got {amount}")
        if not 0 <= self.max_loss <= 1:
            raise InputError(
                f"dummy_forcing.max_loss: must be from 0 to 1, a share of all heads' attention, got {self.max_loss}"
            )

    @property
    def budget(self) -> DummyBudget:
        """How many heads become dummy."""
        return DummyBudget(self.num_dummy, self.num_dummy_within, self.max_loss)

    def retentions(self, num_frame_per_block: int) -> HeadRetentions:
        """What the `packed` policy keeps after the split, for blocks of that many latent frames (n); in the paper: sink
        heads the first frame, neighbour heads the last L n frames, dummy heads the last frame."""
        preset, given = PRESETS[self.preset], self.retention or RetentionConfig()
        context = self.local_context_length * num_frame_per_block
        return HeadRetentions(
            given.sink or preset.sink.frames(context),
            given.neighbor or preset.neighbor.frames(context),
            given.dummy or preset.dummy.frames(context),
        )
