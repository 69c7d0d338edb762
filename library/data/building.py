"""Makes settings of a checked configuration: looks each value up, and compares the values with one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data import conflicts
from library.data.colours import colour
from library.data.document import CODE, Document
from library.data.positions import Path as Position
from library.data.positions import spelled
from library.data.schema import (
    DATASET_KEYS,
    METADATA,
    OWN_SUBSET_KEYS,
    PAIRS,
    SHARED_SUBSET_KEYS,
    Accepts,
    DatasetKind,
    Key,
)
from library.data.settings import NO_RESOLUTION, DatasetSettings, SubsetSettings
from library.log import UserError
from library.options import Options
from library.types import Finding, Size

Find = Callable[[str], str]
"""Takes a path of the configuration to where it is."""
Tables = tuple[tuple[Position, Mapping[str, Any]], ...]
"""Tables that may hold a value, the first that does wins."""


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

    @property
    def caches_latents(self) -> bool:
        """Whether each image is encoded once and for all."""
        return bool(self.field("cache_latents") or self.field("cache_latents_to_disk"))

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
            value = self.field("caption_extention") or value
        problem = None if value is None else key.problem(value)
        if problem:
            raise UserError(f"it {problem}", self.options.where(key.option), code=CODE)
        return value


def _resolution(text: str) -> list[int]:
    numbers = _numbers(text, 0, "--resolution", '"size" or "width,height"')
    if len(numbers) > 2 or any(number != int(number) or not 1 <= number <= 65536 for number in numbers):
        raise UserError(f"can't read the resolution {text}", "--resolution", 'give "size" or "width,height"', code=CODE)
    return [int(numbers[0]), int(numbers[-1])]


def _numbers(text: str, count: int, option: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or (count and len(numbers) != count) or not all(abs(number) < 1e9 for number in numbers):
        raise UserError(f"can't read {text}", option, f"give {form}", code=CODE)
    return numbers


@dataclass
class Values:
    """Values by name, with the place in the file that each comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, Position | None] = field(default_factory=dict)
    """None: not from the file."""

    def __or__(self, other: Values) -> Values:
        return Values(self.values | other.values, self.positions | other.positions)


