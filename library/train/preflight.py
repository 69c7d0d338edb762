"""Everything that can be checked before a weight is loaded; all findings are reported at once."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.log import DataError, ResourceError, UserError, get_logger, raise_all
from library.option_groups import (
    CacheOptions,
    DatasetOptions,
    FluxFullOptions,
    FluxOptions,
    HubOptions,
    LengthOptions,
    MemoryOptions,
    ModelOptions,
    NetworkOptions,
    NoiseOptions,
    OffloadOptions,
    OptimizerOptions,
    PrecisionOptions,
    SampleOptions,
    SaveOptions,
    StateOptions,
    TextCacheOptions,
    TrackerOptions,
)
from library.train import resume
from library.train.plan import Plan, readable_bytes
from library.train.trackers import kinds_wanted
from library.types import Finding, errors

if TYPE_CHECKING:
    from library.options import Options

logger = get_logger(__name__)

_RESERVED_CHARACTERS = frozenset('<>:"/\\|?*')
_RESERVED_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{digit}" for digit in range(1, 10)), *(f"lpt{digit}" for digit in range(1, 10))]
)
_KINDS: dict[str, type[UserError]] = {
    **dict.fromkeys(("E-DISK", "E-DEVICE", "E-HUB"), ResourceError),
    **dict.fromkeys(("E-FILE", "E-MODEL", "E-DATA", "E-STATE", "E-CACHE"), DataError),
}
"""What findings become, by the beginning of their code; all others are usage errors."""


def report(findings: Iterable[Finding]) -> None:
    """Logs the warnings. Errors: all findings that are errors, as one UserError with the exit code of the worst."""
    unique = list(dict.fromkeys(findings))
    for finding in unique:
        if not finding.error:
            logger.warning(" - ".join(part for part in (finding.where, finding.what, finding.hint) if part))
    raise_all(sorted(map(_as_error, errors(unique)), key=lambda error: -error.exit_code))


def settle(options: Options) -> tuple[Options, list[Finding]]:
    """The options with what they imply filled in and what can't work taken out, and a warning for each change."""
    changes: dict[str, object] = {}
    findings: list[Finding] = []

    def change(name: str, value: object, what: str) -> None:
        changes[name] = value
        findings.append(_warning(what, f"--{name}"))

    for group, name in ((CacheOptions, "cache_latents"), (TextCacheOptions, "cache_text_encoder_outputs")):
        found = _group(options, group)
        if found is not None and getattr(found, f"{name}_to_disk") and not getattr(found, name):
            change(name, True, f"switched on by --{name}_to_disk")
    sample = _group(options, SampleOptions)
    if sample is not None:
        for name in ("sample_every_n_steps", "sample_every_n_epochs"):
            value = getattr(sample, name)
            if value is not None and value <= 0:
                change(name, None, f"{value} is not positive: switched off")
    length = _group(options, LengthOptions)
    if length is not None and length.persistent_data_loader_workers and length.max_data_loader_n_workers == 0:
        change(
            "persistent_data_loader_workers",
            False,
            "switched off: there are no workers with --max_data_loader_n_workers 0",
        )
    offload, memory = _group(options, OffloadOptions), _group(options, MemoryOptions)
    if (
        offload is not None
        and memory is not None
        and offload.cpu_offload_checkpointing
        and not memory.gradient_checkpointing
    ):
        change("gradient_checkpointing", True, "switched on by --cpu_offload_checkpointing")
    return (options.with_values(**changes) if changes else options), findings


