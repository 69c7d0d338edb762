"""What a scan should say of the files it found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.data import captions
from library.data.directories import Directory, Facts, Shelf, splitext
from library.data.items import Item
from library.data.scan_report import Scan, SubsetReport, some
from library.data.searching import Search
from library.types import Finding, Size

LARGEST_CROP_LOSS = 0.3
LARGEST_ENLARGEMENT = 2.0


def caption_findings(report: SubsetReport, search: Search, allow_missing: bool) -> Iterator[Finding]:
    """Captions that look as if they were meant to be read but aren't."""
    if not report.without_file:
        return
    subset, where = report.settings, report.settings.where
    count = len(report.without_file)
    if subset.metadata_file:
        what = f"{count} of {report.images} entries of {subset.metadata_file} have neither caption nor tags: "
        yield Finding(error=False, what=what + some(report.without_file), where=where, code="E-CAPTION-MISSING")
        return
    beside = _text_files(search)
    if beside and count == report.images:
        suffix, files = beside.most_common(1)[0]
        what = f"no caption files *{subset.caption_extension} in {Path(subset.image_dir)}, but {files} files *{suffix}"
        hint = f"give --caption_extension {suffix}, or --allow_missing_captions to train without them"
        what += " beside the images"
        yield Finding(error=not allow_missing, what=what, where=where, hint=hint, code="E-CAPTION-EXT")
    elif count < report.images or report.missing:
        instead = f'the class tokens "{subset.class_tokens}"' if subset.class_tokens else "empty captions"
        what = (
            f"{count} of {report.images} images in {Path(subset.image_dir)} have no caption file "
            f"*{subset.caption_extension} and get {instead}: {some(report.without_file)}"
        )
        yield Finding(error=False, what=what, where=where, code="E-CAPTION-MISSING")


def _text_files(search: Search) -> Counter[str]:
    """Extensions of text files that lie beside the images and have their names, but aren't their captions."""
    directories: dict[Directory, None] = dict.fromkeys(candidate.directory for candidate in search.candidates)
    return Counter(
        suffix
        for directory in directories
        for stem, suffix in map(splitext, directory.others)
        if suffix.lower() in captions.TEXT_SUFFIXES
        and suffix != search.subset.caption_extension
        and directory.image(stem) is not None
    )


def claim_findings(search: Search, items: Sequence[Item]) -> Iterator[Finding]:
    """Sizes in metadata files and of conditioning images that aren't those of the images."""
    lies = [
        item.path
        for item in (items if search.image_sizes else ())
        if search.image_sizes.get(item.path, item.original) not in (item.original, item.original[::-1])
    ]
    if lies:
        what = f"{len(lies)} entries of {search.subset.metadata_file} give an image_size that isn't true: {some(lies)}"
        yield Finding(error=False, what=what, where=search.subset.where, code="E-DATA-META")
    if search.subset.conditioning_data_dir is None:
        return
    by_path = {candidate.path: candidate.conditioning for candidate in search.candidates}
    unlike = []
    for item in items:
        place = by_path[item.path]
        facts = place[0].facts[place[1]] if place else None
        if isinstance(facts, Facts) and not _same_shape(item.original, facts):
            unlike.append(f"{item.path} ({item.original}, {facts.width}x{facts.height})")
    if unlike:
        what = f"{len(unlike)} conditioning images have another shape than their image: {some(unlike)}"
        hint = "make them in the size of the images"
        yield Finding(error=True, what=what, where=search.subset.where, hint=hint, code="E-DATA-PAIR")


def _same_shape(image: Size, conditioning: Facts) -> bool:
    """Whether sides have the same ratio, give or take a pixel of rounding."""
    error = abs(image.width * conditioning.height - image.height * conditioning.width)
    return error <= max(*image, conditioning.width, conditioning.height)


