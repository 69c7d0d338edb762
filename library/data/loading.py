"""Makes batches: from caches with threads that read ahead, from image files with worker processes."""

from __future__ import annotations

import os
import random
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.data.caption_cache import TEXT_SEED, draw_cached
from library.data.captions import Moment, caption
from library.data.images import load_conditioning, load_picture
from library.data.items import Item
from library.data.latents import image_seed
from library.data.masks import to_latent_size
from library.data.order import Share
from library.data.texts import stacked
from library.data.views import View, drawn
from library.log import DataError, UserError
from library.randomness import mix
from library.types import Batch, Cond, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.dataset import TrainingData
    from library.data.latents import LatentsStore

BATCHES_AHEAD = 4
VIEW_STREAM, CAPTION_STREAM = 0x76696577, 0x63617074
"""Keep what is drawn for a sample's picture, its caption and its noise apart."""

Tokenize = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True, slots=True)
class Clock:
    """Tells the optimizer steps that are done before a micro-batch."""

    begun: int
    """Steps done before the epoch."""
    accumulation: int

    def step(self, share: Share) -> int:
        """Steps done when the share's turn comes."""
        return self.begun + share.index // self.accumulation


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a batch, and what was drawn for it."""

    index: int
    item: Item
    draw: int
    view: View
    text: str
    """The caption as the model sees it."""


def samples_of(data: TrainingData, share: Share, clock: Clock) -> list[Sample]:
    """The images of a share; what is drawn depends on the seed, the epoch and the place in it alone.

    What is drawn for a held-out image is always the same.
    """
    moment = Moment(share.epoch, clock.step(share), data.total_steps)
    samples = []
    for offset, index in enumerate(share.entries):
        item = data.all_items[index]
        draw = mix(data.seed, share.epoch, share.position + offset) if item.held_out is None else item.held_out
        view = drawn(item, random.Random(mix(draw, VIEW_STREAM)))
        generator = random.Random(mix(draw, CAPTION_STREAM))
        if data.cond is None and not data.words_from_cache:
            text = caption(item.caption, item.subset, generator, moment)
        else:
            text = draw_cached(item.caption, item.subset, data.text_variants, TEXT_SEED, generator, moment)
        samples.append(Sample(index, item, draw, view, text))
    return samples


class Images(NamedTuple):
    """The pictures of a batch."""

    pixels: Tensor | None
    """(B, H, W, 3) uint8"""
    latents: Tensor | None
    """(B, C, h, w)"""
    mask: Tensor | None
    """(B, 1, h, w)"""
    conditioning: Tensor | None
    """(B, H, W, 3) uint8"""


class PixelDataset(Dataset[Any]):
    """Decodes the images of one batch after another; holds next to nothing, so that worker processes cost no memory."""

    def __init__(self, stride: int, conditioned: bool) -> None:
        self.stride, self.conditioned = stride, conditioned

    def __getitem__(self, samples: Sequence[Sample]) -> Images | UserError:
        """The pictures of a batch; an error that the user can mend is handed over as a value."""
        try:
            pictures = [load_picture(each.item, each.view, conditioning=self.conditioned) for each in samples]
        except DataError as error:
            return error
        masks = [None if picture.mask is None else torch.from_numpy(picture.mask) for picture in pictures]
        shown = [picture.conditioning for picture in pictures if picture.conditioning is not None]
        return Images(
            pixels=torch.from_numpy(np.stack([picture.pixels for picture in pictures])),
            latents=None,
            mask=_stacked_masks(masks, self.stride),
            conditioning=torch.from_numpy(np.stack(shown)) if self.conditioned else None,
        )


def _stacked_masks(masks: Sequence[Tensor | None], stride: int) -> Tensor | None:
    """(B, 1, h, w) of masks (H, W) in pixels; an image without one counts wholly. None when no image has one."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    ones = torch.ones_like(present[0])
    return torch.stack([to_latent_size(ones if mask is None else mask, stride) for mask in masks])[:, None]


