"""Wording of what follows a first scene: the random choice of commands, and sentences for them.

A sentence names what changes, and refers to what is there: "it turns blue", "now the red ball is faster", "the other
way". Or it is a whole new scene, worded like a first one. Every choice comes from the generator that is given.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shapes.captions import (
    ADJECTIVES,
    FAIRLY,
    GO,
    NOUNS,
    SHAPE_WEIGHTS,
    VERBS,
    kept_out,
    pick,
    punctuated,
    scene_text,
    with_article,
)
from shapes.world import (
    BACKGROUNDS,
    COLOURS,
    COMMANDS,
    DIRECTIONS,
    LARGEST,
    MOVING,
    SHAPES,
    SIZES,
    SMALLEST,
    Body,
    Command,
    Thing,
    World,
    as_floats,
)

# What {the} thing does; or, of all things, {they}. The verbs that first scenes have too are worded as there.
SENTENCES = {
    "still": ("{the} stops", "{the} stands still", "{the} stays where {it} is", "stop", "{the} comes to a stop"),
    "reverse": (
        "the other way",
        "now the other way round",
        "{the} turns round",
        "{the} goes the other way",
        "{the} goes back",
        "{the} changes direction",
    ),
    "fast": ("{the} goes faster", "now faster", "faster", "{the} speeds up", "{the} moves faster", "{the} is faster"),
    "slow": ("{the} goes slower", "now slower", "slower", "{the} slows down", "{the} moves slower", "more slowly"),
    "morph": (
        "{the} becomes {target}",
        "{the} turns into {target}",
        "{the} changes into {target}",
        "{the} is {target}",
    ),
    "turn": (*VERBS["turn"], "is {target}"),
    "bring": (
        "{new} appears",
        "{new} comes",
        "{new} joins {it}",
        "there is also {new}",
        "bring {new}",
        "{new} comes along",
    ),
    "remove": ("{the} disappears", "{the} vanishes", "{the} goes away", "{the} leaves", "take {the} away"),
    "background": (
        "the background turns {target}",
        "the background becomes {target}",
        "the background is {target}",
        "the background changes to {target}",
    ),
}
SETTINGS = {
    "light": ("light", "bright", "plain light"),
    "dark": ("dark", "black night", "plain dark"),
    "land": ("land", "a field", "land and sky"),
    "stripes": ("striped", "stripes", "full of stripes"),
}
OPENERS = ("", "", "now ", "then ", "and now ")
HIGHEST_BOUNCE = 50.0  # y below which a bounce stays clear of the upper edge
_WEIGHTS = {
    **{"morph": 2.0, "turn": 2.0, "reverse": 1.5, "bring": 1.5, "background": 1.5, "bounce": 0.7, "orbit": 0.7},
    "describe": 4.0,  # any thing with any motion: more to learn than in each of the others
}


def random_command(
    rng: np.random.Generator, world: World, held: bool | None = None, favoured: Mapping[str, float] = FAIRLY
) -> Command:
    """Something that can be asked for. `held` and `favoured`: as for `random_scene`, of shape, colour and verb, and of
    verbs."""
    verbs = [verb for verb in COMMANDS if _possible(verb, world)]
    weights = np.array([_WEIGHTS.get(verb, 1.0) * favoured.get(verb, 1.0) for verb in verbs])
    for _ in range(100):
        verb = str(rng.choice(verbs, p=weights / weights.sum()))
        command = _filled(verb, rng, world)
        if held is None or kept_out(*subject(command, world)) == held:
            break
    return command


def subject(command: Command, world: World) -> tuple[str, str, str]:
    """Shape, colour and verb that a command is about, in the world before it; a new scene's verb is its motion."""
    about = command.new or world.there[command.thing]
    return about.shape, about.colour, command.scene.motion if command.scene else command.verb


def is_common(verb: str) -> bool:
    """Whether a command is for all things that are there."""
    return verb in (*MOVING, "still", "reverse", "fast", "slow")


def _possible(verb: str, world: World) -> bool:
    first = world.there[0]
    path, directed = first.path, first.path.motion in DIRECTIONS
    if verb in ("fast", "slow"):
        return path.motion in MOVING and (abs(path.rate) == 1) == (verb == "fast")
    if verb == "reverse":
        return path.motion in (*DIRECTIONS, "orbit")
    if verb == "bounce":
        return path.motion != "bounce" and all(_can_bounce(body) for body in world.there)
    if verb in (*DIRECTIONS, "orbit", "still"):
        return path.motion != verb or (directed and path.rate < 0) or len(world.there) > 1
    if verb in ("grow", "shrink"):
        return len(world.there) == 1 and abs(first.radius.goal[0] - (LARGEST if verb == "grow" else SMALLEST)) > 2
    if verb in ("bring", "remove"):
        return (len(world.there) == 1) == (verb == "bring")
    return True


