"""Memory over the length of a video: python -m benchmarks.long_video [--minutes 20 --policy packed --json FILE]

Makes one long video with the small checkpoints, through files and the whole path (noise, latents, decoding, writing),
and prints the resident memory after every minute of video.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import result_file, store
from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import read_jobs
from pipeline.video_files import write_videos
from tests.small_checkpoints import write_small_checkpoints
from utils import command
from utils.profiler import resident_bytes
from utils.video import probe

CONFIG = Path(__file__).parents[1] / "configs" / "self_forcing_inference.yaml"
POLICIES = {
    "packed": ["dummy_forcing.num_dummy=6"],
    "window": ["dummy_forcing=off"],
    "packed_relative": ["dummy_forcing.num_dummy=6", "rope=relative"],
}


def configure(policy: str, minutes: int, root: Path) -> InferenceConfig:
    blocks = minutes * 60 * 16 // 12
    overrides = [
        f"model_root={root / 'checkpoints'}",
        f"output_folder={root / 'videos'}",
        f"num_output_frames={3 * blocks}",
        "resolution=[32,48]",
        "inference_iter=1",
        "adapter=null",
        *POLICIES[policy],
    ]
    return load_config(CONFIG, overrides)


def measure(policy: str, minutes: int, root: Path) -> list[int]:
    """Resident bytes after every minute of the video."""
    config = configure(policy, minutes, root)
    (root / "videos").mkdir(exist_ok=True)
    (job,) = read_jobs(config)
    pipeline = Pipeline.from_config(config, prompts=job.prompts)
    blocks_per_minute = 60 * 16 // 12
    readings: list[int] = []

    def on_block(index: int) -> None:
        if (index + 1) % blocks_per_minute == 0:
            gc.collect()
            readings.append(resident_bytes() or 0)
            print(f"{policy:16} minute {len(readings):3}: {readings[-1] / 2**20:8.1f} MiB resident", flush=True)

    write_videos(pipeline, [job], on_block)
    info = probe(job.path)
    print(f"{policy:16} {info.frames} frames of {info.width}x{info.height}")
    return readings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=command.count, default=20)
    parser.add_argument("--policy", action="append", choices=POLICIES)
    parser.add_argument("--json", type=result_file)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_small_checkpoints(root / "checkpoints")
        for policy in arguments.policy or ["window", "packed"]:
            begin = time.perf_counter()
            readings = measure(policy, arguments.minutes, root)
            growth = (readings[-1] - readings[0]) / 2**20
            seconds = time.perf_counter() - begin
            print(f"{policy:16} grew by {growth:.1f} MiB from minute 1 to minute {len(readings)}, in {seconds:.0f} s")
            result[policy] = {"resident_mib": [reading / 2**20 for reading in readings], "growth_mib": growth}
            for made in (root / "videos").iterdir():
                made.unlink()
    store(result, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
