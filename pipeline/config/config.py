"""All settings of a run: the layers' dataclasses composed, checked against each other, and read from YAML.

This is the only file that sees every layer's configuration, and the only place for conditions between fields. It opens
the YAML file and nothing else: whether weights and prompts exist is found out by what loads them, and the conditions
that need the model's sizes are in `check_against_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from dummy.config import DummyForcingConfig
from dummy.policies.registry import cache_policy, finds_roles, has_roles, policy_from_config
from pipeline.config import paths
from pipeline.config.published_keys import expand_overrides, translate
from pipeline.config.resolution import MOST_PIXELS, check_resolution, latent_size, pixel_size
from utils.config import build
from utils.errors import InputError, quoted, require_range
from wan.config import AdapterConfig, ModelConfig, ModelKwargs
from wan.geometry import MOST_FRAMES, LatentGeometry

# What no run can mean, though it may be a slip of the keyboard; each of these is built as a list somewhere.
_MOST = {"num_samples": 10_000, "num_flickering_samples": 10_000, "samples_per_batch": 1_000}
_MOST_FPS = 1000


@dataclass(frozen=True)
class InferenceConfig:
    """Everything a run needs to know beside the prompts. Frames are latent frames unless said otherwise.

    Raises:
        InputError: a value out of range, or values that do not go together; the message says what would.
    """

    denoising_step_list: tuple[int, ...] = (1000, 750, 500, 250)  # of 1000, strictly decreasing
    warp_denoising_step: bool = True  # apply timestep_shift to the steps
    num_frame_per_block: int = 3
    model_name: str = "Wan2.1-T2V-1.3B"  # folder, absolute or under model_root
    model_kwargs: ModelKwargs = field(default_factory=ModelKwargs)
    dummy_forcing: DummyForcingConfig = field(default_factory=lambda: DummyForcingConfig(enabled=False))

    data_path: str = "prompts/example_prompts.txt"
    extended_prompt_path: str | None = None  # generated from, line by line, while data_path's prompts name the files
    output_folder: str = "videos"
    inference_iter: int = -1  # prompts to take; -1: all
    num_output_frames: int = 21  # 21: 5 s, 120: 30 s, 240: 60 s at 16 pixel frames a second
    use_ema: bool = False
    seed: int = 0
    num_samples: int = 1  # videos a prompt
    save_with_index: bool = True
    global_sink: bool = False  # at a prompt switch the sink frames stay
    context_noise: int = 0  # timestep of the clean pass, 0 to 1000
    resolution: int | tuple[int, int] = 480  # 480, 720, 1080, or [height, width] in pixels
    switch_frame_indices: tuple[int, ...] = ()
    generator_ckpt: str | None = None
    lora_ckpt: str | None = None
    adapter: AdapterConfig | None = None
    vae_ckpt: str | None = None  # file or folder; None: that in the model folder, under one of its usual names
    text_encoder_ckpt: str | None = None  # likewise

    model_root: str = field(default_factory=paths.default_model_root)
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"  # auto: bf16 on CUDA, fp32 on the CPU; fp8: products
    attention: Literal["auto", "sdpa", "cudnn", "fa2", "fa3", "varlen"] = "auto"  # varlen: one launch for all heads
    engine: Literal["auto", "eager", "compiled", "graphed"] = "auto"  # graphed: CUDA graphs; auto: those on a GPU
    compile_cache: str | None = None  # folder for what torch.compile makes, so that the next start is quick
    rope: Literal["absolute", "relative"] = "absolute"  # relative: no distance leaves the trained range
    text_encoder_device: Literal["auto", "cpu", "device"] = "auto"
    vae_device: str = "auto"  # auto: as device; another GPU decodes beside the model
    decoder: str = "wan"  # wan: the VAE's own; taehv:FILE (absolute or under model_root): a preview, of less quality
    overlap: Literal["auto"] | bool = "auto"  # decode and write a block while the next is made; auto: yes
    low_memory: Literal["auto"] | bool = "auto"  # prefer what takes less memory to what is faster; auto: where needed
    overwrite: bool = False  # make videos again whose files exist
    save_metadata: bool = True
    contact_sheet: bool = False  # a PNG of evenly spaced frames beside each video
    start_from: str | None = None  # image or video to go on from, or a JSON list with one for each prompt
    start_from_fit: bool = False  # resize and crop it to the resolution if its size differs
    stream_output: bool = False  # write fragments, so that the growing file plays and a killed run's part is kept
    vae_tile: Literal["auto", "never"] | int = "auto"  # side of a decoded tile in pixels; auto: whole if it fits
    num_flickering_samples: int = 25  # VBench: videos of each temporal-flickering prompt
    samples_per_batch: int = 1  # VBench: videos made together; above 1, they share their observed head roles
    fps: int = 16  # pixel frames a second
    video_crf: int = 18  # H.264 quality, 0 (lossless) to 51
    video_codec: Literal["libx264", "h264_nvenc"] = "libx264"  # h264_nvenc: by an NVIDIA GPU, with another ffmpeg

    def __post_init__(self) -> None:
        _check_schedule(self)
        _check_video(self)
        _check_run(self)
        _check_context(self)
        _check_dummy_forcing(self)
        _check_switches(self)

    @property
    def num_blocks(self) -> int:
        """Blocks of `num_frame_per_block` latent frames in the video."""
        return self.num_output_frames // self.num_frame_per_block

    @property
    def policy(self) -> str:
        """The context policy: with Dummy Forcing on, one of dummy/policies/registry.py, else `full` or `window`."""
        if self.dummy_forcing.enabled:
            return self.dummy_forcing.policy
        return "full" if self.model_kwargs.local_attn_size == -1 else "window"

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width (h, w)."""
        return latent_size(self.resolution)

    @property
    def pixel_size(self) -> tuple[int, int]:
        """Height and width (H, W) of the written video, after the crop from 1088 to 1080 rows at `resolution: 1080`."""
        return pixel_size(self.resolution)

    @property
    def model_folder(self) -> Path:
        """Folder of the Wan repository."""
        return paths.resolve_path(self.model_name, self.model_root, "model_name")

    @property
    def generator_path(self) -> Path:
        """File (or Diffusers folder) of the causal generator's weights; the model folder where none is set."""
        if self.generator_ckpt is None:
            return self.model_folder
        return paths.resolve_path(self.generator_ckpt, self.model_root, "generator_ckpt")

    @property
    def lora_path(self) -> Path | None:
        """File of the LoRA to merge, or None."""
        if self.lora_ckpt is None:
            return None
        return paths.resolve_path(self.lora_ckpt, self.model_root, "lora_ckpt")

    @property
    def vae_path(self) -> Path:
        """File (or Diffusers folder) of the VAE."""
        return paths.vae_path(self.model_folder, self.vae_ckpt, self.model_root)

    @property
    def preview_path(self) -> Path | None:
        """File of the preview decoder, or None where the VAE's own decodes."""
        return paths.preview_path(self.decoder, self.model_root)

    @property
    def text_encoder_path(self) -> Path:
        """File (or Diffusers folder) of the text encoder."""
        return paths.text_encoder_path(self.model_folder, self.text_encoder_ckpt, self.model_root)

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer."""
        return paths.tokenizer_path(self.model_folder)


def load_config(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> InferenceConfig:
    """From a YAML file of Dummy Forcing, Self-Forcing, LongLive or ours, or from stored settings, with changes.

    Keys that the published files carry and that have no use here are named in one warning.

    Raises:
        InputError: the file cannot be read, a key is unknown (close ones are suggested), or a value does not fit.
    """
    from utils.settings_file import load_mapping  # the rest of the program does without OmegaConf

    settings = translate(load_mapping(source, expand_overrides(overrides)))
    return build(InferenceConfig, paths.expand_paths(settings))


def geometry_of(config: InferenceConfig, channels: int) -> LatentGeometry:
    """The sizes of this configuration's latents, of so many `channels`."""
    height, width = config.latent_size
    return LatentGeometry(height, width, config.num_output_frames, config.num_frame_per_block, channels)


