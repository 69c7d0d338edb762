"""Everything that can be checked before a weight is loaded; all findings are reported at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import findings as make
from library.findings import report as report
from library.log import UserError
from library.models import detect
from library.option_groups import (
    FluxOptions,
    MetadataOptions,
    ModelOptions,
    NetworkOptions,
    SampleOptions,
    SaveOptions,
    StateOptions,
    TrackerOptions,
)
from library.places import check_output_name, check_readable, check_writable
from library.train import combinations, resume
from library.types import Finding

if TYPE_CHECKING:
    from library.options import Options

_READ: dict[type[Any], tuple[str, ...]] = {
    NetworkOptions: ("network_weights", "base_weights"),
    TrackerOptions: ("log_tracker_config",),
    MetadataOptions: ("metadata_thumbnail",),
}
"""Options that name something that must exist, besides models and datasets, which are looked into elsewhere."""
_MODELS: dict[type[Any], tuple[str, ...]] = {
    ModelOptions: ("pretrained_model_name_or_path",),
    FluxOptions: ("clip_l", "t5xxl", "ae"),
}
"""Options that must be given where the script has the group."""
_KEEPING = ("save_last_n_epochs", "save_last_n_steps", "save_last_n_epochs_state", "save_last_n_steps_state")


def settle(options: Options) -> tuple[Options, list[Finding]]:
    """The options with what they imply filled in and what can't work taken out, and a warning for each change."""
    changes = list(_changes(options))
    findings = [make.warning(why, f"--{name}") for name, _, why in changes]
    return options.with_values(**{name: value for name, value, _ in changes}) if changes else options, findings


def _changes(options: Options) -> Iterator[tuple[str, object, str]]:
    """Name, new value and reason of each change."""

    def value(name: str) -> Any:
        return None if options.script.option(name) is None else options.value(name)

    def is_off(name: str) -> bool:
        return value(name) is not None and value(name) <= 0

    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if value(f"{name}_to_disk") and not value(name):
            yield name, True, f"switched on by --{name}_to_disk"
    for name in filter(is_off, ("sample_every_n_steps", "sample_every_n_epochs")):
        yield name, None, f"{value(name)} is not positive: switched off"
    for name in filter(is_off, _KEEPING):
        yield name, None, f"{value(name)} would keep nothing: switched off"
    if is_off("initial_epoch"):
        yield "initial_epoch", None, "epochs are counted from 1: switched off"
    if value("diffusers_xformers") and not value("xformers"):
        yield "xformers", True, "switched on by --diffusers_xformers"
    if value("persistent_data_loader_workers") and value("max_data_loader_n_workers") == 0:
        why = "switched off: there are no workers with --max_data_loader_n_workers 0"
        yield "persistent_data_loader_workers", False, why
    if value("cpu_offload_checkpointing") and not value("gradient_checkpointing"):
        yield "gradient_checkpointing", True, "switched on by --cpu_offload_checkpointing"


def check_paths(options: Options, parse_prompts: Callable[[Path], Sequence[Any]] | None = None) -> list[Finding]:
    """What is wrong with the files and folders named in the options; `parse_prompts` reads the sample prompts."""
    findings: list[Finding] = []
    for name in (name for group, names in _MODELS.items() if options.has(group) for name in names):
        if not options.value(name):
            findings.append(make.error("a model file is missing", f"--{name}", f"give --{name} FILE", "E-MODEL-NONE"))
    for name, path in _named(options, _READ):
        if path:
            findings += check_readable(path, f"--{name}")
    findings += _check_networks(options)
    for group, name in ((SaveOptions, "output_dir"), (TrackerOptions, "logging_dir")):
        found = _group(options, group)
        if found is not None and getattr(found, name):
            findings += check_writable(Path(getattr(found, name)), f"--{name}")
    save = _group(options, SaveOptions)
    if save is not None:
        if not save.output_dir:
            findings.append(make.error("no output folder", "--output_dir", "give --output_dir FOLDER"))
        findings += check_output_name(save.output_name)
    findings += _check_resume(options)
    sample = _group(options, SampleOptions)
    if sample is not None and sample.sample_prompts:
        findings += _check_prompts(Path(sample.sample_prompts), parse_prompts)
    return _located(findings, options)


def check_combinations(options: Options) -> list[Finding]:
    """Options that contradict one another, do nothing together, or have a value that nothing can be made of."""
    return _located(combinations.check(options), options)


def check_rates(options: Options) -> list[Finding]:
    """Whether optimizer and schedule can be made; takes seconds."""
    return _located(combinations.check_rates(options), options)


def check_device(device_type: str) -> list[Finding]:
    """A warning when the training would run on the CPU."""
    if device_type != "cpu":
        return []
    what = "no GPU is used: the training runs on the CPU, which is very slow for real models"
    return [make.warning(what, "device", "if there is a GPU, install the torch build for it")]


def _named(options: Options, table: dict[type[Any], tuple[str, ...]]) -> Iterable[tuple[str, str]]:
    """Name and value of options, empty where nothing is given; one entry for each value of those that take several."""
    for group, names in table.items():
        found = _group(options, group)
        for name in names if found is not None else ():
            value = getattr(found, name)
            values = value if isinstance(value, tuple) else [value]
            yield from ((name, str(path or "")) for path in values)


def _check_networks(options: Options) -> list[Finding]:
    """Whether network files are networks; those of other packages' modules may be anything."""
    network = _group(options, NetworkOptions)
    if network is None or not (network.network_module or "").startswith("networks."):
        return []
    table: dict[type[Any], tuple[str, ...]] = {NetworkOptions: ("network_weights", "base_weights")}
    files = [(name, path) for name, path in _named(options, table) if path and Path(path).exists()]
    found = [detect.check(path, f"--{name}", "network") for name, path in files]
    return [finding for finding in found if finding is not None]


def _check_resume(options: Options) -> list[Finding]:
    state = _group(options, StateOptions)
    if state is None:
        return []
    if state.resume_from_huggingface:
        if state.resume:
            return []
        hint = "give --resume user/repository/path"
        return [make.error("there is no place to resume from", "--resume_from_huggingface", hint)]
    if not state.resume or state.resume == "auto":
        return []
    try:
        resume.check_state(Path(state.resume))
    except UserError as mistake:
        return [make.of_error(mistake, "--resume")]
    return []


def _check_prompts(path: Path, parse: Callable[[Path], Sequence[Any]] | None) -> list[Finding]:
    option = "--sample_prompts"
    missing = check_readable(str(path), option)
    if missing or parse is None:
        return missing
    try:
        prompts = parse(path)
    except UserError as mistake:
        return [make.of_error(mistake, option)]
    return [] if prompts else [make.warning(f"{path} holds no prompts: no samples are made", option)]


def _group(options: Options, group: type[Any]) -> Any:
    return options[group] if options.has(group) else None


def _located(findings: Iterable[Finding], options: Options) -> list[Finding]:
    """The findings, with the place where an option was given (a line of the config file) instead of its flag."""
    located = []
    for finding in findings:
        flag, _, rest = finding.where.partition(" ")
        name = flag.removeprefix("--")
        known = flag.startswith("--") and options.given(name)
        located.append(replace(finding, where=f"{options.where(name)} {rest}".rstrip()) if known else finding)
    return located
