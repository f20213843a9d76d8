"""How long things took, measured without slowing them down, and how the result is shown.

`Profiler` notes the start and end of named spans; on CUDA as events on the current stream, so that nothing waits until
the report. `VideoProfile` holds the numbers of one video and writes them out. This file does not know what the spans
are, nor where the report goes.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
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
    """Measures spans and instants on one device; the clock starts at construction and again at `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything and start the clock again."""
        self._spans: dict[str, list[tuple[Instant, Instant]]] = {}
        self._marks: dict[str, Instant] = {}
        self._wall_start = time.perf_counter()
        self._start = self._now()

    def _now(self) -> Instant:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure the block; spans of the same name are listed in order. On CUDA, the time the stream took for it."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.setdefault(name, []).append((start, self._now()))

    def mark(self, name: str) -> None:
        """Note this instant (on CUDA, that of the stream). The first mark of a name counts, later ones do nothing."""
        if name not in self._marks:
            self._marks[name] = self._now()

    def report(self) -> ProfileReport:
        """All that was measured so far; on CUDA this is the one place that waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total_ms = (time.perf_counter() - self._wall_start) * 1000
        spans = {name: [_elapsed_ms(*pair) for pair in pairs] for name, pairs in self._spans.items()}
        marks = {name: _elapsed_ms(self._start, instant) for name, instant in self._marks.items()}
        return ProfileReport(spans=spans, marks=marks, total_ms=total_ms)

    def peak_memory_bytes(self) -> int | None:
        """See the function of the same name."""
        return peak_memory_bytes(self._device)


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

    `init_ms` caches and text, `block_ms` each block's diffusion, `vae_ms` decoding, `write_ms` handing frames to the
    encoder, `total_ms` wall clock, `first_frame_ms` from the start to the first finished frame (None: not measured).
    `block_frames` are the pixel frames that each block gave, `peak_bytes` the peak of memory (None: not known),
    `forwards` how often the model was called.
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

    def __post_init__(self) -> None:
        if len(self.block_ms) != len(self.block_frames):
            raise ValueError(f"{len(self.block_ms)} blocks were timed, but {len(self.block_frames)} gave frames")

    @property
    def diffusion_ms(self) -> float:
        """All blocks together."""
        return sum(self.block_ms)

    @property
    def diffusion_fps(self) -> float | None:
        """Pixel frames a second of diffusion time, without text encoder, VAE and file."""
        return _per_second(self.frames, self.diffusion_ms)

    @property
    def end_to_end_fps(self) -> float | None:
        """Pixel frames a second of wall-clock time, everything included."""
        return _per_second(self.frames, self.total_ms)

    @property
    def steady_fps(self) -> float | None:
        """Diffusion FPS once blocks take equally long: frames of a block over the median time of a block.

        The first two blocks are left out (they warm up and have less context), and the last, which runs no clean pass.
        None if no block is left.
        """
        steady = slice(_WARM_UP_BLOCKS, -1)
        if not self.block_ms[steady]:
            return None
        return _per_second(statistics.median_low(self.block_frames[steady]), statistics.median(self.block_ms[steady]))

    def as_dict(self) -> dict[str, object]:
        """Fields and derived rates, ready for JSON."""
        rates = {"diffusion_fps": self.diffusion_fps, "steady_fps": self.steady_fps}
        return {
            **asdict(self),
            "block_ms": list(self.block_ms),
            "block_frames": list(self.block_frames),
            "diffusion_ms": self.diffusion_ms,
            **rates,
            "end_to_end_fps": self.end_to_end_fps,
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
    return "\n".join(
        [
            "Profiling results:",
            f"  - Initialization/caching time: {_share(profile.init_ms, total)}",
            f"  - Diffusion generation time: {_share(diffusion, total)}",
            *blocks,
            f"  - VAE decoding time: {_share(profile.vae_ms, total)}",
            f"  - Video writing time: {_share(profile.write_ms, total)}",
            f"  - Total time: {total:.2f} ms",
            f"Device: {profile.device_name}",
            f"Pixel frames: {profile.frames} in {len(profile.block_ms)} blocks, {profile.forwards} forwards{skipped}",
            f"Diffusion FPS: {_rate(profile.diffusion_fps, 'pixel frames / diffusion time')}",
            f"Steady diffusion FPS: {_rate(profile.steady_fps, 'frames of a block / median block, warm')}",
            f"End-to-end FPS: {_rate(profile.end_to_end_fps, 'pixel frames / total time')}",
            f"Time to first frame: {first}",
            f"Peak memory: {peak}",
        ]
    )
