"""What the files of a run say about it: collects the facts for `library.metadata`."""

from __future__ import annotations

import base64
import mimetypes
import random
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from library import metadata
from library.log import UserError
from library.metadata import BucketFacts, DatasetFacts, SubsetFacts, TrainingFacts
from library.option_groups import (
    DatasetOptions,
    LegacySDOptions,
    MetadataOptions,
    ModelOptions,
    NetworkOptions,
    NoiseOptions,
    SaveOptions,
)
from library.types import Size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from library.data.dataset import TrainingData
    from library.data.items import Item
    from library.data.settings import SubsetSettings
    from library.families.base import Family
    from library.methods.base import Method
    from library.options import Options
    from library.train.plan import Plan
    from library.train.state import RunState

FURTHER_MODELSPEC = ("usage_hint", "trigger_phrase", "preprocessor", "merged_from", "is_negative_embedding")
"""Keys of the model specification that come from `--metadata_<key>` as they are."""


@dataclass
class Record:
    """The metadata of a run's files."""

    options: Options
    family: Family
    method: Method
    data: TrainingData
    plan: Plan
    optimizer_name: str
    started_at: float = field(default_factory=time.time)
    session_id: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))

    def of_save(self, state: RunState) -> dict[str, str]:
        """The metadata of a file that is saved now."""
        now = time.time()
        is_network = self.options.has(NetworkOptions)
        spec = self._modelspec(now, "lora" if is_network else "")
        return {**self._training(state, now), **spec} if is_network else spec

    def _modelspec(self, now: float, kind: str) -> dict[str, str]:
        group, noise = self.options[MetadataOptions], self.options[NoiseOptions]
        spec = metadata.build_modelspec(
            architecture=self.family.architecture(),
            kind=kind,
            timestamp=now,
            title=group.metadata_title or self.options[SaveOptions].output_name,
            resolution=self._resolution(),
            author=group.metadata_author,
            description=group.metadata_description,
            license=group.metadata_license,
            tags=group.metadata_tags,
            timesteps=(noise.min_timestep, noise.max_timestep),
            **self.family.modelspec(),
        )
        further = {f"modelspec.{name}": str(getattr(group, f"metadata_{name}") or "") for name in FURTHER_MODELSPEC}
        if group.metadata_thumbnail:
            further["modelspec.thumbnail"] = thumbnail(Path(group.metadata_thumbnail))
        return spec | {name: value for name, value in further.items() if value}

    def _resolution(self) -> Size | None:
        return self.data.config.datasets[0].resolution if self.options[DatasetOptions].resolution else None

    def _training(self, state: RunState, now: float) -> dict[str, str]:
        network = self.options[NetworkOptions]
        facts = TrainingFacts.from_options(
            self.options.public(),
            session_id=self.session_id,
            training_started_at=self.started_at,
            training_finished_at=now,
            steps=state.step,
            epoch=state.current_epoch,
            base_model_version=self.family.traits.base_model_version,
            num_train_images=self._samples(regularization=False),
            num_reg_images=self._samples(regularization=True),
            num_batches_per_epoch=self.plan.batches_per_epoch,
            num_epochs=self.plan.epochs,
            seed=state.seed,
            optimizer=self.optimizer_name,
            max_train_steps=self.plan.total_steps,
            text_encoder_lr=list(network.text_encoder_lr) if network.text_encoder_lr else None,
            sd_scripts_commit_hash=commit(),
        )
        return metadata.training_metadata(
            facts,
            network_args=getattr(self.method, "recorded_arguments", None),
            dataset=self._dataset,
            models=self._base_model,
            family=self.family.metadata(),
            minimal=network.no_metadata,
        )

    def _samples(self, *, regularization: bool) -> int:
        numbers = range(len(self.data.config.datasets))
        return sum(self.data.samples(number, regularization=regularization) for number in numbers)

    @cached_property
    def _base_model(self) -> dict[str, str]:
        if self.options[NetworkOptions].no_metadata:
            return {}
        found = metadata.base_model(self.options[ModelOptions].pretrained_model_name_or_path)
        if "vae" not in self.options.script.ignored:
            found |= metadata.base_model(self.options[LegacySDOptions].vae, "vae")
        return found

    @cached_property
    def _dataset(self) -> dict[str, str]:
        facts = [self._dataset_facts(number) for number in range(len(self.data.config.datasets))]
        if self.data.config.source is not None:
            return metadata.config_metadata(facts)
        return metadata.single_metadata(facts[0], self.plan.processes, self.plan.accumulation)

    def _dataset_facts(self, number: int) -> DatasetFacts:
        settings = self.data.config.datasets[number]
        items: dict[int, list[Item]] = defaultdict(list)
        for item in self.data.items:
            if item.dataset == number:
                items[id(item.subset)].append(item)
        subsets = [_subset_facts(subset, items[id(subset)]) for subset in settings.subsets]
        counts = self.data.bucket_counts(number)
        return DatasetFacts(
            is_dreambooth=not any(subset.metadata_file for subset in settings.subsets),
            batch_size=settings.batch_size,
            num_train_images=self.data.samples(number, regularization=False),
            num_reg_images=self.data.samples(number, regularization=True),
            resolution=settings.resolution,
            enable_bucket=settings.enable_bucket,
            min_bucket_reso=settings.min_bucket_reso,
            max_bucket_reso=settings.max_bucket_reso,
            bucket_no_upscale=settings.bucket_no_upscale,
            buckets=[BucketFacts(resolution=size, count=count) for size, count in counts.items()],
            mean_ar_error=self.data.mean_aspect_error(number),
            subsets=subsets,
        )


def _subset_facts(subset: SubsetSettings, items: Sequence[Item]) -> SubsetFacts:
    same = {name: getattr(subset, name) for name in _COPIED}
    return SubsetFacts(img_count=len(items), tags=metadata.count_tags(item.caption for item in items), **same)


_COPIED = (
    *("num_repeats", "image_dir", "class_tokens", "is_reg", "metadata_file", "color_aug", "flip_aug", "random_crop"),
    *("shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard"),
    *("caption_prefix", "caption_suffix"),
)
"""What files say of a subset as it was configured."""


def commit() -> str:
    """The git commit of this program, or `(unknown)`."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"
    return found.stdout.strip()


def thumbnail(path: Path) -> str:
    """A picture file as a data URL. Errors: UserError when it can't be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", str(path), "check --metadata_thumbnail") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
