"""Finds the images and captions of a configuration and looks at every file before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from library import garbage
from library.data import buckets, captions
from library.data.buckets import Assignment
from library.data.cache_info import CacheInfo
from library.data.directories import Directory, Facts, Shelf, splitext
from library.data.holdout import hold_out
from library.data.items import Item
from library.data.regularization import balanced
from library.data.scan_cache import ScanCache
from library.data.scan_findings import (
    caption_findings,
    claim_findings,
    damage_findings,
    gone_findings,
    size_findings,
    text_findings,
    transparency_findings,
)
from library.data.scan_report import Scan, SubsetReport, condensed, some
from library.data.searching import Candidate, Finder, Search, face
from library.data.settings import NO_RESOLUTION, DatasetConfig, DatasetSettings, SubsetSettings
from library.types import Finding, Size, Traits

__all__ = ["Scan", "SubsetReport", "scan"]


def scan(
    config: DatasetConfig,
    traits: Traits,
    *,
    skip_bad_images: bool = False,
    ignore_exif_orientation: bool = False,
    allow_missing_captions: bool = False,
    strict: bool = False,
    scan_cache: Path | None = None,
    use_gone: bool = False,
    validation_seed: int = 0,
    visible: bool = True,
) -> Scan:
    """The items of a configuration; damaged files, missing captions and all else that is wrong are findings.

    Args:
        config: from `library.data.config.load`.
        traits: of the model family.
        skip_bad_images: leave out damaged images, and images without conditioning image or file, with a warning.
        ignore_exif_orientation: take images as they are stored.
        allow_missing_captions: warn where captions seem to have another extension.
        strict: warnings become errors.
        scan_cache: file in which headers and captions are remembered.
        use_gone: whether cached latents may stand for images that aren't there any more.
        validation_seed: of datasets that have none of their own.
        visible: show the progress.
    """
    cache = ScanCache(scan_cache, ignore_orientation=ignore_exif_orientation, thorough=skip_bad_images)
    shelf = Shelf(cache, ignore_orientation=ignore_exif_orientation, thorough=skip_bad_images)
    finder = Finder(shelf, traits.latents_suffix if use_gone else None, skip_bad_images)
    result = Scan(config, findings=list(config.findings))
    with garbage.left_alone():
        searches = [
            finder.search(subset, index)
            for index, settings in enumerate(config.datasets)
            for subset in _usable(settings, result)
        ]
        for search in searches:
            result.findings += search.findings
        result.config = replace(config, datasets=tuple(_with_sizes(result, searches, traits)))
        _want(shelf, searches, ignore_exif_orientation)
        shelf.read(visible=visible)
        damaged: dict[str, str] = {}
        makers = [_Maker(settings) for settings in result.config.datasets]
        for search in searches:
            _add(result, search, makers[search.dataset], damaged, allow_missing_captions)
        hold_out(result, validation_seed)
        for index in range(len(config.datasets)):
            _balance(result, index)
        result.opened = shelf.opened
        result.findings += damage_findings(result, damaged, skip_bad_images)
        result.findings += [*text_findings(shelf), *size_findings(result), *transparency_findings(result)]
        result.findings += gone_findings(result)
    if not result.items and not any(finding.error for finding in result.findings):
        where = config.source or "--train_data_dir"
        what = "all images are held out for validation" if result.held_out else "there are no images to train on"
        result.findings.append(Finding(error=True, what=what, where=where, code="E-DATA-NONE"))
    result.findings = condensed(result.findings, strict=strict)
    return result


# what is looked for


def _usable(settings: DatasetSettings, result: Scan) -> Iterator[SubsetSettings]:
    """The subsets of a dataset that count."""
    seen: set[tuple[str, ...]] = set()
    for subset in settings.subsets:
        parts = (subset.metadata_file,) if subset.metadata_file else (subset.image_dir, subset.conditioning_data_dir)
        place = tuple(os.path.normcase(Path(part).absolute()) for part in parts if part)
        if subset.num_repeats < 1:
            what = f"{subset.name} is ignored: num_repeats is {subset.num_repeats}"
        elif place in seen:
            what = f"{subset.metadata_file or subset.name} is ignored: the dataset has it already"
        else:
            seen.add(place)
            yield subset
            continue
        result.findings.append(Finding(error=False, what=what, where=subset.where, code="E-DATA-SUBSET"))


def _with_sizes(result: Scan, searches: Sequence[Search], traits: Traits) -> Iterator[DatasetSettings]:
    """The datasets, with the sizes that the entries of their metadata files ask for."""
    for index, settings in enumerate(result.config.datasets):
        own = [search for search in searches if search.dataset == index and search.subset.metadata_file]
        sizes = {candidate.bucket for search in own for candidate in search.candidates if candidate.bucket}
        if sizes and all(search.has_sizes for search in own):
            result.findings += _fixed_size_findings(settings, sizes, traits)
            resolution = settings.resolution
            if resolution == NO_RESOLUTION:
                resolution = max(sizes, key=lambda size: (size.area, size))
            settings = replace(settings, resolution=resolution, enable_bucket=True)
        else:
            for candidate in (candidate for search in own for candidate in search.candidates):
                candidate.bucket = None
            if settings.resolution == NO_RESOLUTION:
                what = "no resolution given, and not every entry of the metadata files has a train_resolution"
                hint = "give --resolution, or resolution = 1024 in the file"
                result.findings.append(
                    Finding(error=True, what=what, where=settings.where, hint=hint, code="E-DATASET-CONFIG")
                )
                settings = replace(settings, resolution=Size(traits.bucket_step, traits.bucket_step))
            else:
                result.findings += _step_findings(settings, traits)
        yield settings


def _fixed_size_findings(settings: DatasetSettings, sizes: set[Size], traits: Traits) -> Iterator[Finding]:
    """Sizes in metadata files that can't be trained at."""
    if settings.bucket_no_upscale:
        what = "bucket_no_upscale can't be used: the metadata files say train_resolution for every image"
        hint = "leave bucket_no_upscale out, or remove train_resolution"
        yield Finding(error=True, what=what, where=settings.where, hint=hint, code="E-DATASET-CONFIG")
    step = traits.bucket_step
    bad = sorted(size for size in sizes if size.width % step or size.height % step)
    if bad:
        what = f"train_resolution isn't a multiple of {step}, which {traits.name} needs: {some(list(map(str, bad)))}"
        hint = "prepare the buckets anew, or remove train_resolution"
        yield Finding(error=True, what=what, where=settings.where, hint=hint, code="E-BUCKET-STEP")


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


