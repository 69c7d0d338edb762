"""Joins optimizer, schedule, state and observers into a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from library import devices, log
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
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
    StateOptions,
    TrackerOptions,
    VaePrecisionOptions,
)
from library.prompts import SampleRequest, load_prompts
from library.record import Record
from library.sampling import generate, to_image
from library.train import optimizers, resume, schedules
from library.train.checkpoints import Checkpoints
from library.train.conditions import Conditions, decode_latents
from library.train.control import Control
from library.train.loop import Run
from library.train.plan import Plan
from library.train.previews import Previews
from library.train.ranks import PINNING, Ranks
from library.train.resume import Parts
from library.train.state import RunState
from library.train.steppers import Stepper
from library.train.trackers import ProgressLine, Trackers, learning_rates, open_trackers
from library.types import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

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
            self.checkpoints.finish(state)
            self.uploads.finish()
            how = "finished" if state.complete else "stopped as asked; go on with --resume auto"
            logger.info("training %s: %d of %d steps", how, state.step, state.total_steps)


def assemble(job: Job, conditions: Conditions, state_folder: Path | None) -> Assembled:
    """The run of a job, at the place of its state where there is one."""
    options, method, ranks = job.options, job.method, job.ranks
    denoiser = conditions.models.denoiser
    assert denoiser is not None
    groups = method.param_groups()
    built = optimizers.create(
        options[OptimizerOptions], [group.for_optimizer() for group in groups], options[ScheduleOptions].lr_scheduler
    )
    for warning in built.warnings:
        logger.warning(warning)
    scheduler = schedules.create(
        options[ScheduleOptions], built.optimizer, job.plan.total_steps, built.schedule_override
    )
    optimizer = job.accelerator.prepare_optimizer(built.optimizer, device_placement=False)
    stepper = Stepper(
        accelerator=job.accelerator,
        optimizer=optimizer,
        scheduler=scheduler,
        params=method.parameters(),
        max_grad_norm=options[OptimizerOptions].max_grad_norm,
        hooks=method,
    )
    state = _state(job)
    parts = Parts(
        state=state,
        model=method.state_dict,
        load_model=method.load_state_dict,
        optimizers=[built.optimizer],
        schedulers=[scheduler],
        scaler=job.accelerator.scaler,
        accumulation=job.plan.accumulation,
        ranks=ranks,
    )
    _go_on(job, parts, state_folder)
    for _ in range(state.step if state_folder is None else 0):  # --initial_step without a state
        scheduler.step()
    trackers = _trackers(job, stepper, built.optimizer, [group.name for group in groups])
    record = Record(options, job.family, method, job.data, job.plan, built.name)
    previews = _previews(job, conditions, stepper, trackers)
    uploads = Uploads(options[HubOptions])
    if ranks.is_main:
        uploads.prepare()
    checkpoints = _checkpoints(job, stepper, record, parts, uploads)
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
        observers=[control, trackers, checkpoints, previews],
    )
    return Assembled(
        run=run, control=control, trackers=trackers, checkpoints=checkpoints, previews=previews, uploads=uploads
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


def _trackers(job: Job, stepper: Stepper, optimizer: torch.optim.Optimizer, names: list[str]) -> Trackers:
    project = "network_train" if job.options.has(NetworkOptions) else "finetuning"
    return Trackers(
        trackers=open_trackers(
            job.options[TrackerOptions], config=job.options.public(), project=project, ranks=job.ranks
        ),
        progress=ProgressLine(total=job.plan.total_steps),
        rates=lambda: learning_rates(optimizer.param_groups, names, stepper.learning_rates),
        ranks=job.ranks,
    )


def _checkpoints(job: Job, stepper: Stepper, record: Record, parts: Parts, uploads: Uploads) -> Checkpoints:
    options = job.options
    precision = options[SaveOptions].save_precision
    dtype = None if precision is None else devices.dtype_of(precision)
    kind = options[NetworkOptions].save_model_as if options.has(NetworkOptions) else None

    def save_model(path: Path) -> None:
        with stepper.evaluating():
            job.method.save(path, dtype, record.of_save(parts.state))

    return Checkpoints(
        options=options[SaveOptions],
        state_options=options[StateOptions],
        save_model=save_model,
        save_state=lambda folder: resume.save_state(folder, parts),
        extension=f".{kind or 'safetensors'}",
        every_epochs=job.plan.save_every_epochs,
        epochs=job.plan.epochs,
        weights=lambda: job.method.state_dict().items(),
        upload=uploads if uploads.wanted else None,
        upload_states=options[HubOptions].save_state_to_huggingface,
        ranks=job.ranks,
    )


def _previews(job: Job, conditions: Conditions, stepper: Stepper, trackers: Trackers) -> Previews:
    save = job.options[SaveOptions]
    return Previews(
        options=job.options[SampleOptions],
        output_dir=Path(save.output_dir or "."),
        output_name=save.output_name,
        parse=load_prompts,
        render=lambda request, index: _render(job, conditions, request),
        evaluating=partial(_evaluating, job.method, stepper),
        trackers=trackers,
        ranks=job.ranks,
    )


@contextmanager
def _evaluating(method: Method, stepper: Stepper) -> Iterator[None]:
    """What is trained behaves as in use meanwhile: no dropout, the weights of schedule-free optimizers averaged."""
    method.train_mode(False)
    try:
        with stepper.evaluating():
            yield
    finally:
        method.train_mode(True)


def _render(job: Job, conditions: Conditions, request: SampleRequest) -> Image:
    """A sample with the weights of now; the autoencoder is on the device only meanwhile if latents are cached."""
    family, models = job.family, conditions.models
    denoiser, vae = models.denoiser, models.vae
    assert denoiser is not None
    assert vae is not None
    home = next(vae.parameters()).device
    with job.accelerator.autocast():
        latents = generate(
            request,
            predict=lambda x, timesteps, cond, guidance: family.predict(denoiser, x, timesteps, cond, guidance),
            objective=family.objective(),
            cond=conditions.of_prompt(request.prompt),
            negative_cond=None if request.negative is None else conditions.of_prompt(request.negative),
            latent_channels=family.traits.latent_channels,
            stride=family.traits.latent_stride,
            shift=family.sampling_shift(),
            device=job.device,
        )
    try:
        pixels = decode_latents(family, vae.to(job.device), latents)
    finally:
        if home != job.device:
            vae.to(home)
            devices.release_memory()
    return to_image(pixels)
