"""The laws of the world that the small model is trained on: shapes that move over a background and obey sentences.

A `Scene` is what a first caption says: which things, and what they do. A `Command` is what a later sentence changes;
all that it does not name goes on. `Hidden` is what no caption says and what a video must therefore keep from its own
first frames. Scene, hidden part and commands decide every pixel, for as long as one likes: what leaves the picture on
one side comes in on the opposite one, and what goes round or bounces does so for ever. The file knows no wording, no
pixels and no model.
Units: pixels (x to the right, y down, pixel centres at .5) and pixel frames at 16 a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

HEIGHT, WIDTH = 80, 128
FRAMES = 81
LANES = (26.0, 54.0)  # y of two things that pass each other

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "orange": (1.0, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.12, 0.68, 0.22),
    "blue": (0.12, 0.28, 0.92),
    "purple": (0.66, 0.15, 0.82),
}
SIZES = {"small": 12.0, "medium": 15.0, "large": 18.0}  # half the side of a square of equal extent
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 0.55), "up": (0.0, -0.55)}  # pixels a frame
MOVING = (*DIRECTIONS, "bounce", "orbit")  # ways to go on moving
MOTIONS = (*MOVING, "grow", "shrink", "turn", "still", "pass")  # of a first scene
COMMANDS = (
    *(*MOVING, "still", "reverse", "fast", "slow"),  # for all things there are
    *("grow", "shrink", "turn", "morph"),  # for one thing
    *("bring", "remove", "background", "describe"),
)
BACKGROUNDS = ("light", "dark", "land", "stripes")
MARKS = ("none", "white", "black")
SMALLEST, LARGEST = 10.0, 21.0  # where shrinking and growing end
GROWTH = (LARGEST - SMALLEST) / 64  # pixels a frame
TURN_FRAMES = (16, 48)  # a first scene's colour changes between these frames
SWIFT = 6  # frames in which a command changes colour, shape, background or number: half a block
FAST = 1.75  # times the usual speed
BESIDE = WIDTH / 2  # where a second thing comes, to the right of the first


@dataclass(frozen=True)
class Thing:
    """A shape (of SHAPES) with a colour (of COLOURS) and a size (of SIZES)."""

    shape: str
    colour: str
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """One thing that does `motion`, or two for "pass": the first moves right, the second left, one above the other.

    `target` is the colour that "turn" ends in.
    """

    things: tuple[Thing, ...]
    motion: str
    target: str | None = None


@dataclass(frozen=True)
class Command:
    """A verb of COMMANDS. `thing`: the place, among the things that are there, of the one that it is for; `target`: the
    colour of "turn", the shape of "morph", the name of a background, the motion of "describe", which is a whole new
    scene; `new`: what "bring" brings, and what "describe" has there alone."""

    verb: str
    thing: int = 0
    target: str | None = None
    new: Thing | None = None

    @property
    def scene(self) -> Scene | None:
        """What "describe" says, which is worded and read as a first scene is; other commands have none."""
        if self.verb != "describe":
            return None
        assert self.new is not None and self.target is not None
        return Scene((self.new,), self.target)


@dataclass(frozen=True)
class Hidden:
    """What no caption says. `background` indexes BACKGROUNDS, `mark` MARKS (all things bear it), `way` is 0 or 1: in an
    orbit against the clock or with it; who takes the upper lane when two pass each other."""

    background: int = 0
    mark: int = 0
    way: int = 0


@dataclass(frozen=True)
class Track:
    """A thing in every frame: x, y, radius [frames] (radius 0: not there), colour [frames, 3] in 0..1; `before`,
    `after` [frames] index SHAPES, `morph` [frames] in 0..1 is how far it is on its way from one to the other."""

    x: Floats
    y: Floats
    radius: Floats
    colour: Floats
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    morph: Floats

    @property
    def shape(self) -> str:
        """What it is in the end."""
        return SHAPES[int(self.after[-1])]

    def cut(self, first: int, stop: int | None) -> Track:
        return Track(*(getattr(self, name)[first:stop] for name in self.__dataclass_fields__))


def as_floats(values: npt.ArrayLike) -> Floats:
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Ramp:
    """A value that goes in a straight line from `source` to `goal` between two frames, counted from now."""

    source: tuple[float, ...]
    goal: tuple[float, ...]
    start: float = 0.0
    end: float = 0.0

    @classmethod
    def constant(cls, *value: float) -> Ramp:
        return cls(value, value)

    def at(self, frames: Floats) -> Floats:
        """[frames, n]"""
        share = np.clip((frames - self.start) / max(self.end - self.start, 1e-6), 0, 1)[:, None]
        source = as_floats(self.source)
        return as_floats(source + share * (as_floats(self.goal) - source))

    def later(self, frames: int) -> Ramp:
        """The same, seen from `frames` later; over where it has arrived."""
        if frames >= self.end:
            return Ramp(self.goal, self.goal)
        return replace(self, start=self.start - frames, end=self.end - frames)

    def towards(self, *goal: float, frames: float = SWIFT) -> Ramp:
        """From where it is now to another goal."""
        return Ramp(tuple(float(value) for value in self.at(as_floats([0]))[0]), goal, 0.0, frames)


@dataclass(frozen=True)
class Path:
    """A motion of MOVING or "still" that has begun at x, y and has been under way for `phase` frames of usual speed;
    it goes on by `rate` phases a frame."""

    motion: str
    x: float
    y: float
    phase: float = 0.0
    rate: float = 1.0

    def at(self, frames: Floats) -> tuple[Floats, Floats]:
        """Where it is [frames], within the picture."""
        u = self.phase + self.rate * frames
        x, y = np.full_like(u, self.x), np.full_like(u, self.y)
        if self.motion in DIRECTIONS:
            speed = DIRECTIONS[self.motion]
            x, y = x + speed[0] * u, y + speed[1] * u
        elif self.motion == "bounce":
            y = y - 34.0 * np.abs(np.sin(u * np.float32(math.pi / 40)))
        elif self.motion == "orbit":
            angle = u * np.float32(2 * math.pi / 96)
            x, y = x + 28.0 * np.sin(angle), y + 20.0 - 20.0 * np.cos(angle)
        return as_floats(x % WIDTH), as_floats(y % HEIGHT)

    def later(self, frames: int) -> Path:
        return replace(self, phase=self.phase + self.rate * frames)

    def obey(self, verb: str) -> Path:
        """Where it is, it goes on as one of the commands for all things says."""
        if verb == "reverse":
            return replace(self, rate=-self.rate)
        if verb in ("fast", "slow"):
            return replace(self, rate=math.copysign(FAST if verb == "fast" else 1.0, self.rate))
        (x,), (y,) = self.at(as_floats([0]))
        return Path(verb, float(x), float(y))


@dataclass(frozen=True)
class Body:
    """A thing under way. `colour` and `shape` are what it is or is about to be; `leaving`: it is on its way out."""

    number: int
    colour: str
    shape: str
    path: Path
    radius: Ramp
    tint: Ramp
    presence: Ramp = Ramp((1.0,), (1.0,))
    former: str | None = None  # its shape before `morph`
    morph: Ramp = Ramp((1.0,), (1.0,))
    leaving: bool = False

    def later(self, frames: int) -> Body:
        parts = {name: getattr(self, name).later(frames) for name in ("path", "radius", "tint", "presence", "morph")}
        return replace(self, **parts)

    def obey(self, command: Command) -> Body:
        """The commands for one thing."""
        if command.verb in ("grow", "shrink"):
            goal, now = LARGEST if command.verb == "grow" else SMALLEST, float(self.radius.at(as_floats([0]))[0, 0])
            return replace(self, radius=self.radius.towards(goal, frames=abs(goal - now) / GROWTH))
        assert command.target is not None
        if command.verb == "turn":
            return replace(self, colour=command.target, tint=self.tint.towards(*COLOURS[command.target]))
        if command.verb == "morph":
            return replace(self, shape=command.target, former=self.shape, morph=Ramp((0.0,), (1.0,), 0.0, SWIFT))
        assert command.scene is not None, command
        return self._become(command.scene.things[0], command.scene.motion)

    def leave(self) -> Body:
        return replace(self, leaving=True, presence=Ramp((1.0,), (0.0,), 0.0, SWIFT))

    def _become(self, thing: Thing, motion: str) -> Body:
        """Another thing, that begins a motion where this one is."""
        body = self.obey(Command("turn", target=thing.colour)).obey(Command("morph", target=thing.shape))
        return replace(body, path=self.path.obey(motion), radius=self.radius.towards(SIZES[thing.size]))

    def track(self, frames: int) -> Track:
        t = np.arange(frames, dtype=np.float32)
        x, y = self.path.at(t)
        radius = self.radius.at(t)[:, 0] * self.presence.at(t)[:, 0]
        before, after = (np.full(frames, SHAPES.index(shape)) for shape in (self.former or self.shape, self.shape))
        return Track(x, y, as_floats(radius), self.tint.at(t), before, after, self.morph.at(t)[:, 0])


@dataclass(frozen=True)
class World:
    """What is there at a moment and how it goes on. `backdrop` holds the weights of BACKGROUNDS."""

    bodies: tuple[Body, ...]
    backdrop: Ramp

    @property
    def there(self) -> tuple[Body, ...]:
        """The things that stay, in the order in which they came; Command.thing counts them."""
        return tuple(body for body in self.bodies if not body.leaving)

    @property
    def background(self) -> str:
        """The background that is there or is about to be."""
        return BACKGROUNDS[int(np.argmax(self.backdrop.goal))]

    def later(self, frames: int) -> World:
        return World(tuple(body.later(frames) for body in self.bodies), self.backdrop.later(frames))

    def obey(self, command: Command) -> World:
        """The world under a command; who was leaving is gone."""
        bodies = list(self.there)
        if command.verb == "background":
            assert command.target is not None
            return World(tuple(bodies), self.backdrop.towards(*_only(BACKGROUNDS.index(command.target))))
        if command.verb == "bring":
            assert command.new is not None
            bodies.append(self._beside(command.new))
        elif command.verb == "remove":
            bodies[command.thing] = bodies[command.thing].leave()
        elif command.verb == "describe":
            bodies = [body.leave() for body in bodies]
            bodies[command.thing] = self.there[command.thing].obey(command)
        elif command.verb in ("grow", "shrink", "turn", "morph"):
            bodies[command.thing] = bodies[command.thing].obey(command)
        else:
            bodies = [replace(body, path=body.path.obey(command.verb)) for body in bodies]
        return World(tuple(bodies), self.backdrop)

    def _beside(self, thing: Thing) -> Body:
        """A second thing grows out of nothing half a picture's width from the first, and moves along with it."""
        first = self.there[0]
        path = replace(first.path, x=first.path.x + BESIDE)
        number = 1 + max(body.number for body in self.bodies)
        return replace(_body(number, thing, path), presence=Ramp((0.0,), (1.0,), 0.0, SWIFT))


