"""What tests of whole programs share: small checkpoints, written once, and the program at its smallest."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import inference
from pipeline import Pipeline
from shapes.reading import ReadingRecipe, train_text
from shapes.vae import fit_linear_code
from tests.small_checkpoints import SmallCheckpoints, write_small_checkpoints
from utils import command

if TYPE_CHECKING:  # the studio's packages may be missing where the tests marked gpu run
    from tests.studio_server import Studio

command.let_memory_grow()  # as in every program, before the first tensor on a GPU

Pipelines = Callable[..., Pipeline]
"""By overrides."""

ROOT = Path(__file__).parents[1]
PROMPTS = ("A red fox runs.", "A blue bird sings.", "A green fish swims.")
MANY_MODULES = 200  # as a large library brings
_set_aside_at = [0]  # how many modules there were


@dataclass(frozen=True)
class Program:
    """inference.py with the small checkpoints, 9 latent frames (33 pixel frames) of 48 x 32 pixels, and a folder."""

    folder: Path
    model_root: Path

    @property
    def videos(self) -> Path:
        return self.folder / "videos"

    @property
    def written(self) -> list[Path]:
        """All that is in the output folder, hidden files included."""
        return sorted(self.videos.iterdir()) if self.videos.exists() else []

    @property
    def mp4s(self) -> dict[str, bytes]:
        """Names and bytes of the videos under final names."""
        finished = [path for path in self.written if path.suffix == ".mp4" and not path.name.startswith(".")]
        return {path.name: path.read_bytes() for path in finished}

    @property
    def unfinished(self) -> list[Path]:
        """What is neither a video nor the metadata of one."""
        return [p for p in self.written if p.suffix not in (".json", ".mp4") or p.name.startswith(".")]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def arguments(
        self, *overrides: str, config: str = "self_forcing_inference", prompts: Sequence[str] = PROMPTS
    ) -> list[str]:
        lines = "".join(f"{prompt}\n" for prompt in prompts)
        given = [
            f"model_root={self.model_root}",
            f"data_path={self.file('prompts.txt', lines)}",
            f"output_folder={self.videos}",
            "resolution=[32,48]",
            "num_output_frames=9",
            "dummy_forcing.num_dummy=6",
            "device=cpu",
            *("vae_tile=never", "low_memory=false"),  # a choice would have to be planned; test_low_memory.py lets it
        ]
        return ["--config_path", str(ROOT / "configs" / f"{config}.yaml"), *given, *overrides]

    def __call__(
        self, *overrides: str, config: str = "self_forcing_inference", prompts: Sequence[str] = PROMPTS
    ) -> int:
        """Run in this process; returns the exit status."""
        return inference.main(self.arguments(*overrides, config=config, prompts=prompts))


@pytest.fixture(scope="session")
def shapes_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a training of the small model that has its linear code and a text encoder; not to be written to."""
    folder = tmp_path_factory.mktemp("shapes_work")
    fit_linear_code(folder, clips=8)
    train_text(folder, ReadingRecipe(steps=1, batch=2))
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors here are small: threads cost more than they give, and several workers share the cores. Programs that set
    their number set it for the whole process, so every test begins with one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = (
        "1"  # what the processor says it can is not tried with a program of its own
    )


@pytest.fixture(autouse=True)
def _set_aside() -> None:
    """Every run of a program collects garbage once its text encoder is gone: in a fifth of a second and more with all
    modules that there are by then, in no time where those are set aside."""
    if len(sys.modules) > _set_aside_at[-1] + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _set_aside_at.append(len(sys.modules))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> SmallCheckpoints:
    """Not to be written to."""
    return write_small_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def program(tmp_path: Path, checkpoints: SmallCheckpoints) -> Program:
    return Program(tmp_path, checkpoints.root)


@pytest.fixture(scope="module")
def pipeline_of(tmp_path_factory: pytest.TempPathFactory, checkpoints: SmallCheckpoints) -> Pipelines:
    """One pipeline for all sessions under the same settings: nothing of a session stays behind."""
    program = Program(tmp_path_factory.mktemp("pipelines"), checkpoints.root)

    @cache
    def made(*overrides: str) -> Pipeline:
        arguments = program.arguments(*overrides)
        return Pipeline.from_config(arguments[1], arguments[2:])

    return made


@pytest.fixture(scope="session")
def shapes_pipeline() -> Pipeline:
    """The small trained model as the studio has it, with pictures of 48 x 32; servers may have it one after the
    other."""
    from tests.studio_server import shapes_config

    return Pipeline.from_config(shapes_config("resolution=[32,48]"))


@pytest.fixture(scope="session")
def one_studio(shapes_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    from tests.studio_server import running, small_calibration

    folder = tmp_path_factory.mktemp("studio")
    calibration = small_calibration(folder / "calibration.safetensors")
    with running(shapes_pipeline, folder, calibration=str(calibration)) as server:
        yield server


@pytest.fixture
def studio(one_studio: Studio) -> Iterator[Studio]:
    """A studio with room for two sessions, of which there are none."""
    yield one_studio
    one_studio.end_sessions()
