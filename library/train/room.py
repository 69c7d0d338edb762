"""Room on the disk: what a run will need, and whether it is there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from library.train.plan import Plan, readable_bytes
from library.types import Finding

NUMBERS_PER_WEIGHT = 3
"""In a state: the weight and two moments of the optimizer."""


@dataclass(frozen=True)
class Room:
    """Sizes of what a run writes, in bytes, estimated."""

    model: int
    """One model file."""
    state: int
    """One state folder."""
    caches: int
    """What the caches still lack."""

    @classmethod
    def of_training(
        cls, elements: int, trained_size: int, saved_size: int, caches: int, written: int | None = None
    ) -> Room:
        """Of so many trained numbers, and the bytes that each takes while it is trained and when it is saved.

        `written` are the numbers of a saved file; None: those that are trained.
        """
        model = (elements if written is None else written) * saved_size
        return cls(model, NUMBERS_PER_WEIGHT * elements * trained_size, caches)


def check_disk(plan: Plan, output_dir: Path, image_dir: Path) -> list[Finding]:
    """Whether there is room for what the plan leaves behind: an error when the caches or not even one model fit."""
    free, together = _free(output_dir), _device(output_dir) == _device(image_dir)
    caches = plan.cache_bytes if together else 0
    findings = [] if together else check_cache_room(plan.cache_bytes, image_dir)
    if free is None or not plan.bytes_needed:
        return findings
    is_free = f"{readable_bytes(free)} are free"
    if free < plan.model_bytes + caches:
        parts = [f"one model takes {readable_bytes(plan.model_bytes)}"]
        parts += [f"the caches take {readable_bytes(caches)}"] if caches else []
        hint = "free some space or use another --output_dir" + (
            ", or cache in memory, without --cache_..._to_disk" if caches else ""
        )
        findings.append(_full(f"the disk is full: {', '.join(parts)}, {is_free}", output_dir, hint))
    elif free < plan.save_bytes + caches:
        what = f"the disk may fill up: {readable_bytes(plan.save_bytes + caches)} will be needed, {is_free}"
        hint = "see --save_last_n_epochs and --save_last_n_steps"
        findings.append(Finding(error=False, what=what, where=str(output_dir), hint=hint))
    return findings


def check_cache_room(needed: int, image_dir: Path) -> list[Finding]:
    """Whether there is room for caches beside the images."""
    free = _free(image_dir)
    if free is None or free >= needed:
        return []
    what = f"the disk is full: the caches take {readable_bytes(needed)}, {readable_bytes(free)} are free"
    return [_full(what, image_dir, "free some space, or cache in memory, without --cache_..._to_disk")]


def _full(what: str, where: Path, hint: str) -> Finding:
    return Finding(error=True, what=what, where=str(where), hint=hint, code="E-DISK-FULL")


def _free(folder: Path) -> int | None:
    existing = _existing(folder)
    return None if existing is None else shutil.disk_usage(existing).free


def _device(folder: Path) -> int | None:
    existing = _existing(folder)
    return None if existing is None else existing.stat().st_dev


def _existing(folder: Path) -> Path | None:
    """The folder, or the nearest one above it that is there."""
    return next((found for found in (folder, *folder.absolute().parents) if found.is_dir()), None)
