"""Shows what the model will see, instead of training: a contact sheet of samples and the tables of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library import log
from library.data import reports
from library.data.images import load_picture
from library.data.loading import Clock, Sample, samples_of
from library.data.sheet import SheetRow, contact_sheet, histogram_lines
from library.log import DataError
from library.option_groups import DatasetOptions, SaveOptions

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.families.base import Family
    from library.options import Options

logger = log.get_logger(__name__)

SAMPLES = 60
SAMPLES_OF_EACH_SUBSET = 3
"""At least so many, however small a subset is beside others."""
MOST_SAMPLES = 500


def only_looks(options: Options) -> bool:
    """Whether that is all that is wanted."""
    group = options[DatasetOptions]
    return group.dry_run or group.debug_dataset


def inspect(options: Options, family: Family, data: TrainingData, facts: Sequence[str]) -> None:
    """Prints the caption table and the buckets, and writes the contact sheet, with further facts above it."""
    captions = reports.caption_table(data.items, data.scan.reports, family.count_tokens, family.token_limits())
    logger.info("%s", log.block("captions", captions))
    for number in range(len(data.config.datasets)):
        logger.info("%s", log.block(f"buckets of dataset {number + 1}", histogram_lines(data.bucket_counts(number))))
    save = options[SaveOptions]
    draw_sheet(data, [*facts, *captions], Path(save.output_dir or ".") / f"{save.output_name or 'last'}_dataset.html")
    logger.info("nothing was trained: --dry_run and --debug_dataset only look at the data")


def draw_sheet(data: TrainingData, facts: Sequence[str], path: Path) -> None:
    """Writes the contact sheet: samples of the first epoch in their order, the bucket histogram, and facts."""
    histogram = {
        f"dataset {number + 1}, {settings.resolution}, batch size {settings.batch_size}": data.bucket_counts(number)
        for number, settings in enumerate(data.config.datasets)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(_rows(data), histogram, facts, path)
    logger.info("contact sheet: %s", path)


def _rows(data: TrainingData) -> Iterator[SheetRow]:
    for sample in _chosen(data):
        item = sample.item
        notes = [
            note
            for note, holds in (
                ("mirrored", sample.view.mirrored),
                ("regularisation", item.subset.is_reg),
                (f"x {item.repeats}", item.repeats > 1),
            )
            if holds
        ]
        try:
            picture = load_picture(item, sample.view, conditioning=data.conditioned)
        except DataError as error:
            logger.warning("%s", error)
            continue
        yield SheetRow(
            name=item.path,
            size=item.assignment.bucket,
            caption=sample.text,
            pixels=picture.pixels,
            mask=picture.mask,
            conditioning=picture.conditioning,
            note=", ".join(notes),
        )


def _chosen(data: TrainingData) -> Iterator[Sample]:
    """Samples of the first epoch: the first ones, and then the first of subsets that would be missing."""
    shown: dict[str, int] = {}
    count = 0
    for group in data.epoch_batches(1):
        for sample in samples_of(data, group.shares[0], Clock(0, 1)):
            of_subset = shown.get(sample.item.subset.where + sample.item.subset.name, 0)
            if sample.item.gone or count >= MOST_SAMPLES:
                continue
            if count < SAMPLES or of_subset < SAMPLES_OF_EACH_SUBSET:
                shown[sample.item.subset.where + sample.item.subset.name] = of_subset + 1
                count += 1
                yield sample
