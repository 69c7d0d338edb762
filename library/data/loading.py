"""Makes batches: from caches with threads that read ahead, from image files with worker processes."""

from __future__ import annotations

import os
import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.data.images import load_pixels
from library.data.items import Item
from library.data.latents import image_seed
from library.data.order import Share
from library.data.texts import stacked
from library.log import DataError, UserError
from library.randomness import mix
from library.types import Batch, Cond, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.dataset import TrainingData

BATCHES_AHEAD = 4
MIRROR_STREAM = 0x6D6972726F72
"""Keeps the decision to mirror apart from a sample's noise."""

Tokenize = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a batch."""

    index: int
    item: Item
    draw: int
    mirrored: bool


def samples_of(data: TrainingData, share: Share) -> list[Sample]:
    """The images of a share, and what is drawn for each."""
    samples = []
    for offset, index in enumerate(share.entries):
        item, draw = data.items[index], mix(data.seed, share.epoch, share.position + offset)
        mirrored = item.subset.flip_aug and random.Random(mix(draw, MIRROR_STREAM)).random() < 0.5
        samples.append(Sample(index, item, draw, mirrored))
    return samples


class PixelDataset(Dataset[Any]):
    """Decodes the images of one batch after another; holds nothing, so that worker processes cost no memory."""

    def __getitem__(self, samples: Sequence[Sample]) -> Tensor | UserError:
        """(B, H, W, 3) uint8; an error that the user can mend is handed over as a value."""
        try:
            return torch.from_numpy(np.stack([_pixels(sample) for sample in samples]))
        except DataError as error:
            return error


def _pixels(sample: Sample) -> np.ndarray[Any, np.dtype[np.uint8]]:
    item = sample.item
    return load_pixels(
        item.path,
        item.original,
        item.assignment,
        orientation=item.orientation,
        interpolation=item.subset.resize_interpolation,
        mirrored=sample.mirrored,
    )


class Loader:
    """Batches of one process, epoch after epoch; keeps its worker processes where that is wanted."""

    def __init__(self, data: TrainingData, *, workers: int, persistent: bool) -> None:
        self.data = data
        self.workers = 0 if data.latents is not None else min(workers, os.cpu_count() or 1)
        self._jobs = _Jobs()
        self._pool: DataLoader[Any] | None = None
        if self.workers > 0:
            self._pool = DataLoader(
                PixelDataset(),
                batch_size=None,
                sampler=self._jobs,
                num_workers=self.workers,
                persistent_workers=persistent,
                collate_fn=_as_it_is,
                worker_init_fn=_ignore_interrupts,
            )

    def batches(self, shares: Sequence[Share], tokenize: Tokenize | None) -> Iterator[Batch]:
        """The batches of some shares."""
        for share, samples, images, cond in self._loaded(shares):
            yield self._batch(share, samples, images, cond, tokenize)

    def _loaded(self, shares: Sequence[Share]) -> Iterator[tuple[Share, list[Sample], Tensor, Cond | None]]:
        """Shares with latents or pixels, and text outputs."""
        if self._pool is None or self.data.latents is not None:
            yield from _ahead(self._load, shares)
            return
        self._jobs.samples = (samples_of(self.data, share) for share in shares)
        for share, pixels in zip(shares, self._pool, strict=True):
            if isinstance(pixels, UserError):
                raise pixels
            samples = samples_of(self.data, share)
            yield share, samples, pixels, self._cond(samples)

    def _load(self, share: Share) -> tuple[Share, list[Sample], Tensor, Cond | None]:
        samples, latents = samples_of(self.data, share), self.data.latents
        if latents is None:
            images = torch.from_numpy(np.stack([_pixels(sample) for sample in samples]))
        else:
            images = torch.stack([latents.load(sample.index, sample.mirrored) for sample in samples])
        return share, samples, images, self._cond(samples)

    def _cond(self, samples: Sequence[Sample]) -> Cond | None:
        cond = self.data.cond
        return None if cond is None else stacked([cond.load(sample.index) for sample in samples])

    def _batch(
        self, share: Share, samples: Sequence[Sample], images: Tensor, cond: Cond | None, tokenize: Tokenize | None
    ) -> Batch:
        items = [sample.item for sample in samples]
        settings = self.data.config.datasets[items[0].dataset]
        cached = self.data.latents is not None
        captions = [item.caption for item in items]
        return Batch(
            names=[item.path for item in items],
            captions=captions,
            latents=images if cached else None,
            pixels=None if cached else images.permute(0, 3, 1, 2).float().div(127.5).sub(1),
            cond=cond,
            tokens=None if tokenize is None else tokenize(captions),
            loss_weights=torch.full((len(items),), share.weight),
            draws=[sample.draw for sample in samples],
            image_seeds=[image_seed(sample.item, sample.mirrored) for sample in samples],
            size=items[0].assignment.bucket,
            original_sizes=[item.original for item in items],
            crops=[_crop(sample) for sample in samples],
            multiplier=float(settings.network_multiplier),
            attributes=[dict(item.subset.custom_attributes) for item in items],
            completes_step=share.completes_step,
            epoch=share.epoch,
            index=share.index,
        )


class _Jobs:
    """What the worker processes are to do next, as a sampler."""

    def __init__(self) -> None:
        self.samples: Iterable[list[Sample]] = ()

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self.samples)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the worker processes too, but only the main process decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(value: Any) -> Any:
    return value


def _crop(sample: Sample) -> tuple[int, int]:
    given = sample.item.assignment
    return given.mirrored_left() if sample.mirrored else given.left, given.top


def _ahead(load: Callable[[Share], Any], shares: Sequence[Share]) -> Iterator[Any]:
    """The results in order, a few of them computed ahead by threads."""
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(BATCHES_AHEAD, thread_name_prefix="batches")
    try:
        for share in shares:
            waiting.append(pool.submit(load, share))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