def check_against_model(config: InferenceConfig, model: ModelConfig) -> None:
    """The conditions that need the model's sizes. Raises InputError."""
    forcing = config.dummy_forcing
    if not finds_roles(forcing):
        return
    forcing.budget.check(model.num_layers, model.num_heads)
    least, heads = forcing.budget.possible(model.num_layers, model.num_heads)[0], model.num_layers * model.num_heads
    _require(
        forcing.equal_cost is None or least < heads,
        f"dummy_forcing.equal_cost: {forcing.equal_cost} gives neighbor heads what the others save, but all {heads} "
        f"heads are dummy with num_dummy {forcing.num_dummy}; use a smaller num_dummy or remove the equal_cost",
    )


def as_dict(config: InferenceConfig) -> dict[str, object]:
    """The settings as JSON and YAML can write them; `load_config` of the result gives an equal configuration."""
    return {name: _jsonable(value) for name, value in asdict(config).items()}


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_schedule(config: InferenceConfig) -> None:
    steps = list(config.denoising_step_list)
    _require(bool(steps), "denoising_step_list: empty; the published list is [1000, 750, 500, 250]")
    _require(
        all(1 <= step <= 1000 for step in steps),
        f"denoising_step_list: steps must be from 1 to 1000, got {steps}",
    )
    _require(
        all(later < earlier for earlier, later in pairwise(steps)),
        f"denoising_step_list: steps must strictly decrease, got {steps}",
    )
    _require(
        0 <= config.context_noise <= 1000,
        f"context_noise: must be a timestep from 0 (clean) to 1000, got {config.context_noise}",
    )


