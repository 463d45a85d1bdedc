"""The generated `shapes` set: scenes of a few objects, and sentences that describe each scene completely.

Draws images and writes sentences; knows nothing of files, towers or caches. A scene is two or three objects in a row,
a column or along a diagonal; objects differ in color, shape and size. No two scenes of a set share a description.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (42, 157, 66),
    "blue": (40, 80, 214),
    "yellow": (240, 200, 30),
    "purple": (135, 50, 170),
    "orange": (245, 125, 20),
    "pink": (245, 130, 180),
    "brown": (120, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
SIZES = ("small", "large")
LAYOUTS = ("row", "column", "diagonal", "antidiagonal")
SYNONYMS = {
    "circle": "disc",
    "square": "box",
    "star": "five-pointed star",
    "diamond": "rhombus",
    "ring": "hoop",
    "cross": "plus sign",
    "small": "tiny",
    "large": "big",
    "purple": "violet",
}
IMAGE_SIZE = 64
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    color: str
    shape: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Two or three objects in reading order along `layout`; this is what a description says, no more."""

    layout: str
    things: tuple[Thing, ...]


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Draw `count` different scenes, the same for the same seed.

    A longer list begins with the shorter one, so that a split by position never shares a scene.
    """
    rng = np.random.default_rng(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        things = tuple(
            Thing(str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)), str(rng.choice(SIZES)))
            for _ in range(rng.integers(2, 4))
        )
        scenes[Scene(str(rng.choice(LAYOUTS)), things)] = None
    return list(scenes)


def arrange(scene: Scene, seed: int | Sequence[int]) -> np.ndarray:
    """Place the objects of a scene: (objects, 3) float64 of center x, center y and radius, as shares of the side."""
    rng = np.random.default_rng(seed)
    along = np.linspace(-1, 1, len(scene.things)) * rng.uniform(0.27, 0.32)
    shift = rng.uniform(-0.12, 0.12)
    placed = []
    for thing, a in zip(scene.things, along, strict=True):
        x, y = {"row": (a, shift), "column": (shift, a), "diagonal": (a, a), "antidiagonal": (-a, a)}[scene.layout]
        jitter = rng.uniform(-0.03, 0.03, 2)
        radius = rng.uniform(0.07, 0.085) if thing.size == "small" else rng.uniform(0.12, 0.14)
        placed.append((x + jitter[0] + 0.5, y + jitter[1] + 0.5, radius))
    return np.array(placed)


def draw_image(scene: Scene, seed: int | Sequence[int]) -> Image.Image:
    """Draw a scene as a 64 × 64 RGB image; places, exact sizes and shades vary with the seed."""
    rng = np.random.default_rng(seed)
    side = IMAGE_SIZE * _SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(215, 256, 3)))
    pen = ImageDraw.Draw(canvas)
    for thing, (x, y, radius) in zip(scene.things, arrange(scene, seed), strict=True):
        color = tuple(int(v) for v in np.clip(np.array(COLORS[thing.color]) + rng.integers(-12, 13, 3), 0, 255))
        _draw_thing(pen, thing.shape, x * side, y * side, radius * side, color)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def captions(scene: Scene) -> list[str]:
    """Five sentences, each a complete description in other words."""
    plain = [f"{t.size} {t.color} {t.shape}" for t in scene.things]
    other = [" ".join(SYNONYMS.get(word, word) for word in name.split()) for name in plain]
    spoken = {
        "row": ("to the left of", "from left to right", "in a row"),
        "column": ("above", "from top to bottom", "in a column"),
        "diagonal": ("above and to the left of", "from the upper left to the lower right", "on a falling diagonal"),
        "antidiagonal": ("above and to the right of", "from the upper right to the lower left", "on a rising diagonal"),
    }
    relation, order, arrangement = spoken[scene.layout]
    backwards = {
        "row": "to the right of",
        "column": "below",
        "diagonal": "below and to the right of",
        "antidiagonal": "below and to the left of",
    }[scene.layout]
    return [
        f" {relation} ".join(f"a {name}" for name in plain),
        f" {backwards} ".join(f"a {name}" for name in reversed(plain)),
        f"{order}: {', '.join(other)}",
        f"{len(plain)} objects {arrangement}, first a {', then a '.join(plain)}",
        f"this picture shows {_listed([f'a {name}' for name in other])}, {order}",
    ]


def generate(count: int, seed: int) -> Iterator[tuple[Scene, Image.Image]]:
    """Yield `count` scenes with their images."""
    for number, scene in enumerate(draw_scenes(count, seed)):
        yield scene, draw_image(scene, (seed, number))


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _draw_thing(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: tuple[int, ...]) -> None:
    def polygon(points: Sequence[tuple[float, float]]) -> None:
        pen.polygon([(x + r * px, y + r * py) for px, py in points], fill=color)

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=color, width=max(2, round(0.42 * r)))
    elif shape == "square":
        polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    elif shape == "triangle":
        polygon([(0, -1.05), (1.05, 0.85), (-1.05, 0.85)])
    elif shape == "diamond":
        polygon([(0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)])
    elif shape == "cross":
        arm = 0.36
        polygon([(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)])
        polygon([(-1, -arm), (1, -arm), (1, arm), (-1, arm)])
    elif shape == "star":
        spikes = [(math.pi * k / 5, 1.15 if k % 2 == 0 else 0.48) for k in range(10)]
        polygon([(s * math.sin(a), -s * math.cos(a)) for a, s in spikes])
    elif shape == "heart":
        ts = [2 * math.pi * k / 40 for k in range(40)]
        polygon(
            [
                (
                    math.sin(t) ** 3,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15,
                )
                for t in ts
            ]
        )
    else:
        raise AssertionError(shape)
