"""A studio that runs: sessions, viewers, the line, saves, and whatever clients may do to it."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

import interactive_inference
from pipeline import Pipeline
from studio.settings import PROMPT_CHARS
from tests.studio_server import PATIENCE_S, Studio, Visitor, running, until
from tests.test_studio_protocol import NEAR_MESSAGES
from utils.profiler import resident_bytes

RED, BLUE, GREEN = "A large red ball moves to the right.", "It turns blue.", "The ball turns green."


def closed(visitor: Visitor) -> ConnectionClosed:
    """How the server ends the connection."""
    ends = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < ends:
            visitor.hear()
        raise AssertionError("the connection goes on")
    except ConnectionClosed as ended:
        return ended


def test_a_visitor_sees_a_video_that_does_what_he_says(studio: Studio) -> None:
    with studio.visit() as visitor:
        welcome = visitor.wait_for("welcome")
        assert (welcome["fps"], welcome["width"], welcome["height"]) == (16, 48, 32)
        assert (welcome["first_block"], welcome["block"]) == (9, 12)
        assert [policy["name"] for policy in welcome["policies"]] == [
            "window",
            "paper",
            "anchored",
            "prune",
            "calibrated",
            "online",
        ]
        assert RED in welcome["examples"]
        visitor.wait_for_frames(1)
        assert visitor.events["scene"][0]["text"] == RED
        assert Image.open(io.BytesIO(visitor.pictures[0])).size == (48, 32)
        visitor.say("prompt", text=BLUE, id=7)
        scene = visitor.wait_for("scene", id=7)
        visitor.wait_for_frames(scene["frame"] + 1)
        assert [frame for _, _, frame, _ in visitor.frames] == list(range(len(visitor.frames)))
        assert visitor.frames[scene["frame"]][3] == 1 and visitor.frames[scene["frame"] - 1][3] == 0
        heads = visitor.events["heads"][-1]
        kept = [heads["kinds"][place] for row in heads["table"] for place in row]
        assert len(kept) == 24 and all((kind["sink"], kind["recent"]) == (1, 6) for kind in kept)
        numbers = visitor.wait_for("numbers")
        assert numbers["end_to_end_fps"] > 0 and numbers["transformer_fps"] > 0 and numbers["memory"]["resident"] > 0
        visitor.say("bye")
        assert closed(visitor).rcvd.code == 1000  # type: ignore[union-attr]


def test_it_stops_and_steps_and_starts_again(studio: Studio) -> None:
    with studio.visit() as visitor:
        visitor.wait_for_frames(9)
        visitor.say("step")
        assert "step: the video is running" in visitor.wait_for("error")["message"]
        visitor.say("pause", on=True)
        visitor.wait_for("paused", on=True)
        time.sleep(0.3)  # what is under way comes first
        visitor.say("save")
        visitor.wait_for("saved")
        made = len(visitor.frames)
        visitor.say("step")
        visitor.wait_for_frames(made + 12)
        visitor.say("save")  # nothing comes between but events
        visitor.wait_for("saved")
        assert len(visitor.frames) == made + 12
        visitor.say("restart", seed=5, policy="calibrated", frames_per_head=2.0, global_sink=True)
        take = visitor.wait_for("take")
        assert (take["seed"], take["policy"], take["frames_per_head"], take["global_sink"]) == (
            5,
            "calibrated",
            2.0,
            True,
        )
        visitor.wait_for_frames(33, take["take"])  # it runs again, from its first frame on
        assert take["prompt"] == RED and next(f for t, _, f, _ in visitor.frames if t == take["take"]) == 0
        heads = visitor.events["heads"][-1]
        held = [len(heads["kinds"][place]["frames"]) for row in heads["table"] for place in row]
        assert sum(held) / len(held) == pytest.approx(2.0, abs=0.2) and len(set(held)) > 1
        for fields, said in (
            ({"policy": "nonsense"}, "policy: 'nonsense' is none of"),
            ({"policy": "window", "frames_per_head": 2}, "frames_per_head: policy window has no such dial"),
            ({"frames_per_head": 900}, "frames_per_head: must be from"),
        ):
            visitor.say("restart", **fields)  # type: ignore[arg-type]
            assert said in visitor.wait_for("error")["message"]


@pytest.mark.parametrize("policy", ["window", "anchored", "calibrated", "online"])
def test_a_save_is_made_again_byte_for_byte(studio: Studio, policy: str, tmp_path: Path) -> None:
    with studio.visit() as visitor:
        visitor.wait_for("session")
        visitor.say("restart", policy=policy, seed=7)
        visitor.wait_for("take", seed=7)
        visitor.wait_for("scene")
        visitor.say("prompt", text=BLUE, id=1)
        visitor.wait_for("scene", id=1)
        enough = 81 if policy == "online" else 45  # until heads have parted
        visitor.wait_for_frames(enough, visitor.events["take"][-1]["take"])
        visitor.say("save")
        saved = visitor.wait_for("saved")
        visitor.say("bye")
    files = {kind: studio.fetch(path) for kind, path in saved["files"].items()}
    assert [status for status, _ in files.values()] == [200, 200, 200]
    board = json.loads(files["jsonl"][1])
    assert board["prompts"] == [RED, BLUE] and len(board["switch_frame_indices"]) == 1
    settings_file = saved["command"].split()[-1]
    assert interactive_inference.main(["--config_path", settings_file, f"output_folder={tmp_path}"]) == 0
    (again,) = tmp_path.glob("*.mp4")
    assert again.read_bytes() == files["mp4"][1]


def test_two_sessions_see_their_own_prompts(studio: Studio) -> None:
    with studio.visit() as one, studio.visit() as other:
        for visitor, text in ((one, BLUE), (other, GREEN)):
            visitor.wait_for_frames(1)
            visitor.say("prompt", text=text, id=1)
        for visitor, text in ((one, BLUE), (other, GREEN)):
            assert visitor.wait_for("scene", id=1)["text"] == text
            visitor.wait_for_frames(40)
            assert [scene["text"] for scene in visitor.events["scene"]] == [RED, text]
            visitor.say("bye")


def test_viewers_watch_and_one_steers(studio: Studio) -> None:
    with studio.visit() as owner:
        session = owner.wait_for("session")
        assert session["steers"] and session["key"] != session["watch"]
        with studio.visit(join=session["watch"]) as guest, studio.visit(join=session["key"]) as tab:
            seen = guest.wait_for("session")
            assert not seen["steers"] and seen["key"] is None
            assert tab.wait_for("session")["steers"]
            guest.say("prompt", text=BLUE)
            assert "this link is for watching" in guest.wait_for("error")["message"]
            owner.wait_for("viewers", count=3, steering=2)
            tab.say("prompt", text=GREEN, id=5)
            tab.say("at", take=0, frame=2**31)  # nobody can have seen what there is not
            for visitor in (owner, guest):
                visitor.reports = visitor is owner
            pump = threading.Thread(target=lambda: owner.wait_for("scene", id=5))
            pump.start()
            scene = tab.wait_for("scene", id=5)
            pump.join()
            assert guest.wait_for("scene", id=5) == scene
        owner.say("bye")
    with studio.visit(join=session["watch"]) as late:
        assert late.wait_for("notice")["message"].startswith("that session is over")
        late.wait_for_frames(1)
        late.say("bye")


def test_a_line_forms_and_those_who_are_gone_make_room(shapes_pipeline: Pipeline, tmp_path: Path) -> None:
    with running(shapes_pipeline, tmp_path, max_sessions=1, absence_s=0.5) as studio, studio.visit() as first:
        key = first.wait_for("session")["key"]
        first.wait_for_frames(1)
        with studio.visit() as second, studio.visit() as third, studio.visit() as fourth:
            assert second.wait_for("waiting")["place"] == 1
            assert third.wait_for("waiting")["place"] == 2
            assert fourth.wait_for("waiting")["place"] == 3
            third.say("prompt", text=BLUE)
            assert "there is no session yet" in third.wait_for("error")["message"]
            third.ws.close()
            assert fourth.wait_for("waiting")["place"] == 2
            first.ws.close()
            with studio.visit(join=key) as back:  # within the time, it is still the visitor's
                assert back.wait_for("session")["key"] == key
            second.wait_for("session")  # and then the next one's
            second.wait_for_frames(1)
            second.say("bye")
            fourth.wait_for_frames(1)
    kinds = [path.suffix for path in (tmp_path / "saved").iterdir()]  # of who was gone, and of the server's end
    assert kinds.count(".jsonl") == kinds.count(".yaml") == 2


def test_a_slow_reader_loses_frames_and_the_server_no_memory(studio: Studio) -> None:
    with studio.visit() as owner:
        watch = owner.wait_for("session")["watch"]
        slow = socket.create_connection(("127.0.0.1", studio.port))  # reads nothing after the handshake
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        slow.sendall(
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{studio.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert slow.recv(1000).startswith(b"HTTP/1.1 101")
        hello = json.dumps({"type": "hello", "join": watch}).encode()
        mask = b"\0\0\0\0"
        slow.sendall(bytes([0x81, 0x80 | len(hello)]) + mask + hello)
        owner.wait_for("viewers", count=2)
        (room,) = studio.house.parts.lobby.rooms.values()
        (viewer,) = (one for one in room.viewers if not one.steers)
        event = "x" * 100_000
        for _ in range(100):
            studio.loop.call_soon_threadsafe(viewer.tell, event)  # so that the pipe is full without minutes of video
        before = resident_bytes() or 0
        owner.wait_for_frames(120)
        assert viewer.lost_frames > 0
        assert len(viewer._outbox) < 600
        assert (resident_bytes() or 0) - before < 64 << 20
        slow.close()
        owner.wait_for("viewers", count=1)
        owner.say("bye")


def test_many_viewers_and_those_who_are_killed(studio: Studio) -> None:
    """Twenty clients, half of whom vanish in the middle of a frame."""
    with studio.visit() as owner, contextlib.ExitStack() as stack:
        watch = owner.wait_for("session")["watch"]
        guests = [stack.enter_context(studio.visit(join=watch)) for _ in range(20)]
        for guest in guests:
            guest.reports = False
        owner.wait_for("viewers", count=21)
        for guest in guests[::2]:
            guest.ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            guest.ws.socket.close()  # a reset, without a word
        owner.wait_for("viewers", count=11)
        owner.wait_for_frames(len(owner.frames) + 24)
        for guest in guests[1::2]:
            guest.wait_for_frames(20)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=40), st.binary(max_size=40), NEAR_MESSAGES), max_size=80))
def test_hostile_messages_hurt_nobody(studio: Studio, messages: list[str | bytes]) -> None:
    """3,200 of them at most, in a session and before one; the server answers and goes on."""
    with studio.visit(hello=len(messages) % 5 > 0) as visitor:
        try:
            for message in messages:
                if isinstance(message, bytes) or '"bye"' not in message:
                    visitor.ws.send(message)
            visitor.say("bye")
            closed(visitor)
        except ConnectionClosed:
            pass
    assert studio.fetch("/healthz") == (200, b"ok\n")


def test_too_much_talk_is_stopped(studio: Studio) -> None:
    """10,000 prompts at once, and a visitor beside it sees the video go on."""
    with studio.visit() as calm:
        calm.wait_for_frames(1)
        with studio.visit() as noisy:
            noisy.wait_for("session")
            with contextlib.suppress(ConnectionClosed):
                for number in range(10_000):
                    noisy.say("prompt", text=f"A red ball {number}", id=number)
            assert "too many at once" in closed(noisy).reason
        calm.wait_for_frames(len(calm.frames) + 30)
        calm.say("bye")


def test_long_prompts_are_told_and_longer_ones_end_the_line(studio: Studio) -> None:
    with studio.visit() as visitor:
        visitor.wait_for_frames(1)
        visitor.say("prompt", text="x" * 100_000, id=1)
        assert "characters are too many" in visitor.wait_for("error")["message"]
        visitor.say("prompt", text="x" * (PROMPT_CHARS + 1), id=2)
        assert f"{PROMPT_CHARS} at most" in visitor.wait_for("error")["message"]
        visitor.ws.send(b"binary")
        assert "binary data" in visitor.wait_for("error")["message"]
        visitor.say("prompt", text="x" * (2 << 20))
        assert closed(visitor).rcvd.code == 1009  # type: ignore[union-attr]


def test_who_says_nothing_right_at_first_is_sent_away(studio: Studio) -> None:
    for first in ('{"type": "prompt", "text": "a"}', "nonsense", b"\x00"):
        with studio.visit(hello=False) as visitor:
            visitor.ws.send(first)
            assert visitor.wait_for("error")["fatal"]
            assert closed(visitor).rcvd.code == 1008  # type: ignore[union-attr]


def test_pages_of_others_and_other_names_are_refused(studio: Studio) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}):
        with pytest.raises(InvalidStatus), studio.visit(headers=headers):
            pass
    with studio.visit(headers={"Origin": studio.url}) as visitor:
        visitor.wait_for("session")
        visitor.say("bye")
        closed(visitor)
    assert studio.fetch("/", Host="evil.example")[0] == 403
    assert studio.fetch("/v1/videos", "POST", b"{}", Origin="http://evil.example")[0] == 403
    status, page = studio.fetch("/")
    assert status == 200 and b"Live studio" in page


def test_a_token_is_asked_for_everywhere(shapes_pipeline: Pipeline, tmp_path: Path) -> None:
    with running(shapes_pipeline, tmp_path, token="12345678", max_viewers=3) as studio:
        for token in (None, "wrong"):
            with studio.visit(token=token) as visitor:
                assert "token: it is missing or wrong" in visitor.wait_for("error")["message"]
                assert closed(visitor).rcvd.code == 1008  # type: ignore[union-attr]
        for path in ("/metrics", "/v1/videos", "/v1/saved/x.mp4"):
            assert studio.fetch(path)[0] == 401
            assert studio.fetch(path, Authorization="Bearer 12345678")[0] in (200, 404)
        assert studio.fetch("/readyz") == (200, b"ready\n")
        until(lambda: studio.house.connections == 0)
        with studio.visit(token="12345678") as one, studio.visit(token="12345678"), studio.visit(token="12345678"):
            one.wait_for_frames(1)
            with pytest.raises(InvalidStatus), studio.visit():
                pass


def test_no_path_that_a_client_names_is_opened(studio: Studio) -> None:
    for path in ("/../pyproject.toml", "/%2e%2e/pyproject.toml", "/v1/saved/../../etc/passwd.mp4", "/v1/saved/a.mp4"):
        assert studio.fetch(path)[0] == 404
    assert studio.fetch("/v1/saved/%2e%2e%2fjobs%2fx.json")[0] == 404
    assert studio.fetch("/v1/videos/..%2f..%2fx")[0] == 404


def test_metrics_are_prometheus_text(studio: Studio) -> None:
    with studio.visit() as visitor:
        visitor.wait_for_frames(9)
        text = studio.fetch("/metrics")[1].decode()
        visitor.say("bye")
        closed(visitor)
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["studio_sessions"]) == 1 and float(values["studio_frames_total"]) >= 9
    assert float(values["studio_first_frame_seconds_count"]) >= 1 and float(values["studio_resident_bytes"]) > 1e8


def test_frames_do_not_depend_on_who_else_is_there(studio: Studio) -> None:
    """Two sessions of one seed at the same time: the same pictures as bytes."""
    assert torch.get_num_threads() >= 1
    with studio.visit() as one, studio.visit() as other:
        for visitor in (one, other):
            visitor.wait_for_frames(21)
        assert one.pictures[:21] == other.pictures[:21]
        for visitor in (one, other):
            visitor.say("bye")
