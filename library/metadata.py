"""What files say about themselves: `ss_*` facts of the training, `modelspec.*`, hashes.

No value holds a folder of the user's machine: paths become base names, see `private`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, tzinfo
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library import files

if TYPE_CHECKING:
    from torch import Tensor

    from library.types import Size

MINIMUM = ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
"""The facts that stay with `--no_metadata`, names without the prefix."""


# facts of the training


@dataclass(kw_only=True, frozen=True)
class TrainingFacts:
    """What is known of a training run; the names, with `ss_` before them, are those in the file.

    Fields that are options have the option's name or are filled from it by `from_options`. The fields without a default
    are facts that no option knows.
    """

    session_id: int
    training_started_at: float
    """Unix time."""
    training_finished_at: float
    """Unix time of this save."""
    steps: int
    """Optimizer steps done."""
    epoch: int
    """Finished epochs."""
    base_model_version: str
    num_train_images: int
    """With repeats."""
    num_reg_images: int
    """With repeats."""
    num_batches_per_epoch: int
    """Of all processes, before accumulation."""
    num_epochs: int
    seed: int
    optimizer: str
    """Module and class, with the arguments in parentheses when there are any."""
    text_encoder_lr: Sequence[float] | float | None

    sd_scripts_commit_hash: str = "(unknown)"
    output_name: str | None = None
    learning_rate: float | None = None
    unet_lr: float | None = None
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    max_train_steps: int | None = None
    lr_warmup_steps: float | None = None
    lr_scheduler: str | None = None
    network_module: str | None = None
    network_dim: int | None = None
    network_alpha: float | None = None
    network_dropout: float | None = None
    mixed_precision: str = "no"
    full_fp16: bool = False
    v2: bool = False
    cache_latents: bool = False
    debiased_estimation: bool = False
    fp8_base: bool = False
    fp8_base_unet: bool = False
    clip_skip: int | None = None
    max_token_length: int | None = None
    lowram: bool = False
    noise_offset: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float | None = None
    adaptive_noise_scale: float | None = None
    zero_terminal_snr: bool = False
    training_comment: str | None = None
    max_grad_norm: float | None = None
    caption_dropout_rate: float | None = None
    caption_dropout_every_n_epochs: int | None = None
    caption_tag_dropout_rate: float | None = None
    face_crop_aug_range: str | None = None
    prior_loss_weight: float | None = None
    min_snr_gamma: float | None = None
    scale_weight_norms: float | None = None
    ip_noise_gamma: float | None = None
    noise_offset_random_strength: bool | None = None
    ip_noise_gamma_random_strength: bool | None = None
    loss_type: str | None = None
    huber_schedule: str | None = None
    huber_c: float | None = None

    @classmethod
    def from_options(cls, values: Mapping[str, object], **computed: Any) -> TrainingFacts:
        """The facts from the values of options by name (those without secrets), and what was computed besides."""
        renamed = {"debiased_estimation": "debiased_estimation_loss"}
        names = {fact.name: renamed.get(fact.name, fact.name) for fact in fields(cls)}
        options = {fact: values[name] for fact, name in names.items() if name in values}
        return cls(**{**options, **computed})

    def strings(self) -> dict[str, str]:
        """The facts as in a file."""
        return {f"ss_{fact.name}": str(getattr(self, fact.name)) for fact in fields(self)}


def training_metadata(
    facts: TrainingFacts,
    *,
    network_args: Mapping[str, str] | None = None,
    dataset: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    family: Mapping[str, object] | None = None,
    minimal: bool = False,
) -> dict[str, str]:
    """All `ss_*` values of a network file.

    Args:
        facts: of the run.
        network_args: values of `--network_args` by name; None or empty: not given.
        dataset: from `config_metadata` or `single_metadata`.
        models: from `base_model`.
        family: values of the model family, names without the prefix.
        minimal: only what `--no_metadata` leaves.
    """
    values = {name: private(value) for name, value in facts.strings().items()}
    if network_args:
        values["ss_network_args"] = json.dumps({name: private(value) for name, value in network_args.items()})
    values |= {f"ss_{name}": private(str(value)) for name, value in (family or {}).items()}
    if minimal:
        return {f"ss_{name}": values[f"ss_{name}"] for name in MINIMUM if f"ss_{name}" in values}
    return {**values, **(models or {}), **(dataset or {})}


# facts of the dataset


@dataclass(kw_only=True, frozen=True)
class BucketFacts:
    """One bucket: (width, height), and images with repeats."""

    resolution: tuple[int, int]
    count: int


@dataclass(kw_only=True, frozen=True)
class SubsetFacts:
    """One folder or metadata file of a dataset. `tags`: how often each tag occurs, see `count_tags`."""

    img_count: int
    num_repeats: int
    image_dir: str | None = None
    """The folder; only its base name gets into files."""
    class_tokens: str | None = None
    is_reg: bool = False
    metadata_file: str | None = None
    """Of a fine-tuning subset; only its base name gets into files."""
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    tags: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Base name of folder or metadata file."""
        return base_name(self.metadata_file or self.image_dir or "")

    def values(self, is_dreambooth: bool) -> dict[str, object]:
        """As in `ss_datasets`."""
        own = {"image_dir", "class_tokens", "is_reg", "metadata_file", "tags"}
        values: dict[str, object] = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in own
        }
        if self.image_dir:
            values["image_dir"] = base_name(self.image_dir)
        if is_dreambooth:
            return {**values, "class_tokens": self.class_tokens, "is_reg": self.is_reg}
        return {**values, "metadata_file": base_name(self.metadata_file or "")}


