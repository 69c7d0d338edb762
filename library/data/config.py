"""Reads the dataset configuration: a TOML or JSON file, or the command line alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.data import folders
from library.data.building import Builder, CommandLine, beside
from library.data.checking import check
from library.data.document import Document, read
from library.data.schema import FOLDERS, METADATA, PAIRS, Accepts, DatasetKind
from library.data.settings import DatasetConfig, SubsetSettings
from library.log import DataError, UserError
from library.options import Options
from library.types import Finding

__all__ = ["Accepts", "load"]

IGNORED_WITH_FILE = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


def load(options: Options, accepts: Accepts | None = None) -> DatasetConfig:
    """The datasets that the options ask for.

    Args:
        options: of any script.
        accepts: what the script can train on; by default what trainers of networks and of whole models can: pairs with
            conditioning images only as masks, with `--masked_loss`.

    Raises:
        UserError: lists all mistakes of the configuration.
    """
    command_line = CommandLine(options)
    if accepts is None:
        accepts = Accepts(pairs=bool(command_line.field("masked_loss")))
    path = command_line.field("dataset_config")
    loaded = _from_file(Path(path), command_line, accepts) if path else _from_options(command_line, accepts)
    findings = *loaded.findings, *_mask_findings(loaded, command_line), *_validation_findings(loaded, command_line)
    return replace(loaded, findings=findings)


def _from_file(path: Path, command_line: CommandLine, accepts: Accepts) -> DatasetConfig:
    document = read(path)
    kinds = check(document, accepts)
    document.stop_if_wrong()
    builder = Builder(document, command_line, accepts, beside(path.parent))
    datasets = tuple(builder.dataset(index, kind) for index, kind in enumerate(kinds))
    document.stop_if_wrong()
    ignored = [
        Finding(error=False, what=f"--{name} is ignored", where=str(path), hint="the dataset configuration decides")
        for name in IGNORED_WITH_FILE
        if command_line.field(name)
    ]
    return DatasetConfig(datasets=datasets, source=str(path), findings=(*ignored, *builder.findings()))


# without a file


def _from_options(command_line: CommandLine, accepts: Accepts) -> DatasetConfig:
    """One dataset: of a metadata file, of pairs, or of `<repeats>_<class tokens>` folders."""
    if command_line.field("dataset_class"):
        what = "not available yet: a dataset class of one's own"
        raise UserError(what, "--dataset_class", "leave the option out", code="E-LATER")
    kind, subsets, findings = _subsets(command_line)
    if kind not in accepts.kinds():
        what, hint = {
            PAIRS: ("conditioning images are masks here", "give --masked_loss, too"),
            METADATA: ("this script takes no metadata files", "leave out --in_json"),
            FOLDERS: ("this script takes no folders of images alone", "give --dataset_config"),
        }[kind]
        option = {PAIRS: "--conditioning_data_dir", METADATA: "--in_json", FOLDERS: "--train_data_dir"}[kind]
        raise UserError(what, option, hint, code="E-OPTION")
    document = Document({"datasets": [{"subsets": subsets}]}, "command line")
    builder = Builder(document, command_line, accepts)
    dataset = builder.dataset(0, kind)
    document.stop_if_wrong()
    return DatasetConfig(datasets=(dataset,), findings=(*findings, *builder.findings()))


def _subsets(command_line: CommandLine) -> tuple[DatasetKind, list[dict[str, Any]], Sequence[Finding]]:
    directory, metadata = command_line.field("train_data_dir"), command_line.field("in_json")
    if metadata:
        subset = {"metadata_file": str(metadata)} | ({"image_dir": str(directory)} if directory else {})
        return METADATA, [subset], ()
    if not directory:
        raise DataError(
            "no images given",
            hint="give --dataset_config FILE, or --train_data_dir with the folder above the <repeats>_<name> folders",
            code="E-DATA-NONE",
        )
    conditioning = command_line.field("conditioning_data_dir")
    if conditioning:
        pairs = {"image_dir": str(directory), "conditioning_data_dir": str(conditioning), "num_repeats": 1}
        return PAIRS, [pairs], ()
    subsets, findings = _class_folders(str(directory), "--train_data_dir", is_reg=False)
    if regularization := command_line.field("reg_data_dir"):
        more, wrong = _class_folders(str(regularization), "--reg_data_dir", is_reg=True)
        if subsets:  # without training images that is what must be said
            subsets, findings = subsets + more, findings + wrong
    return FOLDERS, subsets, findings


def _class_folders(directory: str, option: str, *, is_reg: bool) -> tuple[list[dict[str, Any]], list[Finding]]:
    found, findings = folders.class_folders(Path(directory), option)
    subsets = [
        {"image_dir": str(folder.path), "num_repeats": folder.repeats, "class_tokens": folder.class_tokens}
        | ({"is_reg": True} if is_reg else {})
        for folder in found
    ]
    return subsets, findings


# masks


def _mask_findings(loaded: DatasetConfig, command_line: CommandLine) -> Iterator[Finding]:
    """Whether `--masked_loss` has masks."""
    if not command_line.field("masked_loss"):
        return
    subsets: list[SubsetSettings] = [subset for dataset in loaded.datasets for subset in dataset.subsets]
    bare = [subset for subset in subsets if not subset.mask and not subset.is_reg]
    if subsets and len(bare) == sum(not subset.is_reg for subset in subsets):
        yield Finding(
            error=True,
            what="there are no masks for the loss",
            where=command_line.options.where("masked_loss"),
            hint="give conditioning_data_dir, a folder of masks, or alpha_mask for images with transparency; "
            "or leave out --masked_loss",
            code="E-MASK",
        )
        return
    for subset in bare:
        what = f"{subset.name} has no masks: all of its images is learned"
        yield Finding(error=False, what=what, where=subset.where, code="E-MASK")


# validation


def _validation_findings(loaded: DatasetConfig, command_line: CommandLine) -> Iterator[Finding]:
    """Whether `--validation_split` has folders to split."""
    if command_line.field("validation_split") and not any(dataset.validation_split for dataset in loaded.datasets):
        what = "nothing is held out for validation: only datasets of image folders can be split"
        where = command_line.options.where("validation_split")
        yield Finding(error=False, what=what, where=where, code="E-VALIDATION")
