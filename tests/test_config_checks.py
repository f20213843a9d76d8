"""Conditions between settings, and the messages that users read: the field, the value, and what would do.

Base of all cases is configs/self_forcing_inference.yaml: 21 frames in 7 blocks of 3, window 12, sink 3, ar_start 1.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.config.config import InferenceConfig, check_against_model, load_config
from pipeline.config.jobs import read_jobs
from pipeline.runtime.loading import require_files
from pipeline.vbench.prompts import read_vbench_jobs
from utils.errors import InputError
from wan.config import WAN_1_3B, ModelConfig

SELF_FORCING = Path(__file__).parents[1] / "configs" / "self_forcing_inference.yaml"


def message_of(*overrides: str, path: Path = SELF_FORCING) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("num_output_frame", "num_output_frames"),
        ("model_kwargs.sink_sise", "model_kwargs.sink_size"),
        ("dummy_forcing.num_dumy", "dummy_forcing.num_dummy"),
        ("dummy_forcing.retention.neighbour", "dummy_forcing.retention.neighbor"),
        ("adapter.rnk", "adapter.rank"),
        ("local_attn_size", "model_kwargs.local_attn_size"),
        ("dummy_forcing.rope", "rope"),
    ],
)
def test_a_misspelt_or_misplaced_key_is_answered_with_the_right_one(tmp_path: Path, key: str, suggestion: str) -> None:
    expected = f"{key}: unknown key; did you mean {suggestion}"
    assert message_of(f"{key}=1").startswith(expected)
    head, *sections = key.split(".")[::-1]
    tree: dict[str, object] = {head: 1}
    for section in sections:
        tree = {section: tree}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    assert message_of(path=path).startswith(expected)


ONE_SIDED = "dummy_forcing.retention.neighbor"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            "num_output_frames=20",
            "num_output_frames: 20 is no positive multiple of num_frame_per_block 3; use 18 or 21",
        ),
        ("num_output_frames=2", "num_output_frames: 2 is no positive multiple of num_frame_per_block 3; use 3"),
        ("num_output_frames=0", "num_output_frames: 0 is no positive multiple of num_frame_per_block 3; use 3"),
        ("num_frame_per_block=0", "num_frame_per_block: must be 1 or more, got 0"),
        ("resolution=500", "resolution: 500 is none of 480, 720, 1080; write any other size as [height, width]"),
        ("resolution=[256,450]", "resolution: [256, 450]: 450 pixels is no positive multiple of 16; 448 is near"),
        ("resolution=[1080,1920]", "1080 pixels is no positive multiple of 16; 1088 is near (resolution: 1080 is"),
        ("resolution=[0,448]", "resolution: [0, 448]: 0 pixels is no positive multiple of 16; 16 is near"),
        ("resolution=480p", "resolution: expected an integer or a list of 2 integers, got the text '480p'"),
        ("fps=0", "fps: must be 1 or more pixel frames a second, got 0"),
        ("video_crf=52", "video_crf: must be from 0 to 51, got 52"),
        ("denoising_step_list=[]", "denoising_step_list: empty; the published list is [1000, 750, 500, 250]"),
        ("denoising_step_list=[0]", "denoising_step_list: steps must be from 1 to 1000, got [0]"),
        ("denoising_step_list=[1001,3]", "denoising_step_list: steps must be from 1 to 1000, got [1001, 3]"),
        ("denoising_step_list=[500,500]", "denoising_step_list: steps must strictly decrease, got [500, 500]"),
        ("context_noise=1001", "context_noise: must be a timestep from 0 (clean) to 1000, got 1001"),
        ("context_noise=-1", "context_noise: must be a timestep from 0 (clean) to 1000, got -1"),
        ("inference_iter=0", "inference_iter: must be -1 (all prompts) or 1 or more, got 0"),
        ("inference_iter=-2", "inference_iter: must be -1 (all prompts) or 1 or more, got -2"),
        ("num_samples=0", "num_samples: must be 1 or more videos, got 0"),
        ("seed=-1", "seed: must be from 0 to 2**63 - 1, got -1"),
        (f"seed={2**63}", f"seed: must be from 0 to 2**63 - 1, got {2**63}"),
        ("device=gpu", "device: expected auto, cpu, cuda, cuda:1 or the like, got 'gpu'"),
        ("precision=fp16", "precision: expected one of auto, bf16, fp32, fp8, got the text 'fp16'"),
        ("engine=fast", "engine: expected one of auto, eager, compiled, graphed, got the text 'fast'"),
        ("attention=fa4", "attention: expected one of auto, sdpa, cudnn, fa2, fa3, varlen, got the text 'fa4'"),
        ("adapter.rank=0", "adapter.rank: must be 1 or more, got 0"),
        ("adapter.alpha=0", "adapter.alpha: must be above 0, got 0"),
        ("adapter.type=dora", "adapter.type: expected one of lora, got the text 'dora'"),
        ("generator_ckpt=3", "generator_ckpt: expected text or null, got 3 (int)"),
        # the window
        (
            "model_kwargs.local_attn_size=5",
            "model_kwargs.local_attn_size: 5 latent frames do not hold sink_size 3 and a",
        ),
        ("model_kwargs.local_attn_size=5", "block of 3; use 6 or more, or -1 for all frames"),
        ("model_kwargs.local_attn_size=0", "model_kwargs.local_attn_size: got 0; use -1 (all frames) or a positive"),
        ("model_kwargs.local_attn_size=-2", "model_kwargs.local_attn_size: got -2; use -1 (all frames) or a positive"),
        ("model_kwargs.sink_size=-1", "model_kwargs.sink_size: must be 0 or more latent frames, got -1"),
        ("model_kwargs.timestep_shift=0", "model_kwargs.timestep_shift: must be above 0 (published: 5.0), got 0.0"),
        ("rope=relative model_kwargs.local_attn_size=-1", "rope: relative places 1 sink frames and a block of 3 in a"),
        ("rope=relative model_kwargs.local_attn_size=-1", "got -1; use 4 or more (published: 12), or rope=absolute"),
        ("rope=relative dummy_forcing.retention.sink=[10,0]", "rope: relative places 10 sink frames and a block of 3"),
        ("rope=rotary", "rope: expected one of absolute, relative, got the text 'rotary'"),
        # dummy_forcing
        ("dummy_forcing=maybe", "dummy_forcing: expected a section with the keys enabled, policy"),
        (
            "dummy_forcing.policy=pack",
            "dummy_forcing.policy: expected one of packed, prune, calibrated, got the text 'pack'; did you",
        ),
        ("dummy_forcing.denoise_start=1", "dummy_forcing.denoise_start: only 0 works, got 1"),
        ("dummy_forcing.ar_start=0", "dummy_forcing.ar_start: must be 1 or more, got 0"),
        (
            "dummy_forcing.ar_start=6",
            "dummy_forcing.ar_start: head roles are found in block 6 (counted from 0) and used",
        ),
        ("dummy_forcing.ar_start=6", "num_output_frames 21 makes only 7 blocks of 3; use dummy_forcing.ar_start=5 or"),
        ("dummy_forcing.ar_start=6", "or num_output_frames=24 or more, or dummy_forcing.enabled=false"),
        (
            "num_output_frames=3",
            "makes only 1 block of 3; use num_output_frames=9 or more, or dummy_forcing.enabled=fal",
        ),
        ("dummy_forcing.local_context_length=0", "dummy_forcing.local_context_length: must be 1 or more, got 0"),
        ("dummy_forcing.sink_score_frames=0", "dummy_forcing.sink_score_frames: must be 1 or more, got 0"),
        ("dummy_forcing.num_dummy=-1", "dummy_forcing.num_dummy: must be 0 or more heads, got -1"),
        ("dummy_forcing.score_query_share=0", "dummy_forcing.score_query_share: must be above 0 and at most 1"),
        ("dummy_forcing.score_query_share=1.5", "dummy_forcing.score_query_share: must be above 0 and at most 1"),
        ("dummy_forcing.teacache_threshold=-0.1", "dummy_forcing.teacache_threshold: must be 0 or more, got -0.1"),
        (f"{ONE_SIDED}=[0,-1]", f"{ONE_SIDED}: [sink, recent] must be 0 or more latent frames each, got [0, -1]"),
        (f"{ONE_SIDED}=[3]", f"{ONE_SIDED}: expected a list of 2 integers, got [3] (list)"),
        (
            "dummy_forcing.policy=prune dummy_forcing.retention.sink=[1,0]",
            "dummy_forcing.retention: policy prune would ignore it",
        ),
        # switches
        ("switch_frame_indices=6,x", "switch_frame_indices: expected latent frames such as 40, 80, 120, got '6,x'"),
        ("switch_frame_indices=[0,6]", "switch_frame_indices: must be positive and strictly increasing latent frames"),
        ("switch_frame_indices=9,6", "must be positive and strictly increasing latent frames, got [9, 6]"),
        ("switch_frame_indices=6,6", "must be positive and strictly increasing latent frames, got [6, 6]"),
        ("switch_frame_indices=21", "no block starts at or after frame 21 in num_output_frames 21; use 18 or less"),
        ("switch_frame_indices=19", "no block starts at or after frame 19 in num_output_frames 21; use 18 or less"),
        ("switch_frame_indices=4,5", "switch_frame_indices: [4, 5] take effect at frames [6, 6] (blocks of 3)"),
        ("switch_frame_indices=1 num_output_frames=3 dummy_forcing=off", "num_output_frames 3; make the video longer"),
    ],
)
def test_values_that_do_not_fit_are_named_with_a_remedy(overrides: str, expected: str) -> None:
    assert expected in message_of(*overrides.split(" "))


@pytest.mark.parametrize(
    "overrides",
    [
        "dummy_forcing.ar_start=5",
        "dummy_forcing.ar_start=99 dummy_forcing.roles=roles.json",
        "num_output_frames=3 dummy_forcing=off",
        "num_output_frames=3 dummy_forcing.roles=roles.json",
        "num_output_frames=9",
        "model_kwargs.local_attn_size=6",
        "rope=relative model_kwargs.local_attn_size=6",
        "switch_frame_indices=18",
        "switch_frame_indices=3,4,7",
        f"seed={2**63 - 1}",
        "context_noise=1000",
        "inference_iter=1",
        "dummy_forcing.score_query_share=1",
        "dummy_forcing.num_dummy=0",
        "device=cuda:1",
        "lora_ckpt=lora.pt",
        "num_frame_per_block=1 num_output_frames=20",
    ],
)
def test_values_at_the_edge_fit(overrides: str) -> None:
    assert isinstance(load_config(SELF_FORCING, overrides.split(" ")), InferenceConfig)


def test_remedies_in_the_message_work() -> None:
    message = message_of("num_output_frames=12", "dummy_forcing.ar_start=4")
    for remedy in ("dummy_forcing.ar_start=2", "num_output_frames=18", "dummy_forcing.enabled=false"):
        assert remedy in message
        load_config(SELF_FORCING, ["num_output_frames=12", "dummy_forcing.ar_start=4", remedy])


def test_conditions_hold_for_configurations_made_in_code_too() -> None:
    with pytest.raises(InputError, match="num_output_frames: 20"):
        dataclasses.replace(InferenceConfig(), num_output_frames=20)


def test_num_dummy_is_bounded_by_the_model() -> None:
    config = load_config(SELF_FORCING, ["dummy_forcing.num_dummy=360"])
    check_against_model(config, WAN_1_3B)
    small = ModelConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=3)
    with pytest.raises(InputError, match=r"dummy_forcing\.num_dummy: 360 is .* 3 layers x 2 heads = 6"):
        check_against_model(config, small)
    check_against_model(load_config(SELF_FORCING, ["dummy_forcing=off"]), small)


@pytest.mark.parametrize(
    ("name", "most"),
    [("Wan2.1-T2V-1.3B", "30 layers x 12 heads = 360"), ("/x/Wan2.1-T2V-14B", "40 layers x 40 heads = 1600")],
)
def test_too_many_heads_for_a_published_model_are_told_before_its_files_are_missing(
    tmp_path: Path, name: str, most: str
) -> None:
    overrides = [f"model_root={tmp_path}", f"model_name={name}"]
    with pytest.raises(
        InputError, match=rf"^dummy_forcing\.num_dummy: 1601 is more than the model has heads; .*{most}"
    ):
        require_files(load_config(SELF_FORCING, [*overrides, "dummy_forcing.num_dummy=1601"]))
    with pytest.raises(InputError, match="does not exist"):
        require_files(load_config(SELF_FORCING, overrides))


@pytest.mark.parametrize("value", [2**32, 2**63, 10**40])
@pytest.mark.parametrize(
    "setting",
    [
        *("num_samples", "num_flickering_samples", "samples_per_batch", "fps", "adapter.rank", "num_output_frames"),
        *("resolution", "switch_frame_indices", "video_crf", "vae_tile", "context_noise", "num_frame_per_block"),
        *("model_kwargs.local_attn_size", "model_kwargs.sink_size", "dummy_forcing.ar_start", "denoising_step_list"),
        *("dummy_forcing.local_context_length", "dummy_forcing.sink_score_frames", "dummy_forcing.retention.sink"),
    ],
)
def test_sizes_that_no_machine_can_mean_are_refused(setting: str, value: int) -> None:
    pairs = {"resolution": f"[{value},{value}]", "dummy_forcing.retention.sink": f"[{value},1]"}
    given = pairs.get(setting, f"[{value}]" if setting == "denoising_step_list" else str(value // 48 * 48))
    message = message_of(f"{setting}={given}")
    assert message.startswith(setting), message


@pytest.mark.parametrize(
    "override",
    [
        *("model_kwargs.timestep_shift=1e-308", "model_kwargs.timestep_shift=1e308", "adapter.alpha=1e308"),
        *("device=cuda:999999999999", "vae_device=cpu:99999999999999999999", "device=cuda:٣", "resolution=[8208,16]"),
    ],
)
def test_numbers_with_which_nothing_can_be_computed_are_refused(override: str) -> None:
    assert message_of(override).startswith(f"{override.partition('=')[0]}: ")


def test_no_more_videos_are_planned_than_a_run_can_mean(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red fox runs\n" * 200)
    config = load_config(SELF_FORCING, [f"data_path={tmp_path / 'p.txt'}", "num_samples=1000"])
    with pytest.raises(InputError, match=r"num_samples: 1000 for each prompt of data_path .* are 200000 videos"):
        read_jobs(config)
    assert len(read_jobs(dataclasses.replace(config, inference_iter=2))) == 2000
    assert len(read_vbench_jobs(config)) == 1000  # the same prompt throughout
    (tmp_path / "p.txt").write_text("".join(f"fox {number}\n" for number in range(200)))
    with pytest.raises(InputError, match="are 200000 videos"):
        read_vbench_jobs(config)
