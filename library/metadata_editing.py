"""Metadata of finished files: chosen, set, removed, made private. The tensors are never touched.

Hashes of network files are those of the new metadata; see `library.metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from library import files
from library.log import DataError, UserError, get_logger
from library.metadata import MINIMUM, file_hashes, private

logger = get_logger(__name__)

HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""Of network files."""

Metadata = Mapping[str, str]


# what can be stripped


def _without_paths(metadata: Metadata) -> dict[str, str]:
    return {key: _changed(value, private, private) for key, value in metadata.items()}


def _without_folders(metadata: Metadata) -> dict[str, str]:
    """Counts of images and tags stay, under numbers instead of names."""
    found = dict(metadata)
    for key in ("ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency"):
        parsed = _parsed(found.get(key, ""))
        if isinstance(parsed, dict):
            found[key] = json.dumps(_numbered(parsed))
    datasets = _parsed(found.get("ss_datasets", ""))
    if isinstance(datasets, list):
        found["ss_datasets"] = json.dumps([_nameless(dataset) for dataset in datasets])
    return found


def _numbered(folders: Mapping[str, Any]) -> dict[str, Any]:
    return {f"folder {number}": value for number, value in enumerate(folders.values(), 1)}


def _nameless(dataset: Any) -> Any:
    if not isinstance(dataset, dict):
        return dataset
    frequencies = dataset.get("tag_frequency")
    named = {"tag_frequency": _numbered(frequencies)} if isinstance(frequencies, dict) else {}
    return _less({**dataset, **named}, subsets=("image_dir", "metadata_file"))


def _without_captions(metadata: Metadata) -> dict[str, str]:
    found = {key: value for key, value in metadata.items() if key != "ss_tag_frequency"}
    datasets = _parsed(found.get("ss_datasets", ""))
    if isinstance(datasets, list):
        words = ("class_tokens", "caption_prefix", "caption_suffix")
        found["ss_datasets"] = json.dumps([_less(dataset, ("tag_frequency",), words) for dataset in datasets])
    return found


def _less(dataset: Any, names: Sequence[str] = (), subsets: Sequence[str] = ()) -> Any:
    """A dataset of `ss_datasets` without some of its values, and its subsets without some of theirs."""
    if not isinstance(dataset, dict):
        return dataset
    left = {name: value for name, value in dataset.items() if name not in names}
    if isinstance(left.get("subsets"), list):
        left["subsets"] = [
            {name: value for name, value in subset.items() if name not in subsets} for subset in left["subsets"]
        ]
    return left


def _without_models(metadata: Metadata) -> dict[str, str]:
    starts = ("ss_sd_model_", "ss_new_sd_model_", "ss_vae_", "ss_new_vae_")
    return {key: value for key, value in metadata.items() if not key.startswith(starts)}


def _minimal(metadata: Metadata) -> dict[str, str]:
    kept = {f"ss_{name}" for name in MINIMUM}
    return {key: value for key, value in metadata.items() if not key.startswith("ss_") or key in kept}


STRIPS: Mapping[str, Callable[[Metadata], dict[str, str]]] = {
    "paths": _without_paths,
    "folders": _without_folders,
    "captions": _without_captions,
    "models": _without_models,
    "minimal": _minimal,
    "all": lambda metadata: {},
}
"""By value of `--strip`."""


# edits


@dataclass(frozen=True)
class Edit:
    """What becomes of metadata, in this order."""

    filters: Sequence[str] = ()
    """Wildcards of the keys that stay; empty: all."""
    strips: Sequence[str] = ()
    """Names of `STRIPS`."""
    removed: Sequence[str] = ()
    """Wildcards of keys."""
    values: Sequence[str] = ()
    """`name=value`."""

    def __call__(self, metadata: Metadata) -> dict[str, str]:
        """The metadata afterwards. Errors: UserError for a pattern that matches nothing, and for what can't be set."""
        found = chosen(metadata, self.filters, "--filter") if self.filters else dict(metadata)
        for name in self.strips:
            found = STRIPS[name](found)
        if self.removed:
            gone = chosen(found, self.removed, "--remove")
            found = {key: value for key, value in found.items() if key not in gone}
        return found | dict(_pair(text) for text in self.values)


