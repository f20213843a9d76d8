"""Videos as jobs: asked for as JSON or as a form, made as inference.py makes them, and there after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import inference
from pipeline import Pipeline
from studio.settings import QUEUED_JOBS
from tests.studio_server import CONFIG, ROOT, Studio, running, until

RED = "A large red ball moves to the right."


def finished(studio: Studio, name: str) -> dict[str, Any]:
    def done() -> Any:
        job = studio.json(f"/v1/videos/{name}")
        return job if job["status"] in ("completed", "failed") else None

    job: dict[str, Any] = until(done, "the video")
    return job


def test_a_job_is_the_video_of_the_script(studio: Studio, tmp_path: Path) -> None:
    job = studio.json("/v1/videos", "POST", prompt=RED, seconds="1.5", seed=4, size="48x32", policy="anchored")
    assert (job["object"], job["status"], job["seconds"]) == ("video", "queued", "2.062")
    done = finished(studio, job["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None), done
    status, video = studio.fetch(f"/v1/videos/{job['id']}/content")
    (tmp_path / "prompts.txt").write_text(f"{RED}\n")
    settings = [
        f"model_root={ROOT / 'checkpoints'}",
        f"data_path={tmp_path / 'prompts.txt'}",
        f"output_folder={tmp_path}",
    ]
    settings += [
        "resolution=[32,48]",
        "num_output_frames=9",
        "seed=4",
        "dummy_forcing.enabled=true",
        "dummy_forcing.preset=anchored",
    ]
    assert job["seconds"] and inference.main(["--config_path", str(CONFIG), *settings]) == 0
    (made,) = tmp_path.glob("*.mp4")
    assert status == 200 and video == made.read_bytes()
    studio.house.folders.jobs.joinpath(f"{job['id']}.mp4").unlink()
    status, said = studio.fetch(f"/v1/videos/{job['id']}/content")
    assert status == 410 and b"is gone from the server" in said
    assert job["id"] in [one["id"] for one in studio.json("/v1/videos")["data"]]
    assert studio.json(f"/v1/videos/{job['id']}", "DELETE")["deleted"]
    assert studio.fetch(f"/v1/videos/{job['id']}")[0] == 404
    assert not list((studio.house.folders.jobs).glob(f"{job['id']}*"))


def test_forms_are_jobs_too(studio: Studio) -> None:
    form = b"prompt=A+blue+square+stands+still.&seconds=0.5&seed=3"
    status, body = studio.fetch("/v1/videos", "POST", form, content_type="application/x-www-form-urlencoded")
    assert status == 200 and json.loads(body)["seed"] == 3
    parts = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nA red disc.\r\n--x--\r\n'
    status, body = studio.fetch("/v1/videos", "POST", parts, content_type="multipart/form-data; boundary=x")
    assert status == 200 and json.loads(body)["prompt"] == "A red disc."
    for job in studio.json("/v1/videos")["data"]:
        studio.json(f"/v1/videos/{job['id']}", "DELETE")


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "body: is not JSON"),
        (b"[]", 400, "body: expected an object"),
        (b"[" * 10_000, 400, "body: is not JSON"),
        (b"\xff", 400, "body: is not JSON"),
        (b"{}", 400, "prompt: missing"),
        (b'{"prompt": ""}', 400, "prompt: it is empty"),
        (b'{"prompt": "a", "promt": 1}', 400, "promt: unknown key; did you mean prompt"),
        (b'{"prompt": "a", "seconds": 1e9}', 400, "seconds: must be above 0 and at most 60"),
        (b'{"prompt": "a", "seconds": "1e3"}', 400, "seconds: must be a number"),
        (b'{"prompt": "a", "size": "1920x1080"}', 400, "size: this server makes 48x32 alone"),
        (b'{"prompt": "a", "model": "sora-2"}', 400, "model: this server has Wan2.1-T2V-shapes alone"),
        (b'{"prompt": "a", "seed": -1}', 400, "seed: must be from 0"),
        (b'{"prompt": "a", "seed": 1.5}', 400, "seed: expected text or an integer"),
        (b'{"prompt": "a", "policy": "best"}', 400, "policy: 'best' is none of"),
        (b'{"prompt": "a", "seconds": 0.5, "policy": "paper"}', 400, "dummy_forcing.ar_start"),
        (b"x" * 100_000, 413, "body: more than 64 KiB"),
    ],
)
def test_what_cannot_be_made_is_told(studio: Studio, content: bytes, status: int, said: str) -> None:
    found, body = studio.fetch("/v1/videos", "POST", content, content_type="application/json")
    assert found == status and said in json.loads(body)["error"]["message"]


def test_there_are_no_more_jobs_than_may_wait(studio: Studio) -> None:
    with studio.visit() as visitor:  # at full speed, so that jobs wait
        made = [studio.json("/v1/videos", "POST", prompt="A ball.", seconds=60) for _ in range(QUEUED_JOBS + 2)]
        assert "id" in made[0] and "wait already" in made[-1]["error"]["message"]
        visitor.wait_for_frames(30)  # and a session comes before them
    for job in made:
        if "id" in job:
            studio.json(f"/v1/videos/{job['id']}", "DELETE")
    assert not studio.json("/v1/videos")["data"]


def test_jobs_survive_a_restart(shapes_pipeline: Pipeline, tmp_path: Path) -> None:
    with running(shapes_pipeline, tmp_path) as studio:
        first = studio.json("/v1/videos", "POST", prompt=RED, seconds=1)
        second = studio.json("/v1/videos", "POST", prompt=RED, seconds=2, seed=9)
        assert finished(studio, first["id"])["status"] == "completed"
    (tmp_path / "jobs" / "video_0.json").write_text("nonsense")
    (tmp_path / "jobs" / f"video_{'0' * 24}.json").write_text('{"id": "../../x"}')
    with running(shapes_pipeline, tmp_path) as studio:
        assert studio.json(f"/v1/videos/{first['id']}")["status"] == "completed"
        assert studio.fetch(f"/v1/videos/{first['id']}/content")[0] == 200
        assert finished(studio, second["id"])["status"] == "completed"
        assert len(studio.json("/v1/videos")["data"]) == 2
        assert not list((tmp_path / "jobs").glob(".*"))
