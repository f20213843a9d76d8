"""inference.py and interactive_inference.py as people call them: what comes out, under which names, and what is said.

The scripts run for real on small checkpoints in the published layouts; what they write is probed with ffmpeg.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import inference
import interactive_inference
from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import read_jobs
from tests.conftest import PROMPTS, ROOT, Program
from tests.small_checkpoints import SmallCheckpoints
from utils.video import VideoInfo, probe, read_frames

SMALL = VideoInfo(width=48, height=32, frames=33, fps=16.0, codec="h264", pix_fmt="yuv420p")
SHORT = ("num_output_frames=3", "dummy_forcing=off")  # 9 pixel frames, where the content does not matter
LIBRARY = ("utils", "wan", "dummy", "pipeline")


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("self_forcing_inference", []),
        ("longlive_inference", ["adapter.rank=4", "adapter.alpha=4", "num_output_frames=12"]),
        ("longlive_inference", ["adapter=null", "num_output_frames=12"]),
        ("causal_forcing_inference", []),
        ("causal_forcing_framewise_inference", []),
    ],
)
def test_published_configurations_make_videos(program: Program, config: str, overrides: list[str]) -> None:
    assert program("inference_iter=1", *overrides, config=config) == 0
    frames = 45 if "num_output_frames=12" in overrides else 33
    video, metadata = program.videos / "000-a-red-fox-runs-0.mp4", program.videos / "000-a-red-fox-runs-0.json"
    assert program.written == [metadata, video]
    assert probe(video) == VideoInfo(48, 32, frames, 16.0, "h264", "yuv420p")


def test_what_a_lora_makes_one_wonder_is_said_once(
    program: Program, checkpoints: SmallCheckpoints, caplog: pytest.LogCaptureFixture
) -> None:
    factors = torch.load(checkpoints.longlive_lora, weights_only=True)["generator_lora"]
    halves = {name.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for name in factors if "lora_A" in name}
    path = program.folder / "half.pt"
    torch.save({"generator_lora": factors | halves}, path)
    given = [f"lora_ckpt={path}", "adapter.rank=4", "adapter.alpha=4", *SHORT]
    for more in (["--dry_run"], []):
        caplog.clear()
        assert program(*given, *more, config="longlive_inference", prompts=["A fox."]) == 0
        assert sum("adapter.alpha is 4" in record.getMessage() for record in caplog.records) == 1


def test_the_lora_changes_the_video(program: Program) -> None:
    longlive = ("inference_iter=1", "num_output_frames=12", "adapter.rank=4")
    assert program(*longlive, "adapter.alpha=4", config="longlive_inference") == 0
    merged = program.mp4s
    assert program(*longlive, "adapter.alpha=8", "overwrite=true", config="longlive_inference") == 0
    assert program.mp4s != merged


def test_a_stack_of_loras(program: Program, checkpoints: SmallCheckpoints, capsys: pytest.CaptureFixture[str]) -> None:
    """Each changes the video by its strength; metadata has them, and a remark is made where they changed."""
    short = (*SHORT, "inference_iter=1", "vae_tile=never", "low_memory=false")
    loras = f"loras=[{{path: {checkpoints.longlive_lora}, strength: 0.5}}]"
    assert program(*short, loras) == 0
    (half,) = program.mp4s.values()
    (made,) = [json.loads(path.read_text()) for path in program.written if path.suffix == ".json"]
    assert made["config"]["loras"] == [{"path": str(checkpoints.longlive_lora), "strength": 0.5}]
    capsys.readouterr()
    assert program(*short) == 0
    assert "although it was made with other loras;" in capsys.readouterr().out
    assert program(*short, loras.replace("0.5", "1"), "overwrite=true") == 0
    (whole,) = program.mp4s.values()
    assert half != whole
    adapter = (f"lora_ckpt={checkpoints.longlive_lora}", "adapter={rank: 4, alpha: 4}", "overwrite=true")
    assert program(*short, *adapter) == 0
    assert program.mp4s == dict.fromkeys(program.mp4s, whole)


POLICIES: dict[str, list[str]] = {
    "full": ["dummy_forcing=off", "model_kwargs.local_attn_size=-1"],
    "window": ["dummy_forcing=off", "model_kwargs.local_attn_size=7", "model_kwargs.sink_size=1"],
    "prune": ["dummy_forcing.policy=prune"],
    "packed": [],
    "retention": ["dummy_forcing.retention.dummy=[2,1]", "dummy_forcing.retention.sink=[1,1]"],
    "teacache": ["dummy_forcing.teacache_enabled=true", "dummy_forcing.teacache_threshold=1e9"],
}


def test_every_policy_makes_a_video_of_its_own(program: Program) -> None:
    videos, forwards = {}, {}
    for name, overrides in POLICIES.items():
        assert program(*overrides, "num_output_frames=12", "inference_iter=1", "overwrite=true") == 0
        (path,) = [path for path in program.written if path.suffix == ".mp4"]
        assert probe(path).frames == 45
        made = json.loads(path.with_suffix(".json").read_text())
        assert (made["head_roles"] is None) == (name in ("full", "window"))
        videos[name], forwards[name] = path.read_bytes(), made["timings"]["forwards"]
    assert len(set(videos.values())) == len(POLICIES)
    assert forwards["packed"] == 4 * 4 + 3  # four steps a block, and a clean pass for all but the last


def test_saved_roles_are_used_again(program: Program) -> None:
    one = ("inference_iter=1", "num_output_frames=12")
    assert program(*one) == 0
    observed = program.file("roles.json", (program.videos / "000-a-red-fox-runs-0.json").read_bytes())
    roles = json.loads(observed.read_text())["head_roles"]
    assert sum(row.count(2) for row in roles["roles"]) == 6
    found = program.mp4s
    assert program(*one, f"dummy_forcing.roles={observed}", "overwrite=true") == 0
    given = program.mp4s
    assert given != found  # roles from a file hold from the first block on
    again = program.videos / "000-a-red-fox-runs-0.json"
    assert json.loads(again.read_text())["head_roles"] == roles
    alone = program.file("alone.json", json.dumps(roles))  # a file with nothing but the roles
    assert program(*one, f"dummy_forcing.roles={alone}", "overwrite=true") == 0
    assert program.mp4s == given


def test_metadata_has_what_made_the_video(program: Program) -> None:
    assert program("inference_iter=1", "seed=7") == 0
    made = json.loads((program.videos / "000-a-red-fox-runs-0.json").read_text())
    assert made["prompts"] == [PROMPTS[0]]
    assert (made["seed"], made["prompt_index"], made["sample_index"]) == (7, 0, 0)
    assert made["config"]["dummy_forcing"]["num_dummy"] == 6
    assert made["config"]["resolution"] == [32, 48]
    assert len(made["head_roles"]["roles"]) == 3 and len(made["timings"]["block_ms"]) == 3
    # The configuration in it is one that can be run.
    copy = program.file("again.yaml", json.dumps(made["config"]))
    assert inference.main(["--config_path", str(copy), f"output_folder={program.folder / 'again'}"]) == 0
    assert {p.name: p.read_bytes() for p in (program.folder / "again").glob("*.mp4")} == program.mp4s


def test_metadata_can_be_left_out(program: Program) -> None:
    assert program("inference_iter=1", "save_metadata=false", *SHORT) == 0
    assert [path.name for path in program.written] == ["000-a-red-fox-runs-0.mp4"]


def test_the_profile_is_printed(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("inference_iter=1") == 0
    said = capsys.readouterr().out
    ms, share = r"[\d.]+ ms", r"[\d.]+ ms \([\d.]+%\)"
    for line in (
        rf"Initialization/caching time: {share}",
        rf"Diffusion generation time: {share}",
        *(rf"Block {block} generation time: [\d.]+ ms \([\d.]+% of diffusion\)" for block in range(3)),
        rf"VAE decoding time: {share}",
        rf"Total time: {ms}",
        r"Device: \S+",
        r"Diffusion FPS: [\d.]+",
        r"End-to-end FPS: [\d.]+",
        rf"Time to first frame: {ms}",
        r"Peak memory: [\d.]+ [MG]iB",
    ):
        assert len(re.findall(line, said)) == 1, line


def test_portrait_and_landscape(program: Program) -> None:
    assert program("resolution=[48,32]", "inference_iter=1", *SHORT) == 0
    info = probe(program.videos / "000-a-red-fox-runs-0.mp4")
    assert (info.width, info.height) == (32, 48)


def test_1080_is_cropped_from_1088() -> None:
    config = InferenceConfig(resolution=1080)
    assert config.latent_size == (136, 240)
    assert config.pixel_size == (1080, 1920)


def test_samples_and_the_number_of_prompts(program: Program) -> None:
    assert program("inference_iter=2", "num_samples=2", *SHORT) == 0
    names = [f"{stem}-{i}.mp4" for stem in ("000-a-red-fox-runs", "001-a-blue-bird-sings") for i in range(2)]
    assert list(program.mp4s) == names
    assert len(set(program.mp4s.values())) == 4


@pytest.mark.parametrize("with_index", ["true", "false"])
def test_file_names_never_collide(program: Program, with_index: str) -> None:
    prompts = [
        "cats/dogs",
        "x" * 300,
        "x" * 300 + "y",
        "fish 🐟",
        "Fish 🐟",
        "cats/dogs",
        "..",
        "con",
        "a" * 90 + "🐟" * 60,
    ]
    assert program(f"save_with_index={with_index}", "save_metadata=false", *SHORT, prompts=prompts) == 0
    assert len({name.casefold() for name in program.mp4s}) == len(program.written) == len(prompts)


def test_extended_prompts_are_generated_from(program: Program) -> None:
    longer = program.file("longer.txt", "".join(f"{prompt} In the evening sun.\n" for prompt in PROMPTS))
    assert program(*SHORT) == 0
    plain = program.mp4s
    assert program(*SHORT, f"extended_prompt_path={longer}", "overwrite=true") == 0
    assert list(program.mp4s) == list(plain)
    assert not set(program.mp4s.values()) & set(plain.values())
    made = json.loads((program.videos / "001-a-blue-bird-sings-0.json").read_text())
    assert made["prompts"] == ["A blue bird sings. In the evening sun."]


def test_a_video_is_the_same_first_or_last_alone_or_in_a_list(program: Program) -> None:
    assert program() == 0
    all_at_once = program.mp4s
    for name in list(all_at_once)[::-1]:
        path = program.videos / name
        others = {other: other.stat().st_mtime_ns for other in program.videos.glob("*.mp4") if other != path}
        path.unlink()
        assert program() == 0
        assert program.mp4s == all_at_once
        assert {other: other.stat().st_mtime_ns for other in others} == others


def test_latents_do_not_depend_on_what_came_before(program: Program) -> None:
    arguments = program.arguments()
    config = load_config(arguments[1], arguments[2:])
    jobs = read_jobs(config)
    pipeline = Pipeline.from_config(config, prompts=[job.prompts[0] for job in jobs])

    def latents(index: int) -> torch.Tensor:
        job = jobs[index]
        with pipeline.session(frames=config.num_output_frames, noise_seeds=[job.noise_seed]) as session:
            session.prompt(job.prompts[0])
            return torch.cat([block.latents for block in session], dim=1)

    forward, backward = [latents(i) for i in range(3)], [latents(i) for i in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], forward[1])


def test_finished_videos_are_kept_with_a_remark(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("inference_iter=1", *SHORT) == 0
    before = program.mp4s
    (name,) = before
    capsys.readouterr()
    for overrides, prompt, remark in (
        ([], PROMPTS[0], "exists and is kept\n"),
        (["seed=1"], PROMPTS[0], "exists and is kept although it was made with other seed; overwrite=true"),
        ([], "A red fox runs!", "exists and is kept although it was made with other prompts; overwrite=true"),
        (["resolution=[48,48]"], PROMPTS[0], "although it was made with other resolution; overwrite=true"),
    ):
        assert program("inference_iter=1", *SHORT, *overrides, prompts=[prompt]) == 0
        said = capsys.readouterr().out
        assert name in said and remark in said
        assert program.mp4s == before
    assert program("inference_iter=1", *SHORT, "seed=1", "overwrite=true") == 0
    assert program.mp4s != before


def test_keys_that_are_newer_than_a_video_are_at_their_defaults(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    one = (*SHORT, "inference_iter=1", "vae_tile=never", "low_memory=false")
    assert program(*one) == 0
    (path,) = [path for path in program.written if path.suffix == ".json"]
    made = json.loads(path.read_text())
    del made["config"]["loras"], made["config"]["kv_flush"], made["config"]["model_kwargs"]["rolling_sink"]
    path.write_text(json.dumps(made))
    capsys.readouterr()
    assert program(*one) == 0
    assert "although" not in capsys.readouterr().out
    assert program(*one, "kv_flush=true", "loras=[{path: a.pt}]") == 0
    assert "made with other kv_flush, loras;" in capsys.readouterr().out.replace("loras, kv_flush", "kv_flush, loras")


def test_settings_may_stand_anywhere_and_config_file_is_an_alias(program: Program) -> None:
    _, config, *overrides = program.arguments("inference_iter=1", *SHORT)
    mixed = [overrides[0], "--config_file", config, *overrides[1:3], "--dry_run", *overrides[3:]]
    assert inference.main(mixed) == 0
    assert not program.videos.exists()
    assert inference.main([argument for argument in mixed if argument != "--dry_run"]) == 0
    assert len(program.mp4s) == 1


def test_it_runs_outside_the_main_thread(program: Program) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(program("--dry_run")))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_storyboards(program: Program) -> None:
    boards = program.file("boards.jsonl", '{"prompts": ["A red fox runs.", "A blue bird sings."]}\n')
    name = program.videos / "000-a-red-fox-runs-0.mp4"
    videos = []
    for switch in (3, 6):
        arguments = program.arguments(f"data_path={boards}", f"switch_frame_indices={switch}", "overwrite=true")
        arguments += ["adapter=null", "dummy_forcing.ar_start=1"]
        arguments[1] = str(ROOT / "configs" / "longlive_interactive_inference.yaml")
        assert interactive_inference.main(arguments) == 0
        assert probe(name) == SMALL
        videos.append(name.read_bytes())
        made = json.loads(name.with_suffix(".json").read_text())
        assert (made["prompts"], made["starts"]) == (["A red fox runs.", "A blue bird sings."], [0, switch])
    assert videos[0] != videos[1]


def test_importing_opens_nothing_and_needs_nothing() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for layer in LIBRARY
        for path in sorted((ROOT / layer).glob("**/*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = f"""
