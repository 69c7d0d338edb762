"""Finds the images and captions of a configuration and looks at every file before anything is loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from library.data import buckets, captions, folders
from library.data.images import DamagedImageError, Header, read_header
from library.data.items import Item
from library.data.progress import Progress
from library.data.settings import DatasetConfig, DatasetSettings, SubsetSettings
from library.files import read_text
from library.types import Finding, Traits

THREADS = min(16, 2 * (os.cpu_count() or 1))
LARGEST_CROP_LOSS = 0.3
LARGEST_ENLARGEMENT = 2.0


@dataclass
class SubsetReport:
    """What was found for one subset."""

    settings: SubsetSettings
    dataset: int
    images: int = 0
    captioned: int = 0
    from_class_tokens: int = 0
    empty: int = 0
    """Caption files without text in their first line."""
    missing: int = 0
    """Images with neither a caption file nor class tokens."""
    multi_line: int = 0
    """Caption files of which only the first of several lines is used."""
    samples: list[str] = field(default_factory=list)
    without_file: list[str] = field(default_factory=list)
    """Images that have no caption file."""

    def line(self) -> str:
        """One row for people."""
        parts = [f"{self.captioned}/{self.images} captioned"]
        for count, meaning in (
            (self.from_class_tokens, "from class tokens"),
            (self.empty, "empty"),
            (self.missing, "missing"),
            (self.multi_line, "of several lines, only the first is used"),
        ):
            if count:
                parts.append(f"{count} {meaning}")
        return f"{self.settings.image_dir}: {self.images} images x {self.settings.num_repeats}; " + ", ".join(parts)


@dataclass
class Scan:
    """All usable images, and everything that was noticed."""

    config: DatasetConfig
    items: list[Item] = field(default_factory=list)
    reports: list[SubsetReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Damaged images that are left out."""
    rotated: int = 0
    transparent: int = 0

    def lines(self) -> list[str]:
        """The subsets and three captions of each, for people."""
        lines = []
        for report in self.reports:
            lines.append(report.line())
            lines += [f"  caption: {sample}" for sample in report.samples]
        return lines


@dataclass
class _Folder:
    """The files of a folder that several subsets may use."""

    path: Path
    content: folders.Listing
    headers: dict[str, Header | str] = field(default_factory=dict)
    """By image name; a text says what is wrong with the file."""

    def __post_init__(self) -> None:
        self.names = {os.path.normcase(name): name for name in (*self.content.images, *self.content.others)}
        self.stems = Counter(os.path.normcase(_stem(name)) for name in self.content.images)


def scan(
    config: DatasetConfig,
    traits: Traits,
    *,
    skip_bad_images: bool = False,
    ignore_exif_orientation: bool = False,
    allow_missing_captions: bool = False,
    visible: bool = True,
) -> Scan:
    """The items of a configuration; damaged files, missing captions and all else that is wrong are findings."""
    result = Scan(config, findings=list(config.findings))
    for settings in config.datasets:
        result.findings += _step_findings(settings, traits)
    known: dict[str, _Folder] = {}
    used = [
        (index, subset, folder)
        for index, settings in enumerate(config.datasets)
        for subset, folder in _usable(settings, known, result.findings)
    ]
    _read_headers(
        {str(folder.path): folder for _, _, folder in used}.values(),
        partial(read_header, ignore_orientation=ignore_exif_orientation, thorough=skip_bad_images),
        visible,
    )
    with ThreadPoolExecutor(THREADS) as pool:
        for index, subset, folder in used:
            texts = dict(
                pool.map(lambda name, of=folder, by=subset: (name, _caption_text(of, name, by)), folder.content.images)
            )
            _add_subset(result, index, subset, folder, texts, allow_missing_captions)
    _report_damage(result, (folder for _, _, folder in used), skip_bad_images)
    _report_sizes(result)
    if not result.items and not any(finding.error for finding in result.findings):
        what = "there are no images to train on"
        result.findings.append(
            Finding(error=True, what=what, where=config.source or "--train_data_dir", code="E-DATA-NONE")
        )
    return result


