"""Options that contradict one another, do nothing together, or have values that nothing can be made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from library.findings import error, of_error, warning
from library.log import UserError
from library.option_groups import (
    DreamBoothOptions,
    EmaOptions,
    HubOptions,
    LegacySDOptions,
    LengthOptions,
    MemoryOptions,
    NetworkOptions,
    NoiseOptions,
    OffloadOptions,
    OptimizerOptions,
    PrecisionOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
    StateOptions,
    TrackerOptions,
)
from library.train import optimizers, schedules
from library.train.idle import idle_options
from library.train.processes import world_size
from library.train.setups import cut_of, storage_of, swap_of
from library.train.trackers import kinds_wanted, tracker_arguments
from library.types import Finding

if TYPE_CHECKING:
    from library.options import Options

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LONG = 10**9
"""Stands for the steps of a run of unknown length."""


def check(options: Options) -> list[Finding]:
    """All that is found; `where` is the flag of the option."""
    checks = (
        *(_check_precision, _check_optimizer, _check_swapping, _check_graphs, _check_trackers, _check_saving),
        *(_check_hub, _check_network, _check_noise, _check_tokens, idle_options),
    )
    return [finding for check in checks for finding in check(options)]


def _check_precision(options: Options) -> Iterator[Finding]:
    precision = _group(options, PrecisionOptions)
    if precision is None:
        return
    mixed = precision.mixed_precision
    for full, wanted in ((precision.full_fp16, "fp16"), (precision.full_bf16, "bf16")):
        if full and mixed != wanted:
            what = f"it needs --mixed_precision {wanted}, which is {mixed}"
            yield error(what, f"--full_{wanted}", f"give --mixed_precision {wanted}")
    network = _group(options, NetworkOptions)
    fp8 = precision.fp8_base or (network is not None and network.fp8_base_unet)
    if fp8 and mixed == "no":
        yield error("fp8 weights need a type to compute in", "--fp8_base", "give --mixed_precision bf16")
    try:
        storage_of(options)
    except UserError as mistake:
        yield of_error(mistake, "")


def _check_optimizer(options: Options) -> Iterator[Finding]:
    optimizer, length = _group(options, OptimizerOptions), _group(options, LengthOptions)
    if optimizer is None or length is None:
        return
    kind, cut = optimizer.optimizer_type.lower(), cut_of(options)
    in_backward = ["fused_backward_pass"] if optimizer.fused_backward_pass else []
    in_backward += [] if cut is None else [cut]
    for option in (f"--{name}" for name in in_backward):
        if length.gradient_accumulation_steps > 1:
            yield error("it steps in each backward pass", option, "--gradient_accumulation_steps must be 1")
        if options[PrecisionOptions].mixed_precision == "fp16":
            yield error("gradients of fp16 are scaled until all are there", option, "give --mixed_precision bf16")
    if cut is not None and kind.endswith("schedulefree"):
        yield error("schedule-free optimizers can't be split", f"--{cut}", "choose another optimizer")
    if len(in_backward) > 1:
        where = ", ".join(f"--{name}" for name in reversed(in_backward))
        yield error("both step in the backward pass", where, "choose one of the two")
    if optimizer.learning_rate < 0 and options.has(NetworkOptions):
        yield error("a network can't learn at a negative rate", "--learning_rate", "give a positive one")
    if optimizer.fused_backward_pass and options.has(NetworkOptions) and world_size() > 1:
        what = "parts of a network may be left out in one process, for which the others would wait for ever"
        yield error(what, "--fused_backward_pass", "leave it out: a network's gradients are small")
    ema = _group(options, EmaOptions)
    if ema is not None and ema.ema_decay is not None and kind.endswith("schedulefree"):
        yield error("schedule-free optimizers average by themselves", "--ema_decay", "leave it out")


def _check_swapping(options: Options) -> Iterator[Finding]:
    optimizer, memory = _group(options, OptimizerOptions), _group(options, MemoryOptions)
    if optimizer is None or memory is None or not swap_of(options, 2):
        return
    in_backward = optimizer.fused_backward_pass or cut_of(options) is not None
    kind = "8bit" if optimizer.use_8bit_adam else optimizer.optimizer_type.lower()
    if not options.has(NetworkOptions) and not in_backward and ("8bit" in kind or "paged" in kind):
        what = "swapped blocks are stepped in main memory, where this optimizer doesn't work"
        yield error(what, "--blocks_to_swap", "give --fused_backward_pass, too")
    if memory.torch_compile and memory.dynamo_backend == "cudagraphs":
        what = "weights of swapped blocks change their place, which recorded graphs can't follow"
        yield error(what, "--dynamo_backend cudagraphs", "leave it out, or --blocks_to_swap")


def _check_graphs(options: Options) -> Iterator[Finding]:
    memory = _group(options, MemoryOptions)
    if memory is None or not options.has(OptimizerOptions):
        return
    if memory.cuda_graphs and (cause := against_graphs(options)) is not None:
        yield warning(f"nothing is recorded: {cause}", "--cuda_graphs")


def against_graphs(options: Options) -> str | None:
    """Why the other options don't go with `--cuda_graphs`, in words; None: they do."""
    optimizer, memory, offload = options[OptimizerOptions], options[MemoryOptions], options[OffloadOptions]
    offloads = memory.gradient_checkpointing and offload.cpu_offload_checkpointing
    in_backward = optimizer.fused_backward_pass or cut_of(options) is not None
    records_itself = memory.torch_compile and memory.dynamo_backend == "cudagraphs"
    causes = (
        (swap_of(options, 2) > 0, "weights of swapped blocks change their place"),
        (in_backward, "weights are stepped during the backward pass"),
        (offloads, "activations travel to main memory (--cpu_offload_checkpointing)"),
        (records_itself, "--dynamo_backend cudagraphs records by itself"),
    )
    return next((cause for applies, cause in causes if applies), None)


