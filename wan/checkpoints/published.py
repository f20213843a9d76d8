"""The published checkpoints that this program runs: one entry says where each comes from, how its file is made, what it
was distilled for, and which of our configurations use it.

Repositories, files, containers and names are those that the publishers' own loaders expect; no file was opened to write
them down (docs/checkpoints.md says what could not be verified). This file opens none either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from wan.config import WAN_1_3B, WAN_14B, ModelConfig

# Names that many repositories give their files: one of these alone tells nothing.
COMMON_NAMES = frozenset({"model", "ema_model", "base", "lora", "longvideo", "diffusion_pytorch_model"})
FSDP = "model._fsdp_wrapped_module."


@dataclass(frozen=True)
class Backbone:
    """A model of Wan-AI that checkpoints are made of; its folder has sizes, VAE and text encoder too."""

    name: str
    repository: str  # OWNER/NAME on the hub
    sizes: ModelConfig
    mark: str  # what the name of a folder with such a model holds

    @property
    def folder(self) -> str:
        """What hfd.sh calls the repository's folder."""
        return self.repository.rpartition("/")[2]


@dataclass(frozen=True)
class Schedule:
    """The denoising that a checkpoint was distilled for: steps of 1000, to which the shift of 5 is applied."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    block: int = 3  # latent frames
    first: tuple[int, ...] | None = None  # of the first block, where it has steps of its own
    rolling: bool = False  # blocks are denoised side by side, each a step further than the next

    def words(self) -> str:
        """As text."""
        first = f", the first one by {list(self.first)}" if self.first is not None else ""
        return f"blocks of {self.block} by {list(self.steps)}{first}{' in a rolling window' if self.rolling else ''}"


@dataclass(frozen=True)
class ModelSpec:
    """A published file with a generator, and with a LoRA for it if it has one."""

    name: str
    repository: str  # OWNER/NAME on the hub
    file: str  # in the repository
    container: str  # that holds the generator; "": the file itself is the mapping
    prefix: str  # of every name
    configs: tuple[str, ...]  # in configs/, without the suffix
    licence: str  # of the weights
    schedule: Schedule = Schedule()
    lora: str | None = None  # in the repository; with it the generator is what the name says

    @property
    def folder(self) -> str:
        """What hfd.sh calls the repository's folder."""
        return self.repository.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Of the generator, under the model root."""
        return Path(self.folder, self.file)

    @property
    def files(self) -> tuple[str, ...]:
        """What is needed of the repository."""
        return (self.file,) if self.lora is None else (self.file, self.lora)


BACKBONES = (
    Backbone("Wan 2.1 14B", "Wan-AI/Wan2.1-T2V-14B", WAN_14B, "14B"),
    Backbone("Wan 2.1 1.3B", "Wan-AI/Wan2.1-T2V-1.3B", WAN_1_3B, "1.3B"),
)

_NOT_SEEN = "its card was not seen; the code is Apache-2.0"
_CC_BY_NC_SA = "CC-BY-NC-SA by its card when last seen; the code is Apache-2.0"
_ONE_STEP = Schedule((1000,), 1, (1000, 750, 500, 250))

SPECS = (
    ModelSpec(
        "Self-Forcing",
        "gdhe17/Self-Forcing",
        "checkpoints/self_forcing_dmd.pt",
        "generator_ema",
        "model.",
        (
            *("self_forcing_inference", "self_forcing_vbench", "self_forcing_calibrated"),
            *("deep_forcing_inference", "rolling_sink_inference"),
        ),
        _CC_BY_NC_SA,
    ),
    ModelSpec(
        "LongLive",
        "Efficient-Large-Model/LongLive-1.3B",
        "models/longlive_base.pt",
        "generator",
        "model.",
        (
            *("longlive_inference", "longlive_vbench", "longlive_calibrated"),
            *("longlive_interactive_inference", "longlive_long_context"),
        ),
        _CC_BY_NC_SA,
        lora="models/lora.pt",
    ),
    ModelSpec(
        "Causal Forcing, chunk-wise",
        "zhuhz22/Causal-Forcing",
        "chunkwise/causal_forcing.pt",
        "generator",
        "model.",
        ("causal_forcing_inference", "causal_forcing_vbench"),
        "Apache-2.0 by its card",
    ),
    ModelSpec(
        "Causal Forcing, frame-wise",
        "zhuhz22/Causal-Forcing",
        "framewise/causal_forcing.pt",
        "generator_ema",
        FSDP,
        ("causal_forcing_framewise_inference",),
        "Apache-2.0 by its card",
        Schedule(block=1),
    ),
    ModelSpec(
        "Causal Forcing++, 2 steps",
        "zhuhz22/Causal-Forcing",
        "causal-forcing++/framewise-2step.pt",
        "generator_ema",
        FSDP,
        ("causal_forcing_pp_2step_inference", "causal_forcing_pp_2step_vbench"),
        "Apache-2.0 by its card",
        Schedule((1000, 500), 1, (1000, 750, 500, 250)),
    ),
    ModelSpec(
        "Causal Forcing++, 1 step",
        "zhuhz22/Causal-Forcing",
        "causal-forcing++/framewise-1step.pt",
        "generator_ema",
        FSDP,
        ("causal_forcing_pp_1step_inference", "causal_forcing_pp_1step_vbench"),
        "Apache-2.0 by its card",
        _ONE_STEP,
    ),
    ModelSpec(
        "Causal Forcing, long videos",
        "zhuhz22/Causal-Forcing",
        "chunkwise/longvideo.pt",
        "generator_ema",
        FSDP,
        ("causal_forcing_long_inference",),
        "Apache-2.0 by its card",
        Schedule(rolling=True),
    ),
    ModelSpec(
        "One-Forcing",
        "JiaqiFeng/OneForcing",
        "checkpoints/one_forcing.pt",
        "generator",
        FSDP,
        ("one_forcing_inference", "one_forcing_vbench"),
        _NOT_SEEN,
        _ONE_STEP,
    ),
    ModelSpec(
        "Self Gradient Forcing, frame-wise",
        "JunhaoZhuang/Self_Gradient_Forcing",
        "framewise/ar/model.pt",
        "generator_ema",
        FSDP,
        ("self_gradient_forcing_framewise_inference",),
        _NOT_SEEN,
        Schedule(block=1),
    ),
    ModelSpec(
        "Self Gradient Forcing, chunk-wise",
        "JunhaoZhuang/Self_Gradient_Forcing",
        "chunkwise/ar/model.pt",
        "generator_ema",
        FSDP,
        ("self_gradient_forcing_inference",),
        _NOT_SEEN,
    ),
    ModelSpec(
        "OPSD-V on Self-Forcing",
        "MeiGen-AI/OPSD-V",
        "checkpoints/self_forcing_dmd_ema_as_generator.pt",
        "generator",
        "model.",
        ("opsdv_self_forcing_inference",),
        _NOT_SEEN,
        lora="checkpoints/opsdv_self_forcing_lora.pt",
    ),
    ModelSpec(
        "OPSD-V on LongLive",
        "MeiGen-AI/OPSD-V",
        "checkpoints/longlive_base.pt",
        "generator",
        "model.",
        ("opsdv_longlive_inference",),
        _NOT_SEEN,
        lora="checkpoints/opsdv_longlive_lora.pt",
    ),
    ModelSpec(
        "Infinite-Forcing",
        "SOTAmak1r/Infinite-Forcing",
        "ema_model.pt",
        "generator_ema",
        FSDP,
        ("infinite_forcing_inference", "infinite_forcing_interactive_inference"),
        _NOT_SEEN,
    ),
    ModelSpec(
        "Reward Forcing",
        "JaydenLu666/Reward-Forcing-T2V-1.3B",
        "rewardforcing.pt",
        "",
        "model.",
        ("reward_forcing_inference", "reward_forcing_vbench"),
        "its card states none; the code is Apache-2.0",
    ),
    ModelSpec(
        "Rolling Forcing",
        "TencentARC/RollingForcing",
        "checkpoints/rolling_forcing_dmd.pt",
        "generator_ema",
        FSDP,
        ("rolling_forcing_inference", "rolling_forcing_vbench"),
        "academic use only by the LICENSE of its code, which is for the weights too; its card says MIT",
        Schedule((1000, 800, 600, 400, 200), rolling=True),
    ),
)

# What hfd.sh calls a repository's folder, and the repository.
REPOSITORIES = {one.folder: one.repository for one in (*BACKBONES, *SPECS)}


def download_name(repository: str, file: str) -> str:
    """What hfd.sh is asked for to get a file: of repositories with several checkpoints, the one file."""
    of_it = [spec for spec in SPECS if spec.repository == repository]
    one_of_several = len(of_it) > 1 and any(file in spec.files for spec in of_it)
    return f"{repository}/{file}" if one_of_several else repository


def config_files(specs: Iterable[ModelSpec]) -> str:
    """The configurations of checkpoints, as text."""
    return ", ".join(f"configs/{name}.yaml" for spec in specs for name in spec.configs)


def published_as(path: Path) -> tuple[ModelSpec, ...]:
    """The checkpoints whose generator or LoRA a file is by its name and the folders that it lies in; whatever suffix it
    has. Several where they are of one name, none where the name tells nothing."""
    scores = {spec: max(_common_end(path, Path(spec.folder, file)) for file in spec.files) for spec in SPECS}
    most = max(scores.values())
    if most == 0 or (most == 1 and path.stem in COMMON_NAMES):
        return ()
    return tuple(spec for spec, score in scores.items() if score == most)


def _common_end(path: Path, other: Path) -> int:
    """How many parts the two have in common, from the last one on, whatever their suffixes."""
    ends = zip((path.stem, *path.parts[-2::-1]), (other.stem, *other.parts[-2::-1]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))


def backbone_of(folder: str) -> Backbone | None:
    """The backbone that the name of a model's folder promises."""
    return next((backbone for backbone in BACKBONES if backbone.mark in Path(folder).name), None)