import sys, importlib, torch, numpy, omegaconf, yaml, torch.utils._pytree, torch.utils._python_dispatch
import torch.distributed, torch.nn.attention
opened = []
def audit(event, arguments):
    name = arguments[0] if event == "open" else ""
    if isinstance(name, str) and name and not name.endswith((".py", ".pyc", ".so")):
        opened.append(name)
    if event == "subprocess.Popen":
        opened.append(event)
sys.argv = ["program", "--no-such-flag"]
sys.addaudithook(audit)
for name in {modules!r}:
    importlib.import_module(name)
names = ("diffusers", "transformers", "imageio_ffmpeg", "flash_attn", "matplotlib")
heavy = [name for name in names if name in sys.modules]
print(opened, heavy, torch.cuda.is_initialized())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.stderr == "" and done.stdout == "[] [] False\n"


def test_every_library_module_is_meant(tmp_path: Path) -> None:
    """The list above is not empty by accident."""
    assert sum(1 for layer in LIBRARY for _ in (ROOT / layer).glob("*.py")) > 30


def test_a_contact_sheet_shows_the_whole_video(program: Program) -> None:
    assert program("contact_sheet=true", "inference_iter=1") == 0
    (sheet,) = program.videos.glob("*.png")
    (video,) = program.videos.glob("*.mp4")
    frames, picture = read_frames(video), read_frames(sheet)[0]
    assert picture.shape == (3 * 32 + 2 * 2, 4 * 48 + 3 * 2, 3)
    for row, column, number in ((0, 0, 0), (2, 3, 32), (1, 1, 15)):
        cell = picture[row * 34 : row * 34 + 32, column * 50 : column * 50 + 48].astype(int)
        assert abs(cell - frames[number]).mean() < 3


def test_a_prompt_longer_than_the_model_takes_is_cut(
    program: Program, checkpoints: SmallCheckpoints, caplog: pytest.LogCaptureFixture
) -> None:
    root = program.folder / "short"
    shutil.copytree(checkpoints.root, root)
    path = root / "Wan2.1-T2V-1.3B" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_len": 16}))
    assert program(f"model_root={root}", prompts=["A red fox runs over the hill and on. " * 8]) == 0
    assert "is longer than 16" in caplog.text
    assert len(program.mp4s) == 1
