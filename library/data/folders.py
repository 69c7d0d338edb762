"""What lies in folders of images: image files, and `<repeats>_<class tokens>` folders; what is wrong with a layout."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.data import shards
from library.types import Finding

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".jxl"})
CODE = "E-DATA-FOLDER"


_LEFTOVERS = frozenset({"__MACOSX", "Thumbs.db", "thumbs.db", "Desktop.ini", "desktop.ini"})


def is_leftover(name: str) -> bool:
    """Whether a file or folder is litter of an operating system or an archive."""
    return name[0] == "." or name in _LEFTOVERS


def leads_to_leftover(path: str) -> bool:
    """Whether any part of a path inside an archive is litter."""
    return any(is_leftover(part) for part in path.split("/") if part)


@dataclass(frozen=True)
class Listing:
    """The content of one folder, leftovers excluded, sorted by name."""

    images: tuple[str, ...]
    others: tuple[str, ...]
    """Files that are no images."""
    folders: tuple[str, ...]


def listing(folder: Path) -> Listing:
    """What lies directly in a folder. Errors: OSError when it can't be read."""
    if shards.is_shard(str(folder)):
        return _inside(shards.members(str(folder)))
    images, others, folders = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_leftover(entry.name):
                continue
            if entry.is_dir() or entry.name.lower().endswith(shards.SUFFIX):
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 - much faster for many files
                images.append(entry.name)
            else:
                others.append(entry.name)
    return Listing(tuple(sorted(images)), tuple(sorted(others)), tuple(sorted(folders)))


def _inside(names: Iterable[str]) -> Listing:
    """What lies in a tar file, however deep."""
    ours = sorted(name for name in names if not leads_to_leftover(name))
    images = tuple(name for name in ours if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)  # noqa: PTH122
    return Listing(images, tuple(name for name in ours if name not in frozenset(images)), ())


@dataclass(frozen=True)
class ClassFolder:
    """A folder, or a tar file, named `<repeats>_<class tokens>`."""

    path: Path
    repeats: int
    class_tokens: str


def class_folder(path: Path) -> ClassFolder | str:
    """A folder's repeats and class tokens, or why it is none."""
    number, _, tokens = shards.without_suffix(path.name).partition("_")
    if not number.removeprefix("-").isdecimal():
        return "its name doesn't begin with a number of repeats"
    if int(number) < 1:
        return f"its number of repeats is {number}"
    return ClassFolder(path, int(number), tokens)


def class_folders(directory: Path, option: str) -> tuple[list[ClassFolder], list[Finding]]:
    """The class folders of a `--train_data_dir`, and what is wrong with it."""
    if not directory.is_dir():
        return [], [_not_a_folder(directory, option)]
    found = listing(directory)
    judged = [class_folder(directory / name) for name in found.folders]
    good = [folder for folder in judged if isinstance(folder, ClassFolder)]
    if not good:
        return [], [_no_class_folders(directory, option, found)]
    findings = [
        Finding(error=False, what=f"folder ignored: {reason}", where=str(directory / name), code=CODE)
        for name, reason in zip(found.folders, judged, strict=True)
        if isinstance(reason, str)
    ]
    if found.images:
        what = f"{_count(len(found.images), 'image')} beside the folders ignored"
        hint = f"move them into a folder such as {directory / '1_name'}"
        findings.append(Finding(error=False, what=what, where=str(directory), hint=hint, code=CODE))
    return good, findings


def missing_folder(directory: Path, where: str) -> Finding:
    """An image folder that isn't there."""
    if shards.is_shard(str(directory)):
        what, hint = f"{directory} isn't a whole tar file without compression", "make it anew, or unpack it"
    elif directory.exists():
        what, hint = f"{directory} is a file, not a folder of images", f"give its folder: {directory.parent}"
    else:
        what, hint = f"the folder {directory} doesn't exist", _nearest_folder(directory)
    return Finding(error=True, what=what, where=where, hint=hint, code=CODE)


def no_images(directory: Path, where: str, *, recursive: bool = False) -> Finding:
    """A folder of images without images: says what is there instead; `recursive`: the folders inside have none, too."""
    found = listing(directory)
    suffixes = Counter(Path(name).suffix.lower() or "no extension" for name in found.others)
    if suffixes:
        seen = ", ".join(f"{count} x {suffix}" for suffix, count in suffixes.most_common(4))
        known = " ".join(sorted(IMAGE_SUFFIXES))
        what, hint = f"no images in {directory}, only {seen}", f"convert the pictures to one of {known}"
    elif found.folders and recursive:
        what, hint = f"no images in {directory}, nor in the folders inside ({_some(found.folders)})", ""
    elif found.folders:
        inner = [name for name in found.folders if listing(directory / name).images]
        what = f"no images in {directory}, only folders ({_some(found.folders)}), and those are not searched"
        hint = f"give {directory / inner[0]}, or recursive = true" if inner else ""
    else:
        what, hint = f"the folder {directory} is empty", ""
    return Finding(error=False, what=what, where=where, hint=hint, code=CODE)


def _not_a_folder(directory: Path, option: str) -> Finding:
    if directory.exists():
        right = directory.parent.parent if isinstance(class_folder(directory.parent), ClassFolder) else directory.parent
        what, hint = f"{directory} is a file", f"give the folder above the <repeats>_<name> folders: {option} {right}"
    else:
        what, hint = f"the folder {directory} doesn't exist", _nearest_folder(directory)
    return Finding(error=True, what=what, where=option, hint=hint, code=CODE)


def _nearest_folder(directory: Path) -> str:
    """What of a path exists, and the name there that is most like the missing one."""
    missing = directory
    while not missing.parent.is_dir():
        if missing.parent == missing:
            return ""
        missing = missing.parent
    near = difflib.get_close_matches(missing.name, listing(missing.parent).folders, 1)
    return f"did you mean {missing.parent / near[0]}?" if near else f"there is no {missing.name} in {missing.parent}"


def _no_class_folders(directory: Path, option: str, found: Listing) -> Finding:
    """Why no folder below could be used, and the command or name that would work."""

    def finding(what: str, hint: str) -> Finding:
        return Finding(error=True, what=what, where=f"{option} {directory}", hint=hint, code=CODE)

    if found.images:
        what = f"{_count(len(found.images), 'image')} lie directly in the folder, but no folders named <repeats>_<name>"
        if isinstance(class_folder(directory.resolve()), ClassFolder):
            return finding(what, f"give its parent: {option} {directory.parent}")
        return finding(what, f"move them to {directory / f'1_{directory.resolve().name}'}")
    for name in found.folders:
        inner = listing(directory / name)
        if any(isinstance(class_folder(directory / name / folder), ClassFolder) for folder in inner.folders):
            what = f"the <repeats>_<name> folders lie one level deeper, in {name}"
            return finding(what, f"give {option} {directory / name}")
    for name in found.folders:
        reason = class_folder(directory / name)
        if isinstance(reason, str) and listing(directory / name).images:
            what = f"none of its folders ({_some(found.folders)}) can be used: {name} holds images, but {reason}"
            tokens = name.partition("_")[2] if name[:1] in "-0" else name
            return finding(what, f"rename it to {directory / f'1_{tokens}'}")
    if found.folders:
        what = f"none of its folders ({_some(found.folders)}) is named <repeats>_<name>"
    else:
        what = f"there is nothing in it but {_some(found.others)}" if found.others else "the folder is empty"
    return finding(what, f"put the images into {directory / '1_name'}")


def _some(names: tuple[str, ...], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