class Builder:
    """Makes settings of checked tables: subset before dataset before general before command line before default."""

    def __init__(self, document: Document, command_line: CommandLine, accepts: Accepts, find: Find = str) -> None:
        self.document, self.command_line, self.accepts, self.find = document, command_line, accepts, find
        self.masked_loss = bool(command_line.field("masked_loss"))
        text = command_line.field("alpha_background")
        self.background = None if text is None else colour(text, command_line.options.where("alpha_background"))
        self._idle: dict[tuple[str, str], set[str]] = {}
        """Reasons why a value does nothing, by name and place; "" among them: it does something somewhere."""

    def findings(self) -> Iterator[Finding]:
        """Values that do nothing wherever they are looked up."""
        for (name, where), reasons in self._idle.items():
            if "" not in reasons:
                what = f"{name} has no effect: {' and '.join(sorted(reasons))}"
                yield Finding(error=False, what=what, where=where, code=CODE)

    def dataset(self, index: int, kind: DatasetKind) -> DatasetSettings:
        """The settings of one dataset; mistakes go to the document."""
        table = self.document.content["datasets"][index]
        position: Position = ("datasets", index)
        outer: Tables = ((position, table), (("general",), self.document.content.get("general", {})))
        found = self._values(DATASET_KEYS, outer, kind)
        values = dict(found.values)
        resolution = self._resolution(position, values.pop("resolution"), kind)
        settings = DatasetSettings(
            resolution=resolution,
            subsets=tuple(
                self._subset((*position, "subsets", number), subset, outer, kind, values["enable_bucket"])
                for number, subset in enumerate(table.get("subsets", []))
            ),
            where=self.document.where(position),
            **values,
        )
        if resolution != NO_RESOLUTION:
            for conflict in conflicts.of_dataset(values, resolution):
                self._wrong(found, conflict)
        if self.document.lines:
            self._note_idle(DATASET_KEYS, found, conflicts.idle_in_dataset(values))
        if settings.subsets and all(subset.is_reg for subset in settings.subsets):
            what = f"`{spelled(position)}` has regularization images only"
            self.document.wrong(position, what, "add a subset of training images")
        return settings

    def _resolution(self, position: Position, resolution: Any, kind: DatasetKind) -> Size:
        if isinstance(resolution, list):
            return Size(resolution[0], resolution[1])
        if resolution is not None:
            return Size(resolution, resolution)
        if kind != METADATA:
            what = f"`{spelled(position)}` has no resolution" if self.document.lines else "no resolution given"
            hint = "give --resolution" + (", or resolution = 1024 in the file" if self.document.lines else "")
            self.document.wrong(position, what, hint)
        return NO_RESOLUTION

    def _subset(
        self, position: Position, table: Mapping[str, Any], outer: Tables, kind: DatasetKind, enable_bucket: bool
    ) -> SubsetSettings:
        found = self._values(SHARED_SUBSET_KEYS, ((position, table), *outer), kind)
        found |= self._values(OWN_SUBSET_KEYS, ((position, table),), kind)
        values = dict(found.values)
        cached = self.command_line.caches_latents
        for conflict in conflicts.of_subset(values, enable_bucket=enable_bucket, cached=cached):
            self._wrong(found, conflict)
        self._note_idle(SHARED_SUBSET_KEYS, found, conflicts.idle_in_subset(values, enable_bucket=enable_bucket))
        extension = values["caption_extension"]
        values["caption_extension"] = extension if extension.startswith(".") else f".{extension}"
        values["custom_attributes"] = values["custom_attributes"] or {}
        for name in ("image_dir", "metadata_file", "conditioning_data_dir"):
            values[name] = self.find(values[name]) if values[name] else None
        values["image_dir"] = values["image_dir"] or ""
        if values["face_crop_aug_range"] is not None:
            values["face_crop_aug_range"] = tuple(values["face_crop_aug_range"])
        values["mask"] = "alpha" if values["alpha_mask"] else ""
        if kind == PAIRS and self.masked_loss:
            values["mask"] = "conditioning"
        return SubsetSettings(where=self.document.where(position), background=self.background, **values)

    def _values(self, keys: Sequence[Key], tables: Tables, kind: DatasetKind) -> Values:
        """The value of each key from the first table that has it; of keys that the kind doesn't know, the default."""
        found = Values()
        for key in keys:
            position, value = self._value(key, tables) if key.fits(self.accepts, kind) else (None, key.default)
            found.values[key.name], found.positions[key.name] = value, position
        return found

    def _value(self, key: Key, tables: Tables) -> tuple[Position | None, Any]:
        for position, table in tables:
            if key.name in table:
                return (*position, key.name), table[key.name]
        value = self.command_line.value(key)
        return None, key.default if value is None else value

    def _wrong(self, found: Values, conflict: conflicts.Conflict) -> None:
        """Notes a mistake where the value was given."""
        position = found.positions[conflict.name]
        if position is not None:
            what = f"`{spelled(position)}`: {conflict.what}" if self.document.lines else conflict.what
            self.document.wrong(position, what, conflict.hint)
        else:
            where = self.command_line.options.where(conflict.name)
            self.document.wrong_at(where, conflict.what, conflict.hint)

    def _note_idle(self, keys: Sequence[Key], found: Values, reasons: Mapping[str, str]) -> None:
        """Notes for each value that isn't the default whether it does something."""
        for key in keys:
            position, given = found.positions[key.name], found.values[key.name]
            if given in (key.default, None):
                continue
            if position is None:
                where = self.command_line.options.where(str(key.option))
            else:
                where = self.document.where(position)
            self._idle.setdefault((key.name, where), set()).add(reasons.get(key.name, ""))


def beside(folder: Path) -> Find:
    """Takes a relative path from the working directory, or else from the folder of the configuration file."""

    def find(path: str) -> str:
        there = folder / path
        return str(there) if not Path(path).exists() and there.exists() else path

    return find
