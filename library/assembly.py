"""Joins optimizer, schedule, state and observers into a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from library import log, observing, stepping
from library.caching import Caches
from library.data.dataset import TrainingData
from library.families.base import Family
from library.hub import Uploads
from library.metadata import private
from library.methods.base import Method
from library.option_groups import (
    HubOptions,
    LengthOptions,
    NetworkOptions,
    OptimizerOptions,
    PrecisionOptions,
    SaveOptions,
    VaePrecisionOptions,
)
from library.record import Record
from library.train import graphs, resume
from library.train.best import Best
from library.train.checkpoints import Checkpoints
from library.train.conditions import Conditions
from library.train.control import Control
from library.train.loop import Run
from library.train.plan import Plan
from library.train.previews import Previews
from library.train.ranks import PINNING, Ranks
from library.train.resume import Parts
from library.train.state import RunState
from library.train.trackers import Trackers
from library.train.validation import Validation
from library.types import Batch

if TYPE_CHECKING:
    from library.options import Options

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Precision:
    """The types of a run's parts."""

    frozen: torch.dtype
    trained: torch.dtype
    vae: torch.dtype

    @classmethod
    def from_options(cls, options: Options) -> Precision:
        """What `--mixed_precision`, `--full_bf16`, `--full_fp16` and `--no_half_vae` mean."""
        group = options[PrecisionOptions]
        frozen = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[group.mixed_precision]
        trained = frozen if group.full_bf16 or group.full_fp16 else torch.float32
        full_vae = options.has(VaePrecisionOptions) and options[VaePrecisionOptions].no_half_vae
        return cls(frozen, trained, torch.float32 if full_vae else frozen)


@dataclass(kw_only=True)
class Setting:
    """What encoding and training share: the options, the family, the data, the place of this process."""

    options: Options
    family: Family
    data: TrainingData
    precision: Precision
    caches: Caches
    accelerator: Any
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device


@dataclass(kw_only=True)
class Job(Setting):
    """What the phases of a training share."""

    method: Method
    plan: Plan


@dataclass(kw_only=True)
class Assembled:
    """A run with its observers; entering it begins, leaving it finishes or closes."""

    run: Run
    control: Control
    trackers: Trackers
    checkpoints: Checkpoints
    previews: Previews
    uploads: Uploads
    judges: Sequence[Validation | Best] = ()

    def __enter__(self) -> Assembled:
        self._stack = ExitStack()
        self._stack.callback(self.trackers.close)
        self._stack.enter_context(self.control)
        self.trackers.begin(self.run.state)
        self.previews.begin(self.run.state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                return
            state = self.run.state
            state.finish()
            self.trackers.finish(state)
            self.previews.finish(state)
            for judge in self.judges:
                judge.finish(state)
            self.checkpoints.finish(state)
            self.uploads.finish()
            how = "finished" if state.complete else "stopped as asked; go on with --resume auto"
            logger.info("training %s: %d of %d steps", how, state.step, state.total_steps)


def assemble(
    job: Job, conditions: Conditions, state_folder: Path | None, settle: Callable[[], None] | None = None
) -> Assembled:
    """The run of a job, at the place of its state where there is one.

    `settle` brings home the weights that are on their way between memories.
    """
    options, method, ranks = job.options, job.method, job.ranks
    denoiser = conditions.models.denoiser
    assert denoiser is not None
    made = stepping.create(
        options,
        job.accelerator,
        method,
        denoiser,
        total_steps=job.plan.total_steps,
        seed=job.data.seed,
        validates=bool(job.data.scan.held_out),
    )
    stepper = made.stepper
    average = observing.average_of(job, settle)
    state = _state(job)
    parts = Parts(
        state=state,
        model=method.state_dict,
        load_model=method.load_state_dict,
        optimizers=made.optimizers,
        schedulers=made.schedulers,
        average=average,
        scaler=job.accelerator.scaler,
        accumulation=job.plan.accumulation,
        ranks=ranks,
    )
    _go_on(job, parts, state_folder)
    if state_folder is None:  # --initial_step
        made.skip(state.step)
    made.begin_after(state.step)
    method.begin_after(state.step)
    trackers = observing.trackers_of(job, made)
    record = Record(options, job.family, method, job.data, job.plan, made.optimizer_name)
    previews = observing.previews_of(job, conditions, stepper, trackers)
    uploads = Uploads(options[HubOptions])
    if ranks.is_main:
        uploads.prepare()
    checkpoints = observing.checkpoints_of(job, stepper, record, parts, uploads, average)
    control = Control(output_dir=checkpoints.folder, output_name=options[SaveOptions].output_name, ranks=ranks)
    run = Run(
        accelerator=job.accelerator,
        family=job.family,
        method=method,
        objective=job.family.objective(),
        denoiser=denoiser,
        batches=partial(_batches, job, bool(conditions.models.encoders)),
        cond=conditions.of_batch,
        latents=conditions.latents,
        stepper=stepper,
        state=state,
        observers=(),
        learn=graphs.learner(options, method, job.device),
    )
    best = observing.best_of(job, checkpoints)
    tokenizes = bool(conditions.models.encoders)
    validation = observing.validation_of(job, run, made, trackers, best, tokenizes=tokenizes)
    observers = (average, control, trackers, validation, checkpoints, previews)
    run.observers = [observer for observer in observers if observer is not None]
    observing.show_density(job, run, trackers)
    return Assembled(
        run=run,
        control=control,
        trackers=trackers,
        checkpoints=checkpoints,
        previews=previews,
        uploads=uploads,
        judges=[judge for judge in (validation, best) if judge is not None],
    )


def _batches(job: Job, tokenizes: bool, epoch: int, start: int) -> Iterator[Batch]:
    length = job.options[LengthOptions]
    batches = job.data.loader(
        epoch,
        start,
        job.ranks.rank,
        job.ranks.world,
        job.plan.accumulation,
        workers=length.max_data_loader_n_workers,
        persistent=length.persistent_data_loader_workers,
        tokenize=job.family.tokenize if tokenizes else None,
    )
    return (batch.pinned() for batch in batches) if job.device.type in PINNING else batches


def _state(job: Job) -> RunState:
    scaled = job.accelerator.scaler is not None
    return RunState.begin(
        job.plan,
        job.data.seed,
        job.ranks,
        nonfinite_limit=job.options[OptimizerOptions].stop_on_nonfinite,
        watched=() if scaled else ("grad_norm",),
        dataset=_fingerprint(job.data),
        options={name: private(str(value)) for name, value in job.options.public().items() if value is not None},
    )


def _fingerprint(data: TrainingData) -> str:
    """Changes when the samples of an epoch, or their order, would be others."""
    digest = hashlib.sha256(repr((data.batch_sizes, data.scan.reg_slots)).encode())
    for item in data.items:
        line = (Path(item.stem).name, item.caption, item.repeats, item.assignment.bucket, item.dataset)
        digest.update(repr(line).encode())
    return digest.hexdigest()


def _go_on(job: Job, parts: Parts, state_folder: Path | None) -> None:
    """Loads the state, or sets the step that the run begins with."""
    if state_folder is not None:
        resume.load_state(state_folder, parts)
    if job.options.has(NetworkOptions):
        group = job.options[NetworkOptions]
        resume.begin_at(
            parts.state, group.initial_step, group.initial_epoch, group.skip_until_initial_step, parts.accumulation
        )
