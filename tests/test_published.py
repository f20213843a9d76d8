"""Published checkpoints: the table, configurations, small files in the layout of each, and another one's schedule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import inference
import interactive_inference
import sample_vbench
from pipeline.config.config import load_config
from pipeline.runtime.published_schedule import warn_of_another_schedule
from tests.small_checkpoints import (
    MODEL_CONFIG,
    dit_shapes,
    preview_shapes,
    random_weights,
    write_published,
    write_small_checkpoints,
)
from utils.errors import InputError
from wan.checkpoints.diffusers_layout import read_generator
from wan.checkpoints.files import download_hint, identify_hint
from wan.checkpoints.identify import describe
from wan.checkpoints.kinds import require_sizes
from wan.checkpoints.published import FSDP, SPECS, ModelSpec, published_as
from wan.checkpoints.reading import read_tensors
from wan.config import ModelConfig

ROOT = Path(__file__).parents[1]
CONFIGS = {name: spec for spec in SPECS for name in spec.configs}
# Those of other papers, which come without Dummy Forcing.
OF_THE_FAMILY = [name for name in CONFIGS if "\n  enabled: false" in (ROOT / "configs" / f"{name}.yaml").read_text()]
FULL_STEPS = (1000, 750, 500, 250)
# What the publishers' loaders and settings say: container, names, block, steps, the first block's.
FACTS: dict[str, tuple[str, str, int, Sequence[int], Sequence[int] | None]] = {
    "zhuhz22/Causal-Forcing/causal-forcing++/framewise-2step.pt": ("generator_ema", FSDP, 1, (1000, 500), FULL_STEPS),
    "zhuhz22/Causal-Forcing/causal-forcing++/framewise-1step.pt": ("generator_ema", FSDP, 1, (1000,), FULL_STEPS),
    "zhuhz22/Causal-Forcing/chunkwise/longvideo.pt": ("generator_ema", FSDP, 3, FULL_STEPS, None),
    "JiaqiFeng/OneForcing/checkpoints/one_forcing.pt": ("generator", FSDP, 1, (1000,), FULL_STEPS),
    "JunhaoZhuang/Self_Gradient_Forcing/framewise/ar/model.pt": ("generator_ema", FSDP, 1, FULL_STEPS, None),
    "JunhaoZhuang/Self_Gradient_Forcing/chunkwise/ar/model.pt": ("generator_ema", FSDP, 3, FULL_STEPS, None),
    "MeiGen-AI/OPSD-V/checkpoints/longlive_base.pt": ("generator", "model.", 3, FULL_STEPS, None),
    "SOTAmak1r/Infinite-Forcing/ema_model.pt": ("generator_ema", FSDP, 3, FULL_STEPS, None),
    "JaydenLu666/Reward-Forcing-T2V-1.3B/rewardforcing.pt": ("", "model.", 3, FULL_STEPS, None),
    "TencentARC/RollingForcing/checkpoints/rolling_forcing_dmd.pt": (
        *("generator_ema", FSDP, 3),
        *((1000, 800, 600, 400, 200), None),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All published checkpoints, small, and a small preview decoder, which takes a dry run less time than the VAE."""
    folder = tmp_path_factory.mktemp("published")
    write_small_checkpoints(folder, lora_rank=256)
    write_published(folder, lora_rank=256)
    torch.save(random_weights(preview_shapes((8, 8, 8, 8)), torch.Generator()), folder / "taew2_1.pth")
    return folder


