"""Fills the caches: finds out what is missing or stale, encodes that, and says how much it was."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from library.data.cache_names import CacheNames
from library.data.images import load_picture, to_tensor
from library.data.latents import Drawn, Encoded, LatentsEntry, LatentsFiles, LatentsMemory, LatentsStore, image_seed
from library.data.texts import TextEntry, TextFiles, TextMemory, TextStore
from library.data.views import still
from library.log import DataError, get_logger, raise_all
from library.progress import Progress
from library.randomness import Draws
from library.types import Cond, Posterior

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.dataset import TrainingData

logger = get_logger(__name__)

THREADS = min(16, 2 * (os.cpu_count() or 1))
IMAGES_AHEAD = 2 * THREADS
"""Decoded images that may wait for the encoder."""
WRITES_AHEAD = 64
CHECKED_AT_ONCE = 32
"""Files that a thread looks at before it asks for more."""

EncodeImages = Callable[["Tensor"], Posterior]
"""The posterior of the latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]."""

EncodeText = Callable[[list[str]], Cond]
"""Text outputs, with a batch axis."""

StoreT = TypeVar("StoreT", LatentsStore, TextStore)
EntryT = TypeVar("EntryT", LatentsEntry, TextEntry)


@dataclass(frozen=True)
class Summary:
    """What a cache held and what had to be encoded."""

    kind: str
    total: int
    reasons: Counter[str]
    """Why entries had to be encoded, and how many."""

    @property
    def encoded(self) -> int:
        """Entries that were, or would have to be, encoded."""
        return self.reasons.total()

    @property
    def reused(self) -> int:
        """Entries that were there and right."""
        return self.total - self.encoded

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.kind}: {self.total} in all, {self.reused} reused, {self.encoded} encoded" + (
            f" ({reasons})" if reasons else ""
        )


@dataclass
class Check(Generic[StoreT, EntryT]):
    """A store, and which of its entries have to be encoded and why."""

    store: StoreT
    kind: str
    total: int
    stale: dict[int, str] = field(default_factory=dict)
    """Reason by number of the entry."""

    @property
    def summary(self) -> Summary:
        """Counts for people."""
        return Summary(self.kind, self.total, Counter(self.stale.values()))

    @property
    def on_disk(self) -> bool:
        """Whether the store outlives the process."""
        return isinstance(self.store, LatentsFiles | TextFiles)

    @property
    def folders(self) -> list[Path]:
        """Where files will be written."""
        if not self.on_disk:
            return []
        return sorted({self.store.entries[number].paths[0].parent for number in self.stale})

    @property
    def bytes_needed(self) -> int:
        """Room on the disk for the latents to be encoded; 0 for text, whose size only the encoder knows."""
        if not isinstance(self.store, LatentsFiles):
            return 0
        return sum(self.store.bytes_needed(self.store.entries[number]) for number in self.stale)


LatentsCheck = Check[LatentsStore, LatentsEntry]
TextCheck = Check[TextStore, TextEntry]


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What decides whether something cached may be used, where it lies, and which part of it is this process's."""

    identity: str = ""
    """Of the encoder's weights and settings."""
    dtype: str = ""
    """Of the encoder."""
    to_disk: bool = True
    skip_check: bool = False
    names: CacheNames = field(default_factory=CacheNames)
    compact: bool = False
    posterior: bool = False
    rank: int = 0
    world: int = 1
    visible: bool = True
    """Whether to show progress."""


def check_latents(data: TrainingData, settings: CacheSettings) -> LatentsCheck:
    """Which latents would have to be encoded by this process; opens every cache file unless told to skip that."""
    store: LatentsStore
    if settings.to_disk:
        store = LatentsFiles(
            data.all_items,
            data.traits,
            settings.identity,
            settings.dtype,
            skip_check=settings.skip_check,
            names=settings.names,
            compact=settings.compact,
            posterior=settings.posterior,
        )
    else:
        store = LatentsMemory(data.all_items, posterior=settings.posterior)
    return _checked(LatentsCheck(store, "latents", 0), settings)


