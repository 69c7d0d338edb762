"""What a scan found: items, counts for each subset, and findings that stay readable for any number of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from library.data.items import Item
from library.data.settings import DatasetConfig, SubsetSettings
from library.types import Finding

LIKE_FINDINGS = 10
DAMAGED_SHOWN = 100
"""Damaged files are mended one by one, so they are named one by one."""


@dataclass
class SubsetReport:
    """What was found for one subset."""

    settings: SubsetSettings
    dataset: int
    images: int = 0
    captioned: int = 0
    from_class_tokens: int = 0
    empty: int = 0
    """Caption files without text in their first line."""
    missing: int = 0
    """Images with neither a caption nor class tokens."""
    multi_line: int = 0
    """Caption files of which only the first of several lines is used."""
    transparent: int = 0
    held_out: int = 0
    """Images that are kept for validation."""
    without_file: list[str] = field(default_factory=list)
    """Images that have no caption file."""


@dataclass
class Scan:
    """All usable images, and everything that was noticed."""

    config: DatasetConfig
    """With the sizes that metadata files have told."""
    items: list[Item] = field(default_factory=list)
    """Images to train on."""
    held_out: list[Item] = field(default_factory=list)
    """Images that are kept for validation."""
    reports: list[SubsetReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Damaged images that are left out."""
    rotated: int = 0
    transparent: int = 0
    gone: int = 0
    """Images that aren't there any more; their cached latents are used."""
    reg_slots: dict[int, int] = field(default_factory=dict)
    """For datasets with more regularization images than an epoch takes: samples of them in an epoch."""
    opened: int = 0
    """Files that were read; the others were remembered."""


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def condensed(findings: Iterable[Finding], *, strict: bool) -> list[Finding]:
    """Findings without repetition and endless lists of their like; strictly, warnings count as errors."""
    kept: list[Finding] = []
    seen: Counter[tuple[bool, str]] = Counter()
    for finding in dict.fromkeys(findings):
        kind = finding.error, finding.code
        seen[kind] += 1
        if seen[kind] <= _limit(finding):
            kept.append(finding)
    for (error, code), count in seen.items():
        like = [finding for finding in kept if (finding.error, finding.code) == (error, code)]
        if count > len(like):
            what = f"and {count - len(like)} more problems of the same kind"
            kept.insert(kept.index(like[-1]) + 1, replace(like[-1], what=what, where="", hint=""))
    return [replace(finding, error=True) for finding in kept] if strict else kept


def _limit(finding: Finding) -> int:
    return DAMAGED_SHOWN if finding.error and finding.code == "E-IMAGE" else LIKE_FINDINGS
