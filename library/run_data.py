"""The data of a run: found as the options say, made into a source of batches, and checked against the encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library import log
from library.data import config, reports, sources
from library.data.caption_cache import cache_problem
from library.data.dataset import TrainingData
from library.log import DataError
from library.option_groups import (
    CacheOptions,
    DatasetOptions,
    DreamBoothOptions,
    LengthOptions,
    PriorLossOptions,
    TextCacheOptions,
)
from library.places import cache_home
from library.types import Finding

if TYPE_CHECKING:
    from library.families.base import Family
    from library.methods.base import Method
    from library.options import Options
    from library.train.plan import Plan

logger = log.get_logger(__name__)


def find(options: Options, family: Family) -> sources.Scan:
    """What the options say there is to train on; what is wrong with it is among the findings."""
    group = options[DatasetOptions]
    scan = sources.scan(
        config.load(options),
        family.traits,
        skip_bad_images=group.skip_bad_images,
        ignore_exif_orientation=group.ignore_exif_orientation,
        allow_missing_captions=group.allow_missing_captions,
        strict=group.strict,
        scan_cache=None if group.no_scan_cache else _scan_cache(group),
        use_gone=options[CacheOptions].cache_latents_to_disk,
        validation_seed=(options[LengthOptions].seed or 0) if options.has(LengthOptions) else 0,
    )
    resolutions = [settings.resolution for settings in scan.config.datasets if settings.resolution]
    scan.findings += family.train_at(resolutions, {item.assignment.bucket for item in scan.items})
    if options[TextCacheOptions].cache_text_encoder_outputs:
        scan.findings += _uncacheable(scan, options[TextCacheOptions].text_cache_variants)
    return scan


def _uncacheable(scan: sources.Scan, variants: int) -> Iterator[Finding]:
    """Subsets whose captions are worded in ways that a cache can't hold."""
    captions: dict[int, list[str]] = {}
    for item in scan.items:
        captions.setdefault(id(item.subset), []).append(item.caption)
    for settings in scan.config.datasets:
        for subset in settings.subsets:
            problem = cache_problem(subset, variants, captions.get(id(subset), ()))
            if problem is not None:
                what = f"{problem[0]} changes captions each time, but text encoder outputs are cached"
                yield Finding(error=True, what=what, where=subset.where, hint=problem[1], code="E-OPTION")


def about_texts(options: Options, scan: sources.Scan, family: Family, method: Method) -> Iterator[Finding]:
    """What options about text outputs ask for that the training, or the batches, don't allow."""
    if options[TextCacheOptions].cache_text_encoder_outputs and set(family.encoder_names) <= method.trained_encoders():
        what = "it does nothing: every text encoder is trained, and so runs for each batch"
        yield Finding(error=False, what=what, where="--cache_text_encoder_outputs", hint="leave it out")
    large = [settings for settings in scan.config.datasets if settings.batch_size > 1]
    if options.has(DreamBoothOptions) and options[DreamBoothOptions].no_token_padding and large:
        what = f"captions of different lengths make no batch of {large[0].batch_size} images"
        hint = "give --train_batch_size 1, or leave it out"
        yield Finding(error=True, what=what, where="--no_token_padding", hint=hint, code="E-OPTION")


def cache_folder(options: Options, scan: sources.Scan) -> Path:
    """Where caches take room: a folder of their own, or that of the first image."""
    folder = options[CacheOptions].cache_dir
    return Path(folder) if folder else Path(scan.items[0].path).parent


def _scan_cache(group: DatasetOptions) -> Path:
    """Where headers and captions of a dataset are remembered."""
    named = (group.dataset_config, group.train_data_dir, group.reg_data_dir, group.in_json)
    digest = hashlib.sha256("|".join(str(Path(path).absolute()) for path in named if path).encode()).hexdigest()[:16]
    return cache_home() / "scans" / f"{digest}.json"


def of_scan(options: Options, scan: sources.Scan, family: Family, seed: int, plan: Plan | None = None) -> TrainingData:
    """The images of a scan as a source of batches."""
    prior = options[PriorLossOptions].prior_loss_weight if options.has(PriorLossOptions) else 1.0
    variants = options[TextCacheOptions].text_cache_variants
    data = TrainingData(scan, family.traits, seed, prior_loss_weight=prior, text_variants=variants)
    data.words_from_cache = options[TextCacheOptions].cache_text_encoder_outputs
    data.total_steps = plan.total_steps if plan is not None else 0
    return data


def check_lengths(options: Options, family: Family, data: TrainingData) -> None:
    """Warns of captions that the encoders cut. Errors: DataError with `--strict`."""
    lines = reports.token_report(data.all_items, family.count_tokens, family.token_limits())
    if lines and options[DatasetOptions].strict:
        raise DataError("; ".join(lines), "--strict", "shorten the captions", code="E-CAPTION-LENGTH")
    for line in lines:
        logger.warning(line)
