"""Captions whose encoder outputs are cached: every text that may be wanted is known, and one is drawn each time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from functools import lru_cache

from library.data.captions import Moment, is_dropped, plain, varies, worded
from library.data.settings import SubsetSettings
from library.randomness import mix

TEXT_SEED = 0x74657874
"""Decides the variants: they don't change from run to run, or the cache would be of no use."""


def texts_to_cache(raw: str, settings: SubsetSettings, variants: int, seed: int = TEXT_SEED) -> tuple[str, ...]:
    """Every text that `draw_cached` can give, once each; the empty one last where whole captions are dropped."""
    if varies(raw, settings):
        texts = dict.fromkeys(_variant(raw, settings, number, seed) for number in range(max(variants, 1)))
    else:
        texts = {plain(raw, settings): None}
    if drops(settings):
        texts.pop("", None)
        texts[""] = None
    return tuple(texts)


def draw_cached(
    raw: str, settings: SubsetSettings, variants: int, seed: int, generator: random.Random, moment: Moment
) -> str:
    """One of the cached texts: nothing where the caption is dropped, else any of its variants with equal chance."""
    if is_dropped(settings, generator, moment):
        return ""
    if not varies(raw, settings):
        return plain(raw, settings)
    return _variant(raw, settings, generator.randrange(variants) if variants > 1 else 0, seed)


def drops(settings: SubsetSettings) -> bool:
    """Whether whole captions may be left out."""
    return settings.caption_dropout_rate > 0 or settings.caption_dropout_every_n_epochs > 0


def cache_problem(settings: SubsetSettings, variants: int, captions: Iterable[str]) -> tuple[str, str] | None:
    """The setting that forbids to cache text encoder outputs, and what to do; None: there is none."""
    if settings.token_warmup_step > 0:
        return "token_warmup_step", "leave it out, or don't cache text encoder outputs"
    if variants > 0 or not any(varies(raw, settings) for raw in captions):
        return None
    names = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard")
    name = next(name for name in names if getattr(settings, name))
    return name, f"give --text_cache_variants 4, or any number, to cache so many wordings of each, or leave {name} out"


def _variant(raw: str, settings: SubsetSettings, number: int, seed: int) -> str:
    return worded(raw, settings, random.Random(mix(seed, _number_of(raw), number)))


@lru_cache(maxsize=4096)
def _number_of(raw: str) -> int:
    return int.from_bytes(hashlib.sha256(raw.encode()).digest()[:8], "big")
