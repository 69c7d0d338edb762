"""The caches of a run: what they lack is known before a weight is loaded, and encoded while the encoders are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library import placing
from library.data import cache
from library.data.cache_names import CacheNames
from library.option_groups import CacheOptions, TextCacheOptions
from library.places import check_writable
from library.train import processes, watch
from library.train.conditions import encode_images
from library.train.setups import storage_of
from library.types import Finding, Posterior

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.assembly import Precision, Setting
    from library.data.dataset import TrainingData
    from library.families.base import Family
    from library.options import Options


@dataclass(frozen=True)
class Caches:
    """What was found in the caches by this process; None where nothing is to be cached."""

    latents: cache.LatentsCheck | None = None
    text: cache.TextCheck | None = None

    @property
    def lack_latents(self) -> bool:
        """Whether there is something for the autoencoder to do."""
        return self.latents is not None and bool(self.latents.stale)

    @property
    def lack_text(self) -> bool:
        """Whether there is something for the text encoders to do."""
        return self.text is not None and bool(self.text.stale)

    def findings(self) -> list[Finding]:
        """Folders in which caches would be written and can't be."""
        by_option = {"--cache_latents_to_disk": self.latents, "--cache_text_encoder_outputs_to_disk": self.text}
        return [
            finding
            for option, check in by_option.items()
            for folder in (check.folders if check is not None else ())
            for finding in check_writable(folder, option)
        ]

    def bytes_needed(self, family: Family, processes: int) -> int:
        """Room on the disk for what all processes together have to encode, estimated from the share of this one."""
        latents = 0 if self.latents is None else self.latents.bytes_needed
        on_disk = self.text is not None and self.text.on_disk
        captions = len(self.text.stale) if self.text is not None and on_disk else 0
        return processes * (latents + captions * family.text_output_bytes())


def look(
    options: Options,
    family: Family,
    data: TrainingData,
    precision: Precision,
    changes_to_encoders: str = "",
) -> Caches:
    """Opens every cache file and finds out what has to be encoded.

    `changes_to_encoders` stands for all that is done to the text encoders of the files before they are used.
    """
    latents, text = options[CacheOptions], options[TextCacheOptions]
    same = cache.CacheSettings(
        skip_check=latents.skip_cache_check,
        names=CacheNames(Path(latents.cache_dir) if latents.cache_dir else None),
        compact=latents.cache_compact,
        posterior=latents.cache_posterior,
        rank=processes.rank(),
        world=processes.world_size(),
        visible=processes.is_main(),
    )
    found_latents, found_text = None, None
    if latents.cache_latents:
        settings = replace(
            same,
            identity=family.vae_identity() if latents.cache_latents_to_disk else "",
            dtype=str(precision.vae),
            to_disk=latents.cache_latents_to_disk,
        )
        found_latents = cache.check_latents(data, settings)
    if text.cache_text_encoder_outputs:
        settings = replace(
            same,
            identity=family.text_identity() + changes_to_encoders if text.cache_text_encoder_outputs_to_disk else "",
            dtype=_encoder_types(family, options, precision),
            to_disk=text.cache_text_encoder_outputs_to_disk,
        )
        found_text = cache.check_text(data, settings)
    return Caches(found_latents, found_text)


def _encoder_types(family: Family, options: Options, precision: Precision) -> str:
    """The types that the encoders run and are stored in: outputs of another type are other outputs."""
    scheme = storage_of(options).encoders
    own = {name: placing.Place.of(options, name).dtype for name in family.encoder_names}
    others = [f"{name} {dtype}" for name, dtype in own.items() if dtype not in (None, precision.frozen)]
    return ", ".join([str(precision.frozen), *([f"stored in {scheme}"] if scheme else []), *others])


def fill_text(job: Setting, encoders: Mapping[str, nn.Module]) -> None:
    """Encodes the captions that the cache lacks; the encoders are needed only if it lacks some."""
    assert job.caches.text is not None
    family = job.family

    def encode(captions: list[str]) -> dict[str, Tensor]:
        watch.heartbeat("caching text outputs")
        tokens = {name: tensor.to(job.device) for name, tensor in family.tokenize(captions).items()}
        with torch.no_grad(), job.accelerator.autocast():
            return family.encode_text(encoders, tokens)

    batch_size = job.options[TextCacheOptions].text_encoder_batch_size or max(job.data.batch_sizes)
    cache.fill_text(job.data, encode, job.caches.text, batch_size=batch_size, visible=job.ranks.is_main)
    processes.wait_for_all()


def fill_latents(job: Setting, vae: nn.Module | None) -> None:
    """Encodes the images that the cache lacks; the autoencoder is needed only if it lacks some."""
    assert job.caches.latents is not None

    def encode(pixels: Tensor) -> Posterior:
        watch.heartbeat("caching latents")
        assert vae is not None, "nothing was missing when the autoencoder was left out"
        with torch.no_grad():
            return encode_images(job.family, vae, pixels)

    batch_size = job.options[CacheOptions].vae_batch_size
    cache.fill_latents(job.data, encode, job.caches.latents, batch_size=batch_size, visible=job.ranks.is_main)
    processes.wait_for_all()
