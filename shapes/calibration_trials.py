"""Calibrations that differ in one thing, and how near to full history the small model stays by them.

By its latents alone, on captions that no evaluation and no training has. shapes.calibration_study asks the questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dummy.calibration.candidates import CANDIDATES
from dummy.calibration.dial import Dial
from dummy.calibration.measured import Calibration
from dummy.calibration.online import OnlineCalibration
from dummy.calibration.recorder import QUERIES, HeadErrors
from dummy.observed import Outcome
from dummy.policies.calibrated import Calibrated, online_policy, policy_of_table
from dummy.retentions import RetentionTable
from pipeline.calibrate import command as calibrate
from pipeline.calibrate.recording import chosen_passes, recorded_grams
from pipeline.config.config import load_config
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings, Segment
from pipeline.runtime.loading import generator_settings
from shapes import evaluate
from shapes.data import BLOCK, make_clip
from shapes.report import Doubles
from utils.prompts import read_prompts
from utils.seed import NoiseStream, video_seed
from wan.attention.cache import KVCache
from wan.attention.head_group import FULL_HISTORY, Observer, Retention
from wan.geometry import LatentGeometry

SEED = 35  # of captions, unlike those of training and of shapes.evaluate
PROMPTS = Path("prompts/shapes_training.txt")
VIDEOS = 8  # of the usual calibration
FRAMES = (1.33, 2, 4)  # a head
SWITCH = 12  # latent frame of the switch, where there is one: after heads have parted by the video itself
RELATIVE = ["rope=relative", "model_kwargs.local_attn_size=10", "model_kwargs.sink_size=1"]
BLOCKS = (1, 2, 3, 4, 5, 6)  # that are recorded
USUAL = "usual"

Settings = Sequence[str]
Measured = Path | Callable[[int], Path]  # one file for all captions, or each one's own


@dataclass(frozen=True)
class Trial:
    """`settings` follow those of the calibrated policy; without a calibration they are the policy. `change`: of the
    loop's settings. `alone`: every video is made by itself, not in a batch."""

    name: str
    calibration: Measured | None = None
    settings: Settings = ()
    reference: Settings = ()  # beyond full history
    switched: bool = False
    frames: tuple[float, ...] = field(default=FRAMES)
    change: Callable[[GeneratorSettings], GeneratorSettings] | None = None
    alone: bool = False


