"""From a configuration and its prompts to a pipeline that is ready: the order in which large parts come and go."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from dummy.policy import ContextPolicy
from pipeline.config.arguments import (
    given_overrides,
    given_path,
    given_prompts,
    given_seeds,
    session_config,
    whole_number,
)
from pipeline.config.checks import MOST, SEEDS
from pipeline.config.config import (
    InferenceConfig,
    check_against_model,
    geometry_of,
    load_config,
    warn_of_what_is_off,
)
from pipeline.planning.memory_advice import memory_explained
from pipeline.planning.plan import choose_strategy
from pipeline.planning.together import choose_together
from pipeline.runtime.decoding import BlockDecoder, DecodeStrategy, start_decoder
from pipeline.runtime.engine import choose_engine, start_engine, use_compile_cache
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import require_bounded, session_geometry
from pipeline.runtime.loading import (
    check_before_loading,
    choose_device,
    choose_dtype,
    choose_vae_device,
    generator_settings,
    load_decoder,
    load_encoder,
    load_transformer,
    require_files,
    require_heads,
)
from pipeline.runtime.prefix import VideoLength, load_prefix
from pipeline.runtime.prompts import PromptEncoder
from pipeline.runtime.speed import at_speed
from pipeline.runtime.together import checked_by_all
from pipeline.runtime.turns import Opening, Turns
from pipeline.session import Session
from utils.errors import InputError
from utils.profiler import Profiler
from utils.seed import NoiseStream, video_seed
from wan.attention.exchange import HeadExchange
from wan.geometry import LatentGeometry, pixel_frames
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a pipeline is made of. `encoder` encodes what videos start from, `strategy` says how they are decoded; a
    process that follows another one has nothing to decode with."""

    generator: BlockGenerator
    vae: LatentDecoder | None
    encoder: VAE | None
    strategy: DecodeStrategy
    prompts: Callable[[str], Tensor]  # to embeddings [length, text_dim]; a PromptEncoder, or what stands for one
    batch: int = 1  # videos that the engine is ready for; fewer at a time are filled up


def assemble(
    config: InferenceConfig,
    prompts: Iterable[str],
    device: torch.device,
    batch: int = 1,
    exchange: HeadExchange | None = None,
) -> Parts:
    """The parts, ready for `batch` videos at a time, which are made together with the processes of the `exchange`.

    `prompts` are encoded, and the text encoder is gone, before the rest is loaded.

    Raises InputError, before anything large is read, if a file is missing or does not fit.
    """
    with checked_by_all(exchange):
        require_files(config)
        use_compile_cache(None if config.compile_cache is None else Path(config.compile_cache))
        sizes, settings = check_before_loading(config, device)
        if exchange is not None:
            require_heads(config, sizes, exchange.ranks)
    if config.preview_path is not None:
        logger.warning(
            "decoder: %s is for previews: these videos are of less quality than with decoder=wan. How much is lost, "
            "`python -m benchmarks.vae --preview FILE --vae FILE --video FILE` measures.",
            config.preview_path,
        )
    texts = PromptEncoder(config, device, sizes.text_len)
    if exchange is None or exchange.rank == 0:
        texts.prepare(prompts)
    if exchange is not None:
        texts.share(exchange)
    dtype = choose_dtype(config, device)
    together = None if exchange is None else choose_together(config, settings, device, exchange, batch)
    mesh = exchange.mesh(device.type) if exchange is not None and together is not None and together.sharded else None
    model = load_transformer(config, sizes, device, dtype, checked=True, mesh=mesh)
    model.exchange = exchange
    generator = BlockGenerator(model, settings)
    geometry = geometry_of(config, sizes.in_dim)
    engine_runs = start_engine(generator, config.engine, geometry, batch)
    _measure_speed(generator, config, geometry)
    # By now the settings say what heads keep.
    strategy = choose_strategy(config, generator.settings, device, batch) if together is None else together.strategy
    runs_for = batch if engine_runs else 1
    if exchange is not None and exchange.rank > 0 and not strategy.dealt:
        return Parts(generator, None, None, strategy, texts, runs_for)
    vae = load_decoder(config, choose_vae_device(config, device), dtype)
    vae.exchange = exchange if strategy.dealt else None
    if strategy.steady:
        latents = torch.zeros(batch, *geometry.block_shape, device=device)
        engine = choose_engine(config.engine, vae.device)
        start_decoder(vae, engine, config.engine != "auto", latents, strategy.on_side_stream)
    return Parts(generator, vae, load_encoder(config, vae), strategy, texts, runs_for)


