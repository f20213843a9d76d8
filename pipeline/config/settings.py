"""All settings of a run: the layers' dataclasses composed. pipeline/config/checks.py has the conditions between them.

This is the only file that sees every layer's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from dummy.config import DummyForcingConfig
from pipeline.config import paths
from pipeline.config.resolution import latent_size, pixel_size
from wan.config import AdapterConfig, LoraConfig, ModelKwargs


@dataclass(frozen=True)
class RollingConfig:
    """The YAML section `rolling`: several blocks are denoised at once, each a step further than the next (Rolling
    Forcing, arXiv 2509.25161; Causal Forcing's long-video checkpoint)."""

    max_attention: int = 21  # A, latent frames that a window of blocks sees, itself and the first block included


class LoraFile(NamedTuple):
    """A LoRA to merge: the setting that names it, its file, what is said of its rank and alpha, and its strength."""

    setting: str
    path: Path
    adapter: AdapterConfig | None
    strength: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Everything a run needs to know beside the prompts. Frames are latent frames unless said otherwise.

    No instance of this class has been checked; `InferenceConfig` is one that has.
    """

    denoising_step_list: tuple[int, ...] = (1000, 750, 500, 250)  # of 1000, strictly decreasing
    # Steps of the first block that is made (Causal Forcing++), or of a block that begins the video (One-Forcing).
    denoising_step_list_first_chunk: tuple[int, ...] | None = None
    first_frame_denoising_step_list: tuple[int, ...] | None = None
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
    adapter: AdapterConfig | None = None  # of lora_ckpt
    loras: tuple[LoraConfig, ...] = ()  # to merge after lora_ckpt, one after the other
    vae_ckpt: str | None = None  # file or folder; None: that in the model folder, under one of its usual names
    text_encoder_ckpt: str | None = None  # likewise

    model_root: str = field(default_factory=paths.default_model_root)
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"  # auto: bf16 on CUDA, fp32 on the CPU; fp8: products
    attention: Literal["auto", "sdpa", "cudnn", "fa2", "fa3", "varlen"] = "auto"  # varlen: one launch for all heads
    engine: Literal["auto", "eager", "compiled", "graphed"] = "auto"  # graphed: CUDA graphs; auto: those on a GPU
    parallel: str | None = None  # heads, or heads:N: the N processes that torchrun has started make one video together
    compile_cache: str | None = None  # folder for what torch.compile makes, so that the next start is quick
    rope: Literal["absolute", "relative"] = "absolute"  # relative: no distance leaves the trained range
    rope_window: int | None = None  # P, latent frames that relative positions span; None: local_attn_size
    kv_flush: bool = False  # prompt switches change the text alone, and encode nothing anew (Infinity-RoPE)
    scene_cut_from: int = 45  # latent frame at which the block after a scene cut stands; needs kv_flush
    rolling: RollingConfig | None = None
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

    @property
    def ranks(self) -> int | None:
        """The number of processes that `parallel` names, if it does."""
        _, _, number = (self.parallel or "").partition(":")
        return int(number) if number else None

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
    def lora_files(self) -> list[LoraFile]:
        """The LoRAs to merge, in order."""
        named = [(f"loras[{i}].path", one.path, None, one.strength) for i, one in enumerate(self.loras)]
        first = [] if self.lora_ckpt is None else [("lora_ckpt", self.lora_ckpt, self.adapter, 1.0)]
        return [
            LoraFile(setting, paths.resolve_path(path, self.model_root, setting), adapter, strength)
            for setting, path, adapter, strength in (*first, *named)
        ]

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