def _only(index: int) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(len(BACKGROUNDS)))


def _body(number: int, thing: Thing, path: Path) -> Body:
    radius, tint = Ramp.constant(SIZES[thing.size]), Ramp.constant(*COLOURS[thing.colour])
    return Body(number, thing.colour, thing.shape, path, radius, tint)


def begin(scene: Scene, hidden: Hidden) -> World:
    """The world as a first scene begins."""
    backdrop = Ramp.constant(*_only(hidden.background))
    if scene.motion == "pass":
        lanes = LANES if hidden.way == 0 else LANES[::-1]
        paths = (Path("right", 24.0, lanes[0]), Path("left", WIDTH - 24.0, lanes[1]))
        bodies = (_body(i, thing, path) for i, (thing, path) in enumerate(zip(scene.things, paths, strict=True)))
        return World(tuple(bodies), backdrop)
    (thing,) = scene.things
    body = _body(0, thing, _path(scene.motion, hidden.way))
    if scene.motion in ("grow", "shrink"):
        ends = (SMALLEST, LARGEST) if scene.motion == "grow" else (LARGEST, SMALLEST)
        body = replace(body, radius=Ramp(ends[:1], ends[1:], 0.0, (LARGEST - SMALLEST) / GROWTH))
    if scene.motion == "turn":
        assert scene.target is not None
        body = replace(body, colour=scene.target, tint=Ramp(COLOURS[thing.colour], COLOURS[scene.target], *TURN_FRAMES))
    return World((body,), backdrop)


def _path(motion: str, way: int) -> Path:
    middle = WIDTH / 2
    places = {
        "right": (24.0, HEIGHT / 2),
        "left": (WIDTH - 24.0, HEIGHT / 2),
        "down": (middle, 18.0),
        "up": (middle, HEIGHT - 18.0),
        "bounce": (middle, HEIGHT - 20.0),
        "orbit": (middle, 20.0),
    }
    if motion not in places:
        return Path("still", middle, HEIGHT / 2)
    return Path(motion, *places[motion], rate=-1.0 if motion == "orbit" and way == 0 else 1.0)