def _step_findings(settings: DatasetSettings, traits: Traits) -> Iterator[Finding]:
    """Sides that the model family can't take."""
    step = traits.bucket_step
    if settings.enable_bucket and settings.bucket_reso_steps % step:
        what = f"bucket_reso_steps is {settings.bucket_reso_steps}, but {traits.name} needs a multiple of {step}"
        hint = f"set it to {max(settings.bucket_reso_steps // step, 1) * step}"
        yield Finding(error=True, what=what, where=settings.where, hint=hint, code="E-BUCKET-STEP")
    if not settings.enable_bucket and (settings.resolution.width % step or settings.resolution.height % step):
        what = f"the resolution {settings.resolution} isn't a multiple of {step}, which {traits.name} needs"
        hint = "round it, or give --enable_bucket"
        yield Finding(error=True, what=what, where=settings.where, hint=hint, code="E-BUCKET-STEP")


def _usable(
    settings: DatasetSettings, known: dict[str, _Folder], findings: list[Finding]
) -> Iterator[tuple[SubsetSettings, _Folder]]:
    """The subsets of a dataset that have images, with their folders."""
    seen: set[str] = set()
    for subset in settings.subsets:
        name = os.path.normcase(Path(subset.image_dir).absolute())
        directory = Path(subset.image_dir)
        if subset.num_repeats < 1:
            what = f"{directory} is ignored: num_repeats is {subset.num_repeats}"
            findings.append(Finding(error=False, what=what, where=subset.where, code="E-DATA-SUBSET"))
        elif name in seen:
            what = f"{directory} is ignored: the dataset has it already"
            findings.append(Finding(error=False, what=what, where=subset.where, code="E-DATA-SUBSET"))
        elif not directory.is_dir():
            findings.append(folders.missing_folder(directory, subset.where))
        else:
            seen.add(name)
            if name not in known:
                known[name] = _Folder(directory, folders.listing(directory))
            if known[name].content.images:
                yield subset, known[name]
            else:
                findings.append(folders.no_images(directory, subset.where))


def _read_headers(all_folders: Iterable[_Folder], read_one: Callable[[str], Header], visible: bool) -> None:
    """Reads the headers of all images with many threads."""

    def read(job: tuple[_Folder, str]) -> None:
        folder, name = job
        try:
            folder.headers[name] = read_one(str(folder.path / name))
        except DamagedImageError as damage:
            folder.headers[name] = str(damage)

    jobs = [(folder, name) for folder in all_folders for name in folder.content.images]
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress("reading image headers", len(jobs), "images", visible=visible) as bar,
    ):
        for _ in pool.map(read, jobs):
            bar.advance()


def _caption_text(folder: _Folder, image: str, subset: SubsetSettings) -> str | None:
    """The content of an image's caption file; None when there is none."""
    name = folder.names.get(os.path.normcase(_stem(image) + subset.caption_extension))
    return None if name is None else read_text(folder.path / name)


def _add_subset(
    result: Scan,
    dataset: int,
    subset: SubsetSettings,
    folder: _Folder,
    texts: dict[str, str | None],
    allow_missing: bool,
) -> None:
    """Adds a subset's items, report and findings."""
    report = SubsetReport(subset, dataset)
    result.reports.append(report)
    for name in folder.content.images:
        header = folder.headers[name]
        if isinstance(header, str):
            continue
        caption = captions.composed(_count_caption(report, name, texts[name], subset), subset)
        if len(report.samples) < 3:
            report.samples.append(caption)
        result.rotated += header.orientation != 1
        result.transparent += header.transparent
        result.items.append(
            Item(
                path=str(folder.path / name),
                original=header.size,
                caption=caption,
                repeats=subset.num_repeats,
                assignment=buckets.assign(header.size, result.config.datasets[dataset]),
                dataset=dataset,
                subset=subset,
                orientation=header.orientation,
                file_bytes=header.file_bytes,
                mtime_ns=header.mtime_ns,
                shares_stem=folder.stems[os.path.normcase(_stem(name))] > 1,
            )
        )
    result.findings += _caption_findings(report, folder, allow_missing)