def check_paths(options: Options, parse_prompts: Callable[[Path], Sequence[Any]] | None = None) -> list[Finding]:
    """What is wrong with the files and folders named in the options; `parse_prompts` reads the sample prompts."""
    findings: list[Finding] = []
    for group, names in _READ.items():
        found = _group(options, group)
        for name in names if found is not None else ():
            value = getattr(found, name)
            for path in value if isinstance(value, (list, tuple)) else [value]:
                if path:
                    findings += check_readable(str(path), f"--{name}")
    for group, name in ((SaveOptions, "output_dir"), (TrackerOptions, "logging_dir")):
        found = _group(options, group)
        if found is not None and getattr(found, name):
            findings += check_writable(Path(getattr(found, name)), f"--{name}")
    save = _group(options, SaveOptions)
    if save is not None:
        if not save.output_dir:
            findings.append(_error("no output folder", "--output_dir", "give --output_dir FOLDER"))
        findings += check_output_name(save.output_name)
    findings += _check_resume(options)
    sample = _group(options, SampleOptions)
    if sample is not None and sample.sample_prompts:
        findings += _check_prompts(Path(sample.sample_prompts), parse_prompts)
    return _located(findings, options)


def check_combinations(options: Options) -> list[Finding]:
    """Options that contradict one another, or do nothing together."""
    checks = (_check_precision, _check_optimizer, _check_trackers, _check_saving, _check_network, _check_ranges)
    return _located([finding for check in checks for finding in check(options)], options)


def check_disk(plan: Plan, output_dir: Path) -> list[Finding]:
    """Whether there is room for what the plan leaves behind: an error when not even one model fits."""
    existing = next((folder for folder in (output_dir, *output_dir.absolute().parents) if folder.is_dir()), None)
    if existing is None or not plan.bytes_needed:
        return []
    free = shutil.disk_usage(existing).free
    if free < plan.model_bytes:
        what = f"the disk is full: one model takes {readable_bytes(plan.model_bytes)}, {readable_bytes(free)} are free"
        return [_error(what, str(output_dir), "free some space or use another --output_dir", "E-DISK-FULL")]
    if free < plan.bytes_needed:
        what = (
            f"the disk may fill up: {readable_bytes(plan.bytes_needed)} will be needed, {readable_bytes(free)} are free"
        )
        return [_warning(what, str(output_dir), "see --save_last_n_epochs and --save_last_n_steps")]
    return []


def check_device(device_type: str) -> list[Finding]:
    """A warning when the training would run on the CPU."""
    if device_type != "cpu":
        return []
    what = "no GPU is used: the training runs on the CPU, which is very slow for real models"
    return [_warning(what, "device", "if there is a GPU, install the torch build for it")]


def check_readable(path: str, option: str) -> list[Finding]:
    """Whether a file or folder exists and can be read."""
    if path.strip("\"'") != path:
        return [
            _error(f"the path has quotation marks in it: {path}", option, "write it without them", "E-FILE-MISSING")
        ]
    place = Path(path)
    try:
        if place.is_dir():
            next(place.iterdir(), None)
        else:
            with place.open("rb") as file:
                file.read(1)
    except FileNotFoundError:
        hint = "check the spelling; a path with spaces must be in quotation marks"
        return [_error(f"not found: {path}", option, hint, "E-FILE-MISSING")]
    except OSError as error:
        return [_error(f"can't be read: {path} ({error.strerror})", option, "check its permissions", "E-FILE-READ")]
    return []


