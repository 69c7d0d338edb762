"""The length of a run: images, batches, steps, epochs, saves and samples, computed once and printed first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from library.log import UserError
from library.train.schedules import resolved_steps

if TYPE_CHECKING:
    from library.option_groups import LengthOptions, SampleOptions, SaveOptions, ScheduleOptions, StateOptions


@dataclass(kw_only=True, frozen=True)
class Plan:
    """How long a run is and what it leaves behind. Steps are optimizer steps, whatever the number of processes."""

    images: int
    """Different training images, without regularization images."""
    regularization_images: int
    """Different regularization images."""
    repeated: int
    """Samples of an epoch: all images times their repeats."""
    batches_per_epoch: int
    """Batches of an epoch, of all processes together."""
    processes: int
    accumulation: int
    """Micro-batches of each process per optimizer step."""
    batch_sizes: tuple[int, ...]
    """Images per batch and process, one for each dataset."""
    batches_per_process: int
    """Micro-batches of each process in an epoch."""
    steps_per_epoch: int
    total_steps: int
    epochs: int
    """Epochs that are begun; the last one may stay unfinished."""
    limit: str
    """Which option decided the length, in words."""
    warmup_steps: int
    decay_steps: int
    save_every_epochs: int | None
    """Distance of epoch saves, with `save_n_epoch_ratio` resolved."""
    epoch_saves: int
    """Model files written at ends of epochs."""
    step_saves: int
    """Model files written at steps."""
    models_kept: int
    """Most model files that lie there at one time, the final one included."""
    states_kept: int
    """Most state folders that lie there at one time."""
    sample_rounds: int
    samples: int
    """Pictures in all."""
    model_bytes: int
    """Size of one model file, estimated."""
    state_bytes: int
    """Size of one state folder, estimated."""
    cache_bytes: int
    """Size of the caches that still have to be written, estimated."""

    @property
    def saves(self) -> int:
        """Model files written, the final one included."""
        return self.epoch_saves + self.step_saves + 1

    @property
    def save_bytes(self) -> int:
        """Room that models and states need at one time."""
        return self.models_kept * self.model_bytes + self.states_kept * self.state_bytes

    @property
    def bytes_needed(self) -> int:
        """Room that models, states and caches need at one time."""
        return self.save_bytes + self.cache_bytes

    def position(self, step: int) -> tuple[int, int]:
        """Epoch (from 1) and micro-batches done in it, after that many optimizer steps."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        return epoch + 1, steps * self.accumulation

    def lines(self) -> list[str]:
        """The plan as a table for people."""
        sizes = " / ".join(str(size) for size in self.batch_sizes)
        regularization = f" + {self.regularization_images} regularization" if self.regularization_images else ""
        effective = " / ".join(str(size * self.processes * self.accumulation) for size in self.batch_sizes)
        rows = [
            ("images", f"{self.images}{regularization}, {self.repeated} samples per epoch with repeats"),
            (
                "batch",
                f"{sizes} per process x {self.processes} process(es) x {self.accumulation} accumulated = {effective}",
            ),
            ("epoch", f"{self.batches_per_epoch} batches = {self.steps_per_epoch} optimizer steps"),
            ("length", f"{self.total_steps} steps, {self.epochs} epoch(s) - {self.limit}"),
        ]
        if self.warmup_steps or self.decay_steps:
            rows.append(("schedule", f"{self.warmup_steps} warm-up steps, {self.decay_steps} decay steps"))
        saves = f"{self.saves} model file(s): {self.epoch_saves} by epoch, {self.step_saves} by step, 1 at the end"
        rows.append(("saves", saves + (f"; at most {self.models_kept} kept" if self.models_kept < self.saves else "")))
        if self.sample_rounds:
            rows.append(("samples", f"{self.samples} picture(s) in {self.sample_rounds} round(s)"))
        if self.bytes_needed:
            parts = [f"models {readable_bytes(self.models_kept * self.model_bytes)}"]
            if self.states_kept:
                parts.append(f"states {readable_bytes(self.states_kept * self.state_bytes)}")
            if self.cache_bytes:
                parts.append(f"caches {readable_bytes(self.cache_bytes)}")
            rows.append(("disk", f"about {readable_bytes(self.bytes_needed)}: {', '.join(parts)}"))
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]


