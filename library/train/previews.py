"""Sample pictures while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.log import UserError, get_logger
from library.sampling import SampleRequest, image_metadata, overview, preview_name, save_png
from library.train import watch
from library.train.ranks import Ranks
from library.train.rng import rng_untouched
from library.train.state import RunState

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.option_groups import SampleOptions

logger = get_logger(__name__)

ERROR_BUDGET = 3
"""Rounds in a row without a single picture after which sampling is given up."""


class PictureLog(Protocol):
    """What takes the pictures besides the folder."""

    def picture(self, tag: str, picture: Image, caption: str, step: int) -> None:
        """See `library.train.trackers.Tracker`."""


def sample_due(options: SampleOptions, *, step: int | None = None, epoch: int | None = None) -> bool:
    """Whether samples are made after this step, or at the end of this epoch; of the two options that of epochs wins."""
    every_epochs, every_steps = options.sample_every_n_epochs or 0, options.sample_every_n_steps or 0
    if step == 0:
        return options.sample_at_first
    if every_epochs > 0:
        return epoch is not None and epoch % every_epochs == 0
    return every_steps > 0 and step is not None and step % every_steps == 0


@dataclass(kw_only=True)
class Previews:
    """Makes sample pictures in the main process. Nothing that fails here ends the training."""

    options: SampleOptions
    output_dir: Path
    output_name: str | None = None
    parse: Callable[[Path], Sequence[SampleRequest]]
    """Reads the prompt file; raises UserError or an OSError."""
    render: Callable[[SampleRequest, int], Image]
    """Makes the picture of a request; called without gradients, within `evaluating`."""
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Puts what is trained into the state in which it is used, meanwhile."""
    trackers: PictureLog | None = None
    with_overview: bool = True
    """Whether all pictures are also shown in one, `sample/<name>_overview.png`."""
    ranks: Ranks = field(default_factory=Ranks)
    problems: list[str] = field(default_factory=list)
    """What went wrong, in words."""
    _requests: Sequence[SampleRequest] = ()
    _stamp: tuple[int, int] | None = None
    _bad_rounds: int = 0
    _rows: list[tuple[str, list[Image | None]]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the pictures go."""
        return self.output_dir / "sample"

    @property
    def requests(self) -> Sequence[SampleRequest]:
        """The prompts, as read last."""
        return self._requests

    def begin(self, state: RunState) -> None:
        """Reads the prompts, and makes the pictures before the first step where wanted."""
        if not self.ranks.is_main or not self.options.sample_prompts:
            return
        self._read_prompts()
        if state.step == 0 and sample_due(self.options, step=0):
            self.make(state.step)

    def after_step(self, state: RunState) -> None:
        """Makes pictures when the step is due or somebody asked for them."""
        if sample_due(self.options, step=state.step) or state.requests.sample:
            self.make(state.step)

    def after_epoch(self, state: RunState) -> None:
        """Makes pictures when the epoch is due."""
        if sample_due(self.options, epoch=state.epochs_done):
            self.make(state.step, epoch=state.epochs_done)

    def finish(self, state: RunState) -> None:
        """Says what went wrong."""
        if self.problems:
            logger.warning("samples that failed: %s", "; ".join(dict.fromkeys(self.problems)))

    def make(self, step: int, epoch: int | None = None) -> list[Path]:
        """Makes a round of pictures now and gives their files."""
        if not self.ranks.is_main or not self.options.sample_prompts or self._bad_rounds >= ERROR_BUDGET:
            return []
        self._read_prompts()
        if not self._requests:
            return []
        made: list[Path | None] = []
        pictures: list[Image | None] = []
        logger.info("making %d sample picture(s) at step %d", len(self._requests), step)
        try:
            with rng_untouched(self.ranks.device), self.evaluating():
                for index, request in enumerate(self._requests):
                    path, picture = self._one(request, index, step, epoch)
                    made.append(path)
                    pictures.append(picture)
        except Exception as error:  # noqa: BLE001 - side work must never end the training
            self._complain("sampling", error)
        watch.heartbeat("training")
        self._count(made)
        self._rewrite_overview(step, epoch, pictures)
        return [path for path in made if path is not None]

    def _one(
        self, request: SampleRequest, index: int, step: int, epoch: int | None
    ) -> tuple[Path | None, Image | None]:
        import torch

        watch.heartbeat(f"making sample {index} at step {step}")
        try:
            with torch.no_grad():
                picture = self.render(request, index)
            path = self.folder / preview_name(request, self.output_name, step=step, epoch=epoch)
            save_png(picture, path, image_metadata(request))
            if self.trackers is not None:
                self.trackers.picture(f"sample_{index}", picture, request.prompt, step)
        except Exception as error:  # noqa: BLE001 - as above
            self._complain(f"sample {index} at step {step}", error)
            return None, None
        return path, picture

    def _read_prompts(self) -> None:
        """Reads the prompt file when it is new or has changed; what can't be read leaves the old prompts."""
        assert self.options.sample_prompts
        path = Path(self.options.sample_prompts)
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            again = self._stamp is not None
            self._stamp = stamp
            self._requests = list(self.parse(path))
        except Exception as error:  # noqa: BLE001 - as above
            kept = f"; going on with the {len(self._requests)} prompts from before" if self._requests else ""
            self._complain(f"{path.name}{kept}", error)
        else:
            if again:
                logger.info("%s has changed: %d prompt(s)", path.name, len(self._requests))

    def _count(self, made: Sequence[Path | None]) -> None:
        if any(made):
            self._bad_rounds = 0
            return
        self._bad_rounds += 1
        if self._bad_rounds >= ERROR_BUDGET:
            logger.warning("no sample could be made %d times in a row: sampling is switched off", ERROR_BUDGET)

    def _rewrite_overview(self, step: int, epoch: int | None, pictures: list[Image | None]) -> None:
        if not self.with_overview or not any(pictures):
            return
        self._rows.append(
            (f"step {step}" if epoch is None else f"epoch {epoch}", [_small(picture) for picture in pictures])
        )
        width = max(len(row) for _, row in self._rows)
        grid = [row + [None] * (width - len(row)) for _, row in self._rows]
        columns = [request.prompt for request in self._requests][:width]
        columns += [""] * (width - len(columns))
        try:
            picture = overview(grid, [label for label, _ in self._rows], columns)
            save_png(picture, self.folder / f"{self.output_name or 'last'}_overview.png", {})
        except Exception as error:  # noqa: BLE001 - as above
            self._complain("the overview", error)
            self.with_overview = False

    def _complain(self, what: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self.problems.append(f"{what}: {reason}")
        logger.warning("%s failed: %s - the training goes on", what, reason)


def _small(picture: Image | None, side: int = 256) -> Image | None:
    """A copy for the overview: many rounds of full pictures would fill the memory."""
    if picture is None:
        return None
    copy = picture.convert("RGB")
    copy.thumbnail((side, side))
    return copy
