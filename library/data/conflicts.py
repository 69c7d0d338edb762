"""Values of a dataset that contradict one another, and values that do nothing beside others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from library.types import Size


class Conflict(NamedTuple):
    """A value that can't be used."""

    name: str
    what: str
    hint: str


def of_dataset(values: Mapping[str, Any], resolution: Size) -> Iterator[Conflict]:
    """Sizes that exclude one another: the resolution must lie between the shortest and the longest side."""
    if not values["enable_bucket"] or values["bucket_no_upscale"]:
        return
    short, long = min(resolution), max(resolution)
    if short < values["min_bucket_reso"]:
        what = f"the resolution {resolution} is smaller than min_bucket_reso {values['min_bucket_reso']}"
        yield Conflict("resolution", what, f"set min_bucket_reso to {short} or less")
    if long > values["max_bucket_reso"]:
        what = f"the resolution {resolution} is larger than max_bucket_reso {values['max_bucket_reso']}"
        yield Conflict("resolution", what, f"set max_bucket_reso to {long} or more")
    if short < values["bucket_reso_steps"]:
        what = f"the resolution {resolution} is smaller than bucket_reso_steps {values['bucket_reso_steps']}"
        yield Conflict("resolution", what, f"set bucket_reso_steps to {short} or less")


def of_subset(values: Mapping[str, Any], *, enable_bucket: bool, cached: bool) -> Iterator[Conflict]:
    """Values of a subset that exclude one another, or can't be used with cached latents."""
    if cached:
        uses_faces = values["face_crop_aug_range"] is not None and not enable_bucket
        wanted = {"color_aug": values["color_aug"], "random_crop": values["random_crop"]}
        for name in [name for name, on in (wanted | {"face_crop_aug_range": uses_faces}).items() if on]:
            what = f"{name} can't be used with cached latents, which are the same each time"
            yield Conflict(name, what, f"leave out {name}, or --cache_latents and --cache_latents_to_disk")
    faces = values["face_crop_aug_range"]
    if faces is not None and not 0 < faces[0] <= faces[1]:
        what = f"face_crop_aug_range must be [low, high] with 0 < low <= high, not {list(faces)}"
        yield Conflict("face_crop_aug_range", what, "for example [2.0, 4.0]")
    if _changes_tags(values) and not values["caption_separator"]:
        what = "caption_separator is empty, so that captions can't be split into tags"
        yield Conflict("caption_separator", what, 'set caption_separator = ","')


def idle_in_dataset(values: Mapping[str, Any]) -> dict[str, str]:
    """Why keys of a dataset do nothing; keys that aren't named may have an effect."""
    idle = {} if values["validation_split"] else {"validation_seed": "there is no validation_split"}
    if not values["enable_bucket"]:
        names = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
        return idle | dict.fromkeys(names, "enable_bucket is off")
    if values["bucket_no_upscale"]:
        return idle | dict.fromkeys(("min_bucket_reso", "max_bucket_reso"), "bucket_no_upscale is on")
    return idle


def idle_in_subset(values: Mapping[str, Any], *, enable_bucket: bool) -> dict[str, str]:
    """Why keys of a subset do nothing; keys that aren't named may have an effect."""
    idle = {}
    if not _changes_tags(values):
        idle["keep_tokens"] = "nothing shuffles or drops tags"
    if not values["token_warmup_step"]:
        idle["token_warmup_min"] = "there is no token_warmup_step"
    if enable_bucket:
        idle["face_crop_aug_range"] = "enable_bucket is on, which keeps the whole picture"
    return idle


def _changes_tags(values: Mapping[str, Any]) -> bool:
    return bool(values["shuffle_caption"] or values["token_warmup_step"] or values["caption_tag_dropout_rate"])
