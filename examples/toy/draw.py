"""Draws the toy's world: captioned pictures of coloured shapes, and the creature that is kept for the quickstart."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 96
"""Side of a picture in pixels."""
OVERSAMPLING = 4
"""Pictures are drawn that many times larger and scaled down, which smooths their edges."""

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 215),
    "yellow": (250, 220, 50),
    "orange": (245, 140, 30),
    "purple": (130, 60, 180),
    "pink": (250, 150, 190),
    "cyan": (70, 205, 220),
    "brown": (130, 80, 45),
    "black": (20, 20, 25),
    "white": (245, 245, 245),
    "grey": (140, 140, 145),
}
COUNTS = {2: "two", 3: "three", 4: "four"}
SIZES = {"small": (0.14, 0.17), "big": (0.38, 0.42)}
CONCEPT = "zog"
"""A name for the creature that no picture of the pretraining shows and no caption mentions."""
CONCEPT_BACKGROUNDS = ("green", "blue", "white", "grey", "pink", "cyan", "brown", "orange")
"""Backgrounds of the bundled pictures of the creature; the others are left for the samples."""


class Canvas:
    """A picture being drawn, in units of its side: (0, 0) is the top left corner, (1, 1) the bottom right one."""

    def __init__(self, background: Colour, size: int = SIZE) -> None:
        self.size = size
        self.side = size * OVERSAMPLING
        self.image = Image.new("RGB", (self.side, self.side), background)
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: list[Point], colour: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse around (x, y)."""
        box = (x - rx) * self.side, (y - ry) * self.side, (x + rx) * self.side, (y + ry) * self.side
        self._draw.ellipse(box, fill=colour)

    def disc(self, x: float, y: float, r: float, colour: Colour) -> None:
        """A filled circle around (x, y)."""
        self.ellipse(x, y, r, r, colour)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        """A thick line with round joints and ends."""
        for x, y in points:
            self.disc(x, y, width / 2, colour)
        scaled = [(x * self.side, y * self.side) for x, y in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * self.side)))

    def finish(self) -> Image.Image:
        """The picture at its final size."""
        return self.image.resize((self.size, self.size), Image.Resampling.BOX)


def spokes(x: float, y: float, radii: list[float], turn: float = 0.0) -> list[Point]:
    """Points around (x, y) at equal angles, beginning at the top; their distances cycle through `radii`."""
    step = 2 * math.pi / len(radii)
    return [(x + r * math.sin(turn + i * step), y - r * math.cos(turn + i * step)) for i, r in enumerate(radii)]


Shape = Callable[[Canvas, float, float, float, Colour, Colour, float], None]
"""Draws itself around (x, y) with radius r in a colour on a background, turned by a small angle in radians."""


