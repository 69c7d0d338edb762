"""Assembles a run from the options: phases the loading, joins the parts, starts. Knows everyone, owns nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed

from library import caching, devices, garbage, inspection, log, placing, run_data
from library.assembly import Job, Precision, assemble
from library.data import reports
from library.data.dataset import TrainingData
from library.families.base import Family
from library.hub import download_state
from library.methods import preservation
from library.methods.base import Method, table_lines, trained_table
from library.option_groups import (
    HubOptions,
    LengthOptions,
    MemoryOptions,
    NetworkOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
    StateOptions,
    ValidationOptions,
)
from library.prompts import PromptRules, SampleRequest
from library.train import loop, preflight, processes, resume, validation, watch
from library.train.advice import Planner
from library.train.conditions import Conditions, remember_prompts
from library.train.forecast import GIB
from library.train.plan import Plan, make_plan
from library.train.ranks import Ranks
from library.train.room import Room, check_disk
from library.train.setups import largest_batch, setup_of
from library.types import DENOISER, Finding, Models, errors

if TYPE_CHECKING:
    from library.data.sources import Scan
    from library.models.streaming import Streaming
    from library.options import Options

logger = log.get_logger(__name__)


def train(family_class: type[Family], method_class: type[Method], options: Options) -> None:
    """Trains as the options say."""
    with garbage.left_alone():
        ready = _prepare(family_class, method_class, options)
    options, family = ready.options, ready.family
    if inspection.only_looks(options):
        return
    accelerator = processes.start(options)
    preflight.report(preflight.check_device(accelerator.device.type))
    seed = processes.agree(_seed(options, ready.state_folder))
    job = Job(
        options=options,
        family=family,
        method=ready.method,
        data=run_data.of_scan(options, ready.scan, family, seed, ready.plan),
        plan=ready.plan,
        precision=ready.precision,
        caches=ready.caches,
        accelerator=accelerator,
        ranks=Ranks.of_this_process(accelerator.device),
    )
    run_data.check_lengths(options, family, job.data)
    watch.start()
    try:
        conditions = _encode_what_is_cached(job, ready.planner)
        with ready.planner.during("loading the denoiser"):
            streamed = _load_and_attach(job, conditions.models)
        with ready.planner.during("training"):
            assembled = assemble(job, conditions, ready.state_folder, None if streamed is None else streamed.settle)
            with assembled:
                loop.fit(assembled.run)
    finally:
        watch.stop()
    processes.leave()


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """What is known before a weight is loaded."""

    options: Options
    family: Family
    method: Method
    scan: Scan
    precision: Precision
    caches: caching.Caches
    plan: Plan
    planner: Planner
    state_folder: Path | None


def _prepare(family_class: type[Family], method_class: type[Method], options: Options) -> _Ready:
    """Looks at everything that the options name and shows what will be done. Errors: all that is wrong, at once."""
    options, findings = preflight.settle(options)
    family = family_class.from_options(options)
    method = method_class.from_options(options, family.encoder_names)
    state_folder = _state_to_resume(options)
    scan = run_data.find(options, family)
    findings += [*scan.findings, *family.findings(), *preflight.check_combinations(options)]
    findings += [
        *preflight.check_paths(options, _prompt_rules(options, family).load),
        *_about_validation(options, scan, method),
        *run_data.about_texts(options, scan, family, method),
    ]
    if errors(findings) or not scan.items:
        preflight.report([*findings, *preflight.check_rates(options)])
    if misfits := method.findings(family.part_shapes()):
        preflight.report([*findings, *misfits])
    if not inspection.only_looks(options):  # which shows more of it later
        _show("data", reports.caption_table(scan.items, scan.reports))
    data, precision = run_data.of_scan(options, scan, family, 0), Precision.from_options(options)
    caches = caching.look(options, family, data, precision, method.changes_to_encoders())
    trained = method.trained_elements(family.part_shapes())
    room = _room(options, family, trained, precision, caches.bytes_needed(family, processes.world_size()))
    plan = _plan(options, family, data, room)
    _show("plan", [*plan.lines(), *filter(None, (data.regularization_line(), data.validation_line()))])
    planner = _planner(options, family, method, data, trained)
    _show("memory", planner.lines())
    family.load_tokenizers()
    folders = Path(options[SaveOptions].output_dir or "."), run_data.cache_folder(options, scan)
    findings += [*planner.findings(), *preflight.check_rates(options), *caches.findings(), *check_disk(plan, *folders)]
    preflight.report(findings)
    if inspection.only_looks(options) and processes.is_main():
        inspection.inspect(options, family, data, [*plan.lines(), *planner.lines()])
    return _Ready(
        options=options,
        family=family,
        method=method,
        scan=scan,
        precision=precision,
        caches=caches,
        plan=plan,
        planner=planner,
        state_folder=state_folder,
    )


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


def _about_validation(options: Options, scan: Scan, method: Method) -> Iterator[Finding]:
    """What is wrong with options and attributes that are about held-out images, or what is to be preserved."""
    subsets = (subset for dataset in scan.config.datasets for subset in dataset.subsets)
    yield from preservation.findings(((subset.where, subset.custom_attributes) for subset in subsets), method)
    yield from validation.findings(options[ValidationOptions], held_out=bool(scan.held_out))


def _planner(options: Options, family: Family, method: Method, data: TrainingData, trained_elements: int) -> Planner:
    """What the run needs in memory, and what the device has."""
    device, given = devices.best_device(), options[MemoryOptions].vram
    shapes, model = family.part_shapes(), family.activations()
    batch, size = largest_batch(data.all_items, data.batch_sizes)
    setup = setup_of(
        options,
        shapes,
        trained_elements=trained_elements,
        trained_encoders=method.trained_encoders(),
        trains_denoiser=DENOISER not in method.frozen(),
        batch=batch,
        size=size,
        token_limits=family.token_limits(),
        samples=[request.size for request in _requests(options, family)],
        units=model.swap_units,
        device=device.type if given is None else "cuda",
    )
    memory = devices.total_memory(device) if given is None else round(given * GIB)
    return Planner(shapes, model, setup, memory=memory, main_memory=devices.main_memory())


def _room(options: Options, family: Family, trained_elements: int, precision: Precision, cache_bytes: int) -> Room:
    written = None if options.has(NetworkOptions) else family.model_elements()
    name = options[SaveOptions].save_precision
    saved = precision.trained if name is None else devices.dtype_of(name)
    return Room.of_training(trained_elements, precision.trained.itemsize, saved.itemsize, cache_bytes, written)


def _plan(options: Options, family: Family, data: TrainingData, room: Room) -> Plan:
    return make_plan(
        images=data.images,
        regularization_images=data.regularization_images,
        repeated=data.repeated,
        batches_per_epoch=data.batches_in_epoch(),
        batches_per_process=data.batches_in_epoch(processes.world_size()),
        batch_sizes=data.batch_sizes,
        processes=processes.world_size(),
        length=options[LengthOptions],
        steps_given=options.given("max_train_steps"),
        schedule=options[ScheduleOptions],
        save=options[SaveOptions],
        state=options[StateOptions],
        sample=options[SampleOptions],
        prompts=len(_requests(options, family)),
        model_bytes=room.model,
        state_bytes=room.state,
        cache_bytes=room.caches,
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
        logger.info("%s", log.block(title, lines))


# encoding what is cached


def _encode_what_is_cached(job: Job, planner: Planner) -> Conditions:
    """Text first, then images; an encoder with nothing to do isn't loaded, and dropped as soon as it is done."""
    family, method, caches = job.family, job.method, job.caches
    samples = bool(job.options[SampleOptions].sample_prompts)
    conditions = Conditions(
        family=family,
        models=Models(unused=family.unused_parameters()),
        device=job.device,
        trained=frozenset(method.trained_encoders()),
    )
    live = family.encoder_names
    if caches.text is not None:
        live = tuple(name for name in live if name in conditions.trained)
        encoders = _load_encoders(job, family.encoder_names if caches.lack_text or samples else live)
        with planner.during("text encoding"):
            caching.fill_text(job, encoders)
            if samples and job.ranks.is_main:
                with job.accelerator.autocast():
                    remember_prompts(conditions, encoders, _prompt_texts(job.options, family))
        conditions.models.encoders = {name: encoders.pop(name) for name in live}
        del encoders
        devices.release_memory()
    else:
        conditions.models.encoders = _load_encoders(job, live)
    if caches.latents is None or caches.lack_latents or samples:
        watch.heartbeat("loading the autoencoder")
        conditions.models.vae = family.load_vae(job.device, job.precision.vae)
    if caches.latents is not None:
        vae = conditions.models.vae
        with planner.during("image encoding"):
            caching.fill_latents(job, vae)
        conditions.models.vae = vae.to("cpu") if vae is not None and samples else None
        del vae
        devices.release_memory()
    return conditions