def _can_bounce(body: Body) -> bool:
    _, (y,) = body.path.at(as_floats([0]))
    return float(y) > HIGHEST_BOUNCE


def _filled(verb: str, rng: np.random.Generator, world: World) -> Command:
    thing = int(rng.integers(len(world.there))) if verb in ("turn", "morph", "remove") else 0
    taken = {body.colour for body in world.there}
    colour = str(rng.choice([name for name in COLOURS if name not in taken]))
    shape = str(rng.choice(SHAPES, p=SHAPE_WEIGHTS))
    while verb == "morph" and shape == world.there[thing].shape:
        shape = str(rng.choice(SHAPES, p=SHAPE_WEIGHTS))
    place = str(rng.choice([name for name in BACKGROUNDS if name != world.background]))
    size = str(rng.choice(list(SIZES)))
    if verb == "describe":
        return _new_scene(rng, world, Thing(shape, str(rng.choice(list(COLOURS))), size))
    target = {"turn": colour, "morph": shape, "background": place}.get(verb)
    return Command(verb, thing, target, Thing(shape, colour, size) if verb == "bring" else None)


def _new_scene(rng: np.random.Generator, world: World, thing: Thing) -> Command:
    """What has the new thing's colour already becomes it, else the first thing."""
    colours = [body.colour for body in world.there]
    place = colours.index(thing.colour) if thing.colour in colours else 0
    motions = [motion for motion in (*MOVING, "still") if motion != "bounce" or _can_bounce(world.there[place])]
    return Command("describe", place, str(rng.choice(motions)), thing)


def sentence(command: Command, world: World, rng: np.random.Generator) -> str:
    """A sentence for a command in the world as it is before."""
    verb = command.verb
    if command.scene:
        return punctuated(pick(OPENERS, rng) + scene_text(command.scene, rng), rng)
    several = len(world.there) > 1
    it = "they" if several and is_common(verb) else "it"
    the = _reference(world.there[command.thing], several, rng) if it == "it" else pick(("they", "both"), rng)
    options = SENTENCES.get(verb) or VERBS[verb]
    text = pick(options, rng)
    if "{the}" not in text and verb in VERBS and verb != "still":
        text = "{the} " + text
    target = command.target or ""
    if verb == "morph":
        target = with_article(pick(NOUNS[target], rng))
    if verb == "background":
        target = pick(SETTINGS[target], rng)
    others = "them" if several and verb == "bring" else it
    text = text.format(the=the, it=others, target=target, go=pick(GO, rng), new=_newcomer(command, rng))
    if it == "they":
        text = _plural(text)
    opener = "" if text.startswith(("now", "take", "bring", "stop")) else pick(OPENERS, rng)
    return punctuated(opener + text, rng)


def _reference(body: Body, several: bool, rng: np.random.Generator) -> str:
    noun = pick(NOUNS[body.shape], rng)
    full = f"the {body.colour} {noun}"
    if several:
        return pick((full, full, f"the {body.colour} one"), rng)
    return pick(("it", "it", full, full, f"the {noun}"), rng)


def _newcomer(command: Command, rng: np.random.Generator) -> str:
    if command.new is None:
        return ""
    thing = command.new
    return with_article(f"{pick(ADJECTIVES[thing.size], rng)} {thing.colour} {pick(NOUNS[thing.shape], rng)}".strip())


_PLURALS = {"is": "are", "does": "do", "goes": "go", "rises": "rise", "rests": "rest", "hops": "hop"}


def _plural(text: str) -> str:
    """The sentence with its verbs, which are the words after the subjects, for several things."""
    words = text.split(" ")
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] in ("they", "both"):
            words[i] = _PLURALS.get(word, word.removesuffix("s"))
    return " ".join(words)


def wording() -> list[str]:
    """Every sentence's words, for the vocabulary."""
    singular = [text for options in (*SENTENCES.values(), *SETTINGS.values()) for text in options]
    common = [text for verb in COMMANDS if is_common(verb) for text in SENTENCES.get(verb) or VERBS[verb]]
    plural = [_plural(f"they {text}".replace("{the} ", "").format(go=go, it="they")) for text in common for go in GO]
    return [*singular, *plural, *OPENERS, "the one it they them both also"]