class Loader:
    """Batches of one process, epoch after epoch; keeps its worker processes where that is wanted."""

    def __init__(self, data: TrainingData, *, workers: int, persistent: bool) -> None:
        self.data = data
        self.workers = 0 if data.latents is not None else min(workers, os.cpu_count() or 1)
        self._pictures = PixelDataset(data.traits.latent_stride, data.conditioned)
        self._jobs = _Jobs()
        self._pool: DataLoader[Any] | None = None
        if self.workers > 0:
            self._pool = DataLoader(
                self._pictures,
                batch_size=None,
                sampler=self._jobs,
                num_workers=self.workers,
                persistent_workers=persistent,
                collate_fn=_as_it_is,
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # so that it draws nothing from the one that dropout uses
            )

    def batches(self, shares: Sequence[Share], clock: Clock, tokenize: Tokenize | None) -> Iterator[Batch]:
        """The batches of some shares."""
        for batch in self._made(shares, clock):
            # tokenizers are not for several threads at once
            yield batch if tokenize is None else replace(batch, tokens=tokenize(batch.captions))

    def _made(self, shares: Sequence[Share], clock: Clock) -> Iterator[Batch]:
        """Batches without tokens, some of them ahead of time."""
        if self._pool is None or self.data.latents is not None:
            yield from _ahead(partial(self._load, clock), shares)
            return
        drawn_ahead: deque[list[Sample]] = deque()
        self._jobs.samples = (self._remembered(drawn_ahead, share, clock) for share in shares)
        for share, images in zip(shares, self._pool, strict=True):
            if isinstance(images, UserError):
                raise images
            yield self._batch(share, drawn_ahead.popleft(), images)

    def _remembered(self, drawn_ahead: deque[list[Sample]], share: Share, clock: Clock) -> list[Sample]:
        samples = samples_of(self.data, share, clock)
        drawn_ahead.append(samples)
        return samples

    def _load(self, clock: Clock, share: Share) -> Batch:
        samples = samples_of(self.data, share, clock)
        images = self._pictures[samples] if self.data.latents is None else self._cached(self.data.latents, samples)
        if isinstance(images, UserError):
            raise images
        return self._batch(share, samples, images)

    def _cached(self, latents: LatentsStore, samples: Sequence[Sample]) -> Images:
        loaded = [latents.load(each.index, each.view.mirrored, each.draw) for each in samples]
        shown: Tensor | None = None
        if self.data.conditioned:
            shown = torch.from_numpy(np.stack([load_conditioning(each.item, each.view) for each in samples]))
        masks = _stacked_masks([each.mask for each in loaded], self.data.traits.latent_stride)
        return Images(None, torch.stack([each.latents for each in loaded]), masks, shown)

    def _cond(self, samples: Sequence[Sample]) -> Cond | None:
        cond = self.data.cond
        return None if cond is None else stacked([cond.load(each.index, each.text) for each in samples])

    def _batch(self, share: Share, samples: Sequence[Sample], images: Images) -> Batch:
        items, texts = [each.item for each in samples], [each.text for each in samples]
        settings = self.data.config.datasets[items[0].dataset]
        weights = [self.data.prior_loss_weight if item.subset.is_reg else 1.0 for item in items]
        return Batch(
            names=[item.path for item in items],
            captions=texts,
            latents=images.latents,
            pixels=None if images.pixels is None else _scaled(images.pixels),
            cond=self._cond(samples),
            conditioning=None if images.conditioning is None else _scaled(images.conditioning),
            mask=images.mask,
            loss_weights=torch.tensor(weights) * share.weight,
            draws=[each.draw for each in samples],
            image_seeds=[image_seed(each.item, each.view.mirrored) for each in samples],
            size=items[0].assignment.bucket,
            original_sizes=[item.original for item in items],
            crops=[(each.view.shown_left(each.item.assignment.bucket), each.view.top) for each in samples],
            multiplier=float(settings.network_multiplier),
            attributes=[dict(item.subset.custom_attributes) for item in items],
            completes_step=share.completes_step,
            epoch=share.epoch,
            index=share.index,
        )


def _scaled(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] of (B, H, W, 3) uint8."""
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


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


def _ahead(load: Callable[[Share], Batch], shares: Sequence[Share]) -> Iterator[Batch]:
    """The results in order, a few of them computed ahead by threads."""
    waiting: deque[Future[Batch]] = deque()
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
