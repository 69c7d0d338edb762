"""Text of unknown encoding: UTF-8 first, then the usual code pages of Windows, told apart by what makes sense."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

_CAPITALS, _SMALL = "\u0410-\u042f\u0401", "\u0430-\u044f\u0451"
_CYRILLIC = re.compile(f"[{_CAPITALS}{_SMALL}]")
_SMALL_THEN_CAPITAL = re.compile(f"[{_SMALL}][{_CAPITALS}]")
_LATIN_BESIDE_CYRILLIC = re.compile(f"[A-Za-z][{_CAPITALS}{_SMALL}]|[{_CAPITALS}{_SMALL}][A-Za-z]")
_RUSSIAN_PUNCTUATION = "\u00ab\u00bb\u2013\u2014\u2116"


def decode(data: bytes) -> tuple[str, str]:
    """The text of `data` and the name of its encoding; never fails."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace"), "utf-16"
    try:
        return data.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        pass
    scores = {encoding: _score(data, encoding, plausible) for encoding, plausible in _CODE_PAGES.items()}
    best = max(scores, key=lambda encoding: scores[encoding])
    if scores[best] < 0.3:
        best = "cp1252"
    return data.decode(best, errors="replace"), best


def _score(data: bytes, encoding: str, plausible: Callable[[str], float]) -> float:
    try:
        return plausible(data.decode(encoding))
    except UnicodeDecodeError:
        return -1.0


def _share(text: str, weight: Callable[[str], float]) -> float:
    """Mean weight of the characters outside ASCII."""
    foreign = [character for character in text if ord(character) > 127]
    return sum(map(weight, foreign)) / max(1, len(foreign))


def _japanese(text: str) -> float:
    """Kana and ideographs count; half-width kana are what other code pages look like when read as this one."""
    return _share(text, lambda c: 1.0 if "\u3000" <= c <= "\u30ff" else 0.8 if "\u4e00" <= c <= "\u9fff" else 0.0)


def _chinese(text: str) -> float:
    """The 3,755 common ideographs (lead bytes B0 to D7) count in full."""

    def weight(character: str) -> float:
        if "\u4e00" <= character <= "\u9fff":
            lead, trail = character.encode("gbk")
            return 0.9 if 0xB0 <= lead <= 0xD7 and trail >= 0xA1 else 0.3
        return 0.7 if "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uffef" else 0.1

    return _share(text, weight)


def _cyrillic(text: str) -> float:
    """Cyrillic letters, less what no language does: capitals after small letters, Latin letters inside words."""
    letters = max(1, sum(ord(character) > 127 for character in text))
    oddities = len(_SMALL_THEN_CAPITAL.findall(text)) + len(_LATIN_BESIDE_CYRILLIC.findall(text))

    def weight(character: str) -> float:
        return 0.85 if _CYRILLIC.match(character) else 0.3 if character in _RUSSIAN_PUNCTUATION else 0.0

    return _share(text, weight) - 2 * oddities / letters


_CODE_PAGES = {"cp932": _japanese, "cp936": _chinese, "cp1251": _cyrillic}
