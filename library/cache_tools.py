"""Fills the caches of a dataset for later runs: what the tools in `tools/` do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from library import caching, inspection, log, placing, run_data
from library.assembly import Precision, Setting
from library.data import reports
from library.findings import warning
from library.log import UserError
from library.option_groups import CacheToolOptions
from library.train import preflight, processes, watch
from library.train.ranks import Ranks
from library.train.room import check_cache_room
from library.types import Finding

if TYPE_CHECKING:
    from library.families.base import Family
    from library.options import Options

logger = log.get_logger(__name__)

_SD = ("v2", "clip_skip", "max_token_length", "weighted_captions")
_T5 = ("clip_l", "t5xxl", "t5xxl_max_token_length", "apply_t5_attn_mask", "t5xxl_dtype", "t5xxl_device")
_SD3 = ("clip_g", "apply_lg_attn_mask")
_OTHERS: Mapping[str, Sequence[str]] = {
    "flux": (*_SD, "vae", *_SD3),
    "sd3": (*_SD, "ae"),
    "sdxl": ("v2", "clip_skip", "ae", *_T5, *_SD3),
    "sd": ("ae", *_T5, *_SD3),
}
"""Options that are for other families, by family."""
_NAMES: Mapping[str, str] = {"flux": "FLUX.1", "sd3": "SD3", "sdxl": "SDXL", "sd": "SD 1.x and 2.x"}


def cache_latents(options: Options) -> None:
    """Fills the latents cache of a dataset, on disk."""

    def fill(job: Setting) -> None:
        vae = job.family.load_vae(job.device, job.precision.vae) if job.caches.lack_latents else None
        caching.fill_latents(job, vae)

    _fill(options.with_values(cache_latents=True, cache_latents_to_disk=True), fill)


def cache_text_encoder_outputs(options: Options) -> None:
    """Fills the text cache of a dataset, on disk."""

    def fill(job: Setting) -> None:
        names = job.family.encoder_names if job.caches.lack_text else ()
        watch.heartbeat("loading the text encoders")
        caching.fill_text(job, placing.load_encoders(job, names, frozenset()))

    _fill(options.with_values(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True), fill)


def _fill(options: Options, fill: Callable[[Setting], None]) -> None:
    family = _family(options).from_options(options)
    scan = run_data.find(options, family)
    findings: list[Finding] = [*scan.findings, *family.findings(), *_for_others(options, family)]
    preflight.report(findings)
    _show("data", reports.caption_table(scan.items, scan.reports))
    family.load_tokenizers()
    data, precision = run_data.of_scan(options, scan, family, 0), Precision.from_options(options)
    if inspection.only_looks(options):
        inspection.inspect(options, family, data, ())
        return
    caches = caching.look(options, family, data, precision)
    preflight.report(
        check_cache_room(caches.bytes_needed(family, processes.world_size()), run_data.cache_folder(options, scan))
    )
    accelerator = processes.start(options)
    fill(
        Setting(
            options=options,
            family=family,
            data=data,
            precision=precision,
            caches=caches,
            accelerator=accelerator,
            ranks=Ranks.of_this_process(accelerator.device),
        )
    )
    processes.leave()


def _family(options: Options) -> type[Family]:
    """The family that the tool is told, by its flag or by files that only some have. Errors: UserError for two."""
    from library.families.flux import Flux
    from library.families.sd import Sd
    from library.families.sd3 import Sd3
    from library.families.sdxl import Sdxl

    families: dict[str, type[Family]] = {"flux": Flux, "sdxl": Sdxl, "sd3": Sd3}
    named = [name for name in families if getattr(options[CacheToolOptions], name)]
    if len(named) > 1:
        where = " ".join(f"--{name}" for name in named)
        raise UserError("a cache is for one family", where, "give one of them", code="E-CHECK")
    files = [name for name in ("clip_g", "ae", "clip_l", "t5xxl") if options.value(name)]
    told = "sd3" if files and files[0] == "clip_g" else "flux"
    family = families[named[0]] if named else families[told] if files else Sd
    why = f", since --{files[0]} is given" if files else "; for others give --sdxl, --sd3 or --flux"
    logger.info("the cache is for %s%s", _NAMES[family.traits.name], "" if named else why)
    return family


def _for_others(options: Options, family: Family) -> Iterator[Finding]:
    """A warning for each option that only other families look at."""
    for name in _OTHERS[family.traits.name]:
        if options.script.option(name) and options.is_meant(name) and name not in options.script.ignored:
            yield warning(f"it does nothing for {_NAMES[family.traits.name]}", f"--{name}")


def _show(title: str, lines: Sequence[str]) -> None:
    if processes.is_main():
        logger.info("%s", log.block(title, lines))
