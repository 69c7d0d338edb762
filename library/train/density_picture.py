"""A picture of the noise levels that a run draws: whether its settings do what was meant shows at one glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from library.log import get_logger
from library.randomness import Draws, mix
from library.sampling import save_png

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.dataset import TrainingData
    from library.objectives import Objective
    from library.train.previews import PictureLog

logger = get_logger(__name__)

DRAWS = 20_000
BINS = 50
SEED = 0x64656E73
"""Of generators of its own: neither the run's numbers nor the picture depend on one another."""
TAG = "timesteps"
TITLE = "Timesteps that are trained at"

SIZE = (960, 540)
LEFT, TOP, RIGHT, BOTTOM = 92, 92, 28, 68
PAPER, INK, QUIET, GRID, BAR, MARK = "#ffffff", "#1c1c1e", "#62626a", "#e3e3e6", "#2f6fb3", "#c8552b"


class _Many(Draws):
    """Numbers of so many samples from one generator for each purpose: fast, where nobody asks for single samples."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(range(count))
        self._seed = seed

    def _scalars(self, draw: Callable[[Tensor, torch.Generator], object], stream: int) -> Tensor:
        numbers = torch.empty(len(self.seeds))
        draw(numbers, torch.Generator().manual_seed(mix(self._seed, stream)))
        return numbers


def token_counts(data: TrainingData) -> Counter[int]:
    """Samples of an epoch by their number of image tokens: pairs of latent rows times pairs of latent columns."""
    side = 2 * data.traits.latent_stride
    counts: Counter[int] = Counter()
    for number in range(len(data.config.datasets)):
        for bucket, samples in data.bucket_counts(number).items():
            counts[(bucket.width // side) * (bucket.height // side)] += samples
    return counts


def drawn_timesteps(objective: Objective, tokens: Mapping[int, int], count: int = DRAWS) -> Tensor:
    """(about `count`,) float32 in [0, 1000]: what a run draws for samples of those many tokens, in proportion."""
    whole = sum(tokens.values())
    parts = [
        objective.sigmas(_Many(max(1, round(count * samples / whole)), mix(SEED, number)), number)
        for number, samples in sorted(tokens.items())
    ]
    return 1000 * torch.cat(parts)


def show(
    objective: Objective,
    data: TrainingData,
    path: Path,
    *,
    trackers: PictureLog | None = None,
    step: int = 0,
) -> None:
    """Writes the picture to a PNG file, and gives it to the trackers; what fails is said, and no more.

    To be called in the main process.
    """
    try:
        timesteps, settings = drawn_timesteps(objective, token_counts(data)), objective.density()
        picture = histogram(timesteps, TITLE, settings)
        save_png(picture, path, {})
        if trackers is not None:
            trackers.picture(TAG, picture, settings, step)
    except Exception as error:  # noqa: BLE001 - side work must never end the training
        logger.warning("no picture of the timesteps: %s: %s", type(error).__name__, error)


def histogram(timesteps: Tensor, title: str, settings: str = "") -> Image.Image:
    """How often timesteps (in [0, 1000]) are drawn, in percent for each of `BINS` ranges, with their median marked."""
    counts = torch.histc(timesteps.float(), BINS, 0, 1000)
    shares = (100 * counts / counts.sum().clamp_min(1)).tolist()
    low, median, high = torch.quantile(timesteps.float(), torch.tensor([0.1, 0.5, 0.9])).tolist()
    sheet = _Sheet(max(shares))
    sheet.title(title, settings, f"median {median:.0f}, 80 % between {low:.0f} and {high:.0f}")
    sheet.axes()
    sheet.bars(shares)
    sheet.mark(median)
    return sheet.image


class _Sheet:
    """A diagram: timesteps from left to right, percent upwards."""

    def __init__(self, highest: float) -> None:
        self.tick = _tick(highest)
        self.top = self.tick * max(1, -(-highest // self.tick))  # the first grid line above all bars
        self.image = Image.new("RGB", SIZE, PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._fonts: dict[int, Any] = {size: ImageFont.load_default(size) for size in (14, 15, 22)}

    def x(self, timestep: float) -> float:
        """Where a timestep lies."""
        return LEFT + (SIZE[0] - LEFT - RIGHT) * timestep / 1000

    def y(self, percent: float) -> float:
        """How high a share lies."""
        return SIZE[1] - BOTTOM - (SIZE[1] - TOP - BOTTOM) * percent / self.top

    def text(self, at: tuple[float, float], text: str, anchor: str, colour: str = QUIET, size: int = 14) -> None:
        """Writes a line."""
        self._draw.text(at, text, fill=colour, font=self._fonts[size], anchor=anchor)

    def title(self, title: str, settings: str, summary: str) -> None:
        """Writes what is shown."""
        self.text((LEFT, 30), title, "ls", INK, 22)
        self.text((LEFT, 54), settings, "ls", QUIET, 15)
        self.text((LEFT, 76), summary, "ls", MARK, 15)

    def axes(self) -> None:
        """Draws the grid with its numbers."""
        for number in range(round(self.top / self.tick) + 1):
            y = self.y(number * self.tick)
            self._draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill=GRID if number else QUIET)
            self.text((LEFT - 10, y), f"{number * self.tick:g} %", "rm")
        for timestep in range(0, 1001, 100):
            x = self.x(timestep)
            self._draw.line([(x, self.y(0)), (x, self.y(0) + 5)], fill=QUIET)
            self.text((x, self.y(0) + 10), str(timestep), "ma")
        self.text((self.x(500), SIZE[1] - 14), "timestep (0: clean image, 1000: noise only)", "ms", INK, 15)
        upright = Image.new("RGB", (SIZE[1] - TOP - BOTTOM, 22), PAPER)
        caption = f"share of samples, per {1000 // BINS} timesteps"
        font = self._fonts[15]
        ImageDraw.Draw(upright).text((upright.width / 2, 17), caption, fill=INK, font=font, anchor="ms")
        self.image.paste(upright.rotate(90, expand=True), (8, TOP))

    def bars(self, shares: Sequence[float]) -> None:
        """Draws a bar for each range."""
        width = 1000 / len(shares)
        for number, share in enumerate(shares):
            if share > 0:
                left, right = self.x(number * width) + 1, self.x((number + 1) * width) - 1
                self._draw.rectangle([left, min(self.y(share), self.y(0) - 1), right, self.y(0) - 1], fill=BAR)

    def mark(self, timestep: float) -> None:
        """Draws a dashed line from bottom to top."""
        x = self.x(timestep)
        for y in range(TOP, SIZE[1] - BOTTOM, 10):
            self._draw.line([(x, y), (x, min(y + 5, SIZE[1] - BOTTOM))], fill=MARK, width=2)


def _tick(highest: float) -> float:
    """A round distance of grid lines, so that there are about five."""
    size = 0.01
    while True:
        for step in (1, 2, 5):
            if highest <= 5 * step * size:
                return step * size
        size *= 10
