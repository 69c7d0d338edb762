"""Filling caches in one call, as tests like it."""

from __future__ import annotations

from typing import Any

from library.data import cache
from library.data.cache import CacheSettings, LatentsCheck, Summary, TextCheck
from library.data.dataset import TrainingData


def check_latents(data: TrainingData, identity: str = "", **settings: Any) -> LatentsCheck:
    return cache.check_latents(data, CacheSettings(identity=identity, visible=False, **settings))


def check_text(data: TrainingData, identity: str = "", **settings: Any) -> TextCheck:
    return cache.check_text(data, CacheSettings(identity=identity, visible=False, **settings))


def fill_latents(data: TrainingData, encode: Any, identity: str = "", batch_size: int = 1, **settings: Any) -> Summary:
    check = check_latents(data, identity, **settings)
    return cache.fill_latents(data, encode, check, batch_size=batch_size, visible=False)


def fill_text(data: TrainingData, encode: Any, identity: str = "", batch_size: int = 1, **settings: Any) -> Summary:
    check = check_text(data, identity, **settings)
    return cache.fill_text(data, encode, check, batch_size=batch_size, visible=False)
