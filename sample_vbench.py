"""VBench's videos: torchrun --nproc_per_node=N sample_vbench.py --config_path configs/self_forcing_vbench.yaml

Also plainly with python, and on any number of machines that share a folder. Writes `{short prompt}-{sample}.mp4` into
output_folder, and seeds and logs into `{output_folder}.run` beside it. A second run makes what is missing.
"""

from __future__ import annotations

from utils import interrupts

if __name__ == "__main__":
    interrupts.answer_at_once()

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference import dry_run
from utils import command
from utils.distributed import World, stop_with_launcher

if TYPE_CHECKING:
    from pipeline.vbench.sampling import Progress


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", "--config_file", dest="config_path", required=True, metavar="YAML")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process, the same for all runs")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="say what is missing, broken or not found, and stop")
    instead.add_argument("--dry_run", action="store_true", help="check the files, print the plan, and stop")
    instead.add_argument("--fetch", action="store_true", help="download the extended prompts, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return command.parse(parser, argv)


def run(arguments: argparse.Namespace, world: World) -> int:
    """Returns the exit status; raises InputError for what the user must mend."""
    from pipeline.config.config import load_config, warn_of_what_is_off
    from pipeline.vbench.prompts import check_folder, fetch_extended_list, read_vbench_jobs
    from pipeline.vbench.sampling import THREADS, sample

    config = load_config(arguments.config_path, arguments.overrides)
    warn_of_what_is_off(config, arguments.overrides)
    if arguments.fetch:
        print(fetch_extended_list(config))
        return 0
    jobs = read_vbench_jobs(config)
    if arguments.dry_run:
        return dry_run(config, jobs, world, config.samples_per_batch)
    if arguments.check:
        report = check_folder(config, jobs)
        print("\n".join(report.lines()))
        return 0 if report.ok else 1

    def show(progress: Progress) -> None:
        if world.rank == 0:
            print(progress.line(), flush=True)

    threads = THREADS if arguments.threads is None else arguments.threads
    outcome = sample(config, jobs, world, show, threads)
    who = f"process {world.rank} of {world.size}"
    print(f"{who} has made {outcome.made} videos; {outcome.done} of {outcome.total} are there", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if --check finds fault, else as inference.py."""
    stop_with_launcher()
    arguments = parse_arguments(argv)

    def program() -> int:
        world = World.from_environment()
        alone = arguments.check or arguments.dry_run or arguments.fetch  # one process does what needs no more
        return 0 if alone and world.rank else run(arguments, world)

    return command.run(program, ["pipeline.vbench.sampling"])


if __name__ == "__main__":
    sys.exit(main())