class Study:
    """The model, the captions, and a folder of calibrations."""

    def __init__(self, folder: Path, captions: int, batch: int) -> None:
        self._folder, self._captions, self._batch = folder, captions, batch
        self._parts = evaluate.Parts.load(load_config(evaluate.CONFIG, evaluate.POLICIES["full"]))
        self._references: dict[tuple[object, ...], Tensor] = {}
        config = load_config(evaluate.CONFIG)
        height, width = config.latent_size
        self._geometry = LatentGeometry(height, width, config.num_output_frames, BLOCK)
        self.usual = Calibration.load(Path(evaluate.CALIBRATION), "calibration")

    def settings(self, given: Settings) -> GeneratorSettings:
        return generator_settings(load_config(evaluate.CONFIG, given), self._parts.model.config)

    def _prompt(self, captions: Sequence[str], start: int = 0) -> Segment:
        return Segment(start, self._parts.model.encode_text(self._parts.embeds(captions)))

    @torch.inference_mode()
    def latents(
        self,
        settings: GeneratorSettings,
        segments: Sequence[Segment],
        seeds: Sequence[int],
        observer: Observer | None = None,
        prefix: Tensor | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """[B, F, C, h, w] by the product's own loop; after a `prefix` one block more and no other. `observer`: of all
        layers, or of one, which then may stand among others whose heads do not all keep the same."""
        count = self._geometry.num_frames if prefix is None else prefix.shape[1] + BLOCK
        generator = BlockGenerator(self._parts.model, settings)
        geometry = replace(self._geometry, num_frames=count)
        rollout = generator.start(geometry, segments, NoiseStream(seeds), len(seeds), prefix_latents=prefix)
        if observer is None:
            return torch.cat([block.latents for block in rollout.blocks()], 1)
        with rollout.cache.observed(observer) if layer is None else _one_observed(rollout.cache, layer, observer):
            return torch.cat([block.latents for block in rollout.blocks()], 1)

    @torch.inference_mode()
    def held_out(self, settings: GeneratorSettings, places: Sequence[int], switched: bool = False) -> Tensor:
        """The videos of captions that nothing else uses."""
        starts = (0, SWITCH) if switched else (0,)
        clips = [make_clip(SEED, place, starts[1:], frames=1, held=True) for place in places]
        segments = [self._prompt([clip.captions[i] for clip in clips], start) for i, start in enumerate(starts)]
        return self.latents(settings, segments, [video_seed(SEED, place, 0) for place in places])

    def signal_to_error(self, trial: Trial, frames: float | None) -> Doubles:
        """In dB, by caption."""
        size = 1 if trial.alone or callable(trial.calibration) else self._batch
        found: list[float] = []
        for start in range(0, self._captions, size):
            places = range(start, min(start + size, self._captions))
            key = (tuple(places), tuple(trial.reference), trial.switched)
            if key not in self._references:
                full = [*evaluate.POLICIES["full"], *trial.reference]
                self._references[key] = self.held_out(self.settings(full), places, trial.switched).double()
            first = SWITCH if trial.switched else BLOCK
            whole = self._references[key][:, first:]
            settings = self.settings(_policy(trial, frames, start))
            settings = settings if trial.change is None else trial.change(settings)
            made = self.held_out(settings, places, trial.switched).double()[:, first:]
            error, signal = ((part).square().mean((1, 2, 3, 4)) for part in (made - whole, whole))
            found += (10 * (signal / error.clamp_min(1e-12)).log10()).tolist()
        return np.array(found)

    def recorded(self, name: str, *arguments: str) -> Path:
        """A calibration by the command, with other arguments than the usual one."""
        path = self._folder / f"{name}.safetensors"
        usual = {"--prompts": str(PROMPTS), "--videos": str(VIDEOS)}
        given = {**usual, **dict(zip(arguments[::2], arguments[1::2], strict=True))}
        options = [part for pair in given.items() for part in pair]
        status = calibrate.main(["--config_path", evaluate.CONFIG, *options, "--out", str(path), "seed=1"])
        assert status == 0, name
        return path

    def changed(self, name: str, change: Callable[[Calibration], Calibration]) -> Path:
        """The usual calibration, changed."""
        path = self._folder / f"{name}.safetensors"
        change(self.usual).save(path)
        return path

    def part(self, name: str, videos: slice, blocks: slice) -> Path:
        """Some of the usual calibration's videos and blocks."""

        def taken(one: Calibration) -> Calibration:
            errors, outputs = one.errors[videos, blocks], one.outputs[videos, blocks]
            return replace(one, errors=errors, outputs=outputs, videos=one.videos[videos], blocks=one.blocks[blocks])

        return self.changed(name, taken)

    def on_policy(self, name: str, frames: float) -> Path:
        """Errors over full history of what the policy itself has made: block by block after its own videos."""
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            given = _policy(Trial(name, Path(evaluate.CALIBRATION)), frames, 0)
            captions = read_prompts(PROMPTS, "prompts")[:VIDEOS]
            seeds = [[video_seed(1, place, 0)] for place in range(VIDEOS)]
            with torch.inference_mode():
                made = [
                    self.latents(self.settings(given), [self._prompt([caption])], seed)
                    for caption, seed in zip(captions, seeds, strict=True)
                ]
            videos = [self._errors([self._prompt([c])], s, m) for c, s, m in zip(captions, seeds, made, strict=True)]
            errors, outputs = (torch.stack(part) for part in zip(*videos, strict=True))
            replace(self.usual, errors=errors, outputs=outputs).save(path)
        return path

    def layer_by_layer(self, name: str, frames: float) -> Path:
        """Errors of every layer over what the layers below it keep by then, at this budget."""
        path = self._folder / f"{name}.safetensors"
        if path.exists():
            return path
        found, past = self.usual, self._geometry.num_frames - BLOCK
        captions, full = read_prompts(PROMPTS, "prompts")[:VIDEOS], self.settings(evaluate.POLICIES["full"])
        with torch.inference_mode():
            videos = [([self._prompt([caption])], [video_seed(1, at, 0)]) for at, caption in enumerate(captions)]
            whole_videos = [self.latents(full, *video) for video in videos]
        for layer in range(1, self.usual.subject.num_layers):
            rows = Dial(found, past).choose(frames).table.rows[:layer]
            whole = [(FULL_HISTORY,) * self.usual.subject.num_heads] * (self.usual.subject.num_layers - layer)
            limited = replace(full, policy=policy_of_table(RetentionTable.of([*rows, *whole])))
            errors = found.errors.clone()
            for place, (video, latents) in enumerate(zip(videos, whole_videos, strict=True)):
                measured, _ = self._errors(*video, latents, settings=limited, layer=layer)
                errors[place, :, layer] = measured[:, 0]
            found = replace(found, errors=errors)
        found.save(path)
        return path

    def own(self, name: str, blocks: Sequence[int], step: int | None = None) -> Callable[[int], Path]:
        """Every caption's own calibration, by these blocks of its video over full history, or one step of them."""

        def path(place: int) -> Path:
            file = self._folder / f"{name}_{place}.safetensors"
            if not file.exists():
                with torch.inference_mode():
                    segments = [self._prompt(make_clip(SEED, place, frames=1, held=True).captions)]
                video = self.held_out(self.settings(evaluate.POLICIES["full"]), [place])
                errors, outputs = self._errors(segments, [video_seed(SEED, place, 0)], video, blocks, step)
                made = replace(self.usual, errors=errors[None], outputs=outputs[None], blocks=tuple(blocks))
                replace(made, videos=(f"caption {place}",)).save(file)
            return file

        return path

    @torch.inference_mode()
    def _errors(
        self,
        segments: Sequence[Segment],
        seeds: Sequence[int],
        video: Tensor,
        blocks: Sequence[int] = BLOCKS,
        step: int | None = None,
        settings: GeneratorSettings | None = None,
        layer: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Errors [blocks, layers, heads, C] and outputs [blocks, layers, heads] of the blocks that follow on the
        beginning of `video` [1, F, C, h, w] over full history, by all denoising steps or by one of them; or of one
        layer over what the `settings` keep."""
        full, model = settings or self.settings(evaluate.POLICIES["full"]), self._parts.model
        chosen = chosen_passes(load_config(evaluate.CONFIG, evaluate.POLICIES["full"]), None, None)
        grams = recorded_grams(BlockGenerator(model, full), chosen)
        grams, found = grams if layer is None else [grams[layer]], []
        for block in blocks:
            watch = HeadErrors(self._geometry.tokens_per_frame, CANDIDATES, grams, QUERIES)
            self.latents(full, segments, seeds, _With(block * BLOCK, watch, step), video[:, : block * BLOCK], layer)
            found.append((watch.errors(), watch.outputs()))
        errors, outputs = (torch.stack(part) for part in zip(*found, strict=True))
        return errors, outputs

    def influence(self) -> Tensor:
        """[layers]: the error in the latents over the predicted one, where that layer alone keeps the last frame."""
        place, layers = CANDIDATES.index(Retention(0, 1)), self.usual.subject.num_layers
        captions, full = read_prompts(PROMPTS, "prompts")[:VIDEOS], self.settings(evaluate.POLICIES["full"])
        with torch.inference_mode():
            segments = [self._prompt(captions)]
        seeds = [video_seed(1, place, 0) for place in range(VIDEOS)]
        whole, found = self.latents(full, segments, seeds), []
        for layer in range(layers):
            kept = [Retention(0, 1) if one == layer else FULL_HISTORY for one in range(layers)]
            table = RetentionTable.of([[one] * self.usual.subject.num_heads for one in kept])
            made = self.latents(replace(full, policy=policy_of_table(table)), segments, seeds)
            predicted = self.usual.mean_errors()[layer, :, place].square().sum()
            found.append(float((made - whole).square().mean() / predicted))
        return torch.tensor(found) / max(found)


@contextmanager
def _one_observed(cache: KVCache, layer: int, observer: Observer) -> Iterator[None]:
    watched = cache.layers[layer]
    watched.observer = lambda index, *given: observer(0, *given)  # which counts passes by their first layer
    yield
    watched.observer = None


@dataclass(frozen=True)
class _With:
    """An observer of the passes that see so many earlier frames, or of one of them."""

    frames: int
    errors: HeadErrors
    step: int | None = None
    seen: list[int] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        if len(context) != self.frames:
            return
        self.seen.append(layer)
        if self.step is None or self.seen.count(0) - 1 == self.step:
            self.errors(layer, q, keys, context, values)


def _policy(trial: Trial, frames: float | None, place: int) -> list[str]:
    if trial.calibration is None:
        return list(trial.settings)
    file = trial.calibration(place) if callable(trial.calibration) else trial.calibration
    assert frames is not None
    return [*evaluate.calibrated(frames, file), *trial.settings]


@dataclass(frozen=True)
class _Known(OnlineCalibration):
    """What the dial's own errors say, whatever the video shows."""

    def outcome(self, seen: Observer, all_heads: Callable[[Tensor], Tensor]) -> Outcome:
        return Outcome(self.dial.choose(self.frames).table.layout())


def after_full_history(settings: GeneratorSettings) -> GeneratorSettings:
    """The same retentions, but as late as those that a video decides itself."""
    dial, allocation = settings.policy.dial, settings.policy.allocation
    assert dial is not None and allocation is not None
    block = Calibrated().observed_block(BLOCK, None)
    late = online_policy(dial, allocation.frames, block)
    return replace(settings, policy=replace(late, online=_Known(dial, allocation.frames, block)))


def weighted(weights: Tensor) -> Callable[[Calibration], Calibration]:
    return lambda one: replace(one, errors=one.errors * weights[:, None, None])


def powered(power: float) -> Callable[[Calibration], Calibration]:
    """Errors that count with a power of their mean square; usual is 0.5."""
    return lambda one: replace(
        one, errors=(one.mean_errors() ** (4 * power)).float().expand_as(one.errors).contiguous()
    )


def evenly(one: Calibration) -> Calibration:
    """Blocks count alike, wherever they are."""
    return replace(one, errors=(one.errors / one.block_weights().float()[:, None, None, None]).contiguous())
