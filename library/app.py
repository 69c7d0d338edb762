"""Assembles a run from the options: phases the loading, joins the parts, starts. Knows everyone, owns nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed

from library import devices, log
from library.assembly import Job, Precision, Setting, assemble
from library.data import cache, config, reports, sources
from library.data.dataset import TrainingData
from library.families.base import Family
from library.hub import download_state
from library.methods.base import Method, table_lines, trained_table
from library.models import memory
from library.option_groups import (
    CacheOptions,
    CacheToolOptions,
    DatasetOptions,
    HubOptions,
    LengthOptions,
    MemoryOptions,
    NetworkOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
    StateOptions,
    T5DtypeOptions,
    TextCacheOptions,
)
from library.prompts import load_prompts
from library.train import loop, preflight, processes, resume, watch
from library.train.conditions import Conditions, encode_images, remember_prompts
from library.train.plan import Plan, make_plan
from library.train.ranks import Ranks
from library.types import Finding, Models, errors

if TYPE_CHECKING:
    from library.options import Options

logger = log.get_logger(__name__)


def train(family_class: type[Family], method_class: type[Method], options: Options) -> None:
    """Trains as the options say."""
    options, findings = preflight.settle(options)
    family = family_class.from_options(options)
    method = method_class.from_options(options, family.encoder_names)
    state_folder = _state_to_resume(options)
    scan = _scan(options, family)
    findings += [*scan.findings, *family.findings(), *preflight.check_combinations(options)]
    findings += preflight.check_paths(options, load_prompts)
    if errors(findings) or not scan.items:
        preflight.report(findings)
    plan = _plan(options, TrainingData(scan, family.traits, 0), processes.world_size())
    preflight.report([*findings, *preflight.check_disk(plan, Path(options[SaveOptions].output_dir or "."))])
    _show("data", scan.lines())
    _show("plan", plan.lines())
    family.load_tokenizers()

    accelerator = processes.start(options)
    preflight.report(preflight.check_device(accelerator.device.type))
    job = Job(
        options=options,
        family=family,
        method=method,
        data=TrainingData(scan, family.traits, processes.agree(_seed(options, state_folder))),
        plan=plan,
        precision=Precision.from_options(options),
        accelerator=accelerator,
        ranks=Ranks.of_this_process(accelerator.device),
    )
    for line in reports.token_report(job.data.items, family.count_tokens, family.token_limits()):
        logger.warning(line)
    watch.start()
    try:
        conditions = _encode_what_is_cached(job)
        _load_and_attach(job, conditions.models)
        assembled = assemble(job, conditions, state_folder)
        with assembled:
            loop.fit(assembled.run)
    finally:
        watch.stop()


def cache_latents(options: Options) -> None:
    """Fills the latents cache of a dataset, on disk."""

    def fill(job: Setting) -> None:
        vae = job.family.load_vae(job.device, job.precision.vae)
        _cache_latents(job, vae)

    _fill_only(options.with_values(cache_latents=True, cache_latents_to_disk=True), fill)


def cache_text_encoder_outputs(options: Options) -> None:
    """Fills the text cache of a dataset, on disk."""
    name = options[T5DtypeOptions].t5xxl_dtype
    dtypes = {} if name is None else {"t5xxl": devices.dtype_of(name)}

    def fill(job: Setting) -> None:
        job.family.load_tokenizers()
        _cache_text(job, _load_encoders(job, job.family.encoder_names, dtypes))

    _fill_only(options.with_values(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True), fill)


# before a weight is loaded


def _state_to_resume(options: Options) -> Path | None:
    """The state folder that `--resume` means; from the hub it is fetched first."""
    group, save = options[StateOptions], options[SaveOptions]
    if not group.resume:
        return None
    if group.resume_from_huggingface:
        return download_state(group.resume, options[HubOptions].huggingface_token)
    if group.resume != "auto":
        return Path(group.resume)
    found = resume.find_latest(Path(save.output_dir or "."), save.output_name)
    logger.info("--resume auto: %s", f"going on from {found}" if found else "no state found, starting anew")
    return found


def _scan(options: Options, family: Family) -> sources.Scan:
    group = options[DatasetOptions]
    return sources.scan(
        config.load(options),
        family.traits,
        skip_bad_images=group.skip_bad_images,
        ignore_exif_orientation=group.ignore_exif_orientation,
        allow_missing_captions=group.allow_missing_captions,
    )


def _plan(options: Options, data: TrainingData, world: int) -> Plan:
    prompts = options[SampleOptions].sample_prompts
    return make_plan(
        images=data.images,
        repeated=data.repeated,
        batches_per_epoch=data.batches_in_epoch(),
        batch_sizes=data.batch_sizes,
        processes=world,
        length=options[LengthOptions],
        steps_given=options.given("max_train_steps"),
        schedule=options[ScheduleOptions],
        save=options[SaveOptions],
        state=options[StateOptions],
        sample=options[SampleOptions],
        prompts=len(load_prompts(prompts)) if prompts else 0,
    )


def _seed(options: Options, state_folder: Path | None) -> int:
    """The seed of the run: the given one, that of the state, or a new one."""
    seed = options[LengthOptions].seed
    if seed is None and state_folder is not None:
        seed = int(resume.check_state(state_folder)["seed"])
    if seed is None:
        seed = processes.new_seed()
    set_seed(seed)
    return seed


def _show(title: str, lines: Sequence[str]) -> None:
    if processes.is_main():
        logger.info("%s\n%s", title, "\n".join(f"  {line}" for line in lines))


# encoding what is cached


def _encode_what_is_cached(job: Job) -> Conditions:
    """Text first, then images; each encoder is dropped before the next is loaded, unless it runs live."""
    options, family, method = job.options, job.family, job.method
    conditions = Conditions(
        family=family, models=Models(), device=job.device, trained=frozenset(method.trained_encoders())
    )
    live = family.encoder_names
    if options[TextCacheOptions].cache_text_encoder_outputs:
        encoders = _load_encoders(job, family.encoder_names)
        _cache_text(job, encoders)
        if options[SampleOptions].sample_prompts and job.ranks.is_main:
            remember_prompts(conditions, encoders, _prompt_texts(options))
        live = tuple(name for name in live if name in conditions.trained)
        conditions.models.encoders = {name: encoders.pop(name) for name in live}
        del encoders
        devices.release_memory()
    else:
        conditions.models.encoders = _load_encoders(job, live)
    watch.heartbeat("loading the autoencoder")
    conditions.models.vae = vae = family.load_vae(job.device, job.precision.vae)
    if options[CacheOptions].cache_latents:
        _cache_latents(job, vae)
        conditions.models.vae = vae.to("cpu") if options[SampleOptions].sample_prompts else None
        del vae
        devices.release_memory()
    return conditions


def _load_encoders(
    job: Setting, names: Sequence[str], dtypes: dict[str, torch.dtype] | None = None
) -> dict[str, torch.nn.Module]:
    watch.heartbeat("loading the text encoders")
    loaded: dict[str, torch.nn.Module] = {}
    for name in names:
        loaded |= job.family.load_encoders([name], job.device, (dtypes or {}).get(name, job.precision.frozen))
    if isinstance(job, Job):
        job.method.loaded(Models(encoders=loaded))
    return loaded


def _prompt_texts(options: Options) -> list[str]:
    requests = load_prompts(str(options[SampleOptions].sample_prompts))
    negatives = [request.negative for request in requests if request.negative is not None]
    return [*(request.prompt for request in requests), *negatives]


def _cache_text(job: Setting, encoders: dict[str, torch.nn.Module]) -> None:
    group, family, data = job.options[TextCacheOptions], job.family, job.data

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        watch.heartbeat("caching text outputs")
        tokens = {name: tensor.to(job.device) for name, tensor in family.tokenize(captions).items()}
        with torch.no_grad(), job.accelerator.autocast():
            return family.encode_text(encoders, tokens)

    cache.fill_text(
        data,
        encode,
        family.text_identity(),
        dtype=str(job.precision.frozen),
        to_disk=group.cache_text_encoder_outputs_to_disk,
        batch_size=group.text_encoder_batch_size or max(data.batch_sizes),
        skip_check=job.options[CacheOptions].skip_cache_check,
        rank=job.ranks.rank,
        world=job.ranks.world,
        visible=job.ranks.is_main,
    )
    processes.wait_for_all()


def _cache_latents(job: Setting, vae: torch.nn.Module) -> None:
    group = job.options[CacheOptions]

    def encode(pixels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        watch.heartbeat("caching latents")
        with torch.no_grad():
            return encode_images(job.family, vae, pixels, seeds)

    cache.fill_latents(
        job.data,
        encode,
        job.family.vae_identity(),
        dtype=str(job.precision.vae),
        to_disk=group.cache_latents_to_disk,
        batch_size=group.vae_batch_size,
        skip_check=group.skip_cache_check,
        rank=job.ranks.rank,
        world=job.ranks.world,
        visible=job.ranks.is_main,
    )
    processes.wait_for_all()


def _fill_only(options: Options, fill: Callable[[Setting], None]) -> None:
    """What the cache tools share: everything but the training."""
    from library.families.flux import Flux

    if not options[CacheToolOptions].flux:
        logger.info("the model family is FLUX.1 (--flux): it is the only one so far")
    family = Flux.from_options(options)
    scan = _scan(options, family)
    findings: list[Finding] = [*scan.findings, *family.findings()]
    preflight.report(findings)
    _show("data", scan.lines())
    accelerator = processes.start(options)
    fill(
        Setting(
            options=options,
            family=family,
            data=TrainingData(scan, family.traits, 0),
            precision=Precision.from_options(options),
            accelerator=accelerator,
            ranks=Ranks.of_this_process(accelerator.device),
        )
    )


# loading what is trained


def _load_and_attach(job: Job, models: Models) -> None:
    """Loads the denoiser, attaches the method, applies what saves memory, and says what is trained."""
    options, method = job.options, job.method
    watch.heartbeat("loading the denoiser")
    is_network = options.has(NetworkOptions)
    dtype = job.precision.frozen if is_network else job.precision.trained
    models.denoiser = job.family.load_denoiser(job.device, dtype)
    if options[MemoryOptions].gradient_checkpointing:
        memory.checkpoint_blocks(models.denoiser)
        for name in method.trained_encoders():
            models.encoders[name].gradient_checkpointing_enable()  # type: ignore[operator]
    method.attach(models)
    method.prepare(job.accelerator, models)
    _show("trained", table_lines(trained_table(method.param_groups(), method.frozen())))
    logger.info(devices.memory_line(job.device))
