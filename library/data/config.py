"""Reads the dataset configuration: a TOML or JSON file, or the command line alone."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.data import folders
from library.data.document import CODE, Document, read
from library.data.positions import Path as Position
from library.data.positions import spelled
from library.data.schema import (
    COMMAND_LINE_ONLY,
    DATASET_KEYS,
    LEVELS,
    OTHER_NAMES,
    SHARED_SUBSET_KEYS,
    SUBSET_KEYS,
    TABLE,
    Key,
)
from library.data.settings import DatasetConfig, DatasetSettings, SubsetSettings
from library.log import DataError, UserError
from library.options import Options
from library.types import Finding, Size

IGNORED_WITH_FILE = ("train_data_dir", "reg_data_dir", "in_json")


def load(options: Options) -> DatasetConfig:
    """The datasets that the options ask for. Errors: UserError that lists all mistakes of the configuration."""
    command_line = CommandLine(options)
    path = command_line.field("dataset_config")
    if path:
        return _from_file(Path(path), command_line)
    return _from_folders(command_line)


class CommandLine:
    """The values that options give where the file says nothing."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def field(self, name: str) -> Any:
        """The value of an option; None where the script has no such option."""
        try:
            return self.options.value(name)
        except KeyError:
            return None

    def value(self, key: Key) -> Any:
        """The value for a key, None when there is none. Errors: UserError."""
        if key.option is None:
            return None
        value = self.field(key.option)
        if key.name == "resolution" and isinstance(value, str):
            return _resolution(value)
        if key.name == "face_crop_aug_range" and isinstance(value, str):
            return _numbers(value, 2, "--face_crop_aug_range", '"lowest,highest"')
        if key.name == "caption_extension":
            return self.field("caption_extention") or value
        return value


def _resolution(text: str) -> list[int]:
    numbers = _numbers(text, 0, "--resolution", '"size" or "width,height"')
    if len(numbers) > 2 or any(number != int(number) or number < 1 for number in numbers):
        raise UserError(f"can't read the resolution {text}", "--resolution", 'give "size" or "width,height"', code=CODE)
    return [int(numbers[0]), int(numbers[-1])]