def check_writable(folder: Path, option: str) -> list[Finding]:
    """Whether a folder exists or can be made, and files can be written in it; leaves no file behind."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        what = f"can't write to {folder} ({error.strerror or error})"
        return [_error(what, option, "check the path, its permissions and the disk", "E-DISK-WRITE")]
    return []


def check_output_name(name: str | None) -> list[Finding]:
    """Whether the name of the output can be a file name on every system; None takes the default names."""
    option = "--output_name"
    if name is None:
        return []
    if not name.strip():
        return [_error("the name is empty", option, "give a name, or leave the option out")]
    bad = sorted({character for character in name if character in _RESERVED_CHARACTERS or ord(character) < 32})
    if bad:
        shown = " ".join(repr(character)[1:-1] for character in bad)
        return [
            _error(
                f"{name!r} holds characters that a file name can't have: {shown}",
                option,
                "folders go into --output_dir",
            )
        ]
    if name[-1] in ". " or name.split(".")[0].lower() in _RESERVED_NAMES:
        return [_error(f"{name!r} can't be a file name on Windows", option, "use another name")]
    if name.endswith((".safetensors", ".ckpt", ".pt")):
        return [_warning(f"{name!r} already has an extension; another one is added", option)]
    return []


_READ: dict[type[Any], tuple[str, ...]] = {
    ModelOptions: ("pretrained_model_name_or_path",),
    FluxOptions: ("clip_l", "t5xxl", "ae"),
    NetworkOptions: ("network_weights", "base_weights"),
    DatasetOptions: ("dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"),
    TrackerOptions: ("log_tracker_config",),
}
"""Options that name something that must exist."""


def _check_resume(options: Options) -> list[Finding]:
    state = _group(options, StateOptions)
    if state is None:
        return []
    if state.resume_from_huggingface:
        return [] if state.resume else [_error("it needs --resume user/repo/path", "--resume_from_huggingface")]
    if not state.resume or state.resume == "auto":
        return []
    try:
        resume.check_state(Path(state.resume))
    except UserError as error:
        return [Finding(error=True, what=error.what, where=f"--resume {error.where}", hint=error.hint, code=error.code)]
    return []


def _check_prompts(path: Path, parse: Callable[[Path], Sequence[Any]] | None) -> list[Finding]:
    option = "--sample_prompts"
    missing = check_readable(str(path), option)
    if missing:
        return missing
    if parse is None:
        return []
    try:
        prompts = parse(path)
    except UserError as error:
        return [Finding(error=True, what=error.what, where=f"{option} {error.where}", hint=error.hint, code=error.code)]
    return [] if prompts else [_warning(f"{path} holds no prompts: no samples are made", option)]


def _check_precision(options: Options) -> Iterable[Finding]:
    precision = _group(options, PrecisionOptions)
    if precision is None:
        return
    mixed = precision.mixed_precision
    for full, wanted in ((precision.full_fp16, "fp16"), (precision.full_bf16, "bf16")):
        if full and mixed != wanted:
            yield _error(f"it needs --mixed_precision {wanted}, which is {mixed}", f"--full_{wanted}")
    network = _group(options, NetworkOptions)
    fp8 = precision.fp8_base or (network is not None and network.fp8_base_unet)
    if fp8 and mixed == "no":
        yield _error("fp8 weights need --mixed_precision fp16 or bf16 to compute in", "--fp8_base")


def _check_optimizer(options: Options) -> Iterable[Finding]:
    optimizer, length = _group(options, OptimizerOptions), _group(options, LengthOptions)
    if optimizer is None or length is None:
        return
    full, accumulates = _group(options, FluxFullOptions), length.gradient_accumulation_steps > 1
    kind = optimizer.optimizer_type.lower()
    if optimizer.fused_backward_pass:
        if kind != "adafactor":
            yield _error("it works with --optimizer_type Adafactor only", "--fused_backward_pass")
        if accumulates:
            yield _error(
                "it steps in each backward pass: --gradient_accumulation_steps must be 1", "--fused_backward_pass"
            )
    if full is not None and full.blockwise_fused_optimizers:
        if accumulates:
            yield _error(
                "it steps in each backward pass: --gradient_accumulation_steps must be 1",
                "--blockwise_fused_optimizers",
            )
        if kind.endswith("schedulefree"):
            yield _error("schedule-free optimizers can't be split by blocks", "--blockwise_fused_optimizers")
        if optimizer.fused_backward_pass:
            yield _error("choose one of the two", "--blockwise_fused_optimizers, --fused_backward_pass")


def _check_trackers(options: Options) -> Iterable[Finding]:
    tracker = _group(options, TrackerOptions)
    if tracker is None:
        return
    if tracker.log_with in ("tensorboard", "all") and not tracker.logging_dir:
        yield _error("it needs a folder", f"--log_with {tracker.log_with}", "give --logging_dir FOLDER")
    for kind in sorted(kinds_wanted(tracker)):
        if find_spec(kind) is None:
            yield _error(f"the package {kind} isn't installed", "--log_with", f"pip install {kind}, or leave it out")


def _check_saving(options: Options) -> Iterable[Finding]:
    save, state, sample = (_group(options, group) for group in (SaveOptions, StateOptions, SampleOptions))
    if save is not None:
        for unit in ("epochs", "steps"):
            every = getattr(save, f"save_every_n_{unit}") or (unit == "epochs" and save.save_n_epoch_ratio)
            if getattr(save, f"save_last_n_{unit}") is not None and not every:
                yield _warning(f"it does nothing without --save_every_n_{unit}", f"--save_last_n_{unit}")
    if sample is not None:
        every = sample.sample_every_n_steps or sample.sample_every_n_epochs or sample.sample_at_first
        if sample.sample_prompts and not every:
            yield _warning("no samples are made without --sample_every_n_epochs or _steps", "--sample_prompts")
        if every and not sample.sample_prompts:
            yield _warning("no samples are made without --sample_prompts FILE", "--sample_every_n_...")
    hub = _group(options, HubOptions)
    if hub is not None and hub.save_state_to_huggingface:
        if not hub.huggingface_repo_id:
            yield _warning("it does nothing without --huggingface_repo_id", "--save_state_to_huggingface")
        elif state is not None and not (state.save_state or state.save_state_on_train_end):
            yield _warning("it does nothing without --save_state", "--save_state_to_huggingface")


def _check_network(options: Options) -> Iterable[Finding]:
    network = _group(options, NetworkOptions)
    if network is None:
        return
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        yield _error(
            "together they leave nothing to train", "--network_train_unet_only, --network_train_text_encoder_only"
        )
    if network.dim_from_weights and not network.network_weights:
        yield _error("it needs --network_weights FILE", "--dim_from_weights")
    if network.initial_step is not None and network.initial_epoch is not None:
        yield _warning("--initial_step is given too, and counts", "--initial_epoch")
    if network.skip_until_initial_step and network.initial_step is None and network.initial_epoch is None:
        yield _warning("it does nothing without --initial_step or --initial_epoch", "--skip_until_initial_step")
    offload = _group(options, OffloadOptions)
    if network.split_mode and offload is not None and offload.cpu_offload_checkpointing:
        yield _error("choose one of the two", "--split_mode, --cpu_offload_checkpointing")


def _check_ranges(options: Options) -> Iterable[Finding]:
    noise, length, data = (_group(options, group) for group in (NoiseOptions, LengthOptions, DatasetOptions))
    if noise is not None:
        if noise.adaptive_noise_scale is not None and noise.noise_offset is None:
            yield _error("it needs --noise_offset", "--adaptive_noise_scale")
        low, high = noise.min_timestep or 0, 1000 if noise.max_timestep is None else noise.max_timestep
        if not 0 <= low < high <= 1000:
            yield _error(
                f"there are no timesteps from {low} to {high}",
                "--min_timestep, --max_timestep",
                "0 <= min < max <= 1000",
            )
    counts = [
        (length, "gradient_accumulation_steps", 1),
        (length, "max_data_loader_n_workers", 0),
        (data, "train_batch_size", 1),
    ]
    for group, name, least in counts:
        if group is not None and getattr(group, name) < least:
            yield _error(f"{getattr(group, name)} is too small", f"--{name}", f"give {least} or more")


def _group(options: Options, group: type[Any]) -> Any:
    return options[group] if options.has(group) else None


def _located(findings: Iterable[Finding], options: Options) -> list[Finding]:
    """The findings, with the place where an option was given (a line of the config file) instead of its flag."""
    located = []
    for finding in findings:
        name = finding.where.removeprefix("--")
        known = finding.where.startswith("--") and options.given(name)
        located.append(replace(finding, where=options.where(name)) if known else finding)
    return located


def _error(what: str, where: str, hint: str = "", code: str = "E-CHECK") -> Finding:
    return Finding(error=True, what=what, where=where, hint=hint, code=code)


def _warning(what: str, where: str, hint: str = "") -> Finding:
    return Finding(error=False, what=what, where=where, hint=hint)


def _as_error(finding: Finding) -> UserError:
    kind = next((kind for start, kind in _KINDS.items() if finding.code.startswith(start)), UserError)
    return kind(finding.what, finding.where, finding.hint, code=finding.code)