def check_text(data: TrainingData, settings: CacheSettings) -> TextCheck:
    """Which text outputs would have to be encoded by this process; opens every cache file unless told to skip that."""
    store: TextStore
    if settings.to_disk:
        suffix = data.traits.text_suffix
        if suffix is None:
            raise DataError(
                f"text outputs of {data.traits.name} models can't be cached on disk",
                "--cache_text_encoder_outputs_to_disk",
                "leave it out",
                code="E-CACHE",
            )
        store = TextFiles(
            data.all_items,
            suffix,
            settings.identity,
            settings.dtype,
            skip_check=settings.skip_check,
            names=settings.names,
            variants=data.text_variants,
            compact=settings.compact,
        )
    else:
        store = TextMemory(data.all_items, variants=data.text_variants)
    return _checked(TextCheck(store, "text outputs", 0), settings)


def _checked(check: Check[StoreT, EntryT], settings: CacheSettings) -> Check[StoreT, EntryT]:
    mine = _share(check.store.entries, settings)
    check.total = len(mine)
    problem: Callable[[Any], str | None] = check.store.problem
    if not settings.to_disk:
        check.stale = {entry.number: reason for entry in mine if (reason := problem(entry)) is not None}
        return check
    title = f"checking cached {check.kind}"
    pieces = [mine[start : start + CHECKED_AT_ONCE] for start in range(0, len(mine), CHECKED_AT_ONCE)]

    def look(piece: list[EntryT]) -> list[str | None]:
        return [problem(entry) for entry in piece]

    with ThreadPoolExecutor(THREADS) as pool, Progress(title, len(mine), "files", visible=settings.visible) as bar:
        for piece, reasons in zip(pieces, pool.map(look, pieces), strict=True):
            bar.advance(len(piece))
            check.stale |= {
                entry.number: reason for entry, reason in zip(piece, reasons, strict=True) if reason is not None
            }
    return check


def _share(entries: Sequence[EntryT], settings: CacheSettings) -> list[EntryT]:
    """The entries of one process: those of one file go to one process; in memory everybody needs all."""
    if not settings.to_disk or settings.world == 1:
        return list(entries)
    numbers: dict[object, int] = {}
    mine = settings.rank
    return [entry for entry in entries if numbers.setdefault(entry.paths[0], len(numbers)) % settings.world == mine]


def fill_latents(
    data: TrainingData, encode: EncodeImages, check: LatentsCheck, *, batch_size: int = 1, visible: bool = True
) -> Summary:
    """Encodes the latents that are missing or stale and makes `data` use the cache.

    `check` is what `check_latents` gave. Processes share the work without waiting for one another; wait for all
    before training. What is encoded stays, whatever happens afterwards. Errors: DataError naming all images that
    can't be decoded, or the one that gives NaN.
    """
    store = check.store
    stale = [store.entries[number] for number in check.stale]
    failures: list[DataError] = []
    title, summary = "caching latents", check.summary
    with _Writer() as writer, Progress(title, len(stale), "images", visible=visible) as bar:
        for batch in _decoded(_batches(stale, batch_size), failures):
            if not batch.entries:
                continue
            straight = _finite(encode(batch.pixels), batch.entries)
            mirrored = _finite(encode(batch.pixels.flip(-1)), batch.entries) if batch.entries[0].mirrored else None
            for row, (entry, mask) in enumerate(zip(batch.entries, batch.masks, strict=True)):
                turned = None if mirrored is None else mirrored.row(row)
                writer.submit(_keep, store, entry, straight.row(row), turned, mask)
            bar.advance(len(batch.entries))
    raise_all(failures)
    data.latents = store
    logger.info("%s", summary)
    return summary


@dataclass(frozen=True)
class _Batch:
    """Entries of one size with what their images hold."""

    entries: list[LatentsEntry]
    pixels: Tensor
    """(B, 3, H, W) in [-1, 1]"""
    masks: list[Tensor | None]
    """(H, W) in [0, 1]"""


def _keep(
    store: LatentsStore, entry: LatentsEntry, straight: Posterior, mirrored: Posterior | None, mask: Tensor | None
) -> None:
    """Keeps an entry with latents drawn from its posteriors, each (C, h, w)."""
    turned = None if mirrored is None else _drawn(mirrored, image_seed(entry.item, mirrored=True))
    store.save(entry, Encoded(straight=_drawn(straight, image_seed(entry.item)), mirrored=turned, mask=mask))


def _drawn(posterior: Posterior, seed: int) -> Drawn:
    noise = Draws([seed]).posterior(tuple(posterior.mean.shape))[0]
    return Drawn(posterior.sample(noise), *posterior)


