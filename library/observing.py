"""What watches a run: trackers, checkpoints, samples, validation, the moving average, made as the options want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library import devices
from library.methods.base import Method
from library.option_groups import (
    DreamBoothOptions,
    EmaOptions,
    FullSaveOptions,
    HubOptions,
    NetworkOptions,
    SampleOptions,
    SaveOptions,
    StateOptions,
    TrackerOptions,
    ValidationOptions,
)
from library.prompts import PromptRules, SampleRequest
from library.sampling import generate, to_image
from library.train import density_picture, resume
from library.train.best import Best
from library.train.checkpoints import Checkpoints, last_stem
from library.train.conditions import Conditions, decode_latents
from library.train.ema import MovingAverage, ema_path
from library.train.previews import Previews
from library.train.schedules import LossSchedule
from library.train.steppers import AnyStepper
from library.train.trackers import ProgressLine, Trackers, learning_rates, open_trackers
from library.train.validation import Validation
from library.types import Saving

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from library.assembly import Job
    from library.families.base import Family
    from library.hub import Uploads
    from library.record import Record
    from library.stepping import Stepping
    from library.train.loop import Run
    from library.train.resume import Parts
    from library.train.state import RunState


def average_of(job: Job, settle: Callable[[], None] | None) -> MovingAverage | None:
    """The moving average of the weights, if one is wanted; the main process has it."""
    if not job.options.has(EmaOptions) or job.options[EmaOptions].ema_decay is None or not job.ranks.is_main:
        return None
    group = job.options[EmaOptions]
    decay = float(group.ema_decay or 0)
    return MovingAverage(job.method.state_dict, decay, on_cpu=group.ema_on_cpu, settle=settle)


def trackers_of(job: Job, made: Stepping) -> Trackers:
    """Where the numbers go."""
    names, stepper = [group.name for group in made.groups], made.stepper
    tuning = "dreambooth" if job.options.has(DreamBoothOptions) else "finetuning"
    project = "network_train" if job.options.has(NetworkOptions) else tuning
    return Trackers(
        trackers=open_trackers(
            job.options[TrackerOptions], config=job.options.public(), project=project, ranks=job.ranks
        ),
        progress=ProgressLine(total=job.plan.total_steps),
        rates=lambda: learning_rates(stepper.param_groups, names, stepper.learning_rates),
        ranks=job.ranks,
    )


def checkpoints_of(
    job: Job,
    stepper: AnyStepper,
    record: Record,
    parts: Parts,
    uploads: Uploads,
    average: MovingAverage | None,
) -> Checkpoints:
    """What saves models, their averages, and states."""
    options = job.options
    precision = options[SaveOptions].save_precision
    dtype = None if precision is None else devices.dtype_of(precision)
    is_network = options.has(NetworkOptions)
    kind = (options[NetworkOptions] if is_network else options[FullSaveOptions]).save_model_as
    extension = f".{kind or 'safetensors'}" if is_network else job.family.model_extension(kind)
    companion = partial(ema_path, extension=extension)
    job.method.writes_by(partial(_write_model, job.family, kind, parts.state))

    def save_model(path: Path) -> None:
        metadata = record.of_save(parts.state)
        with stepper.evaluating():
            job.method.save(path, dtype, metadata)
        if average is not None:
            with average.in_place():
                job.method.save(companion(path), dtype, metadata)

    return Checkpoints(
        options=options[SaveOptions],
        state_options=options[StateOptions],
        save_model=save_model,
        companion=None if average is None else companion,
        save_state=lambda folder: resume.save_state(folder, parts),
        extension=extension,
        every_epochs=job.plan.save_every_epochs,
        epochs=job.plan.epochs,
        weights=lambda: job.method.state_dict().items(),
        upload=uploads if uploads.wanted else None,
        upload_states=options[HubOptions].save_state_to_huggingface,
        ranks=job.ranks,
    )


def _write_model(
    family: Family,
    kind: str | None,
    state: RunState,
    path: Path,
    trained: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Has a family write a whole model around what is trained."""
    saving = Saving(kind=kind, dtype=dtype, metadata=metadata, epoch=state.current_epoch, steps=state.step)
    family.save_model(path, trained, saving)


def previews_of(job: Job, conditions: Conditions, stepper: AnyStepper, trackers: Trackers) -> Previews:
    """What makes samples."""
    save = job.options[SaveOptions]
    return Previews(
        options=job.options[SampleOptions],
        output_dir=Path(save.output_dir or "."),
        output_name=save.output_name,
        parse=PromptRules.of(job.family.traits.name, job.options[SampleOptions].sample_sampler).load,
        render=lambda request, index: _render(job, conditions, request),
        evaluating=partial(_evaluating, job.method, stepper),
        trackers=trackers,
        ranks=job.ranks,
    )


@contextmanager
def _evaluating(method: Method, stepper: AnyStepper) -> Iterator[None]:
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
            size_cond=family.size_cond,
            latent_channels=family.traits.latent_channels,
            stride=family.traits.latent_stride,
            patch=family.traits.patch,
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


def best_of(job: Job, checkpoints: Checkpoints) -> Best | None:
    """What keeps the model of the least validation loss, and ends the run when it falls no more, if that is wanted."""
    group = job.options[ValidationOptions]
    if not job.data.scan.held_out or not (group.save_best or group.early_stop_patience):
        return None
    return Best(
        save_as=checkpoints.save_as if group.save_best else None,
        output_name=job.options[SaveOptions].output_name,
        patience=group.early_stop_patience,
    )


def validation_of(
    job: Job, run: Run, made: Stepping, trackers: Trackers, best: Best | None, *, tokenizes: bool
) -> Validation | None:
    """What measures the loss of held-out images, where there are some."""
    if not job.data.scan.held_out:
        return None
    group = job.options[ValidationOptions]
    schedules = [scheduler for scheduler in made.schedulers if isinstance(scheduler, LossSchedule)]
    return Validation(
        options=group,
        run=run,
        batches=partial(
            job.data.validation_batches,
            job.ranks.rank,
            job.ranks.world,
            most=group.max_validation_steps,
            tokenize=job.family.tokenize if tokenizes else None,
        ),
        evaluating=partial(_evaluating, job.method, made.stepper),
        log=trackers.log,
        listeners=[*([] if best is None else [best.judge]), *(schedule.measured for schedule in schedules)],
        ranks=job.ranks,
    )


def show_density(job: Job, run: Run, trackers: Trackers) -> None:
    """Draws which noise levels the run learns, beside the samples."""
    save = job.options[SaveOptions]
    if job.ranks.is_main:
        path = Path(save.output_dir or ".") / "sample" / f"{last_stem(save.output_name)}_timesteps.png"
        density_picture.show(run.objective, job.data, path, trackers=trackers, step=run.state.step)