def check_rates(options: Options) -> Iterator[Finding]:
    """Makes optimizer and schedule for a weight of no use, to see whether their names and arguments will do.

    The first optimizer of a process takes seconds, in which torch loads its compiler.
    """
    optimizer, schedule = _group(options, OptimizerOptions), _group(options, ScheduleOptions)
    if optimizer is None or schedule is None:
        return
    import torch

    length = options[LengthOptions]
    total = _LONG if length.max_train_epochs is not None else length.max_train_steps
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    try:
        built = optimizers.create(optimizer, [{"params": [weight]}], schedule.lr_scheduler)
        if optimizer.fused_backward_pass and not built.alone:
            hint = "choose another optimizer, such as Adafactor or AdamW8bit"
            yield error("this optimizer needs all gradients at once", "--fused_backward_pass", hint, code="E-FUSED")
        schedules.create(schedule, built.optimizer, total, built.schedule_override)
    except UserError as mistake:
        yield of_error(mistake, "")


def _check_trackers(options: Options) -> Iterator[Finding]:
    tracker = _group(options, TrackerOptions)
    if tracker is None:
        return
    if tracker.log_with in ("tensorboard", "all") and not tracker.logging_dir:
        yield error("it needs a folder", f"--log_with {tracker.log_with}", "give --logging_dir FOLDER")
    for kind in sorted(kinds_wanted(tracker)):
        if find_spec(kind) is None:
            yield error(f"the package {kind} isn't installed", "--log_with", f"pip install {kind}, or leave it out")
    try:
        tracker_arguments(tracker)
    except UserError as mistake:
        yield of_error(mistake, "--log_tracker_config")


def _check_saving(options: Options) -> Iterator[Finding]:
    save, sample = _group(options, SaveOptions), _group(options, SampleOptions)
    if save is not None:
        for unit in ("epochs", "steps"):
            every = getattr(save, f"save_every_n_{unit}") or (unit == "epochs" and save.save_n_epoch_ratio)
            if getattr(save, f"save_last_n_{unit}") is not None and not every:
                yield warning(f"it does nothing without --save_every_n_{unit}", f"--save_last_n_{unit}")
    if sample is not None:
        every = sample.sample_every_n_steps or sample.sample_every_n_epochs or sample.sample_at_first
        if sample.sample_prompts and not every:
            yield warning("no samples are made without --sample_every_n_epochs or _steps", "--sample_prompts")
        if every and not sample.sample_prompts:
            yield warning("no samples are made without --sample_prompts FILE", "--sample_every_n_...")


def _check_hub(options: Options) -> Iterator[Finding]:
    hub, state = _group(options, HubOptions), _group(options, StateOptions)
    if hub is None:
        return
    repository, kind, visibility = (
        hub.huggingface_repo_id,
        hub.huggingface_repo_type,
        hub.huggingface_repo_visibility,
    )
    if repository and not _REPOSITORY.fullmatch(repository):
        yield error(f"{repository!r} is no name of a repository", "--huggingface_repo_id", "write user/name")
    if kind and kind not in ("model", "dataset", "space"):
        yield error(f"there are no repositories of type {kind!r}", "--huggingface_repo_type", "leave it out, or model")
    if visibility and visibility not in ("public", "private"):
        yield warning(f"{visibility!r} is taken for private", "--huggingface_repo_visibility", "public or private")
    if hub.save_state_to_huggingface:
        if not repository:
            yield warning("it does nothing without --huggingface_repo_id", "--save_state_to_huggingface")
        elif state is not None and not (state.save_state or state.save_state_on_train_end):
            yield warning("it does nothing without --save_state", "--save_state_to_huggingface")


def _check_network(options: Options) -> Iterator[Finding]:
    network, length = _group(options, NetworkOptions), _group(options, LengthOptions)
    if network is None or length is None:
        return
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        where = "--network_train_unet_only, --network_train_text_encoder_only"
        yield error("together they leave nothing to train", where, "give one of them")
    if network.dim_from_weights and not network.network_weights:
        yield error("there are no weights to take it from", "--dim_from_weights", "give --network_weights FILE")
    if network.initial_step is not None and network.initial_epoch is not None:
        yield warning("--initial_step is given too, and counts", "--initial_epoch")
    if network.skip_until_initial_step and network.initial_step is None and network.initial_epoch is None:
        yield warning("it does nothing without --initial_step or --initial_epoch", "--skip_until_initial_step")
    if length.max_train_epochs is None and (network.initial_step or 0) >= length.max_train_steps:
        what = f"the run would begin at step {network.initial_step} and ends at step {length.max_train_steps}"
        yield error(what, "--initial_step", "raise --max_train_steps, the number of steps in all")
    if network.split_mode:
        what = "half of the transformer is swapped, block by block, as with --blocks_to_swap"
        yield warning(what, "--split_mode", "give --blocks_to_swap N instead")


def _check_noise(options: Options) -> Iterator[Finding]:
    noise = _group(options, NoiseOptions)
    if noise is None:
        return
    if noise.adaptive_noise_scale is not None and noise.noise_offset is None:
        yield error("there is no noise offset to add to", "--adaptive_noise_scale", "it needs --noise_offset")


def _check_tokens(options: Options) -> Iterator[Finding]:
    dream = _group(options, DreamBoothOptions)
    if dream is None or not dream.no_token_padding:
        return
    option, length = "--no_token_padding", options[LegacySDOptions].max_token_length
    if (length or 75) > 75:
        yield error("longer captions are cut into chunks of 75 tokens", option, "leave out --max_token_length")


def _group(options: Options, group: type[Any]) -> Any:
    return options[group] if options.has(group) else None
