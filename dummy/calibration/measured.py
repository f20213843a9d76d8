"""What a calibration measured, and the file that holds it (safetensors), which is read with mistrust.

Axes: V videos, B blocks, layers, heads, C candidates. The file says all that is needed to trust it: errors by video and
by block, what they are to be compared with, and how, from what, and of which weights they were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dummy.calibration.candidates import named, parse_candidates
from utils.errors import InputError
from utils.tensor_file import TensorFile
from utils.user_paths import exists, require_file, start_of_relative
from wan.attention.head_group import Retention
from wan.geometry import MOST_FRAMES

FILE = TensorFile("calibration", "a calibration", "python -m pipeline.calibrate --out FILE")
VERSION = 2
SIZES = ("num_layers", "num_heads", "head_dim")
GEOMETRY = ("height", "width", "frames_per_block", "num_frames")


@dataclass(frozen=True)
class Subject:
    """What was calibrated: the model's sizes, the latents' and the weights' identity. Heights and widths in latents."""

    num_layers: int
    num_heads: int
    head_dim: int
    height: int
    width: int
    frames_per_block: int
    num_frames: int
    checkpoint: str

    def fault(self, run: Subject) -> str | None:
        """Why a run of `run` cannot go by this, or None; the video's length and the weights may differ."""
        mine, other = (
            f"{one.num_layers} layers of {one.num_heads} heads of {one.head_dim} channels" for one in (self, run)
        )
        if mine != other:
            return f"is for a model of {mine}, this one has {other}"
        mine, other = (f"latents of {one.height} x {one.width}" for one in (self, run))
        if mine != other:
            return f"is for {mine}, this video has {other}"
        if self.frames_per_block != run.frames_per_block:
            return f"is for blocks of {self.frames_per_block} latent frames, this video has blocks of " + str(
                run.frames_per_block
            )
        return None


@dataclass(frozen=True)
class Calibration:
    """`errors` [V, B, layers, heads, C]: the mean square of what a head's output, after its rows of the output
    projection and the layer's gate, loses if it keeps candidate c, over the sampled queries of the recorded passes of a
    block. `outputs` [V, B, layers, heads]: the mean square of that output. `about`: whatever else is worth knowing."""

    candidates: tuple[Retention, ...]
    errors: Tensor
    outputs: Tensor
    blocks: tuple[int, ...]
    passes: tuple[str, ...]
    videos: tuple[str, ...]  # prompts
    subject: Subject
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Videos that were asked for and are not there, as after a run that was stopped."""
        wanted = self.about.get("wanted")
        return max(wanted - len(self.videos), 0) if isinstance(wanted, int) else 0

    def block_weights(self) -> Tensor:
        """[B], which sum to 1: what a block gets wrong stays in the past of all that follow, so that it counts as often
        as there are blocks from it to the video's end."""
        last = self.subject.num_frames // self.subject.frames_per_block
        left = torch.tensor([max(last - block, 1) for block in self.blocks], dtype=torch.float64)
        return left / left.sum()

    def mean_errors(self) -> Tensor:
        """[layers, heads, C] in float64: the root of the mean square over videos and weighted blocks."""
        return torch.einsum("vblhc,b->lhc", self.errors.double(), self.block_weights()).div(len(self.videos)).sqrt()

    def video_errors(self) -> Tensor:
        """[V, layers, heads, C]: the same of every video alone."""
        return torch.einsum("vblhc,b->vlhc", self.errors.double(), self.block_weights()).sqrt()

    def output(self) -> float:
        """The sum over heads of the root mean square of their outputs: what a sum of errors is a share of."""
        squares = torch.einsum("vblh,b->lh", self.outputs.double(), self.block_weights()) / len(self.videos)
        return float(squares.sqrt().sum())

    def save(self, path: Path) -> None:
        """Raises InputError if the file cannot be written."""
        content = {
            "version": VERSION,
            "candidates": [named(one) for one in self.candidates],
            "blocks": list(self.blocks),
            "passes": list(self.passes),
            "videos": list(self.videos),
            **{name: getattr(self.subject, name) for name in (*SIZES, *GEOMETRY, "checkpoint")},
            **self.about,
        }
        tensors = {"errors": self.errors.contiguous(), "outputs": self.outputs.contiguous()}
        FILE.save(path, content, tensors)

    @classmethod
    def load(cls, path: Path, field: str) -> Calibration:
        """Raises InputError, which begins with `field`, for a file that is none, cut, or contradicts itself."""
        where = f"{field}: {path}"
        if not exists(path, field):
            raise InputError(
                f"{where}: there is no such calibration. Make it with python -m pipeline.calibrate --config_path YAML "
                f"--out {path}, or check the path{start_of_relative(path)}."
            )
        require_file(path, field, "calibration")
        about, tensors = _about(path, where), FILE.read_tensors(path, where)
        candidates = parse_candidates(about.pop("candidates"), f"{where}: candidates")
        subject = Subject(**{name: about.pop(name) for name in (*SIZES, *GEOMETRY, "checkpoint")})
        blocks, passes, videos = (tuple(about.pop(name)) for name in ("blocks", "passes", "videos"))
        heads = len(videos), len(blocks), subject.num_layers, subject.num_heads
        for name, shape in (("errors", (*heads, len(candidates))), ("outputs", heads)):
            _check_tensor(where, name, tensors.get(name), shape)
        return cls(candidates, tensors["errors"], tensors["outputs"], blocks, passes, videos, subject, about)


def _about(path: Path, where: str) -> dict[str, Any]:
    """What the file says of itself, of the right types. Raises InputError."""
    about = FILE.read_about(path, where)
    if about.pop("version", None) != VERSION:
        raise InputError(f"{where} is of another version of this program; make it again")
    for name in (*SIZES, *GEOMETRY):
        if type(about.get(name)) is not int or about[name] < 1:
            raise FILE.broken(where, f"{name} is no number from 1 on")
    for name, kind in (("candidates", str), ("passes", str), ("videos", str), ("blocks", int)):
        values = about.get(name)
        if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
            raise FILE.broken(where, f"{name} is no list of {'numbers' if kind is int else 'texts'}")
    if about["num_frames"] > MOST_FRAMES:
        raise FILE.broken(where, "num_frames is more than any video has")
    if not all(0 <= block < about["num_frames"] // about["frames_per_block"] for block in about["blocks"]):
        raise FILE.broken(where, f"blocks are not those of a video of {about['num_frames']} latent frames")
    if not isinstance(about.get("checkpoint"), str):
        raise FILE.broken(where, "checkpoint is no text")
    return about


def _check_tensor(where: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        raise FILE.broken(where, f"{name} is {'missing' if tensor is None else list(tensor.shape)}, not {list(shape)}")
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
        raise FILE.broken(where, f"{name} holds what is no number from 0 on")