def _want(shelf: Shelf, searches: Sequence[Search], ignore_orientation: bool) -> None:
    """Asks for the headers and captions of all candidates."""
    for search in searches:
        subset, info = search.subset, search.info
        directory: Directory | None = None
        for candidate in search.candidates:
            if candidate.directory is not directory:
                directory = candidate.directory
                images, texts = shelf.images_of(directory), shelf.texts_of(directory)
            if candidate.gone is None:
                images[candidate.name] = None
            if candidate.caption_file is not None:
                texts[candidate.caption_file] = None
            elif info is not None and candidate.text is None and not subset.class_tokens:
                candidate.text = info.caption(candidate.path)
            if candidate.conditioning is not None:
                shelf.images_of(candidate.conditioning[0])[candidate.conditioning[1]] = None
        if info is not None:
            _inform(search.candidates, info, ignore_orientation)


def _inform(candidates: Sequence[Candidate], info: CacheInfo, ignore_orientation: bool) -> None:
    """Takes from a folder's own file what is known of its images."""
    for candidate in candidates:
        directory, name = candidate.directory, candidate.name
        if name in directory.stamps and name not in directory.facts:
            known = info.facts(directory, name, ignore_orientation=ignore_orientation)
            if known is not None:
                directory.facts[name] = known


# what is found


class _Maker:
    """Gives sizes their places in the buckets of a dataset; equal ones share one object."""

    def __init__(self, settings: DatasetSettings) -> None:
        self._settings, self.bucketing = settings, settings.enable_bucket
        self._known: dict[tuple[int, int, Size | None], tuple[Size, Assignment]] = {}

    def assignment(self, width: int, height: int, bucket: Size | None) -> tuple[Size, Assignment]:
        """The size of an image, and what becomes of it."""
        key = width, height, bucket
        found = self._known.get(key)
        if found is None:
            size = Size(width, height)
            assigned = buckets.assign(size, self._settings) if bucket is None else buckets.covering(size, bucket)
            found = self._known[key] = size, assigned
        return found


