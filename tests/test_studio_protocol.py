"""The studio's parts without a server: messages, rates, outboxes, the pace, the door, takes on disk, scripts."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.client import Cue, read_script
from studio.pace import Pace
from studio.protocol import HEADER, JPEG, MESSAGES, VERSION, At, Prompt, Restart, frame_message, parse
from studio.security import Doorkeeper
from studio.settings import EXCESS_MESSAGES, MESSAGES_AT_ONCE, StudioSettings
from studio.take import Scene, Take, TakeNotes, left_over
from studio.viewer import QUEUED_EVENTS, QUEUED_FRAMES, Rate, Viewer
from utils.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["text", "id", "take", "frame", "on", "prompt", "seed", "policy", "frames_per_head", "global_sink", "join"]
NEAR_MESSAGES = st.builds(
    lambda kind, fields: json.dumps({"type": kind, **fields}),
    st.sampled_from([*MESSAGES, "nonsense"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
)


@given(st.one_of(st.text(max_size=80), st.binary(max_size=80), NEAR_MESSAGES, JSON.map(json.dumps)))
def test_whatever_comes_is_a_message_or_a_sentence(message: str | bytes) -> None:
    try:
        answer: object = parse(message)
    except InputError as error:
        answer = error
    assert type(answer) in MESSAGES.values() or 0 < len(str(answer)) < 4000


def test_messages_are_understood() -> None:
    assert parse('{"type": "prompt", "text": " It\\n turns  blue. ", "id": 3}') == Prompt("It turns blue.", 3)
    assert parse('{"type": "at", "take": 1, "frame": 20}') == At(1, 20)
    assert parse('{"type": "restart", "seed": 7, "global_sink": true}') == Restart(seed=7, global_sink=True)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", "message: is not JSON"),
        ("[1]", "message: expected an object with a type"),
        ('{"a": 1}', "type: None is none of hello, prompt"),
        ('{"type": ["prompt"]}', "is none of hello"),
        ('{"type": "prompt"}', "text: missing, expected text"),
        ('{"type": "prompt", "text": 5}', "text: expected text, got 5"),
        ('{"type": "prompt", "text": " \\u200b "}', "text: it is empty"),
        ('{"type": "prompt", "text": "\\ud800"}', "text: .* holds half a character"),
        ('{"type": "prompt", "text": "a", "idd": 1}', "idd: unknown key; did you mean id"),
        ('{"type": "prompt", "text": "a", "id": -1}', "id: must be from 0"),
        ('{"type": "at", "take": 0, "frame": 1e99}', "frame: expected an integer"),
        ('{"type": "restart", "seed": -1}', "seed: must be from 0"),
        ('{"type": "restart", "frames_per_head": NaN}', "frames_per_head: expected a number"),
        ('{"type": "hello", "version": 9}', "version: this server speaks 1, not 9"),
        (b"\x00\x01", "message: 2 bytes of binary data"),
        ("[" * 10_000, "message: is not JSON"),
        (json.dumps({"type": "prompt", "text": "x" * 5000}), "text: 5000 characters are too many; 1000 at most"),
        (json.dumps({"type": "prompt", "text": "x" * 100_000}), "message: .* characters are too many"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_message_is_told(message: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(message)


def test_a_frame_says_where_it_belongs() -> None:
    message = frame_message(3, 7, 81, 2, b"picture")
    assert HEADER.unpack_from(message) == (VERSION, JPEG, 3, 7, 81, 2)
    assert message[HEADER.size :] == b"picture" and HEADER.size == 16


def test_a_slow_viewer_loses_frames_and_hears_every_event() -> None:
    viewer = Viewer()
    sent: list[str | bytes] = []

    async def send(item: str | bytes) -> None:
        sent.append(item)

    for number in range(1000):
        viewer.show(b"%d" % number)
        if number % 100 == 0:
            viewer.tell(f"event {number}")
    assert viewer.lost_frames == 1000 - QUEUED_FRAMES
    viewer.dismiss("enough")
    asyncio.run(viewer.deliver(send, send))
    assert [item for item in sent if isinstance(item, str)] == [f"event {number}" for number in range(0, 1000, 100)]
    assert [item for item in sent if isinstance(item, bytes)] == [b"%d" % n for n in range(1000 - QUEUED_FRAMES, 1000)]


def test_who_takes_no_events_either_is_sent_away() -> None:
    viewer = Viewer()
    for _ in range(QUEUED_EVENTS + 10):
        viewer.tell("event")
    assert viewer.gone == "this connection is too slow"


def test_a_rate_is_kept() -> None:
    rate = Rate()
    admitted = sum(rate.admits() for _ in range(10_000))
    assert MESSAGES_AT_ONCE <= admitted < MESSAGES_AT_ONCE + 30
    assert rate.excess == 10_000 - admitted > EXCESS_MESSAGES and rate.is_hopeless


def steering(shown: int, heard: float = 0.0) -> Viewer:
    viewer = Viewer(steers=True, take=0, shown=shown)
    viewer.heard -= heard
    return viewer


def test_no_viewer_has_more_than_a_block_before_him() -> None:
    pace = Pace(16, 12)
    assert not pace.is_due(0, 0, [])  # nobody steers
    assert pace.is_due(0, 0, [steering(0)])
    assert pace.is_due(21, 0, [steering(9)]) and not pace.is_due(22, 0, [steering(9)])
    for _ in range(8):
        pace.took(0.1)
    assert pace.lead == 7  # 0.1 s and a half, and a quarter of a second
    assert pace.is_due(16, 0, [steering(9)]) and not pace.is_due(17, 0, [steering(9)])
    assert not pace.is_due(17, 0, [steering(9), steering(17)])  # the slowest counts,
    assert pace.is_due(17, 0, [steering(9, heard=60), steering(17)])  # unless that one is gone
    assert not pace.is_due(17, 0, [steering(9, heard=60), steering(10, heard=60)])  # nobody looks
    assert pace.is_due(9, 1, [steering(500)]) is False  # of another take
    assert pace.capacity == pytest.approx(120) and pace.playing_fps == 16
    pace.took(3.0)
    assert pace.lead == 12
    for _ in range(8):
        pace.took(1.5)
    assert pace.playing_fps == pytest.approx(8 * 0.97)


def scope(**headers: str) -> dict[str, object]:
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "websocket", "headers": named}


@pytest.mark.parametrize(
    ("settings", "headers", "fault"),
    [
        ({}, {"host": "localhost:7860"}, None),
        ({}, {"host": "localhost:1234", "origin": "http://localhost:1234"}, None),  # an SSH tunnel
        ({}, {"host": "[::1]:7860", "origin": "http://[::1]:7860"}, None),
        ({}, {"host": "evil.example:7860", "origin": "http://evil.example:7860"}, "host: this server answers to"),
        ({}, {"host": "localhost:7860", "origin": "http://evil.example"}, "origin: pages of other servers"),
        ({}, {"host": "localhost:7860", "origin": "http://localhost:8000"}, "origin: pages of other servers"),
        ({}, {"host": "localhost:7860", "origin": "null"}, "origin: pages of other servers"),
        ({}, {"host": "localhost:7860", "origin": "http://["}, "origin: pages of other servers"),
        ({}, {"host": "["}, "host: this server answers to"),
        ({"allowed_origins": ("http://a.example",)}, {"host": "localhost", "origin": "http://a.example"}, None),
        ({"allowed_hosts": ("box",)}, {"host": "box:7860", "origin": "http://box:7860"}, None),
        ({"token": "12345678"}, {"host": "box:7860", "origin": "http://box:7860"}, None),
    ],
)  # fmt: skip
def test_pages_of_others_stay_outside(settings: dict[str, object], headers: dict[str, str], fault: str | None) -> None:
    found = Doorkeeper(StudioSettings(**settings)).fault(scope(**headers))  # type: ignore[arg-type]
    assert found is None if fault is None else (found or "").startswith(fault)


def test_the_token_is_asked_for() -> None:
    keeper = Doorkeeper(StudioSettings(token="12345678"))
    assert keeper.knows("12345678")
    assert not any(keeper.knows(token) for token in (None, "", "1234567", "123456789", "ü" * 8))
    assert keeper.admits({"authorization": "Bearer 12345678"}) and not keeper.admits(
        {"authorization": "Basic 12345678"}
    )
    assert Doorkeeper(StudioSettings()).knows(None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"port": 70_000}, "port: must be 65535 or less"),
        ({"token": "short"}, "token: must be 8 to 200"),
        ({"absence_s": 0.0}, "absence_s: must be above 0"),
        ({"record_gib": float("nan")}, "record_gib: must be above 0"),
        ({"max_sessions": 0}, "max_sessions: must be 1 or more"),
        ({"allowed_origins": ("a.example",)}, "allow_origin: must be as http://name:port"),
    ],
)
def test_settings_out_of_range_are_told(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        StudioSettings(**values)  # type: ignore[arg-type]


NOTES = TakeNotes("studio-20260101-000000-abcdef", 5, ("dummy_forcing.enabled=false",), 3, 4, 3)


def blocks(count: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.integers(0, 255, (16, 24, 3), np.uint8) for _ in range(4 if i else 3)] for i in range(count)]


def test_a_take_is_on_disk_to_its_last_whole_block(tmp_path: Path) -> None:
    take, frames = Take(tmp_path / "take", NOTES, 1 << 30), blocks(3)
    for index, block in enumerate(frames):
        take.begin_scene(Scene(3 * index, f"prompt {index}"))
        take.add(block)
    found = left_over(tmp_path / "take")  # as a killed server leaves it
    assert found == take.recorded() and (found.frames, found.latent_frames, len(found.scenes)) == (11, 9, 3)
    assert all(np.array_equal(a, b) for a, b in zip(found.read(), [*frames[0], *frames[1], *frames[2]], strict=True))
    take.close()
    path = tmp_path / "take" / "frames.bin"
    path.write_bytes(path.read_bytes()[:-10])
    cut = left_over(tmp_path / "take")
    assert (cut.frames, cut.latent_frames, len(cut.scenes)) == (7, 6, 2)
    path.write_bytes(b"")
    assert left_over(tmp_path / "take").frames == 0


def test_a_full_recording_keeps_its_beginning(tmp_path: Path) -> None:
    take = Take(tmp_path / "take", NOTES, 6000)
    for block in blocks(5):
        take.add(block)
    assert take.blocks == 1 and "the recording is full" in (take.fault or "")
    assert take.recorded().frames == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": 5}', '{"scenes": [{"prompt": 1}]}'])
def test_a_broken_take_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "take.json").write_text(content)
    with pytest.raises(InputError):
        left_over(tmp_path)


def test_scripts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "script.txt"
    path.write_text("# comment\n0 A red ball.\n\n4.5 It turns blue.\n")
    assert read_script(path) == [Cue(0, "A red ball."), Cue(4.5, "It turns blue.")]
    for bad, said in (
        ("", "the first prompt must be at second 0"),
        ("1 A ball", "the first prompt must be at second 0"),
        ("0 A\nnonsense", "line 2: expected a second and a prompt"),
        ("0 A\n0 B", "line 2: 0 s is not after 0 s"),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=said):
            read_script(path)


def test_time_moves_a_rate_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = Rate(at=0.0)
    while rate.admits():
        pass
    now[0] += 1.0
    assert sum(rate.admits() for _ in range(100)) == 30
