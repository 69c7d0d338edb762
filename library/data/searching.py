"""Which images and captions a subset means: candidates by name, before any file is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.data import folders, metadata_file, shards
from library.data.cache_info import CacheInfo
from library.data.directories import Directory, Shelf, splitext
from library.data.scan_report import some
from library.data.settings import SubsetSettings
from library.types import Finding, Size

_FACE = re.compile(r"(.+)_(-?\d+)_(-?\d+)_(\d+)_(\d+)", re.ASCII)
_SIZE = re.compile(r"(.+)_(\d{4,})x(\d{4,})", re.ASCII)


@dataclass(slots=True)
class Candidate:
    """An image that may become an item."""

    directory: Directory
    name: str
    """Of the file; of an image that is gone: its stem."""
    caption_file: str | None = None
    """Name in the same folder."""
    text: str | None = None
    """The caption where it comes from somewhere else."""
    conditioning: tuple[Directory, str] | None = None
    bucket: Size | None = None
    """Size that a metadata file wants."""
    gone: Size | None = None
    """Size of an image that isn't there any more."""

    @property
    def path(self) -> str:
        """Path of the image."""
        return self.directory.prefix + self.name


@dataclass
class Search:
    """The candidates of a subset, sorted by path, and what was noticed."""

    subset: SubsetSettings
    dataset: int
    directory: Directory | None = None
    candidates: list[Candidate] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    info: CacheInfo | None = None
    has_sizes: bool = True
    """Whether all entries of a metadata file have a size to train at."""
    image_sizes: dict[str, Size] = field(default_factory=dict)
    """Sizes that a metadata file claims, by path."""

    def warn(self, what: str, hint: str = "", code: str = folders.CODE, *, error: bool = False) -> None:
        """Notes a finding."""
        self.findings.append(Finding(error=error, what=what, where=self.subset.where, hint=hint, code=code))