def _batches(entries: Iterable[LatentsEntry], batch_size: int) -> list[list[LatentsEntry]]:
    """Entries of one size each, small buckets first."""
    groups: dict[tuple[int, int, int, bool], list[LatentsEntry]] = {}
    for entry in entries:
        bucket = entry.item.assignment.bucket
        groups.setdefault((bucket.area, *bucket, entry.mirrored), []).append(entry)
    return [
        group[start : start + batch_size]
        for _, group in sorted(groups.items())
        for start in range(0, len(group), batch_size)
    ]


def _decoded(batches: Iterable[list[LatentsEntry]], failures: list[DataError]) -> Iterator[_Batch]:
    """Batches with pixels and masks, decoded ahead by many threads; images that fail are left out and noted."""
    waiting: deque[tuple[list[LatentsEntry], list[Future[tuple[Tensor, Tensor | None]]]]] = deque()
    pool = ThreadPoolExecutor(THREADS)

    def decode(entry: LatentsEntry) -> tuple[Tensor, Tensor | None]:
        picture = load_picture(entry.item, still(entry.item))
        return to_tensor(picture.pixels), None if picture.mask is None else torch.from_numpy(picture.mask)

    def collected() -> _Batch:
        entries, futures = waiting.popleft()
        good: list[LatentsEntry] = []
        rows: list[Tensor] = []
        masks: list[Tensor | None] = []
        for entry, future in zip(entries, futures, strict=True):
            try:
                row, mask = future.result()
            except DataError as error:
                failures.append(error)
            else:
                good.append(entry)
                rows.append(row)
                masks.append(mask)
        pixels = torch.stack(rows) if len(rows) > 1 else rows[0][None] if rows else torch.empty(0)
        return _Batch(good, pixels, masks)

    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(decode, entry) for entry in batch]))
            if sum(len(entries) for entries, _ in waiting) >= IMAGES_AHEAD:
                yield collected()
        while waiting:
            yield collected()
    finally:
        pool.shutdown(cancel_futures=True)


def _finite(posterior: Posterior, entries: Sequence[LatentsEntry]) -> Posterior:
    """The posterior on the CPU. Errors: DataError when a number isn't one."""
    mean, deviation = (tensor.detach().float().cpu() for tensor in posterior)
    for row, entry in enumerate(entries):
        if not (torch.isfinite(mean[row]).all() and torch.isfinite(deviation[row]).all()):
            hint = "give --no_half_vae, or use another autoencoder"
            raise DataError("the autoencoder gives NaN for an image", entry.item.path, hint, code="E-NAN")
    return Posterior(mean, deviation)


class _Writer:
    """Writes entries with a few threads while the encoder goes on; on leaving, all is written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._pending: deque[Future[None]] = deque()

    def submit(self, save: Callable[..., None], *arguments: object) -> None:
        """Starts to write; waits when too much is waiting. Errors: those of earlier entries."""
        self._pending.append(self._pool.submit(save, *arguments))
        while len(self._pending) > WRITES_AHEAD:
            self._pending.popleft().result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown()
        if error is None:
            for future in self._pending:
                future.result()


def fill_text(
    data: TrainingData, encode: EncodeText, check: TextCheck, *, batch_size: int = 1, visible: bool = True
) -> Summary:
    """Encodes the captions whose outputs are missing or stale, each different one once, and makes `data` use the cache.

    `check` is what `check_text` gave. Processes share the work without waiting for one another; wait for all before
    training. What is encoded stays, whatever happens afterwards. Errors: DataError naming an image whose caption
    gives NaN.
    """
    store = check.store
    by_text: dict[str, list[TextEntry]] = {}
    for number in check.stale:
        entry = store.entries[number]
        by_text.setdefault(entry.text, []).append(entry)
    texts, summary = list(by_text), check.summary
    with _Writer() as writer, Progress("caching text outputs", len(texts), "captions", visible=visible) as bar:
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            cond = {name: tensor.detach().cpu() for name, tensor in encode(chunk).items()}
            for row, text in enumerate(chunk):
                outputs = {name: tensor[row] for name, tensor in cond.items()}
                _check_outputs(outputs, by_text[text][0])
                for entry in by_text[text]:
                    writer.submit(store.save, entry, outputs)
            bar.advance(len(chunk))
    data.cond = store
    logger.info("%s", summary)
    return summary


def _check_outputs(outputs: Cond, entry: TextEntry) -> None:
    for name, tensor in outputs.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            hint = "give the text encoders another type, such as bf16"
            raise DataError(f"a text encoder gives NaN ({name}) for a caption", entry.name, hint, code="E-NAN")
