"""The studio's own settings, beside those of the video, and the bounds of what clients may ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, quoted, require_range

PROMPT_CHARS = 1000
MESSAGE_CHARS = 20_000  # of a client's message: a prompt of escapes alone, and room
MESSAGE_BYTES = 1 << 20  # beyond which the connection is closed before the message is read
MESSAGES_A_SECOND = 30.0  # of a viewer, on the long run
MESSAGES_AT_ONCE = 90.0
EXCESS_MESSAGES = 300  # so many more than that, and the viewer is sent away
PROMPTS_A_TAKE = 2000
VIEWERS_A_SESSION = 64
QUEUED_JOBS = 64
KEPT_JOBS = 1000  # finished ones that are remembered
BODY_BYTES = 64 << 10  # of a job
HELLO_S = 10.0  # within which viewers say who they are
STALE_S = 5.0  # without word of its position, a viewer does not hold up the others


@dataclass(frozen=True)
class StudioSettings:
    """How the server is reached and how much of it there is. Raises InputError for values out of range."""

    host: str = "127.0.0.1"
    port: int = 7860  # 0: any that is free
    token: str | None = None  # what clients must know; hosts other than the loopback have one always
    max_sessions: int = 2  # videos at once, each with a cache of its own
    max_viewers: int = 200  # connections
    absence_s: float = 60.0  # after which a session without a steering viewer is freed
    record_gib: float = 2.0  # of a video's frames on disk, for Save
    job_seconds: int = 60  # of video, the longest that a job may ask for
    calibration: str | None = None  # file for the policy calibrated
    allowed_origins: tuple[str, ...] = ()  # beside the server's own
    allowed_hosts: tuple[str, ...] = ()  # names by which the server may be called, beside its own

    def __post_init__(self) -> None:
        require_range("port", self.port, 0, 65_535)
        require_range("max_sessions", self.max_sessions, 1, 1000)
        require_range("max_viewers", self.max_viewers, 1, 10_000)
        require_range("job_seconds", self.job_seconds, 1, 3600, "seconds")
        for name in ("absence_s", "record_gib"):
            if not 0 < getattr(self, name) < 1e6:
                raise InputError(f"{name}: must be above 0 and below a million, got {getattr(self, name)}")
        if self.token is not None and not (8 <= len(self.token) <= 200 and self.token.isascii()):
            raise InputError("token: must be 8 to 200 characters of ASCII; leave it out and one is made")
        for origin in self.allowed_origins:
            if not origin.startswith(("http://", "https://")):
                raise InputError(f"allow_origin: must be as http://name:port, got {quoted(origin)}")

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Folders:
    """Where the studio writes: all below the configuration's output folder."""

    root: Path

    @property
    def takes(self) -> Path:
        """Videos in the making, of which a killed server leaves something to save."""
        return self.root / "takes"

    @property
    def saved(self) -> Path:
        return self.root / "saved"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"
