"""The keys of a dataset configuration: where each may stand, its type, its option, whether it works yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        return isinstance(value, self.types) and (bool in self.types or not isinstance(value, bool))


INTEGER = Kind("a whole number", (int,))
NUMBER = Kind("a number", (int, float))
SWITCH = Kind("true or false", (bool,))
TEXT = Kind("a text in quotes", (str,))
SIZE = Kind("one whole number or [width, height]", (int,), length=2, or_single=True)
RANGE = Kind("two numbers [low, high]", (int, float), length=2)
TABLE = Kind("a table", (dict,))


@dataclass(frozen=True)
class Key:
    """One key; `None` as default: not set."""

    name: str
    kind: Kind
    default: Any = None
    option: str | None = None
    """Field of the command-line groups that stands in for it."""
    least: float | None = None
    choices: tuple[str, ...] = ()
    later: str = ""
    """What it belongs to, when that isn't there yet: only values that switch it off are accepted."""
    idle: str = ""
    """Why it means nothing yet: warned of when it isn't the default."""

    def problem(self, value: object) -> str | None:
        """What is wrong with a value of this key."""
        if not self.kind.accepts(value):
            return f"must be {self.kind.description}, not {_spelled(value)}"
        smallest = min(value) if isinstance(value, list) else value
        if self.least is not None and isinstance(smallest, (int, float)) and smallest < self.least:
            return f"must be at least {self.least:g}, not {_spelled(value)}"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}, not {_spelled(value)}"
        return None


def _spelled(value: object) -> str:
    if value is None:
        return "null (leave the key out to get its default)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


DATASET_KEYS = (
    Key("resolution", SIZE, option="resolution", least=1),
    Key("batch_size", INTEGER, 1, option="train_batch_size", least=1),
    Key("enable_bucket", SWITCH, False, option="enable_bucket"),
    Key("min_bucket_reso", INTEGER, 256, option="min_bucket_reso", least=1),
    Key("max_bucket_reso", INTEGER, 1024, option="max_bucket_reso", least=1),
    Key("bucket_reso_steps", INTEGER, 64, option="bucket_reso_steps", least=1),
    Key("bucket_no_upscale", SWITCH, False, option="bucket_no_upscale"),
    Key("network_multiplier", NUMBER, 1.0),
    Key("validation_split", NUMBER, 0.0, least=0, later="the validation split"),
    Key("validation_seed", INTEGER, idle="there is no validation split"),
)
"""In [general] and [[datasets]]."""

SHARED_SUBSET_KEYS = (
    Key("num_repeats", INTEGER, 1, option="dataset_repeats"),
    Key("class_tokens", TEXT),
    Key("caption_extension", TEXT, ".caption", option="caption_extension"),
    Key("caption_prefix", TEXT, option="caption_prefix"),
    Key("caption_suffix", TEXT, option="caption_suffix"),
    Key("caption_separator", TEXT, ",", option="caption_separator"),
    Key("secondary_separator", TEXT, option="secondary_separator"),
    Key("flip_aug", SWITCH, False, option="flip_aug"),
    Key("resize_interpolation", TEXT, option="resize_interpolation", choices=INTERPOLATIONS),
    Key("custom_attributes", TABLE),
    Key("cache_info", SWITCH, False, option="cache_info", later="the list of sizes and captions"),
    Key("shuffle_caption", SWITCH, False, option="shuffle_caption", later="caption shuffling"),
    Key("keep_tokens", INTEGER, 0, option="keep_tokens", least=0, idle="nothing shuffles or drops tags"),
    Key("keep_tokens_separator", TEXT, "", option="keep_tokens_separator", later="caption shuffling"),
    Key("enable_wildcard", SWITCH, False, option="enable_wildcard", later="wildcards in captions"),
    Key("token_warmup_min", INTEGER, 1, option="token_warmup_min", least=0, idle="there is no token warm-up"),
    Key("token_warmup_step", NUMBER, 0, option="token_warmup_step", least=0, later="token warm-up"),
    Key("caption_dropout_rate", NUMBER, 0.0, option="caption_dropout_rate", least=0, later="caption dropout"),
    Key(
        "caption_dropout_every_n_epochs",
        INTEGER,
        0,
        option="caption_dropout_every_n_epochs",
        least=0,
        later="caption dropout",
    ),
    Key("caption_tag_dropout_rate", NUMBER, 0.0, option="caption_tag_dropout_rate", least=0, later="tag dropout"),
    Key("color_aug", SWITCH, False, option="color_aug", later="colour augmentation"),
    Key("random_crop", SWITCH, False, option="random_crop", later="random cropping"),
    Key("face_crop_aug_range", RANGE, option="face_crop_aug_range", later="cropping around faces"),
)
"""In [general], [[datasets]] and [[datasets.subsets]]."""

OWN_SUBSET_KEYS = (
    Key("image_dir", TEXT),
    Key("is_reg", SWITCH, False, later="regularisation images"),
    Key("alpha_mask", SWITCH, False, option="alpha_mask", later="masks for the loss"),
    Key("metadata_file", TEXT, later="datasets described by a metadata file"),
    Key("conditioning_data_dir", TEXT, later="conditioning images and masks"),
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

COMMAND_LINE_ONLY = ("prior_loss_weight", "max_token_length", "debug_dataset")