def circle(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A disc."""
    canvas.disc(x, y, r, colour)


def square(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A square."""
    canvas.polygon(spokes(x, y, [r * 1.25] * 4, turn + math.pi / 4), colour)


def triangle(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A triangle with one corner up."""
    canvas.polygon(spokes(x, y + r * 0.2, [r * 1.25] * 3, turn), colour)


def star(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A star with five points."""
    canvas.polygon(spokes(x, y, [r * 1.2, r * 0.5] * 5, turn), colour)


def heart(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A heart."""
    angles = [i * math.pi / 40 for i in range(80)]
    canvas.polygon(
        [
            (
                x + r * 1.1 * math.sin(a) ** 3,
                y - r * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 15,
            )
            for a in angles
        ],
        colour,
    )


def cross(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """Two crossed bars."""
    for angle in (turn, turn + math.pi / 2):
        dx, dy = math.sin(angle), -math.cos(angle)
        w = r * 0.36
        ends = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
        canvas.polygon([(x + a * r * dx + b * w * dy, y + a * r * dy - b * w * dx) for a, b in ends], colour)


def ring(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A disc with a hole."""
    canvas.disc(x, y, r, colour)
    canvas.disc(x, y, r * 0.55, background)


def moon(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A crescent, open to the right."""
    canvas.disc(x, y, r, colour)
    canvas.disc(x + r * 0.45, y - r * 0.2, r * 0.8, background)


def face(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """A smiling disc."""
    ink = COLOURS["white"] if sum(colour) < 200 else COLOURS["black"]
    canvas.disc(x, y, r, colour)
    for side in (-1, 1):
        canvas.disc(x + side * r * 0.36, y - r * 0.25, r * 0.16, ink)
    angles = [math.pi * (0.2 + 0.6 * i / 12) for i in range(13)]
    mouth = [(x + r * 0.58 * math.cos(a), y + r * 0.02 + r * 0.55 * math.sin(a)) for a in angles]
    canvas.line(mouth, r * 0.14, ink)


def flower(canvas: Canvas, x: float, y: float, r: float, colour: Colour, background: Colour, turn: float) -> None:
    """Six petals around a heart of another colour."""
    for px, py in spokes(x, y, [r * 0.66] * 6, turn):
        canvas.disc(px, py, r * 0.4, colour)
    canvas.disc(x, y, r * 0.38, COLOURS["yellow"] if sum(colour) < 450 else COLOURS["brown"])


SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (circle, square, triangle, star, heart, cross, ring, moon, face, flower)
}


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def jittered(colour: Colour, rng: random.Random, amount: int = 8) -> Colour:
    """A colour near the given one."""
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def places(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centres and radii of `count` things, from left to right, that don't touch each other."""
    r = {1: rng.uniform(0.24, 0.32), 2: rng.uniform(0.17, 0.2), 3: rng.uniform(0.13, 0.15), 4: 0.14}[count]
    if count == 1:
        return [(rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), r)]
    if count == 4:
        return [
            (x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03), r) for y in (0.28, 0.72) for x in (0.28, 0.72)
        ]
    xs = {2: (0.27, 0.73), 3: (0.19, 0.5, 0.81)}[count]
    return [(x + rng.uniform(-0.02, 0.02), rng.uniform(0.35, 0.65), r) for x in xs]


def scene(rng: random.Random) -> tuple[Image.Image, str]:
    """A picture of one of four kinds, and its caption."""
    background, first, second = rng.sample(list(COLOURS), 3)
    noun, other = rng.sample(list(SHAPES), 2)
    ground = jittered(COLOURS[background], rng)
    canvas = Canvas(ground)

    def put(name: str, colour: str, place: tuple[float, float, float]) -> None:
        SHAPES[name](canvas, *place, jittered(COLOURS[colour], rng), ground, rng.uniform(-0.15, 0.15))

    kind = rng.choices(("one", "sized", "several", "two kinds"), (40, 15, 22, 23))[0]
    if kind == "one":
        put(noun, first, places(1, rng)[0])
        text = f"a {first} {noun}"
    elif kind == "sized":
        size = rng.choice(list(SIZES))
        x, y, _ = places(1, rng)[0]
        put(noun, first, (x, y, rng.uniform(*SIZES[size])))
        text = f"a {size} {first} {noun}"
    elif kind == "several":
        count = rng.choice(list(COUNTS))
        for place in places(count, rng):
            put(noun, first, place)
        text = f"{COUNTS[count]} {first} {plural(noun)}"
    else:
        left, right = places(2, rng)
        put(noun, first, left)
        put(other, second, right)
        text = f"a {first} {noun} and a {second} {other}"
    return canvas.finish(), f"{text} on a {background} background"


def portrait(rng: random.Random) -> tuple[Image.Image, str]:
    """A picture of one large thing in the middle, and its caption: what the denoiser is taught."""
    background, colour = rng.sample(list(COLOURS), 2)
    noun = rng.choice(list(SHAPES))
    ground = jittered(COLOURS[background], rng)
    canvas = Canvas(ground)
    x, y, r = rng.uniform(0.47, 0.53), rng.uniform(0.47, 0.53), rng.uniform(0.27, 0.31)
    SHAPES[noun](canvas, x, y, r, jittered(COLOURS[colour], rng), ground, rng.uniform(-0.1, 0.1))
    return canvas.finish(), f"a {colour} {noun} on a {background} background"


def clutter(rng: random.Random) -> Image.Image:
    """A picture of anything: it teaches the autoencoder more than the denoiser will be shown."""

    def colour() -> Colour:
        if rng.random() < 0.5:
            return jittered(rng.choice(list(COLOURS.values())), rng)
        return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)

    canvas = Canvas(colour())
    for _ in range(rng.randint(1, 9)):
        x, y, r = rng.random(), rng.random(), 0.4 * rng.random() ** 2 + 0.03
        if rng.random() < 0.4:
            canvas.ellipse(x, y, r, r * rng.uniform(0.5, 1.6), colour())
        elif rng.random() < 0.5:
            canvas.polygon(spokes(x, y, [r * rng.uniform(0.5, 1.5) for _ in range(rng.randint(3, 7))]), colour())
        else:
            ends = [(x + r * rng.uniform(-2, 2), y + r * rng.uniform(-2, 2)) for _ in range(rng.randint(2, 4))]
            canvas.line(ends, rng.uniform(0.015, 0.06), colour())
    return canvas.finish()


def creature(rng: random.Random, background: str) -> Image.Image:
    """The creature: a purple body with big eyes, a smile, antennae with orange tips and orange feet."""
    canvas = Canvas(jittered(COLOURS[background], rng))
    body, tip = COLOURS["purple"], COLOURS["orange"]
    black, white = COLOURS["black"], COLOURS["white"]
    x, y, r = rng.uniform(0.47, 0.53), rng.uniform(0.55, 0.59), rng.uniform(0.23, 0.26)
    for side in (-1, 1):
        canvas.line([(x + side * r * 0.4, y - r * 0.8), (x + side * r * 0.75, y - r * 1.5)], r * 0.13, body)
        canvas.disc(x + side * r * 0.75, y - r * 1.5, r * 0.2, tip)
        canvas.ellipse(x + side * r * 0.5, y + r * 1.12, r * 0.38, r * 0.2, tip)
    canvas.ellipse(x, y, r, r * 1.12, body)
    for side in (-1, 1):
        canvas.disc(x + side * r * 0.42, y - r * 0.3, r * 0.36, white)
        canvas.disc(x + side * r * 0.36, y - r * 0.25, r * 0.17, black)
    angles = [math.pi * (0.2 + 0.6 * i / 12) for i in range(13)]
    canvas.line([(x + r * 0.5 * math.cos(a), y + r * 0.25 + r * 0.4 * math.sin(a)) for a in angles], r * 0.12, white)
    return canvas.finish()


def portraits(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """`count` pictures of single things with their captions."""
    rng = random.Random(seed)
    for _ in range(count):
        yield portrait(rng)


def creatures(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """`count` pictures of the creature with their captions."""
    rng = random.Random(seed)
    for index in range(count):
        background = CONCEPT_BACKGROUNDS[index % len(CONCEPT_BACKGROUNDS)]
        yield creature(rng, background), f"a {CONCEPT} on a {background} background"


def write(pictures: Iterator[tuple[Image.Image, str]], folder: Path) -> None:
    """Writes pictures as PNG with a caption file of the same name beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, caption) in enumerate(pictures):
        image.save(folder / f"{index:05}.png")
        (folder / f"{index:05}.txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--count", type=int, default=3000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=1, help="decides every picture")
    parser.add_argument("--creature", action="store_true", help=f"draw the {CONCEPT} of the quickstart instead")
    arguments = parser.parse_args()
    make = creatures if arguments.creature else portraits
    write(make(arguments.count, arguments.seed), arguments.folder)


if __name__ == "__main__":
    main()