@dataclass(frozen=True)
class Finder:
    """Finds candidates on the disk."""

    shelf: Shelf
    latents_suffix: str | None
    """End of the names of latents caches that may stand for images that are gone; None: they may not."""
    skip_missing: bool
    """Whether entries without image are left out with a warning."""

    def search(self, subset: SubsetSettings, dataset: int) -> Search:
        """What a subset means."""
        result = Search(subset, dataset)
        if subset.metadata_file is None:
            self._in_folder(result)
            if subset.conditioning_data_dir is not None:
                self._pair(result)
        else:
            self._by_metadata(result, subset.metadata_file)
        result.candidates.sort(key=lambda candidate: candidate.directory.prefix + candidate.name)
        return result

    # folders

    def _in_folder(self, result: Search) -> None:
        subset = result.subset
        directory = self._folder(result, subset.image_dir)
        if directory is None:
            return
        result.directory = directory
        result.info = CacheInfo(subset.image_dir, subset.where) if subset.cache_info else None
        for current in self.shelf.below(directory) if subset.recursive else (directory,):
            result.candidates += [
                Candidate(current, name, _caption_file(current, splitext(name)[0], subset.caption_extension))
                for name in current.images
            ]
            if self.latents_suffix is not None:
                result.candidates += self._gone(current, result)
        if not result.candidates:
            deep = subset.recursive
            result.findings.append(folders.no_images(Path(subset.image_dir), subset.where, recursive=deep))

    def _folder(self, result: Search, path: str) -> Directory | None:
        plain = Path(path)
        found = self.shelf.directory(str(plain))
        if found is None:
            if plain.is_dir():
                result.warn(f"the folder {plain} can't be read", "check its permissions", error=True)
            else:
                result.findings.append(folders.missing_folder(plain, result.subset.where))
        return found

    def _gone(self, directory: Directory, result: Search) -> Iterator[Candidate]:
        """Images that aren't there any more although their latents and captions are."""
        for stem, size in _cached_sizes(directory, self.latents_suffix or "").items():
            if directory.image(stem) is not None or directory.image(splitext(stem)[0]) is not None:
                continue
            bare = splitext(stem)[0] if os.path.splitext(stem)[1].lower() in folders.IMAGE_SUFFIXES else stem  # noqa: PTH122
            caption = _caption_file(directory, bare, result.subset.caption_extension)
            text = result.info.caption(directory.prefix + stem) if result.info and caption is None else None
            if caption is not None or text is not None:
                yield Candidate(directory, stem, caption, text, gone=size)

    # pairs

    def _pair(self, result: Search) -> None:
        """Gives each candidate the conditioning image of the same name."""
        subset = result.subset
        root, images = self._folder(result, subset.conditioning_data_dir or ""), result.directory
        if root is None or images is None:
            result.candidates = []
            return
        missing, used = [], set()
        for candidate in result.candidates:
            inner = candidate.directory.prefix[len(images.prefix) :]
            directory = self.shelf.directory((root.prefix + inner).rstrip("/\\") or ".") if inner else root
            stem = candidate.name if candidate.gone else splitext(candidate.name)[0]
            name = directory.image(stem) if directory is not None else None
            if directory is None or name is None:
                missing.append(candidate)
            else:
                candidate.conditioning = (directory, name)
                used.add((directory.path, name))
        if missing:
            result.candidates = [each for each in result.candidates if each.conditioning is not None]
            names = [candidate.path for candidate in missing]
            what = f"{len(names)} images have no conditioning image of the same name in {root.path}: {some(names, 20)}"
            hint = "add them" if self.skip_missing else "add them, or leave these images out with --skip_bad_images"
            result.warn(what, hint, "E-DATA-PAIR", error=not self.skip_missing)
        extra = len(root.images) - sum(path == root.path for path, _ in used)
        if extra > 0 and not missing:
            result.warn(f"{extra} images in {root.path} belong to no image in {images.path}", code="E-DATA-PAIR")

    # metadata

    def _by_metadata(self, result: Search, path: str) -> None:
        subset = result.subset
        content = metadata_file.read(path, subset.where)
        result.findings += content.findings
        root = self._folder(result, subset.image_dir) if subset.image_dir else None
        if subset.image_dir and root is None:
            return
        result.directory = root
        missing, again = [], 0
        seen: set[tuple[str, str]] = set()
        for entry in content.entries:
            candidate = self._image_of(entry.key, root)
            if candidate is None:
                missing.append(entry.key)
                continue
            place = candidate.directory.place, candidate.name
            if place in seen:
                again += 1
                continue
            seen.add(place)
            candidate.text = metadata_file.composed(entry, subset)
            candidate.bucket = entry.train_resolution
            if entry.image_size is not None:
                result.image_sizes[candidate.path] = entry.image_size
            result.candidates.append(candidate)
        result.has_sizes = all(entry.train_resolution is not None for entry in content.entries)
        if missing:
            what = f"{len(missing)} of {len(content.entries)} entries of {path} name no image: {some(missing, 10)}"
            hint = "check image_dir" if root is not None else "give image_dir (--train_data_dir)"
            result.warn(what, hint, metadata_file.CODE, error=not self.skip_missing)
        if again:
            result.warn(f"{again} entries of {path} name an image that others name", code=metadata_file.CODE)

    def _image_of(self, key: str, root: Directory | None) -> Candidate | None:
        """The image that a key means: a path, or a name below the image folder."""
        if os.path.isfile(key):  # noqa: PTH113 - many keys
            folder, name = os.path.split(key)
            found = self._named(self.shelf.directory(str(Path(folder or "."))), name)
            if found is not None:
                return found
        if root is not None and shards.is_shard(root.path):
            return self._named(root, key)
        folder, name = os.path.split(key)
        directory = self.shelf.directory(str(Path(folder or "."))) if root is None else root
        if root is not None and folder:
            directory = self.shelf.directory(str(Path(os.path.join(root.path, folder))))  # noqa: PTH118 - many keys
        return self._named(directory, name)

    def _named(self, directory: Directory | None, name: str) -> Candidate | None:
        """An image by its name, its stem, or its cached latents."""
        if directory is None:
            return None
        file = directory.file(name)
        if file is not None and os.path.splitext(file)[1].lower() in folders.IMAGE_SUFFIXES:  # noqa: PTH122
            return Candidate(directory, file)
        image = directory.image(name)
        if image is not None:
            return Candidate(directory, image)
        if self.latents_suffix is None:
            return None
        sizes = _cached_sizes(directory, self.latents_suffix)
        for stem in (name, splitext(name)[0]):
            if stem in sizes:
                return Candidate(directory, stem, gone=sizes[stem])
        return None


def face(name: str) -> tuple[int, int, int, int] | None:
    """Centre x, centre y, width and height of a face, from the name of an image."""
    match = _FACE.fullmatch(splitext(name)[0])
    numbers = (int(match[2]), int(match[3]), int(match[4]), int(match[5])) if match else (0, 0, 0, 0)
    return numbers if numbers[0] > 0 else None


def _caption_file(directory: Directory, stem: str, extension: str) -> str | None:
    """The caption file of an image; one with a face position in its name may share that of the picture it is from."""
    found = directory.file(stem + extension)
    if found is None and "_" in stem and (match := _FACE.fullmatch(stem)) and directory.image(match[1]) is None:
        return directory.file(match[1] + extension)
    return found


def _cached_sizes(directory: Directory, suffix: str) -> dict[str, Size]:
    """Sizes of images by stem, from the names of their latents caches."""
    if suffix not in directory.cached_sizes:
        found = directory.cached_sizes[suffix] = {}
        for name in directory.others:
            if name.endswith(suffix) and (match := _SIZE.fullmatch(name[: -len(suffix)])):
                found[match[1]] = Size(int(match[2]), int(match[3]))
    return directory.cached_sizes[suffix]