def _count_caption(report: SubsetReport, name: str, text: str | None, subset: SubsetSettings) -> str:
    """The raw caption of an image, counted in the report."""
    report.images += 1
    if text is None:
        report.without_file.append(name)
        report.from_class_tokens += bool(subset.class_tokens)
        report.missing += not subset.class_tokens
        return subset.class_tokens or ""
    caption = captions.first_line(text)
    report.captioned += bool(caption)
    report.empty += not caption
    report.multi_line += captions.is_multi_line(text)
    return caption


def _caption_findings(report: SubsetReport, folder: _Folder, allow_missing: bool) -> Iterator[Finding]:
    """Captions that look as if they were meant to be read but aren't."""
    if not report.without_file:
        return
    extension, where = report.settings.caption_extension, report.settings.where
    beside = Counter(
        suffix
        for name in folder.content.others
        for stem, suffix in [os.path.splitext(name)]  # noqa: PTH122 - many names
        if suffix.lower() in captions.TEXT_SUFFIXES and suffix != extension and os.path.normcase(stem) in folder.stems
    )
    count, place = len(report.without_file), folder.path
    if beside and count == report.images:
        suffix, files = beside.most_common(1)[0]
        what = f"no caption files *{extension} in {place}, but {files} files *{suffix} beside the images"
        hint = f"give --caption_extension {suffix}, or --allow_missing_captions to train without them"
        yield Finding(error=not allow_missing, what=what, where=where, hint=hint, code="E-CAPTION-EXT")
    elif count < report.images or report.missing:
        named = _some(report.without_file)
        instead = (
            f'the class tokens "{report.settings.class_tokens}"' if report.settings.class_tokens else "empty captions"
        )
        what = (
            f"{count} of {report.images} images in {place} have no caption file *{extension} and get {instead}: {named}"
        )
        yield Finding(error=False, what=what, where=where, code="E-CAPTION-MISSING")


def _report_damage(result: Scan, used: Iterator[_Folder], skip: bool) -> None:
    """Names every damaged file, once."""
    damaged = {
        str(folder.path / name): reason
        for folder in used
        for name, reason in folder.headers.items()
        if isinstance(reason, str)
    }
    if skip and damaged:
        result.skipped = list(damaged)
        what = f"{len(damaged)} damaged images are skipped: {_some(result.skipped, 10)}"
        result.findings.append(Finding(error=False, what=what, code="E-IMAGE"))
        return
    hint = "mend or remove it, or give --skip_bad_images"
    result.findings += [
        Finding(error=True, what=f"damaged image: {reason}", where=path, hint=hint, code="E-IMAGE")
        for path, reason in damaged.items()
    ]


def _report_sizes(result: Scan) -> None:
    """Warns of images of which the model will see less, or more, than is in them."""

    def warn(paths: list[str], what: str) -> None:
        if paths:
            number = f"{len(paths)} image{'s' if len(paths) > 1 else ''}"
            result.findings.append(Finding(error=False, what=f"{number} {what}: {_some(paths)}", code="E-IMAGE-SIZE"))

    small = [item.path for item in result.items if item.assignment.too_small]
    warn(small, "too small or too long for any bucket, enlarged or cut to the nearest")
    cut = [item.path for item in result.items if item.assignment.crop_loss > LARGEST_CROP_LOSS]
    warn(cut, f"cropped by more than {LARGEST_CROP_LOSS:.0%}")
    enlarged = [
        item.path for item in result.items if item.assignment.resized.width > LARGEST_ENLARGEMENT * item.original.width
    ]
    warn(enlarged, f"enlarged to more than {LARGEST_ENLARGEMENT:g} times their size")
    if result.transparent:
        what = (
            f"{result.transparent} images have transparency, which is dropped: the colours stored under it are learned"
        )
        result.findings.append(Finding(error=False, what=what, code="E-IMAGE-ALPHA"))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 - many names


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