def _load_encoders(job: Job, names: Sequence[str]) -> dict[str, torch.nn.Module]:
    watch.heartbeat("loading the text encoders")
    loaded = placing.load_encoders(job, names, frozenset(job.method.trained_encoders()))
    job.method.loaded(Models(encoders=loaded))
    return loaded


def _prompt_rules(options: Options, family: Family) -> PromptRules:
    return PromptRules.of(family.traits.name, options[SampleOptions].sample_sampler)


def _requests(options: Options, family: Family) -> list[SampleRequest]:
    """The sample images that are wanted; none without `--sample_prompts`."""
    path = options[SampleOptions].sample_prompts
    return _prompt_rules(options, family).load(path) if path else []


def _prompt_texts(options: Options, family: Family) -> list[str]:
    requests = _requests(options, family)
    negatives = [request.negative for request in requests if request.negative is not None]
    return [*(request.prompt for request in requests), *negatives]


# loading what is trained


def _load_and_attach(job: Job, models: Models) -> Streaming | None:
    """Loads the denoiser, attaches the method, applies what saves memory, and says what is trained."""
    options, method = job.options, job.method
    watch.heartbeat("loading the denoiser")
    placing.choose_attention(options)
    streamed = placing.blocks_to_stream(options, job.family)
    models.denoiser = placing.load_denoiser(job, streamed)
    method.attach(models)
    method.prepare(job.accelerator, models)
    _show("trained", table_lines(trained_table(method.param_groups(), method.frozen())))
    streaming = placing.finish(job, models, streamed)
    placing.report(streaming, job.device)
    return streaming
