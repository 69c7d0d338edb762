"""State folders: everything that a run needs to go on bit for bit, in safetensors and JSON."""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from library import files
from library.log import DataError, ResourceError, UserError, get_logger
from library.randomness import mix
from library.train.ranks import Ranks
from library.train.rng import restore_rng, rng_state, seed_rng
from library.train.state import RunState
from library.train.trees import read_tree, write_tree

logger = get_logger(__name__)

FORMAT = 1
RUN_FILE = "run.json"
HARMLESS = frozenset(
    {
        *("resume", "resume_from_huggingface", "config_file", "output_config", "output_dir", "output_name"),
        *("console_log_level", "console_log_file", "console_log_simple"),
        *(
            "logging_dir",
            "log_with",
            "log_prefix",
            "log_config",
            "log_tracker_name",
            "log_tracker_config",
            "wandb_run_name",
        ),
        *("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", "sample_sampler"),
        *("save_every_n_steps", "save_every_n_epochs", "save_n_epoch_ratio", "save_last_n_steps", "save_last_n_epochs"),
        *("save_state", "save_state_on_train_end", "save_last_n_steps_state", "save_last_n_epochs_state"),
        *("max_data_loader_n_workers", "persistent_data_loader_workers"),
        *("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
        *("save_best", "early_stop_patience"),
    }
)
"""Options that may change between two parts of a run without a word."""


class Stateful(Protocol):
    """An optimizer, schedule or gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, any nesting of plain data and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Takes such a state."""


class Average(Stateful, Protocol):
    """A moving average of the trained weights."""

    def restart(self) -> None:
        """Begins anew with the weights of now."""


_LONGEST = 200
"""Letters that are shown of an error that isn't ours."""
AVERAGE = "ema"
"""Stem of the average's files."""


@dataclass(kw_only=True)
class Parts:
    """What makes up the state of a run."""

    state: RunState
    model: Callable[[], Mapping[str, Tensor]]
    """The trained weights, as they are while training."""
    load_model: Callable[[Mapping[str, Tensor]], None]
    optimizers: Sequence[Stateful] = ()
    schedulers: Sequence[Stateful] = ()
    scaler: Stateful | None = None
    average: Average | None = None
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    ranks: Ranks = field(default_factory=Ranks)

    def stateful(self) -> dict[str, Stateful]:
        """The parts with a state dict, by the stem of their file."""
        named = {_numbered("optimizer", index): part for index, part in enumerate(self.optimizers)}
        named |= {_numbered("scheduler", index): part for index, part in enumerate(self.schedulers)}
        extra = {"scaler": self.scaler, AVERAGE: self.average}
        return named | {stem: part for stem, part in extra.items() if part is not None}


def save_state(folder: Path, parts: Parts) -> None:
    """Writes the state of a run as a folder that appears whole or not at all. All processes must call it.

    Errors: ResourceError, in every process, when any of them couldn't write.
    """
    ranks, partial = parts.ranks, folder.with_name(f"{folder.name}.partial")
    steps: list[Callable[[], None]] = [
        lambda: _make_empty(partial) if ranks.is_main else None,
        lambda: write_tree(rng_state(ranks.device), partial, f"rng_{ranks.rank}"),
        lambda: _write_run(partial, folder, parts) if ranks.is_main else None,
    ]
    for step in steps:
        failure: Exception | None = None
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other processes must hear of it
            failure = error
        if ranks.any(failure is not None):
            if ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(failure, UserError):
                raise failure
            reason = str(failure) if failure else "another process failed"
            raise ResourceError(
                f"the state couldn't be saved: {reason}",
                str(folder),
                "check free disk space and permissions",
                code="E-STATE-SAVE",
            ) from failure


def load_state(folder: Path, parts: Parts) -> None:
    """Brings the run to where it was when the state was saved. All processes must call it.

    Says which options changed since. A changed dataset, or another number of batches per step, starts the epoch anew.
    Errors: UserError for a folder that isn't a state of this program, DataError for a damaged one.
    """
    saved = check_state(folder)
    device = parts.ranks.device
    try:
        with files.LazyTensors(folder / "model.safetensors") as weights:
            parts.load_model(weights)
        for stem, part in parts.stateful().items():
            if part is parts.average:
                _load_average(folder, parts.average)
                continue
            if not (folder / f"{stem}.json").exists():
                raise UserError(
                    f"the state has no {stem}",
                    str(folder),
                    "resume with the same optimizer and precision",
                    code="E-STATE-PART",
                )
            load_exactly(part, read_tree(folder, stem, device))
    except (ValueError, KeyError, RuntimeError) as error:
        anew = f"with --network_weights {folder / 'model.safetensors'} --initial_step {saved['step']}"
        if "network_module" not in parts.state.options:
            anew = "from the model that was saved with it"
        hint = f"resume with the same parts trained, or start anew {anew}"
        raise UserError(
            f"the state doesn't fit this run: {_in_one_line(error)}", str(folder), hint, code="E-STATE-FIT"
        ) from error
    state = parts.state
    changes = changed_options(saved["options"], state.options)
    if changes:
        logger.warning("options changed since the state was saved: %s", "; ".join(changes))
    same_data = not saved["dataset"] or not state.dataset or saved["dataset"] == state.dataset
    state.load_state_dict(saved)
    _find_position(state, saved, parts, same_data)
    _load_rng(folder, saved, parts)
    logger.info("resumed from %s: %d steps done, epoch %d, batch %d", folder, state.step, state.epoch, state.batch)
    if state.complete:
        logger.info(
            "nothing left to do: the run ends at step %d and the state is of step %d", state.total_steps, state.step
        )


def _in_one_line(error: Exception) -> str:
    """The beginning of what torch lists on lines of its own."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _load_average(folder: Path, average: Average) -> None:
    """Takes the average of a state; one without begins it anew."""
    if (folder / f"{AVERAGE}.json").exists():
        average.load_state_dict(read_tree(folder, AVERAGE, torch.device("cpu")))
    else:
        logger.warning("the state has no moving average: it begins with the weights of the state")
        average.restart()


def check_state(folder: Path) -> dict[str, Any]:
    """The content of `run.json` of a complete state folder.

    Errors: UserError when the folder isn't a state of this program, DataError when it is incomplete.
    """
    path = folder / RUN_FILE
    if not folder.is_dir():
        raise UserError("the state folder doesn't exist", str(folder), "check --resume", code="E-STATE-NONE")
    if not path.exists():
        raise _foreign(folder)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        complete, wanted = bool(saved["complete"]), dict(saved["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the state is damaged: {error!r}", str(path), "use an older state", code="E-STATE-BAD"
        ) from error
    if saved.get("format") != FORMAT:
        raise UserError(
            f"the state has format {saved.get('format')}, this version reads {FORMAT}",
            str(path),
            "use the version that wrote it",
        )
    sizes = {name: (folder / name).stat().st_size if (folder / name).exists() else -1 for name in wanted}
    bad = [name for name, size in wanted.items() if sizes[name] != size]
    if bad or not complete:
        raise DataError(
            f"the state is incomplete: {', '.join(bad) or 'not finished'}",
            str(folder),
            "use an older state",
            code="E-STATE-BAD",
        )
    return dict(saved)


def find_latest(output_dir: Path, output_name: str | None) -> Path | None:
    """The newest complete state of a run in its output folder."""
    if not output_dir.is_dir():
        return None
    if output_name:
        pattern = re.compile(re.escape(output_name) + r"(-\d{6,}|-step\d{8,})?-state(\.old)?")
    else:
        pattern = re.compile(r"(epoch-\d{6,}|at-step\d{8,}|last)-state(\.old)?")
    candidates: list[tuple[float, int, Path]] = []
    for folder in output_dir.iterdir():
        if not pattern.fullmatch(folder.name) or not (folder / RUN_FILE).exists():
            continue
        try:
            saved = check_state(folder)
        except UserError as error:
            logger.warning("passing over a state: %s", error)
            continue
        candidates.append((float(saved["saved_at"]), int(saved["step"]), folder))
    return max(candidates)[2] if candidates else None


def begin_at(
    state: RunState, initial_step: int | None, initial_epoch: int | None, skip: bool, accumulation: int
) -> None:
    """Sets the step that the run begins with, as `--initial_step` or else `--initial_epoch` say.

    With `skip` the data go on at that place of the epoch; otherwise only the numbers do, and the epoch starts anew.
    Errors: UserError when the run would have ended by then.
    """
    if initial_step is None and initial_epoch is None:
        return
    per_epoch = state.loss.length
    if initial_step is None:
        assert initial_epoch is not None
        initial_step = (initial_epoch - 1) * per_epoch
    if not 0 <= initial_step < state.total_steps:
        raise UserError(
            f"the run would begin at step {initial_step} and ends at step {state.total_steps}",
            "--initial_step / --initial_epoch",
            "raise --max_train_steps or --max_train_epochs",
        )
    if state.step and state.step != initial_step:
        logger.warning("--initial_step: the run goes on at step %d, its state is of step %d", initial_step, state.step)
    state.step = initial_step
    state.epoch = initial_step // per_epoch + 1
    state.batch = initial_step % per_epoch * accumulation if skip else 0


def changed_options(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which options differ, each as `name: old -> new`; those that can't change the result are left out."""
    names = sorted((before.keys() | now.keys()) - HARMLESS)
    return [
        f"{name}: {before.get(name, '-')} -> {now.get(name, '-')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def load_exactly(part: Stateful, saved: dict[str, Any]) -> None:
    """Loads a state dict, then undoes the changes of dtype that `torch.optim.Optimizer.load_state_dict` makes.

    (It casts the state of a parameter to the parameter's dtype, so fp32 moments of bf16 weights would lose bits.)
    """
    part.load_state_dict(saved)
    groups, per_param = getattr(part, "param_groups", None), getattr(part, "state", None)
    if groups is None or per_param is None or "param_groups" not in saved or "state" not in saved:
        return
    params = [param for group in groups for param in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, param in zip(indices, params, strict=True):
        if index in saved["state"]:
            per_param[param] = _as_saved(saved["state"][index], per_param.get(param))


def _as_saved(saved: Any, loaded: Any) -> Any:
    if isinstance(saved, Tensor):
        return saved.to(loaded.device) if isinstance(loaded, Tensor) else saved
    if isinstance(saved, dict):
        inside = loaded if isinstance(loaded, Mapping) else {}
        return {key: _as_saved(value, inside.get(key)) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        others = loaded if isinstance(loaded, (list, tuple)) and len(loaded) == len(saved) else [None] * len(saved)
        return type(saved)(_as_saved(value, other) for value, other in zip(saved, others, strict=True))
    return saved


def _numbered(stem: str, index: int) -> str:
    return f"{stem}_{index}" if index else stem


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_run(partial: Path, folder: Path, parts: Parts) -> None:
    files.save_safetensors(parts.model(), partial / "model.safetensors", {})
    for stem, part in parts.stateful().items():
        write_tree(part.state_dict(), partial, stem)
    state = parts.state
    for_front_ends = {"current_epoch": state.current_epoch, "current_step": state.step}
    (partial / "train_state.json").write_text(json.dumps(for_front_ends), encoding="utf-8")
    run = {
        "format": FORMAT,
        "saved_at": time.time(),
        "versions": versions(),
        "processes": parts.ranks.world,
        "accumulation": parts.accumulation,
        **state.state_dict(),
        "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
        "complete": True,
    }
    with files.atomic_write(partial / RUN_FILE) as path:
        path.write_text(json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of what computes the run."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("image-model-trainer", "transformers", "diffusers", "accelerate"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _find_position(state: RunState, saved: Mapping[str, Any], parts: Parts, same_data: bool) -> None:
    world_then, accumulation_then = int(saved["processes"]), int(saved["accumulation"])
    if same_data and (world_then, accumulation_then) == (parts.ranks.world, parts.accumulation):
        return
    if same_data and world_then * accumulation_then == parts.ranks.world * parts.accumulation:
        steps = -(-state.batch // accumulation_then)
        state.batch = min(steps * parts.accumulation, state.batches_per_epoch)
        return
    state.epoch, state.batch = state.step // state.loss.length + 1, 0
    reason = "the number of batches per step changed" if same_data else "the dataset changed"
    logger.warning("%s since the state was saved: epoch %d starts anew, at step %d", reason, state.epoch, state.step)


def _load_rng(folder: Path, saved: Mapping[str, Any], parts: Parts) -> None:
    stem = f"rng_{parts.ranks.rank}"
    if (folder / f"{stem}.json").exists():
        restore_rng(read_tree(folder, stem), parts.ranks.device)
    else:
        seed_rng(mix(int(saved["seed"]), int(saved["step"]), parts.ranks.rank) % 2**63)


def _foreign(folder: Path) -> UserError:
    names = {path.name for path in folder.iterdir()}
    pickles = sorted(name for name in names if name.endswith((".bin", ".pkl", ".pt")))
    if not pickles and "model.safetensors" not in names:
        return UserError(
            "the folder is not a saved state", str(folder), f"it has no {RUN_FILE}; check --resume", code="E-STATE-NONE"
        )
    step = 0
    try:
        step = int(json.loads((folder / "train_state.json").read_text(encoding="utf-8"))["current_step"])
    except (OSError, ValueError, KeyError, TypeError):
        logger.debug("no readable train_state.json in %s", folder)
    return UserError(
        f"another program saved this state, as pickles that can run code ({', '.join(pickles[:3]) or 'no run.json'})",
        str(folder),
        f"go on from its weights: --network_weights {folder / 'model.safetensors'} --initial_step {step or 'N'}",
        code="E-STATE-FOREIGN",
    )