@dataclass(kw_only=True, frozen=True)
class DatasetFacts:
    """One dataset."""

    is_dreambooth: bool
    batch_size: int
    """Per process."""
    num_train_images: int
    """With repeats."""
    num_reg_images: int
    """With repeats."""
    resolution: tuple[int, int]
    """Width, height."""
    enable_bucket: bool
    min_bucket_reso: int | None = None
    max_bucket_reso: int | None = None
    bucket_no_upscale: bool = False
    buckets: Sequence[BucketFacts] = ()
    mean_ar_error: float | None = None
    """Mean difference of the aspect ratios of images and buckets."""
    subsets: Sequence[SubsetFacts]

    @property
    def bucket_info(self) -> dict[str, object] | None:
        """As in files; None without buckets."""
        if not self.enable_bucket:
            return None
        buckets = {
            str(index): {"resolution": list(bucket.resolution), "count": bucket.count}
            for index, bucket in enumerate(self.buckets)
        }
        return {"buckets": buckets, "mean_img_ar_error": self.mean_ar_error}

    @property
    def tag_frequency(self) -> dict[str, Mapping[str, int]]:
        """Tags of each subset by base name; subsets of one name are added up."""
        found: dict[str, dict[str, int]] = {}
        for subset in self.subsets:
            counts = found.setdefault(subset.name, {})
            for tag, count in subset.tags.items():
                counts[tag] = counts.get(tag, 0) + count
        return {name: counts for name, counts in found.items() if counts}

    def values(self) -> dict[str, object]:
        """As in `ss_datasets`."""
        return {
            "is_dreambooth": self.is_dreambooth,
            "batch_size_per_device": self.batch_size,
            "num_train_images": self.num_train_images,
            "num_reg_images": self.num_reg_images,
            "resolution": list(self.resolution),
            "enable_bucket": self.enable_bucket,
            "min_bucket_reso": self.min_bucket_reso,
            "max_bucket_reso": self.max_bucket_reso,
            "tag_frequency": self.tag_frequency,
            "bucket_info": self.bucket_info,
            "subsets": [subset.values(self.is_dreambooth) for subset in self.subsets],
        }


