"""What checks find: made, reported all at once, and turned into errors with the right exit code."""

from __future__ import annotations

from collections.abc import Iterable

from library.log import DataError, ResourceError, UserError, get_logger, raise_all
from library.types import Finding, errors

logger = get_logger(__name__)

_KINDS: dict[str, type[UserError]] = {
    **dict.fromkeys(("E-DISK", "E-DEVICE", "E-PACKAGE"), ResourceError),
    **dict.fromkeys(
        ("E-FILE", "E-MODEL", "E-DATA", "E-CAPTION", "E-IMAGE", "E-STATE", "E-CACHE", "E-NETWORK-FILE"), DataError
    ),
    **dict.fromkeys(("E-MODEL-NONE", "E-DATASET-CONFIG"), UserError),
}
"""What findings become, by the longest matching beginning of their code; all others are usage errors."""


def error(what: str, where: str, hint: str, code: str = "E-CHECK") -> Finding:
    """Something that forbids to start."""
    return Finding(error=True, what=what, where=where, hint=hint, code=code)


def warning(what: str, where: str, hint: str = "") -> Finding:
    """Something that the user should know."""
    return Finding(error=False, what=what, where=where, hint=hint)


def of_error(mistake: UserError, option: str) -> Finding:
    """A mistake found by trying, with the option that it belongs to."""
    where = mistake.where if option in mistake.where else " ".join(filter(None, (option, mistake.where)))
    return Finding(error=True, what=mistake.what, where=where, hint=mistake.hint, code=mistake.code)


def report(findings: Iterable[Finding]) -> None:
    """Logs the warnings. Errors: all findings that are errors, as one UserError with the exit code of the worst."""
    unique = list(dict.fromkeys(findings))
    for finding in unique:
        if not finding.error:
            logger.warning(" - ".join(part for part in (finding.where, finding.what, finding.hint) if part))
    raise_all(sorted(map(_as_error, errors(unique)), key=lambda mistake: -mistake.exit_code))


def _as_error(finding: Finding) -> UserError:
    starts = [start for start in _KINDS if finding.code.startswith(start)]
    kind = _KINDS[max(starts, key=len)] if starts else UserError
    return kind(finding.what, finding.where, finding.hint, code=finding.code)
