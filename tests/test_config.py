"""Settings from YAML: our files, the published ones with their spellings, sizes, paths, and metadata written back."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import yaml

from dummy.config import DummyForcingConfig
from pipeline.config.config import InferenceConfig, as_dict, check_against_model, load_config, warn_of_what_is_off
from pipeline.config.paths import TEXT_ENCODER_NAMES, VAE_NAMES, resolve_path
from pipeline.config.published_keys import WITHOUT_USE
from utils.errors import InputError
from wan.config import WAN_1_3B, AdapterConfig, ModelKwargs

ROOT = Path(__file__).parents[1]
ALL_CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FAMILIES = ("self_forcing", "longlive", "causal_forcing")  # the checkpoints of the paper
_OF_FAMILIES = [path for path in ALL_CONFIGS if path.stem.startswith(FAMILIES)]
CALIBRATED = [path for path in _OF_FAMILIES if path.stem.endswith("_calibrated")]
CONFIGS = [path for path in _OF_FAMILIES if path not in CALIBRATED and "num_dummy" in path.read_text()]
PUBLISHED = sorted((ROOT / "tests" / "data" / "published").glob("*.yaml"))
SELF_FORCING = ROOT / "configs" / "self_forcing_inference.yaml"
LONGLIVE = ROOT / "configs" / "longlive_inference.yaml"


@pytest.fixture(autouse=True)
def _no_root_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUMMY_FORCING_ROOT", raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(*overrides: str, path: Path = SELF_FORCING) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_files_load_without_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(path)
    assert not caplog.records
    assert config.policy == "packed"
    assert config.model_kwargs == ModelKwargs(local_attn_size=12, timestep_shift=5.0, sink_size=3)
    assert config.num_samples == (5 if path.stem.endswith("vbench") else 1)
    assert (config.extended_prompt_path is not None) == path.stem.endswith("vbench")
    assert (config.lora_ckpt is not None) == path.stem.startswith("longlive")
    assert not config.generator_path.is_absolute()
    check_against_model(config, WAN_1_3B)
    for switched_off in ("dummy_forcing=off", "dummy_forcing=false", "dummy_forcing.enabled=false"):
        assert load_config(path, [switched_off]).policy == "window"


@pytest.mark.parametrize("path", CALIBRATED, ids=lambda path: path.stem)
def test_calibrated_files_differ_in_their_policy_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, other = load_config(path), load_config(path.with_name(path.name.replace("calibrated", "inference")))
    assert not caplog.records
    assert config.policy == "calibrated" and config.dummy_forcing.frames_per_head == 1.33
    assert dataclasses.replace(config, dummy_forcing=other.dummy_forcing) == other


def test_our_files_are_all_there() -> None:
    assert [path.stem for path in CALIBRATED] == ["longlive_calibrated", "self_forcing_calibrated"]
    expected = {f"{family}_{use}" for family in FAMILIES for use in ("inference", "vbench")}
    extra = {"longlive_interactive_inference", "causal_forcing_framewise_inference"}
    assert expected | extra <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_our_files_hold_no_absolute_path_and_no_model_root(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(/home|/root|/Users|/mnt|/nfs)\b|~/|[:\s]/\w", text)
    assert "model_root" not in yaml.safe_load(text)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_files_load_with_at_most_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(path)
    published = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.seed == published["seed"]
    assert config.num_output_frames == published.get("num_output_frames", 21)
    assert config.generator_ckpt == published["generator_ckpt"]
    assert config.model_kwargs.timestep_shift == 5.0
    without_use = [key for key in published if key in WITHOUT_USE or key.startswith("wandb_")]
    assert len(caplog.records) == bool(without_use)
    for key in without_use:
        assert re.search(rf"\b{key}\b", caplog.text)


def test_published_dummy_forcing_file_keeps_its_absolute_paths() -> None:
    config = load_config(ROOT / "tests/data/published/dummy_longlive_interactive_inference.yaml")
    assert config.generator_path == Path("/home/user/pretrained/LongLive-1.3B/models/longlive_base.pt")
    assert [lora.path for lora in config.lora_files] == [Path("/home/user/pretrained/LongLive-1.3B/models/lora.pt")]
    assert config.model_folder == Path("/home/user/pretrained/Wan2.1-T2V-1.3B")
    assert config.vae_path == Path("/home/user/pretrained/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth")
    assert config.switch_frame_indices == (40, 80, 120, 160, 200)
    assert config.adapter is not None
    assert (config.adapter.rank, config.adapter.alpha) == (256, 256.0)
    assert config.dummy_forcing == DummyForcingConfig(ar_start=2, local_context_length=2)


def test_published_self_forcing_training_file_takes_the_defaults() -> None:
    config = load_config(ROOT / "tests/data/published/self_forcing_dmd.yaml")
    assert (config.policy, config.num_output_frames, config.output_folder) == ("full", 21, "videos")
    assert config.data_path == "prompts/vidprom_filtered_extended.txt"
    assert config.lora_files == []


def test_published_longlive_files() -> None:
    plain = load_config(ROOT / "tests/data/published/longlive_inference.yaml")
    assert (plain.policy, plain.rope, plain.num_blocks, plain.resolution) == ("window", "absolute", 20, 480)
    interactive = load_config(ROOT / "tests/data/published/longlive_interactive_inference.yaml")
    assert interactive.switch_frame_indices == (48, 96)
    endless = load_config(ROOT / "tests/data/published/longlive_inference_infinity.yaml")
    assert (endless.policy, endless.rope, endless.num_output_frames) == ("window", "relative", 1920)


def test_the_shift_may_stand_at_the_top_level(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "timestep_shift: 3\n")).model_kwargs.timestep_shift == 3.0
    both = write(tmp_path, "timestep_shift: 3.0\nmodel_kwargs: {timestep_shift: 5.0}\n")
    assert "timestep_shift: 3.0 disagrees with model_kwargs.timestep_shift: 5.0" in message_of(path=both)


def test_a_final_zero_is_no_step(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path, "denoising_step_list: [1000, 757, 522, 0]\n"))
    assert (plain.denoising_step_list, plain.warp_denoising_step) == ((1000, 757, 522), False)
    warped = load_config(write(tmp_path, "denoising_step_list: [1000, 500, 0]\nwarp_denoising_step: true\n"))
    assert (warped.denoising_step_list, warped.warp_denoising_step) == ((1000, 500), True)


@pytest.mark.parametrize("section", ["", "dummy_forcing:", "dummy_forcing: off", "dummy_forcing: {enabled: false}"])
def test_ways_to_leave_dummy_forcing_off(tmp_path: Path, section: str) -> None:
    path = write(tmp_path, section)
    assert load_config(path).policy == "full"
    assert load_config(path, ["model_kwargs.local_attn_size=12"]).policy == "window"
    assert load_config(path, ["dummy_forcing=on"]).dummy_forcing == DummyForcingConfig()
    assert load_config(path, ["dummy_forcing.enabled=true", "dummy_forcing.policy=prune"]).policy == "prune"


def test_switching_on_keeps_what_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path, "dummy_forcing: {enabled: false, num_dummy: 90}\n")
    assert load_config(path, ["dummy_forcing=on"]).dummy_forcing == DummyForcingConfig(num_dummy=90)


@pytest.mark.parametrize("spelling", ["switch_frame_indices=6,12", "switch_frame_indices=[6,12]"])
def test_switch_frames_as_text_or_list(spelling: str) -> None:
    assert load_config(SELF_FORCING, [spelling]).switch_frame_indices == (6, 12)
    assert load_config(SELF_FORCING, ["switch_frame_indices=6"]).switch_frame_indices == (6,)
    assert load_config(SELF_FORCING, ["switch_frame_indices=null"]).switch_frame_indices == ()


def test_infinite_attention_is_relative_rope(tmp_path: Path) -> None:
    section = "model_kwargs: {local_attn_size: 12, use_infinite_attention: true}\n"
    assert load_config(write(tmp_path, section)).rope == "relative"
    assert load_config(write(tmp_path, section.replace("true", "false"))).rope == "absolute"
    clash = message_of("rope=absolute", path=write(tmp_path, section))
    assert "rope: absolute disagrees with model_kwargs.use_infinite_attention: true" in clash


@pytest.mark.parametrize(
    ("override", "only"), [("i2v=true", "false"), ("independent_first_frame=true", "false"), ("causal=false", "true")]
)
def test_published_keys_that_ask_for_more_are_refused(override: str, only: str) -> None:
    key, value = override.split("=")
    assert message_of(override) == f"{key}: {value} is not supported; remove the key or set it to {only}"
    assert load_config(SELF_FORCING, [f"{key}={only}"]).num_blocks == 7


def test_no_key_is_both_used_and_dropped() -> None:
    assert not WITHOUT_USE & {field.name for field in dataclasses.fields(InferenceConfig)}


@pytest.mark.parametrize(
    ("resolution", "latent", "pixels"),
    [
        ("480", (60, 104), (480, 832)),
        ("720", (90, 160), (720, 1280)),
        ("1080", (136, 240), (1080, 1920)),
        ("[256,448]", (32, 56), (256, 448)),
        ("[1088,1920]", (136, 240), (1088, 1920)),
    ],
)
def test_sizes(resolution: str, latent: tuple[int, int], pixels: tuple[int, int]) -> None:
    config = load_config(SELF_FORCING, [f"resolution={resolution}"])
    assert (config.latent_size, config.pixel_size, config.num_blocks) == (latent, pixels, 7)


def test_model_root_comes_from_yaml_then_environment_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = "LongLive-1.3B/models/longlive_base.pt"
    assert load_config(LONGLIVE).generator_path == Path("checkpoints") / inside
    monkeypatch.setenv("DUMMY_FORCING_ROOT", "/weights")
    assert load_config(LONGLIVE).generator_path == Path("/weights") / inside
    assert load_config(LONGLIVE).lora_files[0].path == Path("/weights/LongLive-1.3B/models/lora.pt")
    assert load_config(LONGLIVE, ["model_root=/disk"]).generator_path == Path("/disk") / inside


def test_paths_that_exist_from_the_current_folder_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("a/b.pt", "root", "generator_ckpt") == Path("root/a/b.pt")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pt").touch()
    assert resolve_path("a/b.pt", "root", "generator_ckpt") == Path("a/b.pt")
    assert resolve_path("/x/b.pt", "root", "generator_ckpt") == Path("/x/b.pt")
    with pytest.raises(InputError, match="generator_ckpt: the path is empty"):
        resolve_path(" ", "root", "generator_ckpt")


def test_model_files_in_wan_and_diffusers_layout(tmp_path: Path) -> None:
    config = InferenceConfig(model_root=str(tmp_path), model_name="Wan2.1")
    folder = tmp_path / "Wan2.1"
    native = (folder / "Wan2.1_VAE.pth", folder / "models_t5_umt5-xxl-enc-bf16.pth", folder / "google" / "umt5-xxl")
    assert (config.vae_path, config.text_encoder_path, config.tokenizer_path) == native
    diffusers = tuple(folder / name for name in ("vae", "text_encoder", "tokenizer"))
    for path in diffusers:
        path.mkdir(parents=True)
    assert (config.vae_path, config.text_encoder_path, config.tokenizer_path) == diffusers
    native[0].touch()
    assert config.vae_path == native[0]


@pytest.mark.parametrize(
    ("part", "setting", "names"),
    [("vae", "vae_ckpt", VAE_NAMES), ("text_encoder", "text_encoder_ckpt", TEXT_ENCODER_NAMES)],
)
def test_vae_and_text_encoder_under_other_names(
    tmp_path: Path, part: str, setting: str, names: tuple[str, ...]
) -> None:
    def path_of(*overrides: str) -> Path:
        found = getattr(load_config(SELF_FORCING, [f"model_root={tmp_path}", *overrides]), f"{part}_path")
        assert isinstance(found, Path)
        return found

    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    for name in reversed(names):
        (folder / name).touch()
        assert path_of() == folder / name
    assert path_of(f"{setting}=other.bin") == tmp_path / "other.bin"
    assert path_of(f"{setting}=/x/other.bin") == Path("/x/other.bin")
    assert path_of(f"{setting}=null") == folder / names[0]


def test_the_section_of_an_adapter_may_be_left_out_or_emptied() -> None:
    assert load_config(LONGLIVE, ["adapter=null"]).adapter is None
    config = load_config(LONGLIVE, ["adapter.rank=null", "adapter.alpha=null"])
    assert config.adapter is not None and (config.adapter.rank, config.adapter.alpha) == (None, None)
    assert AdapterConfig().rank is None


def test_without_a_generator_the_models_own_weights_are_taken() -> None:
    config = InferenceConfig()
    assert config.generator_path == config.model_folder


@pytest.mark.parametrize("path", [*CONFIGS, *PUBLISHED], ids=lambda path: path.stem)
def test_metadata_gives_the_configuration_back(tmp_path: Path, path: Path) -> None:
    config = load_config(path, ["resolution=[256,448]"])
    written = json.dumps(as_dict(config))
    assert load_config(write(tmp_path, written)) == config


def test_the_warning_names_all_keys_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(write(tmp_path, "lr: 1.0e-5\nwandb_key: {your key}\nreward_model: x\nseed: 3\n"))
    assert [record.getMessage() for record in caplog.records] == [
        "keys without a use here are ignored: lr, wandb_key, reward_model"
    ]


NEIGHBOURS = ROOT / "tests" / "data" / "neighbours"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fork_method", ["method (use dummy_forcing.enabled)", "forcing (use dummy_forcing)"]),
        (
            "training_keys",
            ["full_training_steps, beta, checkpoint_path (use generator_ckpt), grad_accum", "discrete_cd_N"],
        ),
        ("sizes_ignored", ["num_frames (use num_output_frames,", "height (use resolution", "width (use resolution"]),
        ("one_forcing", ["generator_fsdp_transformer_modules", "real_score_cpu_offload", "r1_weight", "gan_num_class"]),
    ],
)
def test_files_of_neighbours_load_with_one_warning(
    name: str, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(NEIGHBOURS / f"{name}.yaml")
    assert config.extended_prompt_path is None and config.generator_ckpt is not None
    (record,) = caplog.records
    assert all(part in record.getMessage() for part in told), record.getMessage()


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "fork_method",
            ["use_pyramidkv=true", "method=rolling_forcing"],
            "use_pyramidkv: Pyramid Forcing's cache is not supported; method: 'rolling_forcing' is not supported yet.",
        ),
        ("krea_server", [], "do_kv_recomp: a cache that is computed anew before each block is not supported yet."),
        ("longlive_2", [], "checkpoints, data, inference, logging: sections of a file of LongLive 2.0, whose model"),
        (
            "fork_method",
            ["beat=1", "num_output_frame=2"],
            "2 unknown keys: beat, num_output_frame (did you mean num_out",
        ),
        ("fork_method", ["i2v=true"], "i2v: true is not supported"),
        ("fork_method", ["is_causal=false"], "is_causal: false is not supported"),
    ],
)
def test_what_neighbours_can_and_this_cannot_is_called_that(name: str, overrides: list[str], expected: str) -> None:
    message = message_of(*overrides, path=NEIGHBOURS / f"{name}.yaml")
    assert message.startswith(expected), message
    assert "did you mean denoising_step_list" not in message


def test_the_first_block_may_have_steps_of_its_own() -> None:
    config = load_config(NEIGHBOURS / "first_chunk_steps.yaml")
    assert (config.denoising_step_list_first_chunk, config.denoising_step_list) == ((1000, 750, 500, 250), (1000,))


def test_features_that_are_switched_off_are_no_error() -> None:
    off = ["denoising_step_list_first_chunk=null", "reference_images=[]", "do_kv_recomp=false"]
    assert load_config(SELF_FORCING, off) == load_config(SELF_FORCING)


def test_none_as_python_writes_it_is_null() -> None:
    nothing = ["lora_ckpt=None", "adapter=None", "start_from=none", "extended_prompt_path=None", "compile_cache=None"]
    config = load_config(SELF_FORCING, [*nothing, "dummy_forcing.roles=None", "switch_frame_indices=None"])
    assert config == load_config(
        SELF_FORCING, [item.replace("None", "null") for item in ("lora_ckpt=None", "adapter=None")]
    )
    assert load_config(SELF_FORCING, ["dummy_forcing=None"]).policy == "window"


def test_switch_frames_may_be_texts() -> None:
    assert load_config(SELF_FORCING, ["switch_frame_indices=['6','12']"]).switch_frame_indices == (6, 12)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["dummy_forcing.policy=calibrated", "seed=1"], True),
        (["dummy_forcing.policy=calibrated", "dummy_forcing=off"], False),
        (["seed=1"], False),
    ],
)
def test_a_method_that_is_asked_for_where_the_section_is_off(
    overrides: list[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    off = ROOT / "configs" / "shapes_interactive.yaml"
    warn_of_what_is_off(load_config(off, overrides), overrides)
    assert ("dummy_forcing.policy: without effect" in caplog.text) == warned
