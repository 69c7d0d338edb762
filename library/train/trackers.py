"""Where the numbers of a run go: a JSON-lines file, TensorBoard and wandb."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol

from library import files
from library.log import UserError, get_logger
from library.train import watch
from library.train.progress import ProgressLine as ProgressLine
from library.train.ranks import Ranks
from library.train.state import Reading, RunState

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.option_groups import TrackerOptions

logger = get_logger(__name__)


class Tracker(Protocol):
    """A place that keeps numbers and pictures."""

    name: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes numbers by tag; steps may come out of order."""

    def picture(self, tag: str, picture: Image, caption: str, step: int) -> None:
        """Takes a picture."""

    def close(self) -> None:
        """Writes what is left."""


class JsonLines:
    """A file of one JSON object per line, written at once, for plots and front ends."""

    name = "log.jsonl"

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", newline="\n")
        if config:
            self._write({"config": dict(config)})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        # JSON has no NaN: a loss that isn't finite is written as null
        numbers = {
            tag: value if abs(value) != float("inf") and value == value else None for tag, value in values.items()
        }
        self._write({"step": step, "time": round(time.time(), 3), **numbers})

    def picture(self, tag: str, picture: Image, caption: str, step: int) -> None:
        """Pictures lie in the sample folder; nothing is written here."""

    def close(self) -> None:
        """See `Tracker`."""
        self._file.close()

    def _write(self, record: Mapping[str, object]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


class TensorBoard:
    """TensorBoard's event files."""

    name = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, object], arguments: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), **arguments)
        if config:
            self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()), 0)
            self._writer.flush()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, tag: str, picture: Image, caption: str, step: int) -> None:
        """See `Tracker`."""
        import numpy as np

        self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases; works offline too, as its own settings say. The command line is kept from it."""

    name = "wandb"

    def __init__(
        self,
        project: str,
        folder: Path | None,
        config: Mapping[str, object],
        arguments: Mapping[str, Any],
        key: str | None,
    ) -> None:
        import wandb

        if key:
            wandb.login(key=key)
        with _without_arguments():
            self._run = wandb.init(
                project=project, dir=str(folder) if folder else None, config=dict(config), **_silent(wandb), **arguments
            )
        self._wandb = wandb
        wandb.define_metric("*", step_metric="global_step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`. The step is a value of its own: wandb's counter would drop what comes late."""
        self._run.log({**values, "global_step": step})

    def picture(self, tag: str, picture: Image, caption: str, step: int) -> None:
        """See `Tracker`."""
        self._run.log({tag: self._wandb.Image(picture, caption=caption), "global_step": step}, commit=False)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


@contextmanager
def _without_arguments() -> Iterator[None]:
    """While inside, `sys.argv` holds the program's name only: options may carry secrets and private paths."""
    kept = sys.argv
    sys.argv = [Path(kept[0]).name] if kept else []
    try:
        yield
    finally:
        sys.argv = kept


def _silent(wandb: Any) -> dict[str, Any]:
    """Arguments of `wandb.init` that keep it from collecting command line, code, host, and what the console shows."""
    quiet: dict[str, Any] = {"console": "off", "disable_git": True, "disable_code": True}
    for name in ("x_disable_meta", "_disable_meta"):
        try:
            return {"settings": wandb.Settings(**quiet, **{name: True})}
        except (TypeError, ValueError, AttributeError):
            continue
    return {}


def no_rates() -> Mapping[str, float]:
    """No learning rates."""
    return {}