@pytest.mark.parametrize("file", FACTS)
def test_the_table_has_what_was_published(root: Path, file: str) -> None:
    spec = next(spec for spec in SPECS if f"{spec.repository}/{spec.file}" == file)
    made = spec.schedule
    assert (spec.container, spec.prefix, made.block, made.steps, made.first) == FACTS[file]
    assert made.rolling == ("rolling" in file or "longvideo" in file)
    state = read_generator(root / spec.path, False)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == dit_shapes(MODEL_CONFIG)
    if spec.lora is not None:
        assert list(read_tensors(root / spec.folder / spec.lora)) == ["generator_lora"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_that_of_its_checkpoint(name: str, caplog: pytest.LogCaptureFixture) -> None:
    path, spec = ROOT / "configs" / f"{name}.yaml", CONFIGS[name]
    config = load_config(path, ["model_root=/weights"])
    assert config.generator_path == Path("/weights") / spec.path
    assert config.use_ema == spec.container.endswith("ema")
    loras = [] if spec.lora is None else [Path("/weights", spec.folder, spec.lora)]
    assert [lora.path for lora in config.lora_files] == loras
    warn_of_another_schedule(config)
    assert not caplog.records
    if name in OF_THE_FAMILY:
        text = path.read_text(encoding="utf-8")
        assert spec.repository in text and " card" in text and f"--config_path configs/{name}.yaml" in text


def test_every_configuration_is_in_the_table_and_the_documents() -> None:
    there = {path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("shapes_")}
    assert there == set(CONFIGS)
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for spec in SPECS:
        assert all(f"`{file}`" in page for file in spec.files) and f"{spec.repository}: " in page
        assert all(f"`{name}`" in page for name in spec.configs)


@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_a_dry_run_finds_all_in_place(
    root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/test_readme.py makes a video by each."""
    settings = [f"model_root={root}", "device=cpu", "resolution=[32,48]", "inference_iter=1"]
    settings += [f"decoder=taehv:{root / 'taew2_1.pth'}", f"output_folder={tmp_path / 'videos'}", "--dry_run"]
    main = inference.main
    if name.endswith("vbench"):
        longer = tmp_path / "extended.txt"
        longer.write_text("".join(f"prompt {i}\n" for i in range(946)))
        main, settings = sample_vbench.main, [*settings, f"extended_prompt_path={longer}"]
    elif "interactive" in name:
        main = interactive_inference.main
    assert main(["--config_path", str(ROOT / "configs" / f"{name}.yaml"), *settings]) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "MISSING" not in told.out and told.err == ""


@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_heads_that_a_file_says_it_goes_with(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    told = path.read_text(encoding="utf-8").partition("\n  enabled: false  # ")[2].partition("\n")[0]
    prune = ["dummy_forcing.policy=prune"] * ("prune" in told)
    roles = ["dummy_forcing.roles=roles.json"] * ("roles" in told)
    assert told.startswith("any policy") or prune or roles
    assert load_config(path, ["dummy_forcing=on", *prune, *roles]).dummy_forcing.enabled


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a/longlive_base.pt", ["LongLive", "OPSD-V on LongLive"]),
        ("OPSD-V/checkpoints/longlive_base.pt", ["OPSD-V on LongLive"]),
        ("opsdv_self_forcing_lora.safetensors", ["OPSD-V on Self-Forcing"]),
        ("a/rewardforcing.safetensors", ["Reward Forcing"]),
        ("framewise/causal_forcing.pt", ["Causal Forcing, frame-wise"]),
        ("causal_forcing.pt", ["Causal Forcing, chunk-wise", "Causal Forcing, frame-wise"]),
        ("Infinite-Forcing/ema_model.pt", ["Infinite-Forcing"]),
        ("ema_model.pt", []),
        ("longvideo.pt", []),
        ("chunkwise/longvideo.bin", ["Causal Forcing, long videos"]),
        ("x/model.pt", []),
        ("models/other.pt", []),
        ("", []),
    ],
)
def test_a_name_tells_which_it_is(path: str, names: list[str]) -> None:
    assert [spec.name for spec in published_as(Path(path))] == names


def test_what_a_file_is_for_is_said(root: Path) -> None:
    spec = next(spec for spec in SPECS if spec.name == "Reward Forcing")
    told = "\n".join(describe(root / spec.path))
    for words in (
        "published as: Reward Forcing, by its name",
        "configs/reward_forcing_inference.yaml",
        "its card states",
    ):
        assert words in told
    other = root / "other.pt"
    other.write_bytes((root / "Infinite-Forcing" / "ema_model.pt").read_bytes())
    told = "\n".join(describe(other))
    assert (
        "layout: that of " in told and "Rolling Forcing" in told and "configs/infinite_forcing_inference.yaml" in told
    )
    sizes, state = ModelConfig.from_mapping({**MODEL_CONFIG, "dim": 128}), read_generator(root / spec.path, False)
    with pytest.raises(InputError, match=r"identify .* configs/reward_forcing_inference\.yaml"):
        require_sizes(state, sizes, root / spec.path, "config.json")
    assert "By its name" not in identify_hint(Path("mine.pt"))


def test_of_several_checkpoints_the_missing_one_is_downloaded() -> None:
    file = "Causal-Forcing/causal-forcing++/framewise-2step.pt"
    assert download_hint(Path("/w") / file).endswith(f"bash hfd.sh zhuhz22/{file} /w")
    assert download_hint(Path("/w/Causal-Forcing/x.pt")).endswith("bash hfd.sh zhuhz22/Causal-Forcing /w")


ONE = "generator_ckpt=OneForcing/checkpoints/one_forcing.pt"
SCHEDULES: list[tuple[str, list[str], str]] = [
    (
        "self_forcing_inference",
        [ONE],
        "is by its name One-Forcing, which was made for blocks of 1 by [1000], the first one",
    ),
    (
        "one_forcing_inference",
        ["generator_ckpt=self_forcing_dmd.pt"],
        "these settings have blocks of 1 by [1000], the first",
    ),
    (
        "one_forcing_inference",
        ["first_frame_denoising_step_list=null"],
        "these settings have blocks of 1 by [1000], so",
    ),
    ("self_forcing_inference", ["model_kwargs.timestep_shift=8"], "[1000, 750, 500, 250] shifted by 8, so"),
    ("self_forcing_inference", ["warp_denoising_step=false"], "[1000, 750, 500, 250] not warped, so"),
    (
        "rolling_forcing_inference",
        ["rolling=null"],
        "in a rolling window; these settings have blocks of 3 by [1000, 800",
    ),
    (
        "causal_forcing_inference",
        ["denoising_step_list=[1000,500]"],
        "configs/causal_forcing_inference.yaml has its own",
    ),
    ("self_forcing_inference", ["denoising_step_list=[1000,937,833,625]", "warp_denoising_step=false"], ""),
    ("self_forcing_inference", ["denoising_step_list=[1000,500]", "generator_ckpt=mine.pt"], ""),
    ("self_forcing_inference", ["generator_ckpt=causal_forcing.pt"], ""),
]


@pytest.mark.parametrize(("name", "overrides", "words"), SCHEDULES)
def test_another_ones_schedule_gets_one_warning(
    name: str, overrides: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_another_schedule(load_config(ROOT / "configs" / f"{name}.yaml", overrides))
    assert len(caplog.records) == bool(words) and words in caplog.text


def test_a_run_warns_too(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = [
        f"model_root={root}",
        ONE,
        "use_ema=false",
        "dummy_forcing=off",
        "resolution=[32,48]",
        "num_output_frames=3",
    ]
    given += ["vae_tile=never", "low_memory=false", "inference_iter=1", f"output_folder={tmp_path}", "device=cpu"]
    assert inference.main(["--config_path", str(ROOT / "configs/self_forcing_inference.yaml"), *given]) == 0
    assert caplog.text.count("is by its name One-Forcing") == 1


def test_specs_are_told_apart() -> None:
    assert len({spec.path for spec in SPECS}) == len({spec.name for spec in SPECS}) == len(SPECS)
    assert all(isinstance(spec, ModelSpec) and published_as(spec.path) == (spec,) for spec in SPECS)
