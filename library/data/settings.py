"""What a dataset configuration says, resolved: frozen values without a trace of files or command lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from library.types import Finding, Size

NO_ATTRIBUTES: Mapping[str, object] = MappingProxyType({})
NO_RESOLUTION = Size(0, 0)


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """One folder of images, or one metadata file."""

    image_dir: str
    """Empty where the keys of a metadata file are paths."""
    recursive: bool = False
    """Whether images in folders inside count, too."""
    num_repeats: int = 1
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_separator: str = ","
    secondary_separator: str | None = None
    flip_aug: bool = False
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, object] = field(default_factory=dict)
    where: str = ""
    """File and line, or option, that asked for it."""

    is_reg: bool = False
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    alpha_mask: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    cache_info: bool = False
    mask: Literal["", "alpha", "conditioning"] = ""
    """What weighs the loss: the image's transparency, the red channel of the conditioning image, or nothing."""
    background: tuple[int, int, int] | None = None
    """Colour behind transparent parts; None: the colours stored under them show."""
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    enable_wildcard: bool = False
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0

    @property
    def name(self) -> str:
        """The image folder, or the metadata file where there is none."""
        return self.image_dir or self.metadata_file or ""


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Subsets that share resolution and batch size."""

    resolution: Size
    """`NO_RESOLUTION` until the metadata files have told their sizes."""
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    subsets: tuple[SubsetSettings, ...] = ()
    where: str = ""

    validation_split: float = 0.0
    """Share of the images that is held out for validation."""
    validation_seed: int | None = None
    """Decides which; None: the seed of the run."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """All datasets of a run."""

    datasets: tuple[DatasetSettings, ...]
    source: str | None = None
    """The configuration file; None: the command line."""
    findings: tuple[Finding, ...] = ()
    """What was noticed on the way, folder layout included; an error among them forbids to start."""