@dataclass(kw_only=True)
class Trackers:
    """Hands the numbers of a run to all trackers. A tracker that fails is dropped with a warning; the run goes on."""

    trackers: list[Tracker]
    progress: ProgressLine
    rates: Callable[[], Mapping[str, float]] = no_rates
    """The learning rates of now by tag (`lr/unet`, `lr/d*lr/unet`), see `learning_rates`."""
    ranks: Ranks = field(default_factory=Ranks)
    dropped: list[str] = field(default_factory=list)
    """Trackers that failed, with the reason."""
    _waiting: dict[int, tuple[int, Mapping[str, float]]] = field(default_factory=dict)
    _newest: Reading | None = None

    def begin(self, state: RunState) -> None:
        """Shows where the run starts."""
        if self.ranks.is_main:
            self.progress.begin(state.step)

    def after_step(self, state: RunState) -> None:
        """Logs what has become known with this step."""
        watch.heartbeat("training")
        if not self.ranks.is_main:
            return
        rates = self.rates()
        self._waiting[state.step] = (state.current_epoch, rates)
        self._take(state.readings)
        shown: dict[str, float] = {}
        if self._newest is not None:
            shown = {"loss": self._newest.loss, "avr_loss": self._newest.average}
        first_rate = next((value for tag, value in rates.items() if not tag.startswith("lr/d*lr/")), None)
        if first_rate is not None:
            shown["lr"] = first_rate
        self.progress.update(state.step, state.current_epoch, shown)

    def after_epoch(self, state: RunState) -> None:
        """Logs the average of the epoch that has ended, at the step it ended with."""
        if not self.ranks.is_main:
            return
        self._take(state.readings)
        state.readings = []
        self.log({"loss/epoch_average": state.loss.average, "epoch": float(state.epochs_done)}, state.step)

    def finish(self, state: RunState) -> None:
        """Logs what is left and closes all trackers."""
        if not self.ranks.is_main:
            return
        self._take(state.readings)
        state.readings = []
        self.close()
        if self.dropped:
            logger.warning("trackers that failed: %s", "; ".join(self.dropped))

    def close(self) -> None:
        """Closes all trackers, also after an error."""
        self.progress.end()
        for tracker in list(self.trackers):
            self._isolated(tracker, tracker.close)
        self.trackers.clear()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Gives numbers to all trackers."""
        for tracker in list(self.trackers):
            self._isolated(tracker, lambda tracker=tracker: tracker.log(values, step))  # type: ignore[misc]

    def picture(self, tag: str, picture: Image, caption: str, step: int) -> None:
        """Gives a picture to all trackers."""
        for tracker in list(self.trackers):
            self._isolated(tracker, lambda tracker=tracker: tracker.picture(tag, picture, caption, step))  # type: ignore[misc]

    def _take(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            epoch, rates = self._waiting.pop(reading.step, (None, {}))
            values: dict[str, float] = {
                "loss/current": reading.loss,
                "loss/average": reading.average,
                "loss/smoothed": reading.smoothed,
                **reading.by_band,
                **reading.metrics,
            }
            values |= rates
            if epoch is not None:
                values["epoch"] = float(epoch)
            self.log(values, reading.step)
            self._newest = reading

    def _isolated(self, tracker: Tracker, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - side work must never end the training
            self.dropped.append(f"{tracker.name} ({type(error).__name__}: {error})")
            logger.warning("%s failed and is switched off: %s: %s", tracker.name, type(error).__name__, error)
            if tracker in self.trackers:
                self.trackers.remove(tracker)


def open_trackers(
    options: TrackerOptions, *, config: Mapping[str, object], project: str, ranks: Ranks | None = None
) -> list[Tracker]:
    """The trackers that the options ask for; none in other processes than the main one.

    `config` are the options of the run without secrets; they are sent only with `--log_config`. `project` is the name
    without `--log_tracker_name`. A tracker that can't be opened is left out with a warning.
    """
    ranks = ranks or Ranks()
    if not ranks.is_main:
        return []
    sent = public_config(config) if options.log_config else {}
    project = options.log_tracker_name or project
    arguments = tracker_arguments(options)
    run = run_folder(options)
    wanted: list[tuple[str, Callable[[], Tracker]]] = []
    kinds = kinds_wanted(options)
    if run is not None:
        wanted.append(("log.jsonl", lambda: JsonLines(run / "log.jsonl", sent)))
        if "tensorboard" in kinds:
            wanted.append(("tensorboard", lambda: TensorBoard(run / project, sent, arguments.get("tensorboard", {}))))
    if "wandb" in kinds:
        wandb_arguments = arguments.get("wandb", {})
        wanted.append(("wandb", lambda: Wandb(project, run, sent, wandb_arguments, options.wandb_api_key)))
    trackers: list[Tracker] = []
    for name, open_tracker in wanted:
        try:
            trackers.append(open_tracker())
        except Exception as error:  # noqa: BLE001 - side work must never end the training
            logger.warning("%s can't be opened, the run goes on without it: %s", name, _masked(str(error), options))
    return trackers


def kinds_wanted(options: TrackerOptions) -> frozenset[str]:
    """`tensorboard` and `wandb`, as far as the options ask for them."""
    if options.log_with == "all":
        return frozenset({"tensorboard", "wandb"})
    if options.log_with is not None:
        return frozenset({options.log_with})
    return frozenset({"tensorboard"}) if options.logging_dir else frozenset()


def run_folder(options: TrackerOptions, now: time.struct_time | None = None) -> Path | None:
    """The folder of this run in `--logging_dir`: the prefix and the local time."""
    if not options.logging_dir:
        return None
    stamp = time.strftime("%Y%m%d%H%M%S", now or time.localtime())
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{stamp}"


def public_config(values: Mapping[str, object]) -> dict[str, str | int | float | bool]:
    """Options as a tracker may see them: absent ones left out, paths cut to their last part, lists as text."""
    return {name: _public(value) for name, value in values.items() if value is not None}


def learning_rates(
    param_groups: Sequence[Mapping[str, Any]], names: Sequence[str], effective: Callable[[], Sequence[float]]
) -> dict[str, float]:
    """Learning rates by tag: `lr/<name>` is the scheduled one, `lr/d*lr/<name>` comes with an estimated d.

    `effective` gives what multiplies the updates; it is asked where an optimizer sets its own rate.
    """
    rates: dict[str, float] = {}
    for number, (name, group) in enumerate(zip(names, param_groups, strict=True)):
        lr = group.get("scheduled_lr") or group.get("lr")
        if lr is None:
            lr = effective()[number]
        rates[f"lr/{name}"] = float(lr)
        if "d" in group:
            rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(lr)
    return rates


def _public(value: object) -> str | int | float | bool:
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return json.dumps(
            {str(name): _public(item) for name, item in value.items() if item is not None}, ensure_ascii=False
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_public(item)) for item in value)
    text = str(value)
    head, mark, tail = text.partition("=")
    if mark and head.isidentifier():  # key=value of network_args and the like
        return f"{head}={_public(tail)}"
    return PureWindowsPath(PurePosixPath(text).name).name or text.strip("/\\")


def tracker_arguments(options: TrackerOptions) -> dict[str, dict[str, Any]]:
    """Arguments for starting the trackers, by tracker: what `--log_tracker_config` and `--wandb_run_name` say.

    Errors: UserError for a file that can't be read.
    """
    arguments: dict[str, dict[str, Any]] = {}
    if options.log_tracker_config:
        import toml

        path = Path(options.log_tracker_config)
        try:
            arguments = {name: dict(table) for name, table in toml.loads(files.read_text(path)).items()}
        except (OSError, TypeError, ValueError, IndexError) as error:
            hint = 'write a table for each tracker, such as [wandb] with entity = "me"'
            what = f"can't read the tracker settings: {error}"
            raise UserError(what, f"--log_tracker_config {path}", hint, code="E-CONFIG") from error
    if options.wandb_run_name:
        arguments["wandb"] = {"name": options.wandb_run_name, **arguments.get("wandb", {})}
    return arguments


def _masked(text: str, options: TrackerOptions) -> str:
    return text.replace(options.wandb_api_key, "***") if options.wandb_api_key else text
