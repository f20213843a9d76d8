"""What goes wrong after a prompt switch: which shares of storyboards end right, by what was seen, said and drawn.

    python -m shapes.failures --storyboards 128 [--policy full] [--trained] [--set model_root=FOLDER]

It is for finding what training has to show more of. So its storyboards are others than those of `shapes.evaluate`, by
which nothing may be chosen; with `--trained` they are of the combinations of shape, colour and motion that training
has too: what goes wrong there is no matter of captions that are new.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config.config import load_config
from shapes.data import Clip, make_clip
from shapes.evaluate import CONFIG, LEAST_OF_STORYBOARDS, POLICIES, SWITCHES, TRUTH, Parts, check_scored, generate
from shapes.story_score import PATH_ERROR, SIZE_ERROR, Found, SceneScore, last_scene
from utils import command

SEED = 52
BATCH = 8


@dataclass(frozen=True)
class Outcome:
    """A storyboard's last scene: what it was, how it is scored, and what is there."""

    clip: Clip
    score: SceneScore
    things: Sequence[Found]

    @property
    def kinds(self) -> Mapping[str, str]:
        """What it belongs to of every kind that is told apart."""
        return {
            "first caption's motion": self.clip.scene.motion,
            "later caption's verb": self.clip.commands[-1].verb,
            "shape in the end": self.things[0].body.shape if len(self.things) == 1 else "two things",
            "switch at latent frame": f"{self.clip.switches[-1]:2}",
        }


def report(outcomes: Sequence[Outcome]) -> str:
    """Tables, as Markdown: of every kind what is right, and of everything that is wrong what was wrong about it."""
    return "\n".join([*_shares(outcomes), *_reasons(outcomes)]) + "\n"


def _shares(outcomes: Sequence[Outcome]) -> Iterable[str]:
    for kind in outcomes[0].kinds:
        rows: dict[str, list[SceneScore]] = defaultdict(list)
        for outcome in outcomes:
            rows[outcome.kinds[kind]].append(outcome.score)
        yield f"| {kind} | storyboards | {' | '.join(f'{part} %' for part in _PARTS)} |"
        yield "|---" * (2 + len(_PARTS)) + "|"
        for name, scores in [*sorted(rows.items()), ("all", [outcome.score for outcome in outcomes])]:
            means = (100 * np.mean([getattr(one, part) for one in scores]) for part in _PARTS)
            yield f"| {name} | {len(scores)} | " + " | ".join(f"{mean:.0f}" for mean in means) + " |"
        yield ""


_PARTS = ("right", "colour", "shape", "motion", "background")


def _reasons(outcomes: Sequence[Outcome]) -> Iterable[str]:
    found: Counter[str] = Counter()
    things = [thing for outcome in outcomes for thing in outcome.things]
    for thing in things:
        found.update(reasons(thing))
    yield f"| what is wrong | of {len(things)} things |\n|---|---|"
    for reason, count in found.most_common():
        yield f"| {reason} | {count} |"


def reasons(thing: Found) -> list[str]:
    """What is wrong about a thing, but for its colour."""
    if np.isnan(thing.off_path):
        return ["missing in many frames"]
    found = []
    if thing.seen.shape != thing.body.shape:
        found.append(f"{thing.body.shape} drawn as {thing.seen.shape or 'no shape for long'}")
    if abs(thing.off_size) >= SIZE_ERROR:
        found.append("too large" if thing.off_size > 0 else "too small")
    if thing.off_path >= PATH_ERROR:
        found.append("moves otherwise")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storyboards", type=command.count, default=128)
    parser.add_argument("--policy", choices=[name for name in POLICIES if name != TRUTH], default="full")
    parser.add_argument("--trained", action="store_true", help="combinations that training has, not held-out ones")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=command.count, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = load_config(args.config, [*POLICIES[args.policy], *args.set])
    check_scored(config, LEAST_OF_STORYBOARDS)
    held = not args.trained
    clips = [make_clip(SEED, i, (SWITCHES[i % len(SWITCHES)],), held=held) for i in range(args.storyboards)]
    outcomes = [
        Outcome(clip, *last_scene(video, clip))
        for batch, group in generate(Parts.load(config), config, clips, BATCH)
        for video, clip in zip(batch.videos, group, strict=True)
    ]
    sys.stdout.write(report(outcomes))
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
