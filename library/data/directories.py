"""Folders on the disk: what lies in them, the headers of their images and the texts of their captions, read once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

from library import encodings
from library.data import shards
from library.data.folders import IMAGE_SUFFIXES, is_leftover, leads_to_leftover
from library.data.headers import DamagedImageError, read_header
from library.data.scan_cache import Remembered, ScanCache
from library.log import get_logger
from library.progress import Progress
from library.types import Size

logger = get_logger(__name__)

THREADS = 16
FILES_AT_ONCE = 256
SLOW = 0.001
"""Seconds per file from which on several threads read: the disk, not the processor, is what is waited for."""
_BINARY = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_IGNORES_CASE = os.path.normcase("A") == "a"


class Facts(NamedTuple):
    """What is known of an image file without its pixels."""

    width: int
    height: int
    orientation: int
    transparent: bool


def splitext(name: str) -> tuple[str, str]:
    """Stem and extension of a file name; faster than the general function for many names."""
    at = name.rfind(".")
    return (name, "") if at <= 0 else (name[:at], name[at:])


class Directory:
    """One folder or tar file: its files, leftovers of operating systems excluded, and what was read of them."""

    def __init__(self, path: str) -> None:
        """Lists it. Errors: OSError."""
        self.path = path
        self.place = os.path.abspath(path)  # noqa: PTH100 - text
        self.prefix = "" if path in ("", ".") else path if path.endswith((os.sep, "/")) else path + os.sep
        self.images: list[str] = []
        """Names, sorted."""
        self.others: list[str] = []
        """Names of files that are no images."""
        self.folders: list[str] = []
        self.stamps: dict[str, tuple[int, int]] = {}
        """Bytes and modification time of all files that may be read."""
        self.facts: dict[str, Facts | str] = {}
        """By image name; a text says what is wrong with the file."""
        self.texts: dict[str, str] = {}
        """By name of the caption file."""
        self.cached_sizes: dict[str, dict[str, Size]] = {}
        """Sizes of images by stem, from the names of latents caches, for each suffix that was asked for."""
        if shards.is_shard(path):
            self._list_shard()
        else:
            with os.scandir(path or ".") as entries:
                self._list(entries)
        self.images.sort()
        self.others.sort()
        self.folders.sort()

    def _list_shard(self) -> None:
        """Takes the files in a tar file for those of a folder; their names are paths inside it."""
        changed = os.stat(self.path).st_mtime_ns  # noqa: PTH116 - text
        for name, member in shards.members(self.path).items():
            if leads_to_leftover(name):
                continue
            is_image = splitext(name)[1].lower() in IMAGE_SUFFIXES
            (self.images if is_image else self.others).append(name)
            self.stamps[name] = (member.bytes, changed)

    def _list(self, entries: Iterable[os.DirEntry[str]]) -> None:
        """Sorts entries into images, other files and folders; written for speed, since there may be very many."""
        images, others, stamps, suffixes = self.images, self.others, self.stamps, IMAGE_SUFFIXES
        for entry in entries:
            name = entry.name
            if is_leftover(name):
                continue
            at = name.rfind(".")
            suffix = name[at:].lower() if at > 0 else ""
            if entry.is_dir() or suffix == shards.SUFFIX:
                self.folders.append(name)
                continue
            is_image = suffix in suffixes
            (images if is_image else others).append(name)
            if suffix == ".npz":
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if is_image:
                    self.facts[name] = str(error.strerror or error)
            else:
                stamps[name] = (status.st_size, status.st_mtime_ns)

    def file(self, name: str) -> str | None:
        """The name of a file as it is written in the folder; None when it isn't there."""
        if name in self.stamps:
            return name
        return self._by_case.get(os.path.normcase(name)) if _IGNORES_CASE else None

    @cached_property
    def _by_case(self) -> dict[str, str]:
        return {os.path.normcase(name): name for name in self.stamps}

    @cached_property
    def stems(self) -> dict[str, str]:
        """Name of the first image with each stem, as the disk compares names."""
        return {os.path.normcase(splitext(name)[0]): name for name in reversed(self.images)}

    @cached_property
    def shared_stems(self) -> frozenset[str]:
        """Stems that several images have."""
        if len(self.stems) == len(self.images):
            return frozenset()
        seen: set[str] = set()
        shared: set[str] = set()
        for name in self.images:
            stem = os.path.normcase(splitext(name)[0])
            (shared if stem in seen else seen).add(stem)
        return frozenset(shared)

    def image(self, stem: str) -> str | None:
        """The first image with a stem."""
        return self.stems.get(os.path.normcase(stem))


