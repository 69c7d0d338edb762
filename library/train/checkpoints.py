"""When models and states are saved, under which names, and which old ones go."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library import files
from library.log import DataError, ResourceError, UserError, get_logger
from library.train import watch
from library.train.ranks import Ranks
from library.train.state import RunState

if TYPE_CHECKING:
    from torch import Tensor

    from library.option_groups import SaveOptions, StateOptions

logger = get_logger(__name__)


def epoch_stem(output_name: str | None, epoch: int) -> str:
    """Name, without extension, of what is saved at the end of an epoch (from 1)."""
    return f"{output_name or 'epoch'}-{epoch:06d}"


def step_stem(output_name: str | None, step: int) -> str:
    """Name, without extension, of what is saved at a step."""
    return f"{output_name or 'at'}-step{step:08d}"


def last_stem(output_name: str | None) -> str:
    """Name, without extension, of what is saved at the end of the training."""
    return output_name or "last"


def best_stem(output_name: str | None) -> str:
    """Name, without extension, of the model with the least validation loss."""
    return f"{output_name}-best" if output_name else "best"


def state_name(stem: str) -> str:
    """Name of the state folder that goes with a model of this stem."""
    return f"{stem}-state"


def epoch_to_remove(epoch: int, every: int, keep: int | None) -> int | None:
    """Epoch whose file goes when this epoch has been saved; None: none."""
    if keep is None:
        return None
    number = epoch - every * keep
    return number if number >= 0 else None


def step_to_remove(step: int, every: int, keep: int | None) -> int | None:
    """Step whose file goes when this step has been saved; None: none. `keep` counts steps, not files."""
    if keep is None:
        return None
    number = step - keep - 1
    return number - number % every if number >= 0 else None


class Upload(Protocol):
    """Sends a file or a folder away; never raises."""

    def __call__(self, path: Path, *, final: bool = False) -> None:
        """`final` waits until everything has arrived."""


def _no_tensors() -> Iterable[tuple[str, Tensor]]:
    return ()


@dataclass(kw_only=True)
class Checkpoints:
    """Saves models and states while a run goes on. All processes call it; only the main one writes model files.

    A failing save never ends the training: it is said, and made up for at the next save.
    """

    options: SaveOptions
    state_options: StateOptions
    save_model: Callable[[Path], None]
    """Writes the weights to a path, and its companion; called in the main process only."""
    companion: Callable[[Path], Path] | None = None
    """Which further file goes with a model file; None: none does."""
    save_state: Callable[[Path], None]
    """Writes the state of the run to a folder; called in all processes."""
    extension: str = ".safetensors"
    """With its dot; empty for a folder."""
    every_epochs: int | None = None
    """`Plan.save_every_epochs`."""
    epochs: int
    """`Plan.epochs`: the last one is saved under the final name only."""
    weights: Callable[[], Iterable[tuple[str, Tensor]]] = _no_tensors
    """The trained weights by name, for the check that they are finite."""
    upload: Upload | None = None
    upload_states: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    written: list[Path] = field(default_factory=list)
    """Model files and state folders written so far, oldest first."""
    failures: list[str] = field(default_factory=list)
    """What couldn't be saved, in words."""
    _failed_last: bool = False
    _saved_here: tuple[int, frozenset[Path]] = (-1, frozenset())

    def after_step(self, state: RunState) -> None:
        """Saves when the step is a multiple, when somebody asked for it, and when an earlier save failed."""
        every, requests = self.options.save_every_n_steps or 0, state.requests
        stem = step_stem(self.options.output_name, state.step)
        if every > 0 and state.step % every == 0:
            # a retry after a failure needs no rule of its own: each save tries everything anew
            self._save(state, stem, keep_state=self.state_options.save_state)
            if not self._failed_last:
                self._remove_step(state.step, every)
        if requests.save or (requests.stop and not state.complete):
            logger.info("saving on request at step %d", state.step)
            self._save(state, stem, keep_state=True)

    def after_epoch(self, state: RunState) -> None:
        """Saves when the epoch that has just ended is a multiple and not the last."""
        epoch, every = state.epochs_done, self.every_epochs or 0
        if every <= 0 or epoch % every or epoch >= self.epochs:
            return
        stem = epoch_stem(self.options.output_name, epoch)
        self._save(state, stem, keep_state=self.state_options.save_state)
        if not self._failed_last:
            self._remove_epoch(epoch, every)

    def finish(self, state: RunState) -> None:
        """Saves what the training has made; a run that was stopped early has been saved already.

        Errors: ResourceError when it can't be saved, also not at the second attempt.
        """
        name = self.options.output_name
        keep_state = self.state_options.save_state or self.state_options.save_state_on_train_end
        stem = last_stem(name) if state.complete else step_stem(name, state.step)
        for _ in range(2):
            self._save(state, stem, keep_state=keep_state or not state.complete, final=True)
            if not self._failed_last:
                break
        if self.failures:
            logger.warning("saves that failed: %s", "; ".join(dict.fromkeys(self.failures)))
        if self._failed_last:
            newest = f"the newest good file is {self.written[-1]}" if self.written else "nothing could be saved"
            raise ResourceError(
                f"the last save failed: {self.failures[-1] if self.failures else 'in another process'}",
                str(self.folder),
                f"{newest}; free disk space or memory, then use --resume auto",
                code="E-SAVE",
            )

    def save_as(self, state: RunState, stem: str) -> bool:
        """Writes the model under a name of its own, without extension; whether it lies there now."""
        self._save(state, stem, keep_state=False)
        step, written = self._saved_here
        return step == state.step and self.folder / f"{stem}{self.extension}" in written

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.options.output_dir or ".")

    def _save(self, state: RunState, stem: str, *, keep_state: bool, final: bool = False) -> None:
        """Writes the model, and the state where wanted; what this step has already written isn't written again."""
        done = self._saved_here[1] if self._saved_here[0] == state.step else frozenset()
        model_path, state_path = self.folder / f"{stem}{self.extension}", self.folder / state_name(stem)
        wants_model, wants_state = model_path not in done, keep_state and state_path not in done
        self._failed_last = False
        if not wants_model and not wants_state:
            return
        if not final and not state.is_sound():
            logger.warning("step %d was not finite: %s is not saved", state.step, stem)
            return
        watch.heartbeat(f"saving {stem}")
        if not self._attempt(self._refuse_nonfinite, model_path):
            self._failed_last = True
            return
        if wants_model:
            if self._attempt(lambda: self._write_model(model_path), model_path):
                state.last_saved = state.step
                done |= {model_path}
                self._announce(model_path, final=final and not keep_state)
            else:
                self._failed_last = True
        if wants_state:
            if self._attempt(lambda: self.save_state(state_path), state_path, everywhere=True):
                done |= {state_path}
                self._announce(state_path, final=final, is_state=True)
            else:
                self._failed_last = True
        self._saved_here = (state.step, done)
        watch.heartbeat("training")

    def _write_model(self, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save_model(path)
        for written in self._with_companion(path):
            if not written.exists():
                raise ResourceError("the file isn't there after saving", str(written), code="E-SAVE")
            if written.suffix == ".safetensors" and written.is_file():
                files.header(written)

    def _with_companion(self, path: Path) -> list[Path]:
        return [path] if self.companion is None else [path, self.companion(path)]

    def _refuse_nonfinite(self) -> None:
        name = first_nonfinite(self.weights())
        if name is not None:
            raise DataError(
                f"the weights are not finite any more (first: {name})",
                "model",
                "nothing is overwritten",
                code="E-NONFINITE",
            )

    def _attempt(self, write: Callable[[], None], path: Path, *, everywhere: bool = False) -> bool:
        """Whether the main process, or each of them, could write; all processes learn of it."""
        failed = False
        if everywhere or self.ranks.is_main:
            try:
                write()
            except Exception as error:  # noqa: BLE001 - a failing save must not end the training, whatever the reason
                failed = True
                self._complain(path, error)
        return not self.ranks.any(failed)

    def _complain(self, path: Path, error: Exception) -> None:
        reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self.failures.append(f"{path.name} ({reason})")
        logger.warning("could not save %s: %s - the training goes on, the next save tries again", path, reason)

    def _announce(self, path: Path, *, final: bool, is_state: bool = False) -> None:
        self.written.append(path)
        if not self.ranks.is_main:
            return
        for written in [path] if is_state else self._with_companion(path):
            logger.info("saved %s", written)
            if self.upload is not None and (self.upload_states or not is_state):
                self.upload(written, final=final)

    def _remove_epoch(self, epoch: int, every: int) -> None:
        models, states = self.options.save_last_n_epochs, self.state_options.save_last_n_epochs_state
        self._remove(
            epoch_to_remove(epoch, every, models),
            epoch_to_remove(epoch, every, models if states is None else states),
            lambda number: epoch_stem(self.options.output_name, number),
        )

    def _remove_step(self, step: int, every: int) -> None:
        models, states = self.options.save_last_n_steps, self.state_options.save_last_n_steps_state
        state_number = step_to_remove(step, every, models if states is None else states)
        self._remove(
            step_to_remove(step, every, models),
            state_number or None,
            lambda number: step_stem(self.options.output_name, number),
        )

    def _remove(self, model: int | None, state: int | None, stem: Callable[[int], str]) -> None:
        if not self.ranks.is_main:
            return
        paths = [] if model is None else self._with_companion(self.folder / f"{stem(model)}{self.extension}")
        paths += [] if state is None else [self.folder / state_name(stem(state))]
        for path in paths:
            if not path.exists():
                continue
            try:
                _remove_whole(path)
                logger.info("removed %s", path)
            except OSError as error:
                logger.warning("could not remove %s: %s", path, error)


def _remove_whole(path: Path) -> None:
    """Removes a file or a folder; a folder loses its name first, so that none with it ever lacks something."""
    if not path.is_dir():
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed)


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; waits for the device once per device."""
    import torch

    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not named:
        return None
    flags = [
        torch.isfinite(tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()).all()
        for _, tensor in named
    ]
    device = flags[0].device
    finite = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).cpu().tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)