def count_tags(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag occurs: captions split at commas, stripped, in lower case, once per image."""
    counts: dict[str, int] = {}
    for caption in captions:
        for tag in (part.strip().lower() for part in caption.split(",")):
            if tag:
                counts[tag] = counts.get(tag, 0) + 1
    return counts


def config_metadata(datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    """The dataset keys of a run with a dataset config file."""
    frequencies: dict[str, Mapping[str, int]] = {}
    for dataset in datasets:
        for name, counts in dataset.tag_frequency.items():
            frequencies.setdefault(name, counts)
    subsets = [subset for dataset in datasets for subset in dataset.subsets if not subset.is_reg]
    return {
        "ss_datasets": json.dumps([dataset.values() for dataset in datasets]),
        "ss_tag_frequency": json.dumps(frequencies),
        "ss_dataset_dirs": json.dumps(_folders(subsets)),
    }


def single_metadata(dataset: DatasetFacts, processes: int, accumulation: int) -> dict[str, str]:
    """The dataset keys of a run whose one dataset was given on the command line."""
    first = dataset.subsets[0]
    ordinary = [subset for subset in dataset.subsets if not subset.is_reg]
    plain: dict[str, object] = {
        "batch_size_per_device": dataset.batch_size,
        "total_batch_size": dataset.batch_size * processes * accumulation,
        "resolution": tuple(dataset.resolution),
        "color_aug": first.color_aug,
        "flip_aug": first.flip_aug,
        "random_crop": first.random_crop,
        "shuffle_caption": first.shuffle_caption,
        "enable_bucket": dataset.enable_bucket,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "min_bucket_reso": dataset.min_bucket_reso,
        "max_bucket_reso": dataset.max_bucket_reso,
        "keep_tokens": first.keep_tokens,
    }
    structured: dict[str, object] = {
        "dataset_dirs": _folders(ordinary),
        "reg_dataset_dirs": _folders([subset for subset in dataset.subsets if subset.is_reg]),
        "tag_frequency": dataset.tag_frequency,
        "bucket_info": dataset.bucket_info,
    }
    return {
        **{f"ss_{name}": str(value) for name, value in plain.items()},
        **{f"ss_{name}": json.dumps(value) for name, value in structured.items()},
    }


def _folders(subsets: Sequence[SubsetFacts]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for subset in subsets:
        name, number = subset.name, 2
        while name in found:
            name, number = f"{subset.name} ({number})", number + 1
        found[name] = {"n_repeats": subset.num_repeats, "img_count": subset.img_count}
    return found


# base models


def base_model(path: str | None, kind: str = "sd_model", with_hashes: bool = True) -> dict[str, str]:
    """Name and hashes of a base model (`kind` `sd_model`) or autoencoder (`vae`); empty when there is none.

    The second hash reads the whole file.
    """
    if not path:
        return {}
    local = Path(path)
    if not local.exists():
        name = path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else base_name(path)
        return {f"ss_{kind}_name": name}
    values = {f"ss_{kind}_name": base_name(path)}
    if with_hashes:
        values |= {f"ss_{kind}_hash": window_hash(local), f"ss_new_{kind}_hash": full_hash(local)}
    return values


WINDOW_START, WINDOW_SIZE = 0x100000, 0x10000


def window_hash(path: Path | str) -> str:
    """The old short hash of a model file: of 64 KiB at 1 MiB."""
    try:
        with Path(path).open("rb") as file:
            file.seek(WINDOW_START)
            return hashlib.sha256(file.read(WINDOW_SIZE)).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"
    except OSError:
        return "IsADirectory"


def full_hash(path: Path | str) -> str:
    """SHA-256 of a model file."""
    path = Path(path)
    if not path.exists():
        return "NOFILE"
    return files.sha256(path) if path.is_file() else "IsADirectory"


# network files


def network_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` (of the tensor data) and `sshs_legacy_hash` (of a window of the file with `ss_*` only)."""
    planned = files.planned_infos(tensors)
    return _hashes(planned, (files.raw_bytes(tensors[name]) for name in planned), metadata)


def file_hashes(path: Path | str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The `network_hashes` of a file with other metadata than it has; its tensors are not made, only their bytes read.

    Errors: DataError when it isn't safetensors.
    """
    found = files.header(path)
    planned, position = {}, 0
    for name in files.writing_order({name: info.dtype for name, info in found.tensors.items()}):
        info = found.tensors[name]
        end = position + info.end - info.start
        planned[name] = replace(info, start=position, end=end)
        position = end
    with Path(path).open("rb") as file:
        starts = (found.data_start + found.tensors[name].start for name in planned)
        sizes = (info.end - info.start for info in planned.values())
        pieces = (piece for start, size in zip(starts, sizes, strict=True) for piece in _chunks(file, start, size))
        return _hashes(planned, pieces, metadata)


def _chunks(file: BinaryIO, start: int, size: int) -> Iterator[memoryview]:
    file.seek(start)
    while size > 0 and (piece := file.read(min(size, WINDOW_START))):
        size -= len(piece)
        yield memoryview(piece)


def _hashes(
    planned: Mapping[str, files.TensorInfo], pieces: Iterable[memoryview], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Of a file with these tensors, whose data come in pieces."""
    data, window = hashlib.sha256(), hashlib.sha256()
    position = 0
    head = files.header_bytes(planned, {name: value for name, value in metadata.items() if name.startswith("ss_")})
    for number, piece in enumerate(chain([memoryview(head)], pieces)):
        if number:
            data.update(piece)
        start, end = max(WINDOW_START - position, 0), max(WINDOW_START + WINDOW_SIZE - position, 0)
        window.update(piece[start:end])
        position += len(piece)
    return {"sshs_model_hash": data.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file. Errors: DataError when it isn't one."""
    return files.header(path).metadata


# modelspec


IMPLEMENTATIONS = (
    ("flux", "https://github.com/black-forest-labs/flux"),
    ("stable-diffusion-xl", "https://github.com/Stability-AI/generative-models"),
)
"""Beginnings of architectures with an implementation of their own, whatever the kind of file."""

STABILITY, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"

TITLES = {"lora": "LoRA", "textual-inversion": "TextualInversion", "": "Checkpoint"}


def build_modelspec(
    *,
    architecture: str,
    kind: str = "",
    timestamp: float,
    title: str | None = None,
    resolution: Size | tuple[int, int] | None = None,
    v_parameterization: bool = False,
    single_file: bool = True,
    author: str | None = None,
    description: str | None = None,
    license: str | None = None,  # noqa: A002 - the name of the key
    tags: str | None = None,
    merged_from: str | None = None,
    timesteps: tuple[int | None, int | None] = (None, None),
    clip_skip: int | None = None,
    zone: tzinfo | None = None,
) -> dict[str, str]:
    """The `modelspec.*` values of a file. Source: Stability-AI/ModelSpec, version 1.0.0.

    Args:
        architecture: of the base model, such as `flux-1-dev`.
        kind: `lora` for every network, `textual-inversion`, another suffix, or empty for a whole model.
        timestamp: Unix time of the save.
        title: `--metadata_title`, else the output name.
        resolution: of `--resolution`; None takes the usual one of the architecture.
        v_parameterization: whether the model predicts v.
        single_file: of a whole model: one file, or a Diffusers folder.
        author, description, license, tags: `--metadata_*`.
        merged_from: titles of the merged files.
        timesteps: `--min_timestep` and `--max_timestep`.
        clip_skip: `--clip_skip`.
        zone: time zone of the date; None: local time.
    """
    flow = architecture.startswith(("flux", "stable-diffusion-3"))
    width, height = resolution or _usual_resolution(architecture)
    first, last = timesteps
    values: dict[str, str | None] = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/{kind}" if kind else architecture,
        "implementation": _implementation(architecture, kind, single_file),
        "title": title or f"{TITLES.get(kind, 'Checkpoint')}@{timestamp}",
        "resolution": f"{width}x{height}",
        "description": description,
        "author": author,
        "date": datetime.fromtimestamp(int(timestamp), zone).replace(tzinfo=None).isoformat(),
        "license": license,
        "tags": tags,
        "merged_from": merged_from,
        "prediction_type": None if flow else "v" if v_parameterization else "epsilon",
        "timestep_range": None if first is None and last is None else f"{first or 0},{1000 if last is None else last}",
        "encoder_layer": None if clip_skip is None else str(clip_skip),
    }
    return {f"modelspec.{name}": value for name, value in values.items() if value is not None}


def sd_architecture(version: str, *, v_prediction: bool = False) -> str:
    """`modelspec.architecture` of SD 1.x ("1"), SD 2.x ("2") and SDXL ("xl")."""
    if version == "2":
        return "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
    return "stable-diffusion-xl-v1-base" if version == "xl" else "stable-diffusion-v1"


def sd3_architecture(variant: str) -> str:
    """`modelspec.architecture` of SD3: `medium`, and of SD3.5: `5-medium` and `5-large`."""
    return f"stable-diffusion-3-{variant}"


STALE = ("modelspec.", "sshs_", "ss_", "epoch", "global_step")
"""Beginnings of keys whose values don't hold for what is made of a file."""


def lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is still true of something that is made of a file with this metadata."""
    return {key: value for key, value in metadata.items() if not key.startswith(STALE)}


def title_of(metadata: Mapping[str, str], path: Path | str) -> str:
    """The title of a file, or else its name; without folders."""
    return private(metadata.get("modelspec.title") or Path(path).stem)


def _implementation(architecture: str, kind: str, single_file: bool) -> str:
    for beginning, implementation in IMPLEMENTATIONS:
        if architecture.startswith(beginning):
            return implementation
    whole = kind == "textual-inversion" or (not kind and single_file)
    return STABILITY if whole else DIFFUSERS


def _usual_resolution(architecture: str) -> tuple[int, int]:
    if architecture.startswith(("flux", "stable-diffusion-3", "stable-diffusion-xl")):
        return 1024, 1024
    return (768, 768) if architecture.endswith("768-v") else (512, 512)


# privacy


ABSOLUTE = re.compile(
    r"""
    (?: (?<![\w/\\:.])  /+                        # POSIX; not in words, URLs and relative paths
      | (?<!\w) (?: [A-Za-z]:[\\/]+ | \\\\ | ~[\\/]+ ) )  # Windows drive, network share, home
    (?: [^\\/\s"',;]+ [\\/]+ )*
    ( [^\\/\s"',;]+ ) [\\/]*
    """,
    re.VERBOSE,
)
"""An absolute path within a text; the group is its last part."""


def base_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def private(text: str) -> str:
    """The text with every absolute path cut down to its last part, and the user's home folder gone."""
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    if ABSOLUTE.match(text) and not re.search(r"[\"',;\n]", text):
        return base_name(text)
    return ABSOLUTE.sub(r"\1", text)
