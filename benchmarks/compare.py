"""Policies side by side on a model of yours: the same prompts and noise, one video, one table.

    python -m benchmarks.compare CONFIG --policies full,packed,online:1.33,window --prompts FILE --out FOLDER

CONFIG is a YAML file of inference.py, and key=value may follow. The first policy is what the others are measured
against. comparison.mp4 shows the videos of all policies side by side, prompt after prompt; comparison.json holds the
numbers of every video, comparison.md their means with 95 % intervals over videos: PSNR and SSIM to the first policy,
drift of the background, seams, motion (benchmarks/video_measures.py), seconds of the transformer a block, and memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import facts
from benchmarks.tables import compare as table
from benchmarks.video_measures import Measures, measure, require_libraries
from dummy.config import ONLINE, DummyForcingConfig
from dummy.policies.registry import POLICIES as REGISTERED
from dummy.policies.registry import SELECTIVE
from dummy.presets import PRESETS
from pipeline import Pipeline
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import VideoJob, read_jobs
from pipeline.runtime.loading import check_before_loading, choose_device, require_files
from shapes.report import interval
from utils import command
from utils.config import text_override
from utils.errors import InputError
from utils.files import ensure_writable_folder, write_atomic
from utils.video import VideoWriter

POLICIES = "full,packed,online:1.33,window"
COLUMNS = 4  # videos in a row
FIRST_BLOCKS = 3  # whose history is still short, and in which things are captured
_DEFAULTS = {field.name: field.default for field in fields(DummyForcingConfig)}


@dataclass(frozen=True)
class Made:
    """A video [frames, H, W, 3] with the first frames of its blocks but the first, the
    transformer's median seconds for a steady block, and bytes: of the cache, and at the peak on a GPU (else 0)."""

    frames: Tensor
    borders: tuple[int, ...]
    block_s: float
    context: float
    cache_bytes: int
    peak_bytes: int


def overrides_of(policy: str, config: InferenceConfig, calibration: str | None) -> list[str]:
    """Settings by which any configuration gets that policy and keeps everything else. Raises InputError."""
    name, _, amount = policy.partition(":")
    window = config.model_kwargs.local_attn_size
    if name == "full" and not amount:
        return ["dummy_forcing.enabled=false", "model_kwargs.local_attn_size=-1"]
    if name == "window":
        if not amount and window == -1:
            raise InputError("--policies: window: the configuration has none; write its latent frames, as window:12")
        return ["dummy_forcing.enabled=false", f"model_kwargs.local_attn_size={amount or window}"]
    kind = "packed" if name in PRESETS else name
    kind = "calibrated" if name == ONLINE else kind
    if kind not in REGISTERED or bool(amount) != (kind == "calibrated"):
        raise InputError(
            f"--policies: {policy[:40]!r} is none; write full, window or window:FRAMES, calibrated:FRAMES (a head), "
            f"online:FRAMES, or one of {', '.join([*(one for one in REGISTERED if one != 'calibrated'), *PRESETS])}"
        )
    files: list[str] = []
    given: dict[str, object] = {"enabled": True, "policy": kind}
    given |= {key: _DEFAULTS[key] for key in SELECTIVE if key not in REGISTERED[kind].uses}
    if name in PRESETS:
        given |= {"preset": name, "retention": None, "equal_cost": None}
    elif kind == "prune":
        given["preset"] = "paper"
    elif kind == "calibrated":
        file = ONLINE if name == ONLINE else calibration
        given["frames_per_head"] = amount
        files = [] if file is None else [text_override("dummy_forcing.calibration", file)]
    written = {key: {None: "null", True: "true", False: "false"}.get(value, value) for key, value in given.items()}
    return [
        f"model_kwargs.local_attn_size={window}",
        *(f"dummy_forcing.{key}={value}" for key, value in written.items()),
        *files,
    ]


def configured(arguments: argparse.Namespace) -> tuple[dict[str, InferenceConfig], dict[str, list[str]]]:
    """The configuration and the overrides of every policy. Raises InputError."""
    data = [] if arguments.prompts is None else [text_override("data_path", arguments.prompts), "inference_iter=-1"]
    data += [] if arguments.videos is None else [f"inference_iter={arguments.videos}"]
    config = load_config(arguments.config, [*arguments.overrides, *data])
    names = list(dict.fromkeys(name.strip() for name in arguments.policies.split(",")))
    overrides = {name: overrides_of(name, config, arguments.calibration) for name in names}
    made = {name: load_config(arguments.config, [*arguments.overrides, *data, *overrides[name]]) for name in names}
    return made, overrides


def make(pipeline: Pipeline, job: VideoJob, overrides: Sequence[str]) -> Made:
    """One video under one policy; noise, prompts and weights are the pipeline's."""
    cuda = pipeline.generator.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    pieces, context = [], 0.0
    with pipeline.session(
        noise_seeds=[job.noise_seed],
        frames=pipeline.config.num_output_frames,
        start_from=job.start_from,
        overrides=overrides,
        live=False,
        keep_buffers=True,
    ) as session:
        session.plan(list(zip(job.starts, job.prompts, strict=True)), job.cuts)
        for block in session:
            pieces.append(block.frames)
            context = session.rollout.cache.frames_per_head
        cache_bytes = session.rollout.cache.bytes().total
        spans = session.profiler.report().spans
    ends = np.cumsum([len(piece) for piece in pieces])
    times = [denoise + clean for denoise, clean in zip(spans["denoise"], spans["clean"], strict=False)]  # but the last
    steady = statistics.median(times[min(FIRST_BLOCKS, len(times) - 1) :]) / 1000
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return Made(torch.cat(pieces), tuple(ends[:-1].tolist()), steady, context, cache_bytes, peak)