def make_plan(
    *,
    images: int,
    repeated: int,
    batches_per_epoch: int,
    length: LengthOptions,
    batches_per_process: int | None = None,
    steps_given: bool = False,
    regularization_images: int = 0,
    batch_sizes: Sequence[int] = (1,),
    processes: int = 1,
    schedule: ScheduleOptions | None = None,
    save: SaveOptions | None = None,
    state: StateOptions | None = None,
    sample: SampleOptions | None = None,
    prompts: int = 0,
    model_bytes: int = 0,
    state_bytes: int = 0,
    cache_bytes: int = 0,
) -> Plan:
    """The plan of a run.

    `batches_per_epoch` counts the batches of all processes, `batches_per_process` those of each, which take a little
    longer where buckets can't be shared out evenly; None: they can. `steps_given` says whether the user wrote
    `--max_train_steps` (its default doesn't limit a run that has `--max_train_epochs`).
    Errors: UserError when nothing would be trained or a number makes no sense.
    """
    accumulation = length.gradient_accumulation_steps
    if accumulation < 1:
        raise UserError(f"gradient accumulation of {accumulation}", "--gradient_accumulation_steps", "give 1 or more")
    if batches_per_process is None:
        batches_per_process = ceil(batches_per_epoch / processes)
    steps_per_epoch = ceil(batches_per_process / accumulation)
    if steps_per_epoch == 0:
        raise UserError(
            "there is nothing to train on: 0 batches", "dataset", "check the image folders", code="E-PLAN-EMPTY"
        )
    total_steps, limit = _length(length, steps_given, steps_per_epoch)
    if total_steps < 1:
        raise UserError("0 steps would be trained", limit, "give at least 1", code="E-PLAN-EMPTY")
    epochs = ceil(total_steps / steps_per_epoch)
    saving = _plan_saves(save, state, total_steps, epochs)
    finished_epochs = total_steps // steps_per_epoch
    rounds = _sample_rounds(sample, total_steps, finished_epochs) if prompts else 0
    return Plan(
        images=images,
        regularization_images=regularization_images,
        repeated=repeated,
        batches_per_epoch=batches_per_epoch,
        processes=processes,
        accumulation=accumulation,
        batch_sizes=tuple(batch_sizes),
        batches_per_process=batches_per_process,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        epochs=epochs,
        limit=limit,
        warmup_steps=resolved_steps(schedule.lr_warmup_steps, total_steps, "--lr_warmup_steps") if schedule else 0,
        decay_steps=resolved_steps(schedule.lr_decay_steps, total_steps, "--lr_decay_steps") if schedule else 0,
        save_every_epochs=saving.every_epochs,
        epoch_saves=saving.epoch_saves,
        step_saves=saving.step_saves,
        models_kept=saving.models_kept,
        states_kept=saving.states_kept,
        sample_rounds=rounds,
        samples=rounds * prompts,
        model_bytes=model_bytes,
        state_bytes=state_bytes,
        cache_bytes=cache_bytes,
    )


def epochs_between_saves(save: SaveOptions, epochs: int) -> int | None:
    """Every how many epochs a model is saved; None: not by epochs."""
    if save.save_n_epoch_ratio is not None and save.save_n_epoch_ratio > 0:
        return max(1, epochs // save.save_n_epoch_ratio)
    return _positive(save.save_every_n_epochs)


def readable_bytes(count: int) -> str:
    """A number of bytes for people, such as `2.3 GB`."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _length(length: LengthOptions, steps_given: bool, steps_per_epoch: int) -> tuple[int, str]:
    if length.max_train_epochs is None:
        given = "" if steps_given else ", the default"
        return length.max_train_steps, f"--max_train_steps {length.max_train_steps}{given}"
    by_epochs = length.max_train_epochs * steps_per_epoch
    if not steps_given:
        return by_epochs, f"--max_train_epochs {length.max_train_epochs}"
    both = (
        f"--max_train_epochs {length.max_train_epochs} is {by_epochs} steps, --max_train_steps {length.max_train_steps}"
    )
    return min(by_epochs, length.max_train_steps), f"{both}: the smaller one counts"


@dataclass(frozen=True)
class _Saves:
    every_epochs: int | None = None
    epoch_saves: int = 0
    step_saves: int = 0
    models_kept: int = 1
    states_kept: int = 0


def _plan_saves(save: SaveOptions | None, state: StateOptions | None, total_steps: int, epochs: int) -> _Saves:
    if save is None:
        return _Saves()
    every_epochs, every_steps = epochs_between_saves(save, epochs), _positive(save.save_every_n_steps)
    epoch_saves = (epochs - 1) // every_epochs if every_epochs else 0
    step_saves = total_steps // every_steps if every_steps else 0

    def kept(last_epochs: int | None, last_steps: int | None) -> int:
        # one more than stays: the old file goes only after the new one is safe
        by_epoch = epoch_saves if last_epochs is None else min(epoch_saves, max(last_epochs, 1) + 1)
        room = None if last_steps is None or not every_steps else last_steps // every_steps + 2
        by_step = step_saves if room is None else min(step_saves, room)
        return by_epoch + by_step

    models_kept = kept(save.save_last_n_epochs, save.save_last_n_steps) + 1
    states_kept = 0
    if state is not None and (state.save_state or state.save_state_on_train_end):
        states_kept = 1
        if state.save_state:
            states_kept += kept(
                _first(state.save_last_n_epochs_state, save.save_last_n_epochs),
                _first(state.save_last_n_steps_state, save.save_last_n_steps),
            )
    return _Saves(every_epochs, epoch_saves, step_saves, models_kept, states_kept)


def _sample_rounds(sample: SampleOptions | None, total_steps: int, finished_epochs: int) -> int:
    if sample is None or not sample.sample_prompts:
        return 0
    rounds = 1 if sample.sample_at_first else 0
    every_epochs, every_steps = _positive(sample.sample_every_n_epochs), _positive(sample.sample_every_n_steps)
    if every_epochs:
        return rounds + finished_epochs // every_epochs
    return rounds + (total_steps // every_steps if every_steps else 0)


def _positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _first(value: int | None, otherwise: int | None) -> int | None:
    return otherwise if value is None else value