class Shelf:
    """All folders of a scan, each listed once; what is wanted of their files is read all at once."""

    def __init__(self, cache: ScanCache, *, ignore_orientation: bool, thorough: bool) -> None:
        self._cache = cache
        self._ignore_orientation, self._thorough = ignore_orientation, thorough
        self._directories: dict[str, Directory | None] = {}
        self._images: dict[Directory, dict[str, None]] = {}
        self._texts: dict[Directory, dict[str, None]] = {}
        self.foreign: list[tuple[str, str]] = []
        """Caption files that aren't UTF-8, with what they were read as."""
        self.unreadable: list[tuple[str, str]] = []
        """Caption files that can't be opened, with the reason."""
        self.opened = 0
        """Files whose content was read."""

    def directory(self, path: str) -> Directory | None:
        """A folder; None when it can't be listed."""
        if path not in self._directories:
            try:
                self._directories[path] = Directory(path)
            except (OSError, ValueError):
                self._directories[path] = None
        return self._directories[path]

    def below(self, directory: Directory) -> Iterator[Directory]:
        """A folder and all folders inside, each once, however links lead around."""
        seen: set[str] = set()
        waiting = [directory]
        while waiting:
            current = waiting.pop()
            real = os.path.realpath(current.place)
            if real in seen:
                continue
            seen.add(real)
            yield current
            inner = (self.directory(current.prefix + name) for name in reversed(current.folders))
            waiting += [found for found in inner if found is not None]

    def images_of(self, directory: Directory) -> dict[str, None]:
        """Names of the images whose headers will be read; add to them."""
        return self._images.setdefault(directory, {})

    def texts_of(self, directory: Directory) -> dict[str, None]:
        """Names of the caption files that will be read; add to them."""
        return self._texts.setdefault(directory, {})

    def read(self, *, visible: bool) -> None:
        """Reads all that is wanted, as far as it isn't remembered, and remembers it."""
        used = list(dict.fromkeys((*self._images, *self._texts)))
        jobs: list[tuple[Directory, list[str], list[str]]] = []
        changed: dict[Directory, bool] = {}
        for directory in used:
            images, texts = self._recall(directory)
            changed[directory] = bool(images or texts)
            for start in range(0, max(len(images), len(texts)), FILES_AT_ONCE):
                part = slice(start, start + FILES_AT_ONCE)
                jobs.append((directory, images[part], texts[part]))
        self._do(jobs, visible)
        if any(changed.values()):
            self._cache.save((each.place, self._known(each) if changed[each] else None) for each in used)

    def _recall(self, directory: Directory) -> tuple[list[str], list[str]]:
        """Takes what is remembered of a folder; gives the images and texts that must be read."""
        remembered = self._cache.of(directory.place)
        stamps, facts = directory.stamps, directory.facts
        images = [name for name in self._images.get(directory, ()) if name not in facts]
        texts = list(self._texts.get(directory, ()))
        try:
            for name, (size, time_ns, *content) in remembered.images.items():
                if stamps.get(name) == (size, time_ns) and name not in facts:
                    width, height, orientation, transparent = content
                    facts[name] = Facts(width, height, orientation, bool(transparent))
            for name, (size, time_ns, text) in remembered.texts.items():
                if stamps.get(name) == (size, time_ns):
                    directory.texts[name] = text
        except (TypeError, ValueError, AttributeError):  # not what this program would have written
            return images, texts
        known = directory.texts
        return [name for name in images if name not in facts], [name for name in texts if name not in known]

    def _do(self, jobs: list[tuple[Directory, list[str], list[str]]], visible: bool) -> None:
        """Reads in this thread, and with several where the disk turns out to be slow."""
        total = sum(len(images) + len(texts) for _, images, texts in jobs)
        waiting = iter(jobs)
        with Progress("reading image headers and captions", total, "files", visible=visible) as bar:
            for job in waiting:
                start = time.perf_counter()
                count = self._read_some(job)
                bar.advance(count)
                if time.perf_counter() - start > SLOW * count and count > 8:
                    break
            with ThreadPoolExecutor(THREADS) as pool:
                for count in pool.map(self._read_some, waiting):
                    bar.advance(count)
        self.opened += total

    def _read_some(self, job: tuple[Directory, list[str], list[str]]) -> int:
        directory, images, texts = job
        prefix, facts = directory.prefix, directory.facts
        for name in images:
            try:
                header = read_header(
                    prefix + name, ignore_orientation=self._ignore_orientation, thorough=self._thorough
                )
            except DamagedImageError as damage:
                facts[name] = str(damage)
            else:
                facts[name] = Facts(*header.size, header.orientation, header.transparent)
        for name in texts:
            directory.texts[name] = self._text(prefix + name, directory.stamps[name][0])
        return len(images) + len(texts)

    def _text(self, path: str, size: int) -> str:
        try:
            data = _content(path, size)
        except OSError as error:
            self.unreadable.append((path, str(error.strerror or error)))
            return ""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            text, encoding = encodings.decode(data)
            if encoding != "utf-16":
                self.foreign.append((path, encoding))
            return text

    def _known(self, directory: Directory) -> Remembered:
        stamps = directory.stamps
        not_plain = {path for path, _ in (*self.unreadable, *self.foreign)}
        return Remembered(
            {
                name: [*stamps[name], *map(int, facts)]
                for name, facts in directory.facts.items()
                if not isinstance(facts, str)
            },
            {
                name: (*stamps[name], text)
                for name, text in directory.texts.items()
                if directory.prefix + name not in not_plain
            },
        )


def _content(path: str, size: int) -> bytes:
    """All of a small file, whose size is about known. Errors: OSError."""
    inside = shards.split(path)
    if inside is not None:
        return shards.content(*inside)
    descriptor = os.open(path, _BINARY)
    try:
        data = os.read(descriptor, size + 1)
        while len(data) != size and (more := os.read(descriptor, 1 << 20)):
            data += more
    finally:
        os.close(descriptor)
    return data