def _check_video(config: InferenceConfig) -> None:
    frames, block = config.num_output_frames, config.num_frame_per_block
    require_range("num_frame_per_block", block, 1, MOST_FRAMES)
    below, above = max(frames // block, 1) * block, max(frames // block + 1, 1) * block
    _require(
        frames >= 1 and frames % block == 0,
        f"num_output_frames: {frames} is no positive multiple of num_frame_per_block {block}; use "
        + (f"{below} or {above}" if below < above else f"{below}"),
    )
    _require(
        frames <= MOST_FRAMES,
        f"num_output_frames: {frames} latent frames are more than 7 hours; use {MOST_FRAMES // block * block} or less",
    )
    require_range("fps", config.fps, 1, _MOST_FPS, "pixel frames a second")
    _require(0 <= config.video_crf <= 51, f"video_crf: must be from 0 to 51, got {config.video_crf}")
    check_resolution(config.resolution)


def _check_run(config: InferenceConfig) -> None:
    _require(
        config.inference_iter == -1 or config.inference_iter >= 1,
        f"inference_iter: must be -1 (all prompts) or 1 or more, got {config.inference_iter}",
    )
    for name, most in _MOST.items():
        require_range(name, getattr(config, name), 1, most, "videos")
    tile = config.vae_tile
    _require(
        isinstance(tile, str) or (128 <= tile <= MOST_PIXELS and tile % 16 == 0),
        f"vae_tile: must be auto, never, or a multiple of 16 pixels from 128 to {MOST_PIXELS}, got {tile}",
    )
    preview = config.preview_path
    _require(
        isinstance(tile, str) or preview is None,
        f"vae_tile: {tile} is for decoder: wan; {config.decoder} decodes whole frames, so use vae_tile=auto",
    )
    _require(0 <= config.seed < 2**63, f"seed: must be from 0 to 2**63 - 1, got {config.seed}")
    for name in ("device", "vae_device"):
        fits = re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", getattr(config, name))
        told = f"expected auto, cpu, cuda, cuda:1 or the like, got {quoted(getattr(config, name))}"
        _require(fits is not None, f"{name}: {told}")


def _check_context(config: InferenceConfig) -> None:
    window, sink, block = config.model_kwargs.local_attn_size, config.model_kwargs.sink_size, config.num_frame_per_block
    _require(
        window == -1 or window >= sink + block,
        f"model_kwargs.local_attn_size: {window} latent frames do not hold sink_size {sink} and a block of {block}; "
        f"use {sink + block} or more, or -1 for all frames",
    )
    if config.rope == "absolute":
        return
    if has_roles(config.dummy_forcing):
        split = policy_from_config(config.model_kwargs, config.dummy_forcing, block).split
        assert split is not None
        sink = max(retention.sink for retention in split.by_role.values())
    _require(
        window >= sink + block,
        f"rope: relative places {sink} sink frames and a block of {block} in a window of model_kwargs.local_attn_size "
        f"latent frames, got {window}; use {sink + block} or more (published: 12), or rope=absolute",
    )


def _check_dummy_forcing(config: InferenceConfig) -> None:
    forcing, block, blocks = config.dummy_forcing, config.num_frame_per_block, config.num_blocks
    if forcing.enabled:
        cache_policy(forcing)  # which refuses what it cannot use
    _require(
        not forcing.costs_window or config.model_kwargs.local_attn_size != -1,
        f"dummy_forcing.{forcing.cost_key}: window is the cost of model_kwargs.local_attn_size, which is -1 (all "
        f"frames); set it (published: 12), or use dummy_forcing.{forcing.cost_key}=full",
    )
    # Roles found in the last block would never be used; roles from a file need no block to find them in.
    if not finds_roles(forcing) or forcing.roles is not None or forcing.ar_start <= blocks - 2:
        return
    remedies = [f"num_output_frames={(forcing.ar_start + 2) * block} or more", "dummy_forcing.enabled=false"]
    if blocks >= 3:
        remedies.insert(0, f"dummy_forcing.ar_start={blocks - 2} or less")
    raise InputError(
        f"dummy_forcing.ar_start: head roles are found in block {forcing.ar_start} (counted from 0) and used after it, "
        f"but num_output_frames {config.num_output_frames} makes only {blocks} block{'s'[: blocks > 1]} of {block}; "
        f"use {', or '.join(remedies)}"
    )


def _check_switches(config: InferenceConfig) -> None:
    check_switches(config.switch_frame_indices, config, "switch_frame_indices")


def check_switches(switches: Sequence[int], config: InferenceConfig, where: str) -> None:
    """Prompt switches (latent frames, of the YAML or of a storyboard's line) that every prompt is seen with.

    Raises:
        InputError: not increasing, past the end, or two in one block; `where` begins the message.
    """
    frames, block = list(switches), config.num_frame_per_block
    _require(
        all(frame >= 1 for frame in frames) and frames == sorted(set(frames)),
        f"{where}: must be positive and strictly increasing latent frames, got {frames}",
    )
    starts = [-(-frame // block) * block for frame in frames]  # the first block that starts at or after the switch
    latest = config.num_output_frames - block
    remedy = f"use {latest} or less, or a longer video" if latest > 0 else "make the video longer"
    for frame, start in zip(frames, starts, strict=True):
        _require(
            start < config.num_output_frames,
            f"{where}: no block starts at or after frame {frame} in num_output_frames "
            f"{config.num_output_frames}; {remedy}",
        )
    _require(
        len(set(starts)) == len(starts),
        f"{where}: {frames} take effect at frames {starts} (blocks of {block}); two switches in one block "
        "leave a prompt unseen, so move them apart",
    )