def _numbers(text: str, count: int, option: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or (count and len(numbers) != count):
        raise UserError(f"can't read {text}", option, f"give {form}", code=CODE)
    return numbers


# without a file


def _from_folders(command_line: CommandLine) -> DatasetConfig:
    """One dataset with a subset for each `<repeats>_<class tokens>` folder."""
    for name, meaning in (
        ("in_json", "datasets described by a metadata file"),
        ("reg_data_dir", "regularisation images"),
        ("dataset_class", "a dataset class of one's own"),
    ):
        if command_line.field(name):
            raise UserError(f"not available yet: {meaning}", f"--{name}", "leave the option out", code="E-LATER")
    directory = command_line.field("train_data_dir")
    if not directory:
        raise DataError(
            "no images given",
            hint="give --dataset_config FILE, or --train_data_dir with the folder above the <repeats>_<name> folders",
            code="E-DATA-NONE",
        )
    found, findings = folders.class_folders(Path(directory), "--train_data_dir")
    subsets = [
        {"image_dir": str(folder.path), "num_repeats": folder.repeats, "class_tokens": folder.class_tokens}
        for folder in found
    ]
    document = Document({"datasets": [{"subsets": subsets}]}, "command line")
    builder = Builder(document, command_line)
    dataset = builder.dataset(0, lambda image_dir: image_dir)
    document.stop_if_wrong()
    return DatasetConfig(datasets=(dataset,), findings=(*findings, *builder.findings))


# from a file


def _from_file(path: Path, command_line: CommandLine) -> DatasetConfig:
    document = read(path)
    _check(document)
    document.stop_if_wrong()
    builder = Builder(document, command_line)
    datasets = document.content["datasets"]
    settings = tuple(builder.dataset(index, _finder(path.parent)) for index in range(len(datasets)))
    document.stop_if_wrong()
    ignored = [
        Finding(error=False, what=f"--{name} is ignored", where=str(path), hint="the dataset configuration decides")
        for name in IGNORED_WITH_FILE
        if command_line.field(name)
    ]
    return DatasetConfig(datasets=settings, source=str(path), findings=(*ignored, *builder.findings))


def _finder(folder: Path) -> Callable[[str], str]:
    """Takes a relative path from the working directory, or else from the folder of the configuration file."""

    def find(image_dir: str) -> str:
        beside = folder / image_dir
        return str(beside) if not Path(image_dir).exists() and beside.exists() else image_dir

    return find


def _check(document: Document) -> None:
    """Notes every unknown key, wrong type and missing part."""
    content = document.content
    for name in content:
        if name not in ("general", "datasets"):
            document.wrong((name,), f"unknown key `{name}`", _suggestion(name, ("general", "datasets")))
    general = content.setdefault("general", {})
    if not TABLE.accepts(general):
        document.wrong(("general",), "`general` must be a table")
        content["general"] = {}
    else:
        _check_table(document, ("general",), general, "[general]")
    datasets = content.setdefault("datasets", [])
    if not _is_list_of_tables(datasets):
        document.wrong(("datasets",), "`datasets` must be a list of tables", "write [[datasets]]")
    elif not datasets:
        document.wrong((), "there are no datasets in it", "add [[datasets]] with [[datasets.subsets]]")
    else:
        for index, dataset in enumerate(datasets):
            _check_dataset(document, ("datasets", index), dataset)


def _check_dataset(document: Document, position: Position, dataset: dict[str, Any]) -> None:
    _check_table(document, position, dataset, "[[datasets]]")
    subsets = dataset.get("subsets", [])
    if not _is_list_of_tables(subsets):
        what = f"`{spelled((*position, 'subsets'))}` must be a list of tables"
        document.wrong((*position, "subsets"), what, "write [[datasets.subsets]]")
        return
    if not subsets:
        document.wrong(position, f"`{spelled(position)}` has no subsets", "add [[datasets.subsets]] with an image_dir")
    for index, subset in enumerate(subsets):
        inner = (*position, "subsets", index)
        _check_table(document, inner, subset, "[[datasets.subsets]]")
        if "image_dir" not in subset and "metadata_file" not in subset:
            document.wrong(inner, f"`{spelled(inner)}` has no image_dir", 'add image_dir = "folder"')


def _check_table(document: Document, position: Position, table: dict[str, Any], level: str) -> None:
    keys = {key.name: key for key in LEVELS[level]}
    for name, value in table.items():
        if name == "subsets" and level == "[[datasets]]":
            continue
        inner = (*position, name)
        if name not in keys:
            document.wrong(inner, f"unknown key `{spelled(inner)}`", _suggestion(name, tuple(keys), level))
        elif problem := keys[name].problem(value):
            document.wrong(inner, f"`{spelled(inner)}` {problem}")


def _suggestion(name: str, known: Sequence[str], level: str = "") -> str:
    if name in COMMAND_LINE_ONLY:
        return f"give --{name} on the command line"
    if OTHER_NAMES.get(name) in known:
        return f"did you mean `{OTHER_NAMES[name]}`?"
    places = [place for place, keys in LEVELS.items() if place != level and any(key.name == name for key in keys)]
    if level and places:
        return f"it belongs into {' or '.join(places)}"
    near = difflib.get_close_matches(name, known, 1, 0.7)
    return f"did you mean `{near[0]}`?" if near else ""


def _is_list_of_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


# values


class Builder:
    """Makes settings of checked tables: subset before dataset before general before command line before default."""

    def __init__(self, document: Document, command_line: CommandLine) -> None:
        self.document = document
        self.command_line = command_line
        self.findings: list[Finding] = []

    def dataset(self, index: int, find: Callable[[str], str]) -> DatasetSettings:
        """The settings of one dataset; mistakes go to the document."""
        general = self.document.content.get("general", {})
        table = self.document.content["datasets"][index]
        position: Position = ("datasets", index)
        outer = ((position, table), (("general",), general))
        values = self._values(DATASET_KEYS, outer)
        resolution = values.pop("resolution")
        if resolution is None:
            what = f"`{spelled(position)}` has no resolution" if self.document.lines else "no resolution given"
            hint = "give --resolution" + (", or resolution = 1024 in the file" if self.document.lines else "")
            self.document.wrong(position, what, hint)
            resolution = 1
        width, height = resolution if isinstance(resolution, list) else (resolution, resolution)
        settings = DatasetSettings(
            resolution=Size(width, height),
            subsets=tuple(
                self._subset((*position, "subsets", number), subset, outer, find)
                for number, subset in enumerate(table.get("subsets", []))
            ),
            where=self.document.where(position),
            **values,
        )
        self._check_buckets(position, settings)
        return settings

    def _subset(
        self,
        position: Position,
        table: Mapping[str, Any],
        outer: tuple[tuple[Position, Mapping[str, Any]], ...],
        find: Callable[[str], str],
    ) -> SubsetSettings:
        values = self._values(SHARED_SUBSET_KEYS, ((position, table), *outer))
        values |= self._values(SUBSET_KEYS[len(SHARED_SUBSET_KEYS) :], ((position, table),))
        extension = values["caption_extension"]
        values["caption_extension"] = extension if extension.startswith(".") else f".{extension}"
        values["custom_attributes"] = values["custom_attributes"] or {}
        values["image_dir"] = find(values["image_dir"] or "")
        if values["face_crop_aug_range"] is not None:
            values["face_crop_aug_range"] = tuple(values["face_crop_aug_range"])
        return SubsetSettings(where=self.document.where(position), **values)

    def _values(self, keys: Sequence[Key], tables: Sequence[tuple[Position, Mapping[str, Any]]]) -> dict[str, Any]:
        """The value of each key from the first table that has it."""
        values = {}
        for key in keys:
            position, value = self._value(key, tables)
            if key.later and value not in (key.default, None, "", 0):
                what = f"not available yet: {key.later} ({key.name})"
                if position is None:
                    where = self.command_line.options.where(str(key.option))
                    raise UserError(what, where, "leave it out", code="E-LATER")
                self.document.wrong(position, what, "leave it out")
            if key.idle and value not in (key.default, None):
                where = self.document.where(position) if position else self.command_line.options.where(str(key.option))
                finding = Finding(error=False, what=f"{key.name} has no effect: {key.idle}", where=where)
                if finding not in self.findings:
                    self.findings.append(finding)
            values[key.name] = value
        return values

    def _value(self, key: Key, tables: Sequence[tuple[Position, Mapping[str, Any]]]) -> tuple[Position | None, Any]:
        for position, table in tables:
            if key.name in table:
                return (*position, key.name), table[key.name]
        value = self.command_line.value(key)
        return None, key.default if value is None else value

    def _check_buckets(self, position: Position, settings: DatasetSettings) -> None:
        """The resolution must lie between the shortest and the longest side."""
        if not settings.enable_bucket or settings.resolution == (1, 1):
            return
        short, long = min(settings.resolution), max(settings.resolution)
        if short < settings.min_bucket_reso:
            what = f"the resolution {settings.resolution} is smaller than min_bucket_reso {settings.min_bucket_reso}"
            self.document.wrong(position, what, f"set min_bucket_reso to {short} or less")
        if long > settings.max_bucket_reso:
            what = f"the resolution {settings.resolution} is larger than max_bucket_reso {settings.max_bucket_reso}"
            self.document.wrong(position, what, f"set max_bucket_reso to {long} or more")
        if short < settings.bucket_reso_steps:
            what = (
                f"the resolution {settings.resolution} is smaller than bucket_reso_steps {settings.bucket_reso_steps}"
            )
            self.document.wrong(position, what)
