"""Many images with one model: from a list of requests, or from prompts typed at the terminal."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.log import UserError, get_logger
from library.prompts import SampleRequest, parse_terminal
from library.sampling import image_metadata, save_png, timestamp

if TYPE_CHECKING:
    from PIL import Image

logger = get_logger(__name__)

QUESTION = "prompt (empty to end; options: --w --h --s --d --g --c --n --p2 --m%s): "


def prompts_from_terminal(first: SampleRequest, ask: Callable[[str], str] = input) -> Iterator[SampleRequest]:
    """Requests typed line by line, until an empty line or the end of input.

    Sizes, steps and guidance last until they are changed; `first` holds those to begin with. Where the model embeds no
    guidance, `--g` means the scale of the negative prompt, as `--c` does.
    """
    request = first
    while True:
        try:
            line = ask(QUESTION % (" --ss" if first.sampler else ""))
        except EOFError:
            return
        if not line.strip():
            return
        request, unmatched = parse_terminal(line.strip(), request)
        if first.guidance is None and request.guidance is not None:
            request = replace(request, guidance=None, cfg=request.guidance)
        for piece in unmatched:
            logger.warning('"--%s" is no option and is ignored; options look like --w 512', piece)
        yield request


@dataclass
class Session:
    """Renders requests and saves the images."""

    render: Callable[[SampleRequest], Image.Image]
    output_dir: Path
    set_multipliers: Callable[[Sequence[float]], None] | None = None
    """Changes the strengths of the networks."""
    multiple: int = 16
    """Sides are raised to multiples of this many pixels."""

    def run(self, requests: Iterable[SampleRequest]) -> list[Path]:
        """Makes an image of each request; gives their files."""
        return [self._make(request) for request in requests]

    def run_interactive(self, first: SampleRequest, ask: Callable[[str], str] = input) -> list[Path]:
        """Makes an image of each typed prompt; `first` holds sizes and the like to begin with.

        What goes wrong with one prompt is said, and the next one is asked for.
        """
        paths = []
        for request in prompts_from_terminal(first, ask):
            try:
                paths.append(self._make(request))
            except UserError as error:
                logger.error("%s", error)
        return paths

    def _make(self, request: SampleRequest) -> Path:
        if request.multipliers is not None and self.set_multipliers is not None:
            self.set_multipliers(request.multipliers)
        if request.seed is not None and not -(2**63) <= request.seed < 2**64:
            raise UserError(f"the seed {request.seed} is too large", "--d", "give a number below 2**64")
        request = request.fitted(self.multiple, up=True).seeded(secrets.randbits(32))
        path = self._free_path(f"{timestamp()}_{request.seed}")
        save_png(self.render(request), path, image_metadata(request))
        logger.info("%s: %s, %d steps, seed %s", path, request.size, request.steps, request.seed)
        return path

    def _free_path(self, stem: str) -> Path:
        """A name that isn't taken: two images of one seed may come within a second."""
        path, number = self.output_dir / f"{stem}.png", 1
        while path.exists():
            path, number = self.output_dir / f"{stem}_{number}.png", number + 1
        return path