class SideBySide:
    """Videos of equal sizes next to each other in one file, each under its name, at most COLUMNS in a row."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """Pixels of the whole picture."""
        columns = min(COLUMNS, len(self._names))
        rows = -(-len(self._names) // columns)
        return rows * (height + self._strip(height)), columns * width

    @staticmethod
    def _strip(height: int) -> int:
        return 2 * max(8, height // 24)

    def frames(self, videos: Sequence[Tensor]) -> Tensor:
        """Videos [frames, H, W, 3] to [frames, rows of strips and videos, columns, 3]."""
        count, height, width, _ = videos[0].shape
        strip, columns = self._strip(height), min(COLUMNS, len(videos))
        whole = torch.zeros(count, *self.sizes(height, width), 3, dtype=torch.uint8)
        for place, (name, video) in enumerate(zip(self._names, videos, strict=True)):
            top, left = (place // columns) * (height + strip), (place % columns) * width
            whole[:, top : top + strip, left : left + width] = _written(name, strip, width)
            whole[:, top + strip : top + strip + height, left : left + width] = video
        return whole


def _written(text: str, height: int, width: int) -> Tensor:
    """White text on black, uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height))
    font = ImageFont.load_default(0.75 * height)
    ImageDraw.Draw(picture).text((height // 4, height // 2), text, "white", font, anchor="lm")
    return torch.from_numpy(np.array(picture))


def videos_of(
    pipeline: Pipeline, jobs: Sequence[VideoJob], overrides: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Made]]:
    """For every job its video under every policy."""
    for number, job in enumerate(jobs):
        print(f"video {number + 1} of {len(jobs)}: {job.prompts[0][:70]!r}", file=sys.stderr, flush=True)
        yield {name: make(pipeline, job, chosen) for name, chosen in overrides.items()}


def rows_of(found: Mapping[str, Sequence[tuple[Made, Measures]]]) -> dict[str, dict[str, object]]:
    """For every policy means with their intervals over videos, and the values behind them."""
    rows: dict[str, dict[str, object]] = {}
    for place, (name, pairs) in enumerate(found.items()):
        values = {key: [asdict(one)[key] for _, one in pairs] for key in asdict(pairs[0][1])}
        if not place:
            del values["psnr"], values["ssim"]
        values["block_s"] = [made.block_s for made, _ in pairs]
        means = {key: interval(np.array(column, np.float64)) for key, column in values.items()}
        last = pairs[-1][0]
        memory = {"cache_bytes": last.cache_bytes, "peak_bytes": max(made.peak_bytes for made, _ in pairs)}
        rows[name] = {"context": last.context, **means, **memory, "values": values}
    return rows


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Returns the exit status. Raises InputError, before anything large is loaded, for what cannot be compared."""
    require_libraries()
    configs, overrides = configured(arguments)
    first = next(iter(configs.values()))
    if first.num_output_frames < 2 * first.num_frame_per_block:
        raise InputError(f"num_output_frames: {first.num_output_frames} is one block, which has no past; use more")
    jobs = read_jobs(first)
    device = choose_device(first)
    require_files(first)
    for config in configs.values():
        check_before_loading(config, device)
    ensure_writable_folder(arguments.out, "--out")
    about = facts(device, ["benchmarks.compare", *given])
    found: dict[str, list[tuple[Made, Measures]]] = {name: [] for name in configs}
    sheet = SideBySide(list(configs))
    prompts = [prompt for job in jobs for prompt in job.prompts]
    with Pipeline.from_config(first, prompts=prompts) as pipeline, ExitStack() as stack:
        writer = None
        for made in videos_of(pipeline, jobs, overrides):
            reference = made[next(iter(made))].frames
            for name, one in made.items():
                result = measure(one.frames, reference, one.borders)
                found[name].append((replace(one, frames=one.frames[:0]), result))
            if writer is None:
                height, width = sheet.sizes(*reference.shape[1:3])
                path = arguments.out / "comparison.mp4"
                writer = stack.enter_context(VideoWriter(path, width, height, crf=first.video_crf))
            writer.write(sheet.frames([one.frames for one in made.values()]))
            content = {**about, "prompts": [job.prompts[0] for job in jobs], "policies": rows_of(found)}
            write_atomic(arguments.out / "comparison.json", json.dumps(content, indent=1) + "\n")
    text = table(content) + "\n"
    write_atomic(arguments.out / "comparison.md", text)
    print(f"{text}\n{arguments.out / 'comparison.mp4'}")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--policies", default=POLICIES, help=f"the first is the reference (default {POLICIES})")
    parser.add_argument("--prompts", metavar="FILE", help="instead of data_path; storyboards too")
    parser.add_argument("--videos", type=command.count, help="so many prompts (default: all)")
    parser.add_argument("--calibration", metavar="FILE", help="for calibrated, instead of the configuration's")
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all policies")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(given)
    return command.run(lambda: run(arguments, given))


if __name__ == "__main__":
    raise SystemExit(main())