def text_findings(shelf: Shelf) -> Iterator[Finding]:
    """Caption files that can't be read, or aren't UTF-8."""
    if shelf.unreadable:
        path, reason = shelf.unreadable[0]
        names = [name for name, _ in shelf.unreadable]
        what = f"{len(names)} caption files can't be read ({reason}): {some(names)}"
        yield Finding(error=True, what=what, where=path, hint="check their permissions", code="E-CAPTION-READ")
    if shelf.foreign:
        seen = sorted({encoding for _, encoding in shelf.foreign})
        names = sorted(name for name, _ in shelf.foreign)
        what = f"{len(names)} caption files are not UTF-8 and were read as {', '.join(seen)}: {some(names)}"
        yield Finding(error=False, what=what, hint="save them as UTF-8 to be sure", code="E-CAPTION-READ")


def gone_findings(result: Scan) -> Iterator[Finding]:
    if result.gone:
        names = [item.path for item in result.items if item.gone]
        what = f"{len(names)} images aren't there any more, their cached latents are used: {some(names)}"
        yield Finding(error=False, what=what, code="E-DATA-GONE")


def size_findings(scan: Scan) -> Iterator[Finding]:
    """Images of which the model will see less, or more, than is in them."""

    def warn(paths: list[str], what: str) -> Iterator[Finding]:
        if paths:
            number = f"{len(paths)} image{'s' if len(paths) > 1 else ''}"
            yield Finding(error=False, what=f"{number} {what}: {some(paths)}", code="E-IMAGE-SIZE")

    small: list[str] = []
    cut: list[str] = []
    enlarged: list[str] = []
    lists: dict[tuple[int, int], list[list[str]]] = {}
    for item in scan.items:
        assignment, original = item.assignment, item.original
        key = id(assignment), id(original)  # equal ones are the same
        fitting = lists.get(key)
        if fitting is None:
            judged = (
                (small, assignment.too_small),
                (cut, assignment.crop_loss > LARGEST_CROP_LOSS),
                (enlarged, assignment.resized.width > LARGEST_ENLARGEMENT * original.width),
            )
            fitting = lists[key] = [paths for paths, applies in judged if applies]
        for paths in fitting:
            paths.append(item.path)
    yield from warn(small, "too small or too long for any bucket, enlarged or cut to the nearest")
    yield from warn(cut, f"cropped by more than {LARGEST_CROP_LOSS:.0%}")
    yield from warn(enlarged, f"enlarged to more than {LARGEST_ENLARGEMENT:g} times their size")


def transparency_findings(scan: Scan) -> Iterator[Finding]:
    """Transparency that is dropped, and masks that aren't there."""
    dropped = sum(
        report.transparent
        for report in scan.reports
        if report.settings.mask != "alpha" and report.settings.background is None
    )
    if dropped:
        what = f"{dropped} images have transparency, which is dropped: the colours stored under it are learned"
        hint = "--alpha_background white puts a colour behind it, alpha_mask makes it the mask of the loss"
        yield Finding(error=False, what=what, hint=hint, code="E-IMAGE-ALPHA")
    bare = [
        report.settings.name
        for report in scan.reports
        if report.settings.mask == "alpha" and report.images and not report.transparent
    ]
    bare = [] if scan.gone else bare  # whose transparency nobody knows
    if bare:
        what = f"alpha_mask is on, but no image has transparency in {some(bare)}: all of them is learned"
        yield Finding(error=False, what=what, code="E-IMAGE-ALPHA")


def damage_findings(scan: Scan, damaged: dict[str, str], skip: bool) -> Iterator[Finding]:
    """Every damaged file, once; all together when they are skipped."""
    if not damaged:
        return
    if skip:
        scan.skipped = list(damaged)
        what = f"{len(damaged)} damaged images are skipped: {some(scan.skipped, 10)}"
        yield Finding(error=False, what=what, code="E-IMAGE")
        return
    hint = "mend or remove it, or give --skip_bad_images"
    for path, reason in damaged.items():
        yield Finding(error=True, what=f"damaged image: {reason}", where=path, hint=hint, code="E-IMAGE")
