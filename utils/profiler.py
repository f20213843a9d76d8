"""How long things took, measured without slowing them down, and how the result is shown.

`Profiler` notes the start and end of named spans; on CUDA as events on the current stream, so that nothing waits until
the report. Spans may overlap, on other streams and in other threads: each says how long its part was busy.
`VideoProfile` holds the numbers of one video and writes them out. This file does not know what the spans are, nor where
the report goes.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from utils.memory import format_bytes

_WARM_UP_BLOCKS = 2  # of a video, before its blocks take equally long: first kernels, then head roles and the split
_CPU_INFO = Path("/proc/cpuinfo")

Instant = float | torch.cuda.Event  # seconds of perf_counter, or an event on the stream


@dataclass(frozen=True)
class ProfileReport:
    """What a `Profiler` measured, all in milliseconds."""

    spans: dict[str, list[float]]  # a duration for each time the span was entered, in order
    marks: dict[str, float]  # since the start
    total_ms: float  # wall clock, from the start to the report


class Profiler:
    """Measures spans and instants, of one device unless told; the clock starts at construction and again at `reset`."""

    def __init__(self, device: torch.device, keep: int | None = None) -> None:
        """`keep`: of each name the last so many spans are kept; all of them by default."""
        self._device = device
        self._keep = keep
        self.reset()

    def reset(self) -> None:
        """Forget everything and start the clock again."""
        self._spans: dict[str, deque[tuple[Instant, Instant]]] = {}
        self._marks: dict[str, float] = {}
        self._devices = {self._device}
        self._wall_start = time.perf_counter()

    @contextmanager
    def span(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Measure the block; spans of the same name are listed in order.

        On CUDA, the time that the device's current stream took for it; `device` if it is not that of the profiler.
        """
        device = device or self._device
        self._devices.add(device)
        start = _now(device)
        try:
            yield
        finally:
            self._spans.setdefault(name, deque(maxlen=self._keep)).append((start, _now(device)))

    @contextmanager
    def host_span(self, name: str) -> Iterator[None]:
        """Measure what the host does, in whatever thread, by the wall clock."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.setdefault(name, deque(maxlen=self._keep)).append((start, time.perf_counter()))

    def mark(self, name: str) -> None:
        """Note that the host is here. The first mark of a name counts, later ones do nothing."""
        self._marks.setdefault(name, (time.perf_counter() - self._wall_start) * 1000)

    def report(self) -> ProfileReport:
        """All that was measured so far; on CUDA this is the one place that waits for the device."""
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        total_ms = (time.perf_counter() - self._wall_start) * 1000
        spans = {name: [_elapsed_ms(*pair) for pair in pairs] for name, pairs in self._spans.items()}
        return ProfileReport(spans=spans, marks=dict(self._marks), total_ms=total_ms)

    def latest_ms(self, name: str) -> float | None:
        """How long the last span of that name took which the device is through with; waits for nothing. None if there
        is none."""
        for start, end in reversed(tuple(self._spans.get(name, ()))):
            if isinstance(end, float) or end.query():  # type: ignore[no-untyped-call,unused-ignore]
                return _elapsed_ms(start, end)
        return None

    def peak_memory_bytes(self) -> int | None:
        """See the function of the same name."""
        return peak_memory_bytes(self._device)

    def reserved_memory_bytes(self) -> int | None:
        """The most that PyTorch's allocator has held of a CUDA device so far: with what captured passes have for
        themselves, which `peak_memory_bytes` does not see, and what lies between tensors. None for other devices."""
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None


def _now(device: torch.device) -> Instant:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
    event.record(torch.cuda.current_stream(device))
    return event


def _elapsed_ms(start: Instant, end: Instant) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return (end - start) * 1000
    assert not isinstance(end, float)
    return float(start.elapsed_time(end))


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use so far: of PyTorch's allocator on a CUDA device, else of the process (resident).

    None where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def resident_bytes() -> int | None:
    """The memory that this process has in use now; None where the system does not say (other than Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


@dataclass(frozen=True)
class VideoProfile:
    """The numbers of one run: times in milliseconds, `frames` and `block_frames` in pixel frames.

    How long each part was busy: `init_ms` caches and text, `block_ms` each block's diffusion, `vae_ms` decoding,
    `copy_ms` from the device, `write_ms` handing frames to the encoder and finishing the file. Parts may work at the
    same time. `total_ms` is the wall clock, `first_frame_ms` from the start to the first finished frame (None: not
    measured). `block_frames` are the pixel frames that each block gave, `peak_bytes` the peak of memory (None: not
    known), `forwards` how often the model was called. The first `prefix_blocks` were not made but given to go on from.
    """

    init_ms: float
    block_ms: tuple[float, ...]
    vae_ms: float
    write_ms: float
    total_ms: float
    first_frame_ms: float | None
    frames: int
    block_frames: tuple[int, ...]
    device_name: str
    peak_bytes: int | None
    forwards: int
    skipped: int = 0  # forwards that did not run the layers (TeaCache)
    copy_ms: float = 0.0
    prefix_blocks: int = 0
    reserved_bytes: int | None = None  # on a GPU, what the allocator held at most

    def __post_init__(self) -> None:
        if len(self.block_ms) != len(self.block_frames):
            raise ValueError(f"{len(self.block_ms)} blocks were timed, but {len(self.block_frames)} gave frames")

    @property
    def diffusion_ms(self) -> float:
        """All blocks together."""
        return sum(self.block_ms)

    @property
    def busy_ms(self) -> float:
        """What all parts would take one after the other, at the pace that they had."""
        return self.init_ms + self.diffusion_ms + self.vae_ms + self.copy_ms + self.write_ms

    @property
    def overlap_ms(self) -> float:
        """What working at the same time has saved."""
        return max(self.busy_ms - self.total_ms, 0.0)

    @property
    def generated_frames(self) -> int:
        """Pixel frames, without those of given blocks."""
        return self.frames - sum(self.block_frames[: self.prefix_blocks])

    @property
    def diffusion_fps(self) -> float | None:
        """Generated pixel frames a second of their blocks' diffusion time, without text encoder, VAE and file."""
        return _per_second(self.generated_frames, sum(self.block_ms[self.prefix_blocks :]))

    @property
    def end_to_end_fps(self) -> float | None:
        """Generated pixel frames a second of wall-clock time, everything included."""
        return _per_second(self.generated_frames, self.total_ms)

    @property
    def steady_fps(self) -> float | None:
        """Diffusion FPS once blocks take equally long: frames of a block over the median time of a block.

        The first two generated blocks are left out (they warm up and have less context), and the last, which runs no
        clean pass. None if no block is left.
        """
        steady = slice(self.prefix_blocks + _WARM_UP_BLOCKS, -1)
        if not self.block_ms[steady]:
            return None
        return _per_second(statistics.median_low(self.block_frames[steady]), statistics.median(self.block_ms[steady]))

    def as_dict(self) -> dict[str, object]:
        """Fields and derived values, ready for JSON."""
        derived = ("diffusion_ms", "busy_ms", "overlap_ms", "generated_frames")
        rates = ("diffusion_fps", "steady_fps", "end_to_end_fps")
        return {
            **asdict(self),
            "block_ms": list(self.block_ms),
            "block_frames": list(self.block_frames),
            **{name: getattr(self, name) for name in (*derived, *rates)},
        }

    def format(self) -> str:
        """The report for people, see `format_profile`."""
        return format_profile(self)


def _per_second(frames: int, ms: float) -> float | None:
    return frames / ms * 1000 if ms > 0 else None


def _share(part_ms: float, whole_ms: float, of: str = "") -> str:
    return f"{part_ms:.2f} ms ({100 * part_ms / whole_ms:.2f}%{of})" if whole_ms > 0 else f"{part_ms:.2f} ms"


def _rate(fps: float | None, meaning: str) -> str:
    return "n/a" if fps is None else f"{fps:.2f} ({meaning})"


def format_profile(profile: VideoProfile) -> str:
    """Where the time of a run went, with shares, and below it the rates and the memory; several lines of text."""
    total, diffusion = profile.total_ms, profile.diffusion_ms
    blocks = [
        f"    - Block {index} generation time: {_share(ms, diffusion, ' of diffusion')}"
        for index, ms in enumerate(profile.block_ms)
    ]
    skipped = f", {profile.skipped} of them without the layers (TeaCache)" if profile.skipped else ""
    first = "n/a" if profile.first_frame_ms is None else f"{profile.first_frame_ms:.2f} ms"
    peak = "n/a" if profile.peak_bytes is None else format_bytes(profile.peak_bytes)
    reserved = "" if profile.reserved_bytes is None else f", reserved {format_bytes(profile.reserved_bytes)}"
    given = f", {profile.frames - profile.generated_frames} of them given" if profile.prefix_blocks else ""
    return "\n".join(
        [
            "Profiling results:",
            f"  - Initialization/caching time: {_share(profile.init_ms, total)}",
            f"  - Diffusion generation time: {_share(diffusion, total)}",
            *blocks,
            f"  - VAE decoding time: {_share(profile.vae_ms, total)}",
            f"  - Frame copying time: {_share(profile.copy_ms, total)}",
            f"  - Video writing time: {_share(profile.write_ms, total)}",
            f"  - Total time: {total:.2f} ms; parts were busy for {profile.busy_ms:.2f} ms, overlap saved "
            f"{profile.overlap_ms:.2f} ms",
            f"Device: {profile.device_name}",
            f"Pixel frames: {profile.frames}{given} in {len(profile.block_ms)} blocks, {profile.forwards} forwards"
            f"{skipped}",
            f"Diffusion FPS: {_rate(profile.diffusion_fps, 'generated pixel frames / diffusion time')}",
            f"Steady diffusion FPS: {_rate(profile.steady_fps, 'frames of a block / median block, warm')}",
            f"End-to-end FPS: {_rate(profile.end_to_end_fps, 'generated pixel frames / total time')}",
            f"Time to first frame: {first}",
            f"Peak memory: {peak}{reserved}",
        ]
    )
