"""Fills the caches: finds out what is missing or stale, encodes that, and says how much it was."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from library.data.images import load_pixels, to_tensor
from library.data.latents import LatentsEntry, LatentsFiles, LatentsMemory, LatentsStore, image_seed
from library.data.progress import Progress
from library.data.texts import TextEntry, TextFiles, TextMemory, TextStore
from library.log import DataError, get_logger, raise_all
from library.types import Cond

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.dataset import TrainingData

logger = get_logger(__name__)

THREADS = min(16, 2 * (os.cpu_count() or 1))
IMAGES_AHEAD = 2 * THREADS
"""Decoded images that may wait for the encoder."""
WRITES_AHEAD = 64

EncodeImages = Callable[["Tensor", list[int]], "Tensor"]
"""Latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]; the B seeds decide any random numbers."""

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


def check_latents(
    data: TrainingData,
    identity: str,
    *,
    dtype: str = "",
    to_disk: bool = True,
    skip_check: bool = False,
    rank: int = 0,
    world: int = 1,
    visible: bool = True,
) -> LatentsCheck:
    """Which latents would have to be encoded by this process; opens every cache file unless told to skip that."""
    store: LatentsStore
    if to_disk:
        store = LatentsFiles(data.items, data.traits, identity, dtype, skip_check=skip_check)
    else:
        store = LatentsMemory(data.items)
    return _checked(LatentsCheck(store, "latents", 0), _share(store.entries, rank, world, to_disk), visible)


def check_text(
    data: TrainingData,
    identity: str,
    *,
    dtype: str = "",
    to_disk: bool = True,
    skip_check: bool = False,
    rank: int = 0,
    world: int = 1,
    visible: bool = True,
) -> TextCheck:
    """Which text outputs would have to be encoded by this process; opens every cache file unless told to skip that."""
    store: TextStore
    if to_disk:
        suffix = data.traits.text_suffix
        if suffix is None:
            raise DataError(
                f"text outputs of {data.traits.name} models can't be cached on disk",
                "--cache_text_encoder_outputs_to_disk",
                "leave it out",
                code="E-CACHE",
            )
        store = TextFiles(data.items, suffix, identity, dtype, skip_check=skip_check)
    else:
        store = TextMemory(data.items)
    return _checked(TextCheck(store, "text outputs", 0), _share(store.entries, rank, world, to_disk), visible)


def _share(entries: Sequence[EntryT], rank: int, world: int, to_disk: bool) -> list[EntryT]:
    """The entries of one process: those of one file go to one process; in memory everybody needs all."""
    if not to_disk or world == 1:
        return list(entries)
    numbers: dict[object, int] = {}
    return [entry for entry in entries if numbers.setdefault(entry.paths[0], len(numbers)) % world == rank]


def _checked(check: Check[StoreT, EntryT], mine: Sequence[EntryT], visible: bool) -> Check[StoreT, EntryT]:
    check.total = len(mine)
    problem: Callable[[EntryT], str | None] = check.store.problem  # type: ignore[assignment]
    title = f"checking cached {check.kind}"
    with ThreadPoolExecutor(THREADS) as pool, Progress(title, len(mine), "files", visible=visible) as bar:
        for entry, reason in zip(mine, pool.map(problem, mine), strict=True):
            bar.advance()
            if reason is not None:
                check.stale[entry.number] = reason
    return check


def fill_latents(
    data: TrainingData,
    encode: EncodeImages,
    identity: str = "",
    *,
    dtype: str = "",
    to_disk: bool = True,
    batch_size: int = 1,
    skip_check: bool = False,
    rank: int = 0,
    world: int = 1,
    check: LatentsCheck | None = None,
    visible: bool = True,
) -> Summary:
    """Encodes the latents that are missing or stale and makes `data` use the cache.

    `check` is what `check_latents` gave, whose arguments then count; None: it is made here.
    Processes share the work without waiting for one another; wait for all before training. What is encoded stays,
    whatever happens afterwards. Errors: DataError naming all images that can't be decoded, or the one that gives NaN.
    """
    if check is None:
        check = check_latents(
            data,
            identity,
            dtype=dtype,
            to_disk=to_disk,
            skip_check=skip_check,
            rank=rank,
            world=world,
            visible=visible,
        )
    store = check.store
    stale = [store.entries[number] for number in check.stale]
    failures: list[DataError] = []
    title, summary = "caching latents", check.summary
    with _Writer() as writer, Progress(title, len(stale), "images", visible=visible) as bar:
        for entries, pixels, seeds in _decoded(store, _batches(stale, batch_size), failures):
            if entries:
                latents = _finite(encode(pixels, seeds), entries)
                mirrored = None
                if entries[0].mirrored:
                    mirrored = _finite(
                        encode(pixels.flip(-1), [image_seed(entry.item, mirrored=True) for entry in entries]), entries
                    )
                for row, entry in enumerate(entries):
                    writer.submit(store.save, entry, latents[row], None if mirrored is None else mirrored[row])
            bar.advance(len(entries))
    raise_all(failures)
    data.latents = store
    logger.info("%s", summary)
    return summary


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


def _decoded(
    store: LatentsStore, batches: Iterable[list[LatentsEntry]], failures: list[DataError]
) -> Iterator[tuple[list[LatentsEntry], Tensor, list[int]]]:
    """Batches with pixels and seeds, decoded ahead by many threads; images that fail are left out and noted."""
    waiting: deque[tuple[list[LatentsEntry], list[Future[tuple[Tensor, int]]]]] = deque()
    pool = ThreadPoolExecutor(THREADS)

    def decode(entry: LatentsEntry) -> tuple[Tensor, int]:
        item = entry.item
        pixels = load_pixels(
            item.path,
            item.original,
            item.assignment,
            orientation=item.orientation,
            interpolation=item.subset.resize_interpolation,
        )
        return to_tensor(pixels), image_seed(item)

    def collected() -> tuple[list[LatentsEntry], Tensor, list[int]]:
        entries, futures = waiting.popleft()
        good, rows, seeds = [], [], []
        for entry, future in zip(entries, futures, strict=True):
            try:
                pixels, seed = future.result()
            except DataError as error:
                failures.append(error)
            else:
                good.append(entry)
                rows.append(pixels)
                seeds.append(seed)
        return good, torch.stack(rows) if rows else torch.empty(0), seeds

    try:
        for batch in batches:
            waiting.append((batch, [pool.submit(decode, entry) for entry in batch]))
            if sum(len(entries) for entries, _ in waiting) >= IMAGES_AHEAD:
                yield collected()
        while waiting:
            yield collected()
    finally:
        pool.shutdown(cancel_futures=True)


def _finite(latents: Tensor, entries: Sequence[LatentsEntry]) -> Tensor:
    """The latents on the CPU. Errors: DataError when one isn't a number."""
    latents = latents.detach().float().cpu()
    for row, entry in zip(latents, entries, strict=True):
        if not torch.isfinite(row).all():
            hint = "give --no_half_vae, or use another autoencoder"
            raise DataError("the autoencoder gives NaN for an image", entry.item.path, hint, code="E-NAN")
    return latents


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
    data: TrainingData,
    encode: EncodeText,
    identity: str = "",
    *,
    dtype: str = "",
    to_disk: bool = True,
    batch_size: int = 1,
    skip_check: bool = False,
    rank: int = 0,
    world: int = 1,
    check: TextCheck | None = None,
    visible: bool = True,
) -> Summary:
    """Encodes the captions whose outputs are missing or stale, each different one once, and makes `data` use the cache.

    `check` is what `check_text` gave, whose arguments then count; None: it is made here.
    Processes share the work without waiting for one another; wait for all before training. What is encoded stays,
    whatever happens afterwards. Errors: DataError naming an image whose caption gives NaN.
    """
    if check is None:
        check = check_text(
            data,
            identity,
            dtype=dtype,
            to_disk=to_disk,
            skip_check=skip_check,
            rank=rank,
            world=world,
            visible=visible,
        )
    store = check.store
    by_caption: dict[str, list[TextEntry]] = {}
    for number in check.stale:
        entry = store.entries[number]
        by_caption.setdefault(entry.caption, []).append(entry)
    captions, summary = list(by_caption), check.summary
    with _Writer() as writer, Progress("caching text outputs", len(captions), "captions", visible=visible) as bar:
        for start in range(0, len(captions), batch_size):
            chunk = captions[start : start + batch_size]
            cond = {name: tensor.detach().cpu() for name, tensor in encode(chunk).items()}
            for row, caption in enumerate(chunk):
                outputs = {name: tensor[row] for name, tensor in cond.items()}
                _check_outputs(outputs, by_caption[caption][0])
                for entry in by_caption[caption]:
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
