"""Wording of first scenes: plain English, and the random choice of scenes.

Which combinations of shape, colour and motion are held out of training is decided here. Every choice comes from the
generator that is given. The file does not know how anything looks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from shapes.world import BACKGROUNDS, COLOURS, MARKS, MOTIONS, SHAPES, SIZES, Hidden, Scene, Thing

NOUNS = {
    "disc": ("ball", "disc", "circle"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "cross": ("cross", "plus sign"),
}
ADJECTIVES = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big")}
GO = ("moves", "slides", "glides", "drifts", "travels")
VERBS = {
    "right": ("{go} to the right", "{go} from left to right", "{go} rightwards", "is moving right"),
    "left": ("{go} to the left", "{go} from right to left", "{go} leftwards", "is moving left"),
    "up": ("{go} up", "{go} upwards", "rises", "{go} to the top"),
    "down": ("{go} down", "{go} downwards", "sinks", "{go} to the bottom"),
    "bounce": ("bounces up and down", "bounces on the spot", "keeps bouncing", "hops up and down"),
    "orbit": ("goes round in a circle", "circles around the middle", "orbits the centre", "runs around in a ring"),
    "grow": ("grows", "gets bigger", "becomes larger", "swells"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "turn": ("turns {target}", "becomes {target}", "changes its colour to {target}", "slowly turns {target}"),
    "still": ("stands still", "stays where it is", "does not move", "rests"),
}
PASSING = (
    "{a} and {b} pass each other",
    "{a} and {b} move past each other",
    "{a} passes {b}",
    "{a} moves right and {b} moves left",
)
OPENINGS = ("{a} {verb}", "{a} {verb}", "{a} {verb}", "a video of {a} that {verb}", "{a} that {verb}")
SHAPE_WEIGHTS = (0.2, 0.2, 0.2, 0.4)  # of SHAPES in the random choice: crosses are the hardest to draw
MOTION_WEIGHTS = {"pass": 1.5, "still": 0.5}  # in the random choice of motions, of which the others have 1
FAIRLY: Mapping[str, float] = {}  # no motion and no verb is favoured


def held_out(scene: Scene) -> bool:
    """Whether a combination of (first) shape, colour and motion is kept from training: one in eight."""
    return kept_out(scene.things[0].shape, scene.things[0].colour, scene.motion)


def kept_out(shape: str, colour: str, verb: str) -> bool:
    return zlib.crc32(f"{shape} {colour} {verb}".encode()) % 8 == 0


def random_scene(rng: np.random.Generator, held: bool | None = None, favoured: Mapping[str, float] = FAIRLY) -> Scene:
    """A scene; `held` True or False takes only held-out combinations or only the others, None takes any. `favoured`:
    how many times as often as usual motions are to come, where that is not once."""
    shares = np.array([MOTION_WEIGHTS.get(motion, 1.0) * favoured.get(motion, 1.0) for motion in MOTIONS])
    while True:
        motion = str(rng.choice(MOTIONS, p=shares / shares.sum()))
        colours = [str(name) for name in rng.permutation(list(COLOURS))]
        shapes = [str(name) for name in rng.choice(SHAPES, 2, p=SHAPE_WEIGHTS)]
        size = str(rng.choice(list(SIZES)))
        if motion in ("grow", "shrink"):
            size = "medium"
        if motion == "pass":
            scene = Scene(tuple(Thing(shapes[i], colours[i], "small") for i in (0, 1)), motion)
        else:
            scene = Scene((Thing(shapes[0], colours[0], size),), motion, colours[1] if motion == "turn" else None)
        if held is None or held_out(scene) == held:
            return scene


def random_hidden(rng: np.random.Generator) -> Hidden:
    background, mark, way = (int(rng.integers(n)) for n in (len(BACKGROUNDS), len(MARKS), 2))
    return Hidden(background, mark, way)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence for a first scene."""
    return punctuated(scene_text(scene, rng), rng)


def scene_text(scene: Scene, rng: np.random.Generator) -> str:
    named = [_name(thing, rng, scene.motion) for thing in scene.things]
    if scene.motion == "pass":
        return pick(PASSING, rng).format(a=with_article(named[0]), b=with_article(named[1]))
    verb = pick(VERBS[scene.motion], rng).format(go=pick(GO, rng), target=scene.target)
    return pick(OPENINGS, rng).format(a=with_article(named[0]), verb=verb)


def punctuated(text: str, rng: np.random.Generator) -> str:
    """With a capital letter or without, with a full stop or without."""
    text = text[0].upper() + text[1:] if rng.random() < 0.8 else text
    return text + ("." if rng.random() < 0.7 else "")


def _name(thing: Thing, rng: np.random.Generator, motion: str) -> str:
    size = "" if motion in ("grow", "shrink") or motion == "pass" else pick(ADJECTIVES[thing.size], rng)
    return f"{size} {thing.colour} {pick(NOUNS[thing.shape], rng)}".strip()


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
