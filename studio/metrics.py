"""Counters and gauges in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.sessions = Gauge("studio_sessions", "Sessions that have a cache", registry=registry)
        self.waiting = Gauge("studio_waiting", "Visitors in the waiting line", registry=registry)
        self.viewers = Gauge("studio_viewers", "Connections", registry=registry)
        self.frames = Counter("studio_frames", "Pixel frames made for sessions", registry=registry)
        self.lost_frames = Counter("studio_lost_frames", "Frames that slow viewers did not get", registry=registry)
        self.prompts = Counter("studio_prompts", "Prompts that took effect", registry=registry)
        self.refused = Counter("studio_refused_messages", "Messages of clients that were refused", registry=registry)
        self.jobs = Counter("studio_jobs", "Jobs by how they ended", ["status"], registry=registry)
        self.saves = Counter("studio_saves", "Videos saved", registry=registry)
        self.resident = Gauge("studio_resident_bytes", "Memory of the process", registry=registry)
        self.block_seconds = Histogram(
            "studio_block_seconds", "From when a block was due until its frames were sent", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.prompt_seconds = Histogram(
            "studio_prompt_seconds", "From a prompt's arrival until its first frame was sent", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.first_frame_seconds = Histogram(
            "studio_first_frame_seconds", "From when a video was asked for until its first frame was sent",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)
