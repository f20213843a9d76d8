"""What a calibration has to be like: the small model under tables that differ in one thing, by their latents alone.

    python -m shapes.calibration_study --out FOLDER [--captions 16] [--questions videos,steps]

Signal to error in dB against full history with the same noise, from the second block on, on captions that no evaluation
and no training has; every trial less the usual calibration, caption by caption. Calibrations that a question needs are
recorded into the folder, once. Nothing is decoded: what the pixels say is for shapes.frontier. Writes study.json and
study.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dummy.calibration.candidates import CANDIDATES, named
from dummy.config import ONLINE
from shapes import evaluate
from shapes.calibration_trials import (
    BLOCKS,
    FRAMES,
    RELATIVE,
    USUAL,
    Settings,
    Study,
    Trial,
    after_full_history,
    evenly,
    powered,
    weighted,
)
from shapes.report import Doubles, interval
from utils import command
from utils.errors import InputError, quoted
from utils.files import ensure_writable_folder, write_atomic

logger = logging.getLogger(__name__)

PACKED, WINDOW = evaluate.POLICIES["packed"], evaluate.POLICIES["window"]
MORE = ["2+0", "3+0", "3+1", "3+3", "0+5", "0+7", "2+4", "3+6", "0+8", "3+9", "1+7"]


def questions(study: Study) -> dict[str, Callable[[], list[Trial]]]:
    """What is tried for every question; nothing is recorded before its function is called."""
    usual, every = Path(evaluate.CALIBRATION), slice(None)
    return {
        "others": lambda: [_known(PACKED, "paper"), _known(WINDOW, "window 7")],
        "score": lambda: [
            Trial(f"mean square ^ {power}", study.changed(f"power_{power}", powered(power))) for power in (0.35, 0.7, 1)
        ],
        "weights": lambda: [
            Trial("weights by layer's influence", study.changed("influence", weighted(study.influence())))
        ],
        "videos": lambda: [
            *(Trial(f"{n} videos", study.part(f"videos_{n}", slice(n), every)) for n in (1, 2, 4)),
            Trial("32 videos", study.recorded("videos_32", "--videos", "32")),
        ],
        "queries": lambda: [Trial("30 of 120 queries", study.recorded("queries_30", "--queries", "30"))],
        "steps": lambda: [
            Trial(f"steps {steps}", study.recorded(f"steps_{steps}", "--steps", steps))
            for steps in ("0", "3", "0,1,2,3,clean")
        ],
        "blocks": lambda: [
            Trial("all blocks count alike", study.changed("evenly", evenly)),
            Trial("from block 2 on", study.part("blocks_2", every, slice(1, None))),
            Trial("last two blocks", study.part("blocks_last", every, slice(4, None))),
        ],
        "candidates": lambda: [
            Trial("27 candidates", study.recorded("more", "--candidates", ",".join([*map(named, CANDIDATES), *MORE]))),
            Trial("6 candidates", study.recorded("fewer", "--candidates", "0+0,0+1,1+2,0+3,0+6,0+all")),
        ],
        "lengths": lambda: [
            Trial(f"at most {n} lengths", usual, [f"dummy_forcing.max_lengths={n}"]) for n in (1, 2, 3, 4)
        ],
        "iteration": lambda: [
            Trial(f"on-policy at {frames}", study.on_policy(f"policy_{frames}", frames), frames=(frames,))
            for frames in FRAMES
        ],
        "layers": lambda: [
            Trial(f"layer by layer at {frames}", study.layer_by_layer(f"layers_{frames}", frames), frames=(frames,))
            for frames in FRAMES
        ],
        "online": lambda: [
            *(Trial(f"own video, block {block}", study.own(f"own_{block}", [block])) for block in (1, 2, 3)),
            Trial("own video, block 3, third step", study.own("own_step", [3], 2)),
            Trial("own video, all blocks", study.own("own_all", BLOCKS)),
            Trial("usual, after four blocks of full history", usual, change=after_full_history),
            Trial("online", Path(ONLINE), alone=True),
        ],
        "switch": _switch,
        "relative": _relative,
    }


def _known(settings: Settings, name: str, reference: Settings = (), switched: bool = False) -> Trial:
    """A policy without a calibration."""
    return Trial(name, None, settings, reference, switched, frames=())


def _relative() -> list[Trial]:
    usual = Trial("usual, relative", Path(evaluate.CALIBRATION), RELATIVE, RELATIVE)
    online = Trial("online, relative", Path(ONLINE), RELATIVE, RELATIVE, alone=True)
    return [usual, online, _known([*PACKED, *RELATIVE], "paper, relative", RELATIVE)]


def _switch() -> list[Trial]:
    usual = Trial("usual, switched", Path(evaluate.CALIBRATION), switched=True)
    online = Trial("online, switched", Path(ONLINE), switched=True, alone=True)
    again = replace(online, name="online, observed again", settings=["dummy_forcing.reclassify_on_switch=true"])
    others = [_known(PACKED, "paper, switched", switched=True), _known(WINDOW, "window 7, switched", switched=True)]
    return [usual, online, again, *others]


def trials(study: Study, chosen: Sequence[str]) -> Iterator[tuple[str, Trial]]:
    every = questions(study)
    unknown = [question for question in chosen if question not in every]
    if unknown:
        raise InputError(f"--questions: {', '.join(map(quoted, unknown))}: none of {', '.join(every)}")
    yield "", Trial(USUAL, Path(evaluate.CALIBRATION))
    for question in chosen or every:
        for trial in every[question]():
            yield question, trial


def table(content: Mapping[str, Any]) -> str:
    """Markdown: a row a trial, a column a budget; dB, and less the usual calibration by caption (bold: beyond the
    interval)."""

    def cell(rows: Sequence[Mapping[str, Any]]) -> str:
        if not rows:
            return ""
        text = "{mean:.1f} [{low:.1f}, {high:.1f}]".format(**rows[0]["db"])
        less = rows[0].get("less_usual")
        if less is None:
            return text
        difference = "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**less)
        return f"{text}, {f'**{difference}**' if less['low'] * less['high'] > 0 else difference}"

    budgets = [frames for frames in FRAMES if any(row["frames"] == frames for row in content["rows"])]
    titles = ["question", "trial", *(f"{frames:g} frames" for frames in budgets)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for question, trial in dict.fromkeys((row["question"], row["trial"]) for row in content["rows"]):
        mine = [row for row in content["rows"] if (row["question"], row["trial"]) == (question, trial)]
        cells = [cell([row for row in mine if row["frames"] == frames]) for frames in budgets]
        if mine[0]["frames"] is None:
            cells = [cell(mine), *[""] * (len(budgets) - 1)]
        lines.append(f"| {question} | {trial} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace, given: Sequence[str]) -> int:
    ensure_writable_folder(args.out, "--out")
    study = Study(args.out, args.captions, args.batch)
    rows: list[dict[str, object]] = []
    usual: dict[float | None, Doubles] = {}
    for question, trial in trials(study, args.questions):
        for frames in [frames for frames in trial.frames if frames in args.frames] if trial.frames else [None]:
            values = study.signal_to_error(trial, frames)
            if trial.name == USUAL:
                usual[frames] = values
            row: dict[str, object] = {"question": question, "trial": trial.name, "frames": frames}
            row["db"] = interval(values)
            if frames in usual and trial.name != USUAL and not trial.switched and not trial.reference:
                row["less_usual"] = interval(values - usual[frames])
            rows.append(row)
            logger.info("%s", row)
            content = {**evaluate.about("shapes.calibration_study", given), "rows": rows}
            write_atomic(args.out / "study.json", json.dumps(content, indent=1) + "\n")
    write_atomic(args.out / "study.md", table(content))
    sys.stdout.write(table(content))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/calibration_study"), metavar="FOLDER")
    parser.add_argument("--captions", type=command.count, default=24)
    parser.add_argument("--batch", type=command.count, default=8)
    parser.add_argument(
        "--questions", type=lambda text: text.split(","), default=[], help="some of them (default: all)"
    )
    numbers = ", ".join(map(str, FRAMES))
    parser.add_argument(
        "--frames", type=float, nargs="*", choices=FRAMES, default=FRAMES, help=f"budgets (default {numbers})"
    )
    args = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return command.run(lambda: run(args, given), log_format=None)


if __name__ == "__main__":
    raise SystemExit(main())
