"""The images of a run as a source of batches, and the numbers that describe them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from library.data.holdout import validation_shares
from library.data.items import Item
from library.data.loading import Clock, Loader, Tokenize
from library.data.order import Epoch, Group, Lane, Order, Share, shared_out
from library.data.sources import Scan
from library.types import Batch, Size, Traits

if TYPE_CHECKING:
    from library.data.latents import LatentsStore
    from library.data.texts import TextStore


class TrainingData:
    """Items in buckets, their caches when there are any, and the order in which they come.

    `library.data.cache.fill_latents` and `fill_text` set `latents` and `cond`; without them batches carry pixels
    and no text outputs.
    """

    def __init__(
        self, scan: Scan, traits: Traits, seed: int, *, prior_loss_weight: float = 1.0, text_variants: int = 0
    ) -> None:
        self.scan, self.config, self.traits, self.seed = scan, scan.config, traits, seed
        self.prior_loss_weight, self.text_variants = prior_loss_weight, text_variants
        self.words_from_cache = False
        """Whether captions are worded as they are cached, also before the cache is filled."""
        self.total_steps = 0
        """Length of the run in optimizer steps, once it is known: the token warm-up may be a share of it."""
        self.items: Sequence[Item] = scan.items
        """What is trained on."""
        self.all_items: Sequence[Item] = [*scan.items, *scan.held_out] if scan.held_out else scan.items
        """And what is held out for validation, behind it; what is cached has these numbers."""
        self.latents: LatentsStore | None = None
        self.cond: TextStore | None = None
        self._lanes = _lanes(scan)
        self.order = Order(list(self._lanes.values()), seed)
        self._loader: Loader | None = None

    # numbers

    @cached_property
    def regularization_images(self) -> int:
        """Different regularization images, those included that don't come in every epoch."""
        return sum(item.subset.is_reg for item in self.items)

    @property
    def images(self) -> int:
        """Different training images; one in several datasets counts for each."""
        return len(self.items) - self.regularization_images

    @cached_property
    def repeated(self) -> int:
        """Samples of an epoch: images times repeats, regularization images included."""
        return sum(len(lane) for lane in self._lanes.values())

    def samples(self, dataset: int, *, regularization: bool) -> int:
        """Samples of an epoch from a dataset: of training images or of regularization images."""
        total = sum(self.bucket_counts(dataset).values())
        training = sum(item.repeats for item in self.items if item.dataset == dataset and not item.subset.is_reg)
        return total - training if regularization else training

    def regularization_line(self) -> str | None:
        """How regularization images are used, for people."""
        found = self.regularization_images
        if not found:
            return None
        each = sum(self.samples(number, regularization=True) for number in range(len(self.config.datasets)))
        turns = [-(-len(lane.taking_turns) // lane.turns) for lane in self._lanes.values() if lane.turns]
        line = f"{found} regularization images found, {each} samples of them per epoch"
        if turns:
            line += f"; they take turns, all are seen within {max(turns)} epochs"
        weight = "" if self.prior_loss_weight == 1 else f", their loss counts {self.prior_loss_weight:g} times"
        return line + weight

    def validation_line(self) -> str | None:
        """What is held out for validation, for people."""
        count = len(self.scan.held_out)
        if not count:
            return None
        whole = len({item.path for item in self.scan.held_out})
        several = "" if whole == count else f", in {count} sizes or datasets"
        return f"{whole} images held out for validation{several}"

    @cached_property
    def conditioned(self) -> bool:
        """Whether samples come with conditioning images that aren't masks."""
        return any(item.conditioning is not None and not item.subset.mask for item in self.items)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Images per batch and process, one for each dataset."""
        return tuple(settings.batch_size for settings in self.config.datasets)

    def batches_in_epoch(self, world: int = 1) -> int:
        """Micro-batches of each process in an epoch; with one process: all batches."""
        return self.order.groups(world)

    def steps_in_epoch(self, world: int, accumulation: int) -> int:
        """Optimizer steps in an epoch."""
        return self.order.steps(world, accumulation)

    def bucket_counts(self, dataset: int) -> dict[Size, int]:
        """Samples of an epoch in each bucket of a dataset, sorted by size."""
        return {bucket: len(lane) for (number, bucket), lane in self._lanes.items() if number == dataset}

    def mean_aspect_error(self, dataset: int) -> float:
        """Mean distance of the aspect ratios of images and buckets; 0 when there are no images."""
        errors = [abs(item.assignment.ar_error) for item in self.items if item.dataset == dataset]
        return sum(errors) / len(errors) if errors else 0.0

    # batches

    def epoch_batches(self, epoch: int, world: int = 1, accumulation: int = 1, start: int = 0) -> list[Group]:
        """The micro-steps of an epoch (from 1) from a position on, each with the share of every process."""
        return self.order.epoch(epoch, world, accumulation)[start:]

    def loader(
        self,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        *,
        workers: int = 0,
        persistent: bool = True,
        tokenize: Tokenize | None = None,
    ) -> Iterator[Batch]:
        """The batches of one process in an epoch (from 1), from micro-step `start` on.

        `workers` processes decode images; with cached latents threads read ahead instead. `tokenize` is called in this
        thread for every batch.
        """
        if self._loader is None:
            self._loader = Loader(self, workers=workers, persistent=persistent)
        order = self.order.epoch(epoch, world, accumulation)
        begun = (epoch - 1) * self.steps_in_epoch(world, accumulation)
        return self._loader.batches(_Shares(order, rank, start), Clock(begun, accumulation), tokenize)

    def validation_batches(
        self, rank: int = 0, world: int = 1, *, most: int | None = None, tokenize: Tokenize | None = None
    ) -> Iterator[Batch]:
        """The batches of held-out images of one process, the same each time; `most` is for all processes together.

        They are decoded by threads: the worker processes may be at the training's next batches.
        """
        shares = validation_shares(self.all_items, self.batch_sizes, most)[rank::world]
        return Loader(self, workers=0, persistent=False).batches(shares, Clock(0, 1), tokenize)


def _lanes(scan: Scan) -> dict[tuple[int, Size], Lane]:
    """The entries of each bucket of each dataset, sorted; surplus regularization images take turns."""
    always: dict[tuple[int, Size], list[int]] = {}
    turns: dict[tuple[int, Size], list[int]] = {}
    for index, item in enumerate(scan.items):
        place = item.dataset, item.assignment.bucket
        always.setdefault(place, [])
        if item.subset.is_reg and item.dataset in scan.reg_slots:
            turns.setdefault(place, []).append(index)
        else:
            always[place].extend([index] * item.repeats)
    dealt: dict[tuple[int, Size], int] = {}
    for dataset, slots in scan.reg_slots.items():
        places = [place for place in turns if place[0] == dataset]
        shares = shared_out(slots, [len(turns[place]) for place in places])
        dealt |= dict(zip(places, shares, strict=True))
    return {
        place: Lane(
            tuple(entries),
            scan.config.datasets[place[0]].batch_size,
            tuple(turns.get(place, ())),
            dealt.get(place, 0),
        )
        for place, entries in sorted(always.items())
    }


class _Shares(Sequence[Share]):
    """The shares of one process, each made when it is asked for."""

    def __init__(self, epoch: Epoch, rank: int, start: int) -> None:
        self._epoch, self._rank, self._start = epoch, rank, start

    def __len__(self) -> int:
        return max(len(self._epoch) - self._start, 0)

    def __getitem__(self, index: int) -> Share:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._epoch.share(self._start + index, self._rank)