def _measure_speed(generator: BlockGenerator, config: InferenceConfig, geometry: LatentGeometry) -> None:
    """Find out what heads may keep where the settings ask for a speed. Raises InputError if it cannot be had."""
    forcing = config.dummy_forcing
    if forcing.enabled and forcing.speed is not None:
        generator.settings = at_speed(generator, geometry, forcing.speed, forcing.cost_key)


class Pipeline:
    """A model, its decoder and its text encoder, ready to make videos under one configuration."""

    def __init__(self, config: InferenceConfig, parts: Parts) -> None:
        self.config = config
        self.generator = parts.generator
        self.vae = parts.vae
        self.encoder = parts.encoder
        self.strategy = parts.strategy
        self.prompts = parts.prompts
        self.batch = parts.batch
        self.geometry = geometry_of(config, self.generator.model.config.in_dim)
        self._others: dict[tuple[str, ...], BlockGenerator] = {}  # by the overrides of sessions
        self._numbers = itertools.count()
        self._turns = Turns(self.generator.model.exchange)
        self._lock = threading.RLock()

    @classmethod
    def from_config(
        cls,
        config: InferenceConfig | str | Path | Mapping[str, object],
        overrides: Sequence[str] = (),
        prompts: Sequence[str] = (),
        *,
        device: torch.device | str | None = None,
        batch: int = 1,
        exchange: HeadExchange | None = None,
    ) -> Pipeline:
        """From a YAML file (or settings that are read already) and `key=value` overrides; loads everything.

        `prompts` that are known now are encoded before the model is loaded, so that the text encoder and the model need
        not be in memory together. The engine is made ready for `batch` videos at a time.

        With an `exchange` this process is one of several that make videos together (pipeline/runtime/together.py); of
        these only the first decodes.

        Raises InputError, before anything large is loaded, if a setting or a file does not fit.
        """
        changes, texts = given_overrides(overrides), given_prompts(prompts)
        batch = whole_number("batch", batch, 1, MOST["samples_per_batch"] + 1)
        settings = load_config(config, changes)
        warn_of_what_is_off(settings, changes)
        device = choose_device(settings) if device is None else torch.device(device)
        with memory_explained(settings, device, batch, 1 if exchange is None else exchange.ranks):
            return cls(settings, assemble(settings, texts, device, batch, exchange))

    def session(
        self,
        *,
        seed: int | None = None,
        frames: int | None = None,
        start_from: str | Path | None = None,
        overrides: Sequence[str] = (),
        noise_seeds: Sequence[int] | None = None,
        live: bool = True,
        keep_buffers: bool = False,
    ) -> Session:
        """A video of so many latent `frames`, or without end; its `seed` is the configuration's unless given.

        `start_from` is an image or a video to go on from. `overrides` are `key=value` settings for this session alone,
        of those that say what heads keep and how blocks are denoised (SESSION_SETTINGS). `noise_seeds`: one for each
        video of a batch, in place of `seed` (`utils.seed.video_seed`). `live`, `keep_buffers`: see Session.

        Raises InputError for seeds of both kinds, for an override that does not fit, if the length is no multiple of
        the block, if a video without end would need memory without end, or if what it starts from leaves nothing to do.
        """
        if seed is not None and noise_seeds is not None:
            raise InputError("seed: noise_seeds says what each video's noise is; leave one of them out")
        seed = self.config.seed if seed is None else whole_number("seed", seed, 0, SEEDS)
        seeds = [video_seed(seed, 0, 0)] if noise_seeds is None else given_seeds(noise_seeds)
        changes = given_overrides(overrides)
        with self._lock:  # what is wrong is told to no other process
            settings = self._generator_for(changes).settings
            geometry = session_geometry(self.geometry, frames, settings, prefix=start_from is not None)
            prefix = None
            if start_from is not None:
                length = VideoLength(geometry.num_frames, "frames", settings.policy.online is not None)
                prefix = self.prefix_latents(given_path("start_from", start_from), length=length)
            opening = Opening(next(self._numbers), seeds, geometry, prefix, changes, live, keep_buffers)
            with self._turns.taken(opening):
                return self._open(opening)

    def _open(self, one: Opening) -> Session:
        generator, seeds = self._generator_for(one.overrides), list(one.seeds)
        filled_up = max(self.batch - len(seeds), 0)
        return Session(
            generator,
            one.geometry,
            NoiseStream([*seeds, *seeds[-1:] * filled_up]),
            self.prompts,
            None if self.vae is None else lambda profiler: self._decoder(profiler, len(seeds)),
            batch=len(seeds),
            filled_up=filled_up,
            prefix_latents=one.prefix_latents,
            lock=self._lock,
            live=one.live,
            keep_buffers=one.keep_buffers,
            turns=self._turns,
            number=one.number,
        )

    def follow(self) -> None:
        """Take part in the sessions of the first process, for those that make videos together with it, until it closes
        its pipeline."""
        exchange, sessions = self.generator.model.exchange, dict[int, Session]()
        assert exchange is not None and self.follows
        while (turn := exchange.from_first(None)) is not None:
            if isinstance(turn, Opening):
                sessions[turn.number] = self._open(turn)
            elif turn.ended:
                sessions.pop(turn.number).close()
            else:
                sessions[turn.number].follow(turn.due)

    @property
    def follows(self) -> bool:
        """Whether this process makes videos together with others, of which another one is the first."""
        exchange = self.generator.model.exchange
        return exchange is not None and exchange.rank > 0

    @property
    def processes(self) -> int:
        """How many make videos together."""
        exchange = self.generator.model.exchange
        return 1 if exchange is None else exchange.ranks

    @property
    def fault(self) -> BaseException | None:
        """Why nothing more can be made, if that is so: a process is lost, or has failed where others have not."""
        exchange = self.generator.model.exchange
        return None if exchange is None else exchange.fault

    def _decoder(self, profiler: Profiler, videos: int) -> BlockDecoder:
        assert self.vae is not None
        return BlockDecoder(self.vae, self.config.pixel_size, profiler, self.strategy, videos)

    def generate(
        self,
        prompt: str | Sequence[tuple[int, str]],
        *,
        seed: int | None = None,
        frames: int | None = None,
        start_from: str | Path | None = None,
    ) -> Tensor:
        """A whole video, uint8 [frames, H, W, 3] on the host, of a prompt, or of a storyboard of (latent frame, prompt)
        pairs; `frames` latent frames long, the configuration's `num_output_frames` by default."""
        length = self.config.num_output_frames if frames is None else frames
        with self.session(seed=seed, frames=length, start_from=start_from, live=False, keep_buffers=True) as session:
            session.plan([(0, prompt)] if isinstance(prompt, str) else prompt)
            return torch.cat([block.frames for block in session])

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.generator.model.device

    def pixel_frames(self, latent_frames: int) -> int:
        """What so many latent frames from the beginning of a video decode to."""
        return pixel_frames(latent_frames)

    def endless_policy(self, overrides: Sequence[str] = ()) -> ContextPolicy:
        """What heads keep in a session without end that has these overrides. Raises InputError if it cannot have
        them."""
        settings = self._generator_for(tuple(overrides)).settings
        require_bounded(settings)
        return settings.policy

    def prefix_latents(self, path: Path, profiler: Profiler | None = None, length: VideoLength | None = None) -> Tensor:
        """Latents [1, F, C, h, w] of the image or video to go on from, in a video of the configuration's length unless
        given. Raises InputError for files that do not fit."""
        if self.encoder is None:
            raise InputError("start_from: this pipeline has no encoder; set start_from in its configuration")
        span = nullcontext() if profiler is None else profiler.span("init", self.encoder.device)
        with self._lock, span, torch.inference_mode():
            return load_prefix(path, self.config, self.encoder, length)

    def _generator_for(self, overrides: tuple[str, ...]) -> BlockGenerator:
        """The loop over the shared model under other settings; what was captured is shared too."""
        if not overrides:
            return self.generator
        if overrides not in self._others:
            config = session_config(self.config, overrides)
            model = self.generator.model
            check_against_model(config, model.config)
            settings = generator_settings(config, model.config)
            made = BlockGenerator(model, settings, self.generator.passes)
            _measure_speed(made, config, self.geometry)
            self._others[overrides] = made
        return self._others[overrides]

    def close(self) -> None:
        """Free what sessions have left and the text encoder; open sessions go on."""
        with self._lock:
            self._turns.end(None)
            for generator in (self.generator, *self._others.values()):
                generator.drop_spare_cache()
            if self.vae is not None:
                self.vae.forget()
        if isinstance(self.prompts, PromptEncoder):
            self.prompts.free()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
