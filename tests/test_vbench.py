"""VBench's lists, names and counts, the report on a folder, and fetching (pipeline/vbench/prompts.py)."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.config import InferenceConfig, load_config
from pipeline.vbench.prompts import (
    FLICKERING_LIST,
    LISTS,
    STANDARD_LIST,
    check_folder,
    fetch_extended_list,
    read_vbench_jobs,
)
from utils.errors import InputError
from utils.prompts import read_prompts
from utils.seed import video_seed
from utils.video import VideoWriter

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*_vbench.yaml"))


def config_of(folder: Path, *prompts: str, **settings: object) -> InferenceConfig:
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    values = {"resolution": (32, 48), "num_output_frames": 3, "output_folder": str(folder / "videos"), **settings}
    return InferenceConfig(data_path=str(folder / "prompts.txt"), **values)  # type: ignore[arg-type]


def names(config: InferenceConfig) -> list[str]:
    return [job.path.name for job in read_vbench_jobs(config)]


def test_the_shipped_lists_are_whole() -> None:
    prompts, flickering = read_prompts(STANDARD_LIST), read_prompts(FLICKERING_LIST)
    assert (len(prompts), len(set(prompts)), sum(len(prompt) > 100 for prompt in prompts)) == (946, 944, 72)
    folded = Counter(prompt.casefold() for prompt in set(prompts))
    assert [prompt for prompt, count in folded.items() if count > 1] == ["a fantasy landscape"]
    assert flickering == prompts[:75]
    notice = (LISTS / "README.md").read_text(encoding="utf-8")
    for path in (STANDARD_LIST, FLICKERING_LIST):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in notice
    assert "Apache License 2.0" in notice


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_all_of_vbench(path: Path) -> None:
    config = load_config(path, ["extended_prompt_path=null", "output_folder=out"])
    jobs = read_vbench_jobs(config)
    made = Counter(job.path.name.rpartition("-")[0] for job in jobs)
    prompts, flickering = set(read_prompts(STANDARD_LIST)), set(read_prompts(FLICKERING_LIST))
    assert made == {prompt: 25 if prompt in flickering else 5 for prompt in prompts}
    assert len({job.path for job in jobs}) == len({job.noise_seed for job in jobs}) == len(jobs) == 75 * 25 + 869 * 5
    assert {job.path.parent for job in jobs} == {Path("out")}


def test_each_configuration_has_a_folder_of_its_own() -> None:
    configs = [load_config(path) for path in CONFIGS]
    assert len({config.output_folder for config in configs}) == len(configs)
    assert {Path(config.data_path) for config in configs} == {Path("prompts/vbench/all_dimension.txt")}
    assert {Path(str(config.extended_prompt_path)).parent for config in configs} == {Path("prompts/vbench")}


def test_names_are_the_prompts_and_seeds_go_by_the_first_line(tmp_path: Path) -> None:
    prompts = ["A fantasy landscape", 'q: "a"?', "A fantasy landscape", "a fantasy landscape", "x.", "façades"]
    config = config_of(tmp_path, *prompts, num_samples=2, seed=7)
    unique = list(dict.fromkeys(prompts))
    assert names(config) == [f"{prompt}-{i}.mp4" for prompt in unique for i in range(2)]
    indices = [0, 0, 1, 1, 3, 3, 4, 4, 5, 5]
    assert [job.prompt_index for job in read_vbench_jobs(config)] == indices
    expected = [video_seed(7, index, i % 2) for i, index in enumerate(indices)]
    assert [job.noise_seed for job in read_vbench_jobs(config)] == expected


def test_the_extended_prompt_is_generated_from(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("A long.\nB long.\nA again.\n")
    config = config_of(tmp_path, "a", "b", "a", extended_prompt_path=str(tmp_path / "long.txt"))
    jobs = [(job.path.name, job.prompts) for job in read_vbench_jobs(config)]
    assert jobs == [("a-0.mp4", ("A long.",)), ("b-0.mp4", ("B long.",))]
    (tmp_path / "long.txt").write_text("A long.\nB long.\n")
    with pytest.raises(InputError, match=r"long\.txt has 2 prompts for the 3 of data_path"):
        read_vbench_jobs(config)
    (tmp_path / "long.txt").unlink()
    with pytest.raises(InputError, match=r"extended_prompt_path: .*long\.txt does not exist\. .*--fetch"):
        read_vbench_jobs(config)


def test_inference_iter_takes_exactly_that_many_lines(tmp_path: Path) -> None:
    assert names(config_of(tmp_path, "a", "b", "c", inference_iter=2)) == ["a-0.mp4", "b-0.mp4"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("either/or", "it holds '/'"),
        ("x" * 250, "it is too long, 250 bytes"),
        ("é" * 125, "it is too long, 250 bytes"),
    ],
)
def test_a_prompt_that_cannot_be_a_name(tmp_path: Path, prompt: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"^data_path: the prompt '{prompt[:4]}.*{reason}.*would not find"):
        read_vbench_jobs(config_of(tmp_path, "fine", prompt))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"switch_frame_indices": (3,), "num_output_frames": 6}, "data_path: VBench takes one prompt a video"),
        ({"start_from": "image.png"}, "start_from: has no use"),
        ({"stream_output": True}, "stream_output: has no use"),
    ],
)
def test_settings_without_use_are_refused(tmp_path: Path, settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        read_vbench_jobs(config_of(tmp_path, "a", **settings))


def write_video(path: Path, frames: int = 9, height: int = 32) -> None:
    with VideoWriter(path, 48, height) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (frames, height, 48, 3), dtype=np.uint8))


def test_a_report_names_every_fault(tmp_path: Path) -> None:
    config = config_of(tmp_path, "a", "b", "c", "d", "e")
    assert check_folder(config, read_vbench_jobs(config)).missing == tuple(f"{name}-0.mp4" for name in "abcde")
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abc":
        write_video(folder / f"{name}-0.mp4", frames=5 if name == "c" else 9)
    data = (folder / "b-0.mp4").read_bytes()
    (folder / "b-0.mp4").write_bytes(data[: len(data) // 2])
    write_video(folder / "d-0.mp4", height=64)
    (folder / "notes.json").write_text("{}")
    report = check_folder(config, read_vbench_jobs(config))
    assert (report.wanted, report.missing, report.foreign, report.ok) == (5, ("e-0.mp4",), ("notes.json",), False)
    cut, short, high = report.broken
    assert cut.startswith("b-0.mp4: is not a whole video")
    assert short == "c-0.mp4: 48x32, 5 frames at 16 a second instead of 48x32, 9 at 16"
    assert high == "d-0.mp4: 48x64, 9 frames at 16 a second instead of 48x32, 9 at 16"
    lines = list(report.lines())
    assert lines[0] == "1 of 5 videos are there and whole"
    assert "1 not of this list; VBench's folder holds nothing else, so move them away:" in lines
    assert any("custom_input" in line for line in lines)


def test_a_report_knows_what_vbench_looks_for(tmp_path: Path) -> None:
    first, last = (read_prompts(STANDARD_LIST)[i] for i in (0, -1))
    config = config_of(tmp_path, last, num_samples=5)
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in [*names(config), f"{first}-25.mp4", f"{first}-24.mp4", f"{first}-4.mp4"]:
        write_video(folder / name)
    report = check_folder(config, read_vbench_jobs(config))
    assert (report.missing, report.broken, report.foreign) == ((), (), (f"{first}-25.mp4",))
    assert report.unfound is not None and len(report.unfound) == 944 * 5 - 5 - 1
    assert f"{first}-3.mp4" in report.unfound
    assert f"{first}-4.mp4" not in report.unfound
    assert "4714 looked for by VBench's standard mode and not found:" in list(report.lines())


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_fetching_the_extended_list(tmp_path: Path) -> None:
    source, target = tmp_path / "web", tmp_path / "prompts" / "long.txt"
    source.mkdir()
    (source / "good.txt").write_text("A façade.\nB.\n", encoding="utf-8")
    (source / "short.txt").write_text("A.\n")
    config = config_of(tmp_path, "a", "b", extended_prompt_path=str(target))
    with served(source) as url:
        with pytest.raises(InputError, match=r"short\.txt has 1 lines, but data_path .* has 2"):
            fetch_extended_list(config, f"{url}/short.txt")
        with pytest.raises(InputError, match=r"none\.txt cannot be had \(HTTP Error 404"):
            fetch_extended_list(config, f"{url}/none.txt")
        assert not target.exists()
        assert fetch_extended_list(config, f"{url}/good.txt") == target
    assert target.read_bytes() == (source / "good.txt").read_bytes()
    assert fetch_extended_list(config, "http://127.0.0.1:9/") == target  # it is there already
