"""Sample prompts: what an image should be, read from prompt files, option lines and the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import toml

from library import files
from library.log import UserError, get_logger
from library.types import Size

logger = get_logger(__name__)

MIN_SIDE = 64
"""Smallest side of an image, in pixels."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One image to make. The defaults are those of FLUX previews."""

    prompt: str
    prompt2: str | None = None
    """For the text encoders behind the first; None: the same."""
    negative_prompt: str | None = None
    """None: none was given; an empty one is a negative prompt too."""
    width: int = 512
    height: int = 512
    seed: int | None = None
    """None: any."""
    steps: int = 20
    guidance: float | None = 3.5
    """The guidance that the model embeds; None where it has no such input, and doesn't look at it."""
    cfg: float = 1.0
    """Classifier-free guidance with a negative prompt; 1 is off."""
    sampler: str | None = None
    control_image: str | None = None
    multipliers: tuple[float, ...] | None = None
    """Strength of each network; None leaves them as they are."""
    index: int = 0
    """Position in the prompt file, from 0."""

    @property
    def size(self) -> Size:
        """Width and height in pixels, as asked for."""
        return Size(self.width, self.height)

    @property
    def negative(self) -> str | None:
        """The prompt to guide away from, empty if none was given; None when that guidance is off."""
        return None if self.cfg == 1.0 else self.negative_prompt or ""

    def fitted(self, multiple: int, *, up: bool = False) -> SampleRequest:
        """With sides lowered (`up`: raised) to multiples of so many pixels, at least 64."""

        def fit(side: int) -> int:
            return max(MIN_SIDE, -(-side // multiple) * multiple if up else side // multiple * multiple)

        return replace(self, width=fit(self.width), height=fit(self.height))

    def seeded(self, seed: int) -> SampleRequest:
        """With this seed, unless it has one."""
        return self if self.seed is not None else replace(self, seed=seed)


FLUX_DEFAULTS = SampleRequest(prompt="")
FLUX_IGNORED = frozenset({"sample_sampler", "controlnet_image", "flow_shift", "cfg_trunc_ratio", "renorm_cfg"})
"""Keys of prompt files that mean nothing to FLUX."""

SD_DEFAULTS = SampleRequest(prompt="", steps=30, guidance=None, cfg=7.5)
SD_IGNORED = frozenset({"guidance_scale", "controlnet_image", "flow_shift", "cfg_trunc_ratio", "renorm_cfg"})
"""Keys that mean nothing to Stable Diffusion."""
SD3_IGNORED = SD_IGNORED | {"sample_sampler"}
"""Keys that mean nothing to SD3, which has one sampler."""


@dataclass(frozen=True)
class PromptRules:
    """What a model makes of prompt files."""

    defaults: SampleRequest
    ignored: frozenset[str]
    """Keys that mean nothing to it."""

    @classmethod
    def of(cls, family: str, sampler: str | None = None) -> PromptRules:
        """Those of a family, by `Traits.name`, with the sampler for prompts that don't name one."""
        rules = PROMPT_RULES[family]
        if "sample_sampler" in rules.ignored:
            return rules
        return cls(replace(rules.defaults, sampler=sampler), rules.ignored)

    def load(self, path: str | Path) -> list[SampleRequest]:
        """See `load_prompts`."""
        return load_prompts(path, self.defaults, self.ignored)


PROMPT_RULES: Mapping[str, PromptRules] = {
    "flux": PromptRules(FLUX_DEFAULTS, FLUX_IGNORED),
    "sd": PromptRules(SD_DEFAULTS, SD_IGNORED),
    "sdxl": PromptRules(SD_DEFAULTS, SD_IGNORED),
    "sd3": PromptRules(SD_DEFAULTS, SD3_IGNORED),
}


# option lines


@dataclass(frozen=True)
class ParsedLine:
    """An option line, taken apart."""

    values: dict[str, Any]
    """By the key names of prompt files; what the line doesn't say is absent."""
    unmatched: list[str] = field(default_factory=list)
    """Pieces that are no option, without their dashes."""


def _integer(text: str) -> int | None:
    match = re.match(r"\d+", text)
    return int(match.group()) if match else None


def _decimal(text: str) -> float | None:
    match = re.match(r"[\d.]+", text)
    try:
        return float(match.group()) if match else None
    except ValueError:
        return None


def _steps(text: str) -> int | None:
    number = _integer(text)
    return None if number is None else min(max(number, 1), 1000)


def _multipliers(text: str) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return None


def _negative(text: str) -> str:
    return "" if text.strip() == "-" else text.strip()


Reader = Callable[[str], object]

LINE_OPTIONS: Mapping[str, tuple[str, Reader]] = {
    "w": ("width", _integer),
    "h": ("height", _integer),
    "d": ("seed", _integer),
    "s": ("sample_steps", _steps),
    "l": ("scale", _decimal),
    "g": ("guidance_scale", _decimal),
    "n": ("negative_prompt", str),
    "ss": ("sample_sampler", str.strip),
    "cn": ("controlnet_image", str),
    "ctr": ("cfg_trunc_ratio", _decimal),
    "rcfg": ("renorm_cfg", _decimal),
    "fs": ("flow_shift", str),
}
"""Options of the lines of prompt files: letters, key, reader; a reader gives None for what it can't read."""

TERMINAL_OPTIONS: Mapping[str, tuple[str, Reader]] = {
    "w": ("width", _integer),
    "h": ("height", _integer),
    "s": ("steps", _steps),
    "d": ("seed", _integer),
    "g": ("guidance", _decimal),
    "c": ("cfg", _decimal),
    "n": ("negative_prompt", _negative),
    "p2": ("prompt2", str),
    "ss": ("sampler", str.strip),
    "m": ("multipliers", _multipliers),
}
"""Options of lines typed at the terminal: letters, field of `SampleRequest`, reader."""


def parse_line(line: str) -> ParsedLine:
    """A line of a prompt file, as in `a cat --w 512 --h 768 --d 42`; of repeated options the last wins."""
    prompt, *pieces = line.split(" --")
    values, unmatched = _options(pieces, LINE_OPTIONS)
    return ParsedLine({"prompt": prompt, **values}, unmatched)


def parse_terminal(line: str, before: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """The request of a typed line, and the pieces that are no option.

    What the line doesn't say is as `before`, except seed, second and negative prompt and multipliers, which are then
    None. Two dashes with a space behind them belong to the prompt. `--ss` is an option where there was a sampler.
    """
    prompt, *pieces = re.split(r" --(?=[A-Za-z])", line)
    table = {name: reader for name, reader in TERMINAL_OPTIONS.items() if name != "ss" or before.sampler}
    values, unmatched = _options(pieces, table)
    fresh: dict[str, Any] = {"seed": None, "prompt2": None, "negative_prompt": None, "multipliers": None}
    return replace(before, prompt=prompt.strip(), **{**fresh, **values}), unmatched


def _options(pieces: list[str], table: Mapping[str, tuple[str, Reader]]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    unmatched = []
    for piece in pieces:
        letters, space, text = piece.partition(" ")
        key, reader = table.get(letters.lower(), ("", lambda _: None))
        value = reader(text) if space and text else None
        if value is None:
            unmatched.append(piece)
        else:
            values[key] = value
    return values, unmatched


# prompt files

FIELDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "prompt": ("prompt", (str,)),
    "negative_prompt": ("negative_prompt", (str,)),
    "width": ("width", (int,)),
    "height": ("height", (int,)),
    "seed": ("seed", (int,)),
    "sample_steps": ("steps", (int,)),
    "scale": ("cfg", (int, float)),
    "guidance_scale": ("guidance", (int, float)),
    "sample_sampler": ("sampler", (str,)),
    "controlnet_image": ("control_image", (str,)),
}
"""Key of prompt files -> field of `SampleRequest`, and the types that it may have."""

OTHER_KEYS = frozenset({"enum", "flow_shift", "cfg_trunc_ratio", "renorm_cfg"})
"""Keys that are understood and have no field."""


def load_prompts(
    path: str | Path, defaults: SampleRequest = FLUX_DEFAULTS, ignored: Collection[str] = FLUX_IGNORED
) -> list[SampleRequest]:
    """The requests of a `.txt`, `.toml` or `.json` prompt file, numbered from 0.

    `ignored` names keys that mean nothing to the model; using them is warned of. Errors: UserError for a file that is
    missing, empty or not understood.
    """
    path = Path(path)
    readers = {".txt": _text_entries, ".toml": _toml_entries, ".json": _json_entries}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _unreadable(f"prompts are read from {', '.join(readers)} files", path, "rename or convert the file")
    if not path.is_file():
        raise _unreadable("the prompt file doesn't exist", path, "check --sample_prompts")
    entries = reader(files.read_text(path), path)
    if not entries:
        raise _unreadable("there is no prompt in the file", path, "write one prompt per line")
    return [
        replace(_request(values, where, defaults, ignored), index=index)
        for index, (values, where) in enumerate(entries)
    ]


def request_from(values: Mapping[str, object], defaults: SampleRequest, where: str = "") -> SampleRequest:
    """A request from the keys of prompt files. Errors: UserError for a value of the wrong type."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if key not in FIELDS:
            continue
        name, types = FIELDS[key]
        if isinstance(value, bool) or not isinstance(value, types):
            raise UserError(
                f"{key} = {value!r} should be {' or '.join(kind.__name__ for kind in types)}",
                where,
                "mend the prompt file",
                code="E-PROMPT-TYPE",
            )
        fields[name] = value
    request = replace(defaults, **fields)
    for name in ("width", "height", "steps"):
        if getattr(request, name) < 1:
            raise UserError(
                f"{name} {getattr(request, name)} is too small", where, "give at least 1", code="E-PROMPT-TYPE"
            )
    return request


Entry = tuple[dict[str, Any], str]
"""Values by key, and where they stand."""


def _request(
    values: Mapping[str, object], where: str, defaults: SampleRequest, ignored: Collection[str]
) -> SampleRequest:
    for key in values:
        if key not in FIELDS and key not in OTHER_KEYS:
            logger.warning("%s: %s is no key of a prompt and is ignored", where, key)
        elif key in ignored:
            logger.warning("%s: %s means nothing to this model and is ignored", where, key)
    if "sample_sampler" in values and "sample_sampler" not in ignored:
        from library.samplers import recipe_of

        recipe_of(str(values["sample_sampler"]).strip(), where)
    if defaults.cfg == 1.0 and "scale" in values and "guidance_scale" not in values:
        logger.warning("%s: --l is the scale of guidance by a negative prompt; embedded guidance is --g", where)
    return request_from(values, defaults, where)


def _text_entries(text: str, path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            entries.append(_line_entry(line.strip(), f"{path}, line {number}"))
    return entries


def _line_entry(line: str, where: str) -> Entry:
    parsed = parse_line(line)
    for piece in parsed.unmatched:
        logger.warning('%s: "--%s" is no option and is ignored; options look like --w 512', where, piece)
    return parsed.values, where


def _toml_entries(text: str, path: Path) -> list[Entry]:
    try:
        prompt = toml.loads(text).get("prompt")
    except (toml.TomlDecodeError, IndexError, KeyError) as error:
        raise _unreadable(f"no TOML: {error}", path, "mend the file") from error
    if not isinstance(prompt, dict):
        raise _unreadable("there is no [prompt] table", path, "write [prompt] and [[prompt.subset]] tables")
    shared = {key: value for key, value in prompt.items() if key != "subset"}
    subsets = prompt.get("subset", [{}] if "prompt" in shared else [])
    return [({**shared, **subset}, f"{path}, subset {number}") for number, subset in enumerate(subsets, start=1)]


def _json_entries(text: str, path: Path) -> list[Entry]:
    try:
        elements = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(f"no JSON: {error}", path, "mend the file") from error
    if not isinstance(elements, list) or not all(isinstance(element, str | dict) for element in elements):
        raise _unreadable("should be a list of lines or objects", path, "mend the file")
    places = [f"{path}, element {number}" for number in range(1, len(elements) + 1)]
    return [
        _line_entry(element, where) if isinstance(element, str) else (element, where)
        for element, where in zip(elements, places, strict=True)
    ]


def _unreadable(what: str, path: Path, hint: str) -> UserError:
    return UserError(what, str(path), hint, code="E-PROMPT-FILE")