def _add(result: Scan, search: Search, maker: _Maker, damaged: dict[str, str], allow_missing: bool) -> None:
    """Adds a subset's items, report and findings."""
    if not search.candidates:
        return
    report = SubsetReport(search.subset, search.dataset)
    result.reports.append(report)
    first = len(result.items)
    for candidate in search.candidates:
        facts = _facts(candidate, damaged)
        if facts is not None:
            result.items.append(_item(report, candidate, facts, maker))
    added = result.items[first:]
    report.transparent = sum(item.transparent for item in added)
    result.transparent += report.transparent
    result.rotated += sum(item.orientation != 1 for item in added)
    result.gone += sum(item.gone for item in added)
    result.findings += caption_findings(report, search, allow_missing)
    result.findings += claim_findings(search, added)
    crops_faces = search.subset.face_crop_aug_range and not result.config.datasets[search.dataset].enable_bucket
    if crops_faces and not any(item.face for item in added):
        what = f"no file name in {search.subset.name} holds a face position: face_crop_aug_range does nothing"
        result.findings.append(Finding(error=False, what=what, where=search.subset.where, code="E-DATA-SUBSET"))
    if search.info is not None and (problem := search.info.write(added)):
        result.findings.append(problem)


def _facts(candidate: Candidate, damaged: dict[str, str]) -> Facts | None:
    """The facts of an image; None when it, or its conditioning image, is damaged."""
    if candidate.conditioning is not None:
        directory, name = candidate.conditioning
        condition = directory.facts[name]
        if isinstance(condition, str):
            damaged[directory.prefix + name] = condition
            return None
    if candidate.gone is not None:
        return Facts(*candidate.gone, 1, False)
    facts = candidate.directory.facts[candidate.name]
    if isinstance(facts, str):
        damaged[candidate.path] = facts
        return None
    return facts


def _item(report: SubsetReport, candidate: Candidate, facts: Facts, maker: _Maker) -> Item:
    subset, directory, name = report.settings, candidate.directory, candidate.name
    size, assignment = maker.assignment(facts.width, facts.height, candidate.bucket)
    file_bytes, mtime_ns = directory.stamps.get(name, (0, 0))
    shared = directory.shared_stems
    conditioning = candidate.conditioning
    return Item(
        path=directory.prefix + name,
        original=size,
        caption=_caption(report, candidate),
        repeats=subset.num_repeats,
        assignment=assignment,
        dataset=report.dataset,
        subset=subset,
        orientation=facts.orientation,
        file_bytes=file_bytes,
        mtime_ns=mtime_ns,
        shares_stem=bool(shared) and os.path.normcase(splitext(name)[0]) in shared,
        transparent=facts.transparent,
        conditioning=None if conditioning is None else conditioning[0].prefix + conditioning[1],
        face=face(name) if subset.face_crop_aug_range is not None and not maker.bucketing else None,
        gone=candidate.gone is not None,
    )


def _caption(report: SubsetReport, candidate: Candidate) -> str:
    """The raw caption of an image, counted in the report."""
    report.images += 1
    subset = report.settings
    text = candidate.text
    if candidate.caption_file is not None:
        text = candidate.directory.texts[candidate.caption_file]
    elif text is None or (not text and subset.metadata_file):
        report.without_file.append(candidate.name)
        report.from_class_tokens += bool(subset.class_tokens)
        report.missing += not subset.class_tokens
        return subset.class_tokens or ""
    text = text or ""
    raw = captions.raw_caption(text, subset)
    report.captioned += bool(raw)
    report.empty += not raw
    if not subset.enable_wildcard and len(text) > len(raw) + 2:  # more than the end of a line
        report.multi_line += captions.is_multi_line(text)
    return raw


def _balance(result: Scan, dataset: int) -> None:
    """Gives regularization images the repeats with which they are as many samples as the training images."""
    if not any(subset.is_reg for subset in result.config.datasets[dataset].subsets):
        return
    places = [place for place, item in enumerate(result.items) if item.dataset == dataset and item.subset.is_reg]
    if not places:
        return
    samples = sum(item.repeats for item in result.items if item.dataset == dataset and not item.subset.is_reg)
    if not samples:
        what = "there are regularization images, but no training images"
        where = result.config.datasets[dataset].where
        result.findings.append(Finding(error=True, what=what, where=where, code="E-DATA-NONE"))
        return
    repeats = balanced([result.items[place].repeats for place in places], samples)
    if repeats is None:
        result.reg_slots[dataset] = samples
        repeats = [1] * len(places)
    for place, count in zip(places, repeats, strict=True):
        if result.items[place].repeats != count:
            result.items[place] = replace(result.items[place], repeats=count)
