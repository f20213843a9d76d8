"""The studio by several processes: sessions at the same time, and what becomes of them when a process is lost."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import Pipeline
from pipeline.assembly import Parts
from pipeline.runtime.generator import BlockGenerator
from tests.studio_server import Studio, running, until
from tests.test_studio_process import arguments
from tests.test_together import launched
from tests.thread_exchange import ThreadExchange, together

GREEN = "The ball turns green."


def served(whole: Pipeline, folder: Path, visit: Callable[[Studio, ThreadExchange], None]) -> Exception | None:
    """Visit a studio whose blocks are made by two ranks; what brought the second one to its end, if not the first."""

    def one(exchange: ThreadExchange) -> Exception | None:
        model = copy.deepcopy(whole.generator.model)
        model.exchange = exchange
        generator = BlockGenerator(model, whole.generator.settings)
        parts = Parts(generator, whole.vae, whole.encoder, whole.strategy, whole.prompts, whole.batch)
        pipeline = Pipeline(whole.config, parts)
        if pipeline.follows:
            try:
                pipeline.follow()
            except threading.BrokenBarrierError as error:
                return error
            return None
        with running(pipeline, folder) as studio:
            visit(studio, exchange)
        return None

    return together(2, one)[1]


def test_sessions_of_several_processes(shapes_pipeline: Pipeline, tmp_path: Path) -> None:
    """Two at a time, with a job between them: restarts, another policy, prompts, saves."""

    def visit(studio: Studio, exchange: ThreadExchange) -> None:
        job = studio.json("/v1/videos", "POST", prompt=GREEN, seconds="0.5")
        with studio.visit() as one, studio.visit() as other:
            one.wait_for_frames(9)
            other.wait_for("session")
            seed = shapes_pipeline.config.seed + 1  # not the first take's
            other.say("restart", policy="anchored", seed=seed)
            take = other.wait_for("take", seed=seed)["take"]
            one.say("prompt", text=GREEN, id=1)
            one.wait_for("scene", id=1)
            other.wait_for_frames(33, take)  # roles are known after two blocks
            heads = other.events["heads"][-1]
            assert {(kind["sink"], kind["recent"]) for kind in heads["kinds"]} > {(0, 1)}
            assert all(len(kind["frames"]) == kind["sink"] + kind["recent"] for kind in heads["kinds"])
            other.say("save")
            command = other.wait_for("saved")["command"]
            assert command.startswith("torchrun --nproc_per_node=2 interactive_inference.py --config_path ")
        studio.end_sessions()
        until(lambda: studio.json(f"/v1/videos/{job['id']}")["status"] == "completed", "the job")

    assert served(shapes_pipeline, tmp_path, visit) is None


def test_a_lost_process_ends_the_server_and_nothing_is_lost(shapes_pipeline: Pipeline, tmp_path: Path) -> None:
    def visit(studio: Studio, exchange: ThreadExchange) -> None:
        with studio.visit() as visitor:
            visitor.wait_for_frames(21)
            job = studio.json("/v1/videos", "POST", prompt=GREEN)
            exchange.part()
            assert "the server has failed" in visitor.wait_for("ended")["reason"]
            until(lambda: isinstance(studio.house.failure, threading.BrokenBarrierError), "the end")
        assert json.loads((tmp_path / "jobs" / f"{job['id']}.json").read_text())["status"] != "failed"

    assert served(shapes_pipeline, tmp_path, visit) is not None
    assert len(list((tmp_path / "takes").glob("*/frames.bin"))) == 1
    assert not list((tmp_path / "saved").iterdir())


def test_a_killed_process_is_told_once(tmp_path: Path) -> None:
    process = launched(2, "-m", "studio", *arguments(tmp_path), "parallel=heads")
    assert process.stdout is not None
    found = re.search(r"http://127.0.0.1:([0-9]+)/", process.stdout.readline())
    assert found is not None
    with Studio(None, int(found[1]), None).visit() as visitor:  # type: ignore[arg-type]
        visitor.wait_for_frames(9)
        visitor.say("pause", on=True)  # nobody waits for anybody
        visitor.wait_for("paused")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        told, _ = process.communicate(timeout=20)
    assert process.returncode and told.count("error: ") == 1, told
    assert "error: parallel: process 1 is gone" in told
    assert list((tmp_path / "takes").glob("*/take.json"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)
