"""The keys of a dataset configuration: where each may stand, for which kind of dataset, its type, its option."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

DatasetKind = Literal["folders", "metadata", "pairs"]
FOLDERS: DatasetKind = "folders"
METADATA: DatasetKind = "metadata"
PAIRS: DatasetKind = "pairs"
KINDS = (FOLDERS, METADATA, PAIRS)
"""Image folders with caption files, a file with captions, images with conditioning images."""

LONGEST_SIDE = 65536
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True)
class Kind:
    """A type as users write it."""

    description: str
    types: tuple[type, ...]
    length: int = 0
    """Number of elements of a list of the types; 0: not a list."""
    or_single: bool = False
    """Whether one value may stand for the list."""

    def accepts(self, value: object) -> bool:
        """Whether a parsed value has this type; true and false are no numbers."""
        if isinstance(value, list):
            return self.length > 0 and len(value) == self.length and all(self._single(item) for item in value)
        return (self.length == 0 or self.or_single) and self._single(value)

    def _single(self, value: object) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return isinstance(value, self.types) and (bool in self.types or not isinstance(value, bool))


INTEGER = Kind("a whole number", (int,))
NUMBER = Kind("a number", (int, float))
SWITCH = Kind("true or false", (bool,))
TEXT = Kind("a text in quotes", (str,))
PATH = Kind("a path in quotes", (str,))
SIZE = Kind("one whole number or [width, height]", (int,), length=2, or_single=True)
RANGE = Kind("two numbers [low, high]", (int, float), length=2)
TABLE = Kind("a table", (dict,))


@dataclass(frozen=True)
class Accepts:
    """What a script can train on."""

    dreambooth: bool = True
    """Folders of images with caption files."""
    metadata: bool = True
    """Images described by a metadata file."""
    pairs: bool = False
    """Images with conditioning images."""
    dropout: bool = True
    """Whether captions and tags may be dropped."""

    def kinds(self) -> tuple[DatasetKind, ...]:
        """The kinds of datasets."""
        wanted = zip(KINDS, (self.dreambooth, self.metadata, self.pairs), strict=True)
        return tuple(kind for kind, accepted in wanted if accepted)


@dataclass(frozen=True)
class Key:
    """One key; `None` as default: not set."""

    name: str
    kind: Kind
    default: Any = None
    option: str | None = None
    """Field of the command-line groups that stands in for it."""
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    kinds: tuple[DatasetKind, ...] = KINDS
    """The datasets that know it; in [general] it may also stand beside others."""
    is_dropout: bool = False

    def fits(self, accepts: Accepts, kind: DatasetKind | None) -> bool:
        """Whether it may be given for a kind of datasets; None: for any that the script accepts."""
        if self.is_dropout and not accepts.dropout:
            return False
        return kind in self.kinds if kind else any(accepted in self.kinds for accepted in accepts.kinds())

    def problem(self, value: object) -> str | None:
        """What is wrong with a value of this key."""
        if not self.kind.accepts(value):
            return f"must be {self.kind.description}, not {_spelled(value)}"
        numbers = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, (int, float))]
        if numbers and self.least is not None and min(numbers) < self.least:
            return f"must be at least {self.least:g}, not {_spelled(value)}"
        if numbers and self.most is not None and max(numbers) > self.most:
            return f"must be at most {self.most:g}, not {_spelled(value)}"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}, not {_spelled(value)}"
        if self.kind is PATH and (not str(value).strip() or not _can_be_a_path(str(value))):
            return "is empty" if not str(value).strip() else "holds characters that no path can have"
        return None


def _can_be_a_path(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _spelled(value: object) -> str:
    if value is None:
        return "null (leave the key out to get its default)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


DATASET_KEYS = (
    Key("resolution", SIZE, option="resolution", least=1, most=LONGEST_SIDE),
    Key("batch_size", INTEGER, 1, option="train_batch_size", least=1, most=1_000_000),
    Key("enable_bucket", SWITCH, False, option="enable_bucket"),
    Key("min_bucket_reso", INTEGER, 256, option="min_bucket_reso", least=1, most=LONGEST_SIDE),
    Key("max_bucket_reso", INTEGER, 1024, option="max_bucket_reso", least=1, most=LONGEST_SIDE),
    Key("bucket_reso_steps", INTEGER, 64, option="bucket_reso_steps", least=1, most=LONGEST_SIDE),
    Key("bucket_no_upscale", SWITCH, False, option="bucket_no_upscale"),
    Key("network_multiplier", NUMBER, 1.0),
    Key("validation_split", NUMBER, 0.0, option="validation_split", least=0, most=1, kinds=(FOLDERS,)),
    Key("validation_seed", INTEGER, option="validation_seed", kinds=(FOLDERS,)),
)
"""In [general] and [[datasets]]."""

_WITH_FILES = (FOLDERS, PAIRS)

SHARED_SUBSET_KEYS = (
    Key("num_repeats", INTEGER, 1, option="dataset_repeats", most=1_000_000),
    Key("class_tokens", TEXT, kinds=(FOLDERS,)),
    Key("caption_extension", TEXT, ".caption", option="caption_extension", kinds=_WITH_FILES),
    Key("caption_prefix", TEXT, option="caption_prefix"),
    Key("caption_suffix", TEXT, option="caption_suffix"),
    Key("caption_separator", TEXT, ",", option="caption_separator"),
    Key("secondary_separator", TEXT, option="secondary_separator"),
    Key("flip_aug", SWITCH, False, option="flip_aug"),
    Key("resize_interpolation", TEXT, option="resize_interpolation", choices=INTERPOLATIONS),
    Key("custom_attributes", TABLE),
    Key("cache_info", SWITCH, False, option="cache_info", kinds=_WITH_FILES),
    Key("shuffle_caption", SWITCH, False, option="shuffle_caption"),
    Key("keep_tokens", INTEGER, 0, option="keep_tokens", least=0),
    Key("keep_tokens_separator", TEXT, "", option="keep_tokens_separator"),
    Key("enable_wildcard", SWITCH, False, option="enable_wildcard"),
    Key("token_warmup_min", INTEGER, 1, option="token_warmup_min", least=0),
    Key("token_warmup_step", NUMBER, 0, option="token_warmup_step", least=0),
    Key("caption_dropout_rate", NUMBER, 0.0, option="caption_dropout_rate", least=0, most=1, is_dropout=True),
    Key(
        "caption_dropout_every_n_epochs",
        INTEGER,
        0,
        option="caption_dropout_every_n_epochs",
        least=0,
        is_dropout=True,
    ),
    Key("caption_tag_dropout_rate", NUMBER, 0.0, option="caption_tag_dropout_rate", least=0, most=1, is_dropout=True),
    Key("color_aug", SWITCH, False, option="color_aug"),
    Key("random_crop", SWITCH, False, option="random_crop"),
    Key("face_crop_aug_range", RANGE, option="face_crop_aug_range"),
)
"""In [general], [[datasets]] and [[datasets.subsets]]."""

OWN_SUBSET_KEYS = (
    Key("image_dir", PATH),
    Key("recursive", SWITCH, False, kinds=_WITH_FILES),
    Key("is_reg", SWITCH, False, kinds=(FOLDERS,)),
    Key("alpha_mask", SWITCH, False, option="alpha_mask", kinds=(FOLDERS, METADATA)),
    Key("metadata_file", PATH, kinds=(METADATA,)),
    Key("conditioning_data_dir", PATH, kinds=(PAIRS,)),
)
"""Only in [[datasets.subsets]]."""

SUBSET_KEYS = SHARED_SUBSET_KEYS + OWN_SUBSET_KEYS

LEVELS: dict[str, tuple[Key, ...]] = {
    "[general]": DATASET_KEYS + SHARED_SUBSET_KEYS,
    "[[datasets]]": DATASET_KEYS + SHARED_SUBSET_KEYS,
    "[[datasets.subsets]]": SUBSET_KEYS,
}

OTHER_NAMES = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "repeats": "num_repeats",
    "caption_extention": "caption_extension",
    "train_data_dir": "image_dir",
    "reg_data_dir": "image_dir",
    "in_json": "metadata_file",
}
"""Names under which users know a key."""

COMMAND_LINE_ONLY = ("prior_loss_weight", "max_token_length", "debug_dataset", "masked_loss", "alpha_background")