def chosen(metadata: Metadata, patterns: Sequence[str], option: str) -> dict[str, str]:
    """The values whose keys match one of some wildcards. Errors: UserError when one of these matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in metadata):
            keys = ", ".join(sorted(metadata)[:3]) + ("…" if len(metadata) > 3 else "")
            hint = f"keys are such as {keys}" if metadata else "there are none"
            raise UserError("no key matches", f"{option} {pattern}", hint, code="E-METADATA-KEY")
    return {key: value for key, value in metadata.items() if any(fnmatchcase(key, pattern) for pattern in patterns)}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r} isn't name=value", "--set", "such as modelspec.title=Cat", code="E-METADATA-KEY")
    if key.strip() in HASHES:
        raise UserError(f"{key.strip()} is computed", "--set", "leave it out", code="E-METADATA-KEY")
    return key.strip(), value


# files


def rewrite(source: Path | str, target: Path | str, edit: Edit) -> dict[str, str]:
    """Writes a file with edited metadata, in place where both paths are the same; gives the metadata.

    Network files get hashes that fit, unless they had some and these were to go.

    Errors: UserError as `Edit`; DataError when it isn't safetensors.
    """
    before = read(source)
    after = edit(before)
    hashed = [key for key in HASHES if key in after]
    if not any(key in before for key in HASHES) and is_network(after):
        hashed = list(HASHES)
    if hashed:
        found = file_hashes(source, after)
        after |= {key: found[key] for key in hashed}
    files.save_with_metadata(source, target, after)
    changed = sum(before[key] != after[key] for key in before.keys() & after.keys())
    logger.info(
        "%s: %d values removed, %d new, %d changed, %d kept",
        *(target, len(before.keys() - after.keys()), len(after.keys() - before.keys()), changed),
        len(before.keys() & after.keys()) - changed,
    )
    return after


def read(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file. Errors: DataError when it isn't one."""
    return files.header(path).metadata


def is_network(metadata: Metadata) -> bool:
    """Whether it is that of a network file that a program of this kind wrote."""
    return any(key.startswith("ss_") for key in metadata)


def verify(path: Path | str) -> str:
    """A line that says that the hashes of a network file fit its tensors and metadata.

    Errors: DataError when one doesn't, or there is none.
    """
    metadata = read(path)
    stored = {key: metadata[key] for key in HASHES if key in metadata}
    if not stored:
        what = "it has no hashes"
        raise DataError(what, str(path), "only network files have them; any edit adds them", code="E-METADATA-HASH")
    found = file_hashes(path, metadata)
    wrong = [key for key, value in stored.items() if found[key] != value]
    if wrong:
        what = f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not those of this file"
        hint = "the weights were changed without it, or by a tool that doesn't renew it; any edit here does"
        raise DataError(what, str(path), hint, code="E-METADATA-HASH")
    return f"{path}: {' and '.join(stored)} fit"


# values that are JSON


def _parsed(text: str) -> Any:
    """What a value holds if it is a JSON object or list; None for other texts."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _changed(text: str, change: Callable[[str], str], rename: Callable[[str], str]) -> str:
    """The value with its text, or all texts in its JSON, changed; images that are written as text stay."""
    if text.startswith("data:"):
        return text
    parsed = _parsed(text)
    if parsed is None:
        return change(text)
    new = _walked(parsed, change, rename)
    return text if new == parsed else json.dumps(new)


def _walked(value: Any, change: Callable[[str], str], rename: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walked(item, change, rename) for item in value]
    if isinstance(value, dict):
        names = _distinct(rename(key) for key in value)
        return {name: _walked(item, change, rename) for name, item in zip(names, value.values(), strict=True)}
    return value


def _distinct(names: Iterable[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        new, number = name, 2
        while new in found:
            new, number = f"{name} ({number})", number + 1
        found.append(new)
    return found
