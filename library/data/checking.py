"""Looks through a parsed dataset configuration: kinds of datasets, unknown and misplaced keys, wrong types."""

from __future__ import annotations

from typing import Any

from library.data.document import Document
from library.data.positions import Path as Position
from library.data.positions import shown, spelled
from library.data.schema import (
    COMMAND_LINE_ONLY,
    FOLDERS,
    LEVELS,
    METADATA,
    OTHER_NAMES,
    PAIRS,
    TABLE,
    Accepts,
    DatasetKind,
    Key,
)
from library.data.spelling import nearest

_ALL_KEYS = {key.name: key for keys in LEVELS.values() for key in keys}
_OF_A_KIND = {
    FOLDERS: "datasets of folders",
    METADATA: "datasets with a metadata_file",
    PAIRS: "datasets with a conditioning_data_dir",
}
_NEEDED: dict[DatasetKind, tuple[tuple[str, str], ...]] = {
    FOLDERS: (("image_dir", "folder"),),
    METADATA: (("metadata_file", "file.json"),),
    PAIRS: (("image_dir", "folder"), ("conditioning_data_dir", "folder")),
}


def check(document: Document, accepts: Accepts) -> list[DatasetKind]:
    """Notes every mistake in the document; gives the kind of each dataset."""
    content = document.content
    for name in content:
        if name not in ("general", "datasets"):
            document.wrong((name,), f"unknown key `{shown(name)}`", _suggestion(name, "", accepts, None))
    general = content.setdefault("general", {})
    if TABLE.accepts(general):
        _check_table(document, ("general",), "[general]", accepts, None)
    else:
        document.wrong(("general",), "`general` must be a table")
        content["general"] = {}
    datasets = content.setdefault("datasets", [])
    if not _is_list_of_tables(datasets):
        document.wrong(("datasets",), "`datasets` must be a list of tables", "write [[datasets]]")
        return []
    if not datasets and not document.mistakes:
        document.wrong((), "there are no datasets in it", "add [[datasets]] with [[datasets.subsets]]")
    return [_check_dataset(document, index, accepts) for index in range(len(datasets))]


def _check_dataset(document: Document, index: int, accepts: Accepts) -> DatasetKind:
    position: Position = ("datasets", index)
    subsets = document.content["datasets"][index].get("subsets", [])
    if not _is_list_of_tables(subsets):
        what = f"`{spelled((*position, 'subsets'))}` must be a list of tables"
        document.wrong((*position, "subsets"), what, "write [[datasets.subsets]]")
        subsets = []
    else:
        kind = _kind(document, position, subsets, accepts)
    if not subsets:
        kind = accepts.kinds()[0]
    _check_table(document, position, "[[datasets]]", accepts, kind if subsets else None)
    for number, subset in enumerate(subsets):
        inner = (*position, "subsets", number)
        _check_table(document, inner, "[[datasets.subsets]]", accepts, kind)
        for name, example in _NEEDED[kind]:
            if name not in subset:
                document.wrong(inner, f"`{spelled(inner)}` has no {name}", f'add {name} = "{example}"')
    return kind


def _kind(document: Document, position: Position, subsets: list[dict[str, Any]], accepts: Accepts) -> DatasetKind:
    """What kind of dataset it is; subsets of several kinds, and none at all, are mistakes."""
    if not subsets:
        document.wrong(position, f"`{spelled(position)}` has no subsets", "add [[datasets.subsets]] with an image_dir")
    kinds = {_kind_of_subset(subset, accepts) for subset in subsets}
    if len(kinds) > 1:
        what = f"`{spelled(position)}` mixes subsets of folders, with metadata_file or with conditioning_data_dir"
        document.wrong(position, what, "put each kind into a [[datasets]] of its own")
    accepted = accepts.kinds()
    kind: DatasetKind = next((kind for kind in (PAIRS, METADATA, FOLDERS) if kind in kinds), accepted[0])
    return kind if kind in accepted else accepted[0]


def _kind_of_subset(subset: dict[str, Any], accepts: Accepts) -> DatasetKind:
    if "conditioning_data_dir" in subset and accepts.pairs:
        return PAIRS
    return METADATA if "metadata_file" in subset else FOLDERS


def _check_table(
    document: Document, position: Position, level: str, accepts: Accepts, kind: DatasetKind | None
) -> None:
    """Names and values of a table; `kind` is None where the keys of all kinds may stand."""
    table: Any = document.content
    for part in position:
        table = table[part]
    keys = {key.name: key for key in LEVELS[level]}
    for name, value in table.items():
        if name == "subsets" and level == "[[datasets]]":
            continue
        inner = (*position, name)
        key = keys.get(name)
        if key is None or not key.fits(accepts, kind):
            known = name in _ALL_KEYS
            what = f"`{spelled(inner)}` doesn't belong here" if known else f"unknown key `{spelled(inner)}`"
            document.wrong(inner, what, _suggestion(name, level, accepts, kind))
        elif problem := key.problem(value):
            document.wrong(inner, f"`{spelled(inner)}` {problem}")


def _suggestion(name: str, level: str, accepts: Accepts, kind: DatasetKind | None) -> str:
    """What was probably meant by a key that isn't known at its place; level "" is the root."""
    if name in _ALL_KEYS:
        return _why_not(_ALL_KEYS[name], level, accepts, kind)
    if name in COMMAND_LINE_ONLY:
        return f"give --{name} on the command line"
    known = {key.name for key in LEVELS.get(level, ()) if key.fits(accepts, kind)}
    known |= {"subsets"} if level == "[[datasets]]" else set()
    known |= {"general", "datasets"} if not level else set()
    meant = OTHER_NAMES.get(name) or nearest(name, known) or nearest(name, _ALL_KEYS)
    if meant is None:
        return ""
    if meant in known:
        return f"did you mean `{meant}`?"
    return f"did you mean `{meant}`? {_why_not(_ALL_KEYS[meant], level, accepts, kind)}"


def _why_not(key: Key, level: str, accepts: Accepts, kind: DatasetKind | None) -> str:
    """Why a key that exists can't stand there."""
    if key.is_dropout and not accepts.dropout:
        return "this script can't drop captions: leave it out"
    if not key.fits(accepts, None):
        if key.kinds == (PAIRS,):
            return "conditioning images are masks here: give --masked_loss"
        return f"this script takes {' and '.join(_OF_A_KIND[kind] for kind in accepts.kinds())} only"
    if key not in LEVELS.get(level, ()):
        return f"it belongs into {' or '.join(place for place, keys in LEVELS.items() if key in keys)}"
    return f"it is for {' and '.join(_OF_A_KIND[kind] for kind in key.kinds)}"


def _is_list_of_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
