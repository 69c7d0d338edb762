"""Options: declared once as dataclass fields, read from the command line and from a TOML file, checked alike.

    options = parse(FLUX_TRAIN_NETWORK)
    options[SaveOptions].output_dir

A script is a list of groups, see `option_groups.py` and `option_types.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

from library.config_file import ConfigFile, read_config, with_suffix, write_config
from library.log import UserError, get_logger, raise_all, setup
from library.option_groups import SCRIPTS, ConsoleOptions
from library.option_types import Option, Script, did_you_mean, options_of

logger = get_logger(__name__)

G = TypeVar("G")
Source = Literal["default", "environment", "config file", "command line"]

KNOWN_MODULES = {
    "network_module": ("networks.", "lycoris.kohya"),
    "optimizer_type": (
        "torch.optim.",
        "bitsandbytes.optim.",
        "dadaptation.",
        "lion_pytorch.",
        "prodigyopt.",
        "schedulefree.",
        "transformers.optimization.",
    ),
    "lr_scheduler_type": ("torch.optim.lr_scheduler.", "transformers.", "diffusers.optimization."),
    "dataset_class": ("library.",),
}
"""Options that name code, and what they may name in a config file."""

RENAMED = {"skip_latents_validity_check": "skip_cache_check"}
"""Old names of flags."""

FOREIGN_KEYS = {
    "epoch": "use max_train_epochs",
    "lowvram": "",
    "noise_offset_type": "",
    "loraplus_lr_ratio": "put it into network_args",
    "loraplus_text_encoder_lr_ratio": "put it into network_args",
    "loraplus_unet_lr_ratio": "put it into network_args",
    "stop_text_encoder_training": "use network_train_unet_only",
    "learning_rate_te": "",
    "learning_rate_te1": "",
    "learning_rate_te2": "",
    "train_text_encoder": "",
    "no_token_padding": "",
}
"""Keys that front ends write into every config file: a warning instead of an error."""


@dataclass(frozen=True)
class Origin:
    """Where a value comes from."""

    source: Source
    where: str
    """For messages: the flag, or file and line."""


class Options:
    """The values of all groups of a script."""

    def __init__(self, script: Script, values: Mapping[str, object], origins: Mapping[str, Origin]) -> None:
        self.script = script
        self._origins = dict(origins)
        self._groups: dict[type, Any] = {}
        for group in script.groups:
            given = {spec.name: values[spec.name] for spec in options_of(group) if spec.name in values}
            self._groups[group] = group(**given)

    def __getitem__(self, group: type[G]) -> G:
        return cast("G", self._groups[group])

    def __repr__(self) -> str:
        return (
            f"Options({self.script.name}, {', '.join(f'{k}={v!r}' for k, v in self.public().items() if self.given(k))})"
        )

    def has(self, group: type) -> bool:
        """Whether the script has the group."""
        return group in self._groups

    def value(self, name: str) -> Any:
        """The value of an option by its name. Errors: KeyError when the script doesn't have it."""
        for group in self._groups.values():
            if hasattr(group, name):
                return getattr(group, name)
        raise KeyError(name)

    def source(self, name: str) -> Source:
        """Where the value comes from."""
        origin = self._origins.get(name)
        return "default" if origin is None else origin.source

    def given(self, name: str) -> bool:
        """Whether someone gave the value, even if it equals the default."""
        return name in self._origins

    def where(self, name: str) -> str:
        """Where the value was given, for messages: the flag, or file and line."""
        origin = self._origins.get(name)
        return _flag(self.script, name) if origin is None else origin.where

    def with_values(self, **changes: object) -> Options:
        """A copy with other values; where they come from stays as it was."""
        values = {spec.name: self.value(spec.name) for spec in self.script.options()}
        unknown = changes.keys() - values.keys()
        assert not unknown, f"{self.script.name} has no {unknown}"
        return Options(self.script, values | changes, self._origins)

    def public(self) -> dict[str, object]:
        """Name -> value of everything that may be stored and shown: no secrets."""
        return {spec.name: self.value(spec.name) for spec in self.script.options() if spec.secret is None}

    def is_meant(self, name: str) -> bool:
        """Whether the value differs from the default in effect: front ends write 0 or "" for "off"."""
        spec = self.script.option(name)
        if spec is None:
            return False
        value = self.value(name)
        is_off = not value and not spec.default
        return not is_off and value != spec.default


# reading


def parse(script: Script, argv: Sequence[str] | None = None) -> Options:
    """The options of a run: command line over `--config_file` over environment (secrets) over defaults.

    Sets up logging as the options say, hides secrets in `sys.argv`, and warns of what does nothing. `--help` and
    `--output_config` end the program. Errors: UserError, for a config file with all its mistakes at once.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    values = _from_command_line(script, words)
    origins = {name: Origin("command line", _flag(script, name)) for name in values}
    writes_config = bool(values.get("output_config"))
    notes: list[str] = []
    if (config := values.get("config_file")) and not writes_config:
        for name, (value, origin) in _from_config_file(script, with_suffix(str(config)), notes).items():
            if name not in values:
                values[name], origins[name] = value, origin
    for old, new in RENAMED.items():
        if values.get(old):
            values[new], origins[new] = True, origins[old]
            notes.append(f"--{old} is now called --{new}")
    _take_secrets(script, values, origins)
    _check_required(script, values)
    _check_limits(script, values, origins)
    options = Options(script, values, origins)
    if writes_config:
        _write_config(options)
    refuse_custom_modules(options)
    _refuse_unavailable(options)
    _set_up_logging(options)
    for note in [*notes, *_does_nothing(options)]:
        logger.warning(note)
    return options


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError."""

    def error(self, message: str) -> NoReturn:
        hint = "see --help"
        if "expected" in message and "argument" in message:
            hint = "give a value; one that begins with - is written --option=-value"
        raise UserError(message.removeprefix("argument "), "command line", hint, code="E-OPTION")


def build_parser(script: Script) -> argparse.ArgumentParser:
    """An argparse parser for the script, whose result holds only what was given."""
    parser = _Parser(prog=script.name, description=script.summary, argument_default=argparse.SUPPRESS)
    for group in script.groups:
        section = parser.add_argument_group((group.__doc__ or "").split("\n")[0].rstrip("."))
        for spec in options_of(group):
            text = help_text(spec).replace("%", "%%")
            if spec.kind == "bool":
                section.add_argument(*spec.flags, action="store_true", help=text)
            else:
                section.add_argument(
                    *(spec.flags or [spec.name]),
                    type=partial(spec.convert_one, where=spec.flag),
                    nargs=spec.nargs,
                    metavar=_metavar(spec),
                    help=text,
                )
    return parser


def help_text(spec: Option) -> str:
    """The explanation of an option as `--help` shows it."""
    notes = []
    if spec.required:
        notes.append("required")
    if spec.default not in (None, False, "", ()):
        notes.append(f"default: {spec.default}")
    if spec.example:
        notes.append(f"example: {spec.example}")
    return spec.help + (f" ({'; '.join(notes)})" if notes else "")


def _flag(script: Script, name: str) -> str:
    spec = script.option(name)
    return f"--{name}" if spec is None else spec.flag


def _metavar(spec: Option) -> str:
    if spec.position is not None:
        return spec.name
    if spec.choices is not None:
        return "{" + ",".join(str(choice) for choice in spec.choices if choice is not None) + "}"
    names = {"int": "N", "float": "X", "int_or_float": "STEPS", "str": "TEXT", "Path": "PATH"}
    return "PATH" if spec.path else names[spec.kind]


_EXPONENT = re.compile(r"\A-\d*\.?\d+[eE][-+]?\d{1,2}\Z")


def _written_out(number: re.Match[str]) -> str:
    """A negative number without exponent: `-1e-4` would be taken for an option, `-0.0001` isn't."""
    return format(Decimal(number[0]), "f")


def _from_command_line(script: Script, words: list[str]) -> dict[str, Any]:
    """Name -> value of what is on the command line."""
    flags = {spec.name for spec in script.options() if spec.kind == "bool"}
    negations = {f"--no_{name}": name for name in flags if script.option(f"no_{name}") is None}
    switched_off = {negations[word] for word in words if word in negations}
    words = [_EXPONENT.sub(_written_out, word) for word in words if word not in negations]
    namespace, rest = build_parser(script).parse_known_args(words)
    raise_all(_stray_words(script, words, rest))
    values: dict[str, Any] = vars(namespace)
    for name in switched_off:
        if name in values:
            raise UserError(f"both --{name} and --no_{name}", "command line", "give one of them", code="E-OPTION")
        values[name] = False
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _stray_words(script: Script, words: Sequence[str], rest: Sequence[str]) -> list[UserError]:
    """What to say of words that belong to no option."""
    errors: list[UserError] = []
    at, unknown_at = 0, -2
    for word in rest:
        at = words.index(word, at) if word in words[at:] else at
        if word.startswith("--"):
            errors.append(_unknown_flag(script, word.partition("=")[0]))
            unknown_at = at
        elif unknown_at != at - 1:
            before = next((w for w in reversed(words[:at]) if w.startswith("--")), "")
            hint = f'put values with spaces into quotes: {before or "--option"} "… {word}"'
            errors.append(UserError(f"stray argument {word!r}", before and f"after {before}", hint, code="E-OPTION"))
        else:
            unknown_at = at  # further values of the unknown option
        at += 1
    return errors


def _unknown_flag(script: Script, flag: str) -> UserError:
    name = flag.lstrip("-")
    hint = did_you_mean(flag.lstrip("-"), [spec.name for spec in script.options()])
    if not hint and (others := _scripts_with(name)):
        hint = f"it belongs to {', '.join(others)}"
    return UserError(f"unknown option {flag}", "command line", hint or "see --help", code="E-OPTION")


def _scripts_with(name: str) -> list[str]:
    return [script.name for script in SCRIPTS if script.option(name) is not None]


def _from_config_file(script: Script, path: Path, notes: list[str]) -> dict[str, tuple[Any, Origin]]:
    """Name -> value and origin of what is in the file. Errors: UserError with all mistakes."""
    config = read_config(path)
    errors: list[UserError] = []
    found: dict[str, tuple[Any, Origin]] = {}
    for name, raw in config.values.items():
        where = config.where(name)
        spec = script.option(name)
        if spec is None:
            if name in FOREIGN_KEYS or _scripts_with(name):
                if raw:
                    hint = FOREIGN_KEYS.get(name)
                    notes.append(f"{where}: {name} does nothing in {script.name}" + (f"; {hint}" if hint else ""))
            else:
                names = [spec.name for spec in script.options()]
                hint = did_you_mean(name, names) or f"see {script.name} --help"
                errors.append(UserError(f"unknown key {name}", where, hint, code="E-CONFIG"))
        elif name in ("config_file", "output_config", "allow_custom_modules"):
            what = f"{name} can't be set in a config file"
            errors.append(UserError(what, where, "give it on the command line", code="E-CONFIG"))
        else:
            try:
                value = spec.convert(raw, where)
            except UserError as error:
                errors.append(UserError(error.what, error.where, error.hint, code="E-CONFIG"))
            else:
                found[name] = (_located(spec, value, config), Origin("config file", where))
    raise_all(errors)
    return found


def _located(spec: Option, value: Any, config: ConfigFile) -> Any:
    """The value with paths that exist only beside the config file made relative to the working directory."""
    if not spec.path or value is None:
        return value
    if spec.many:
        return tuple(config.beside(item) for item in value)
    located = config.beside(str(value))
    return Path(located) if isinstance(value, Path) else located


def _take_secrets(script: Script, values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Fills in secrets from the environment, and hides those of the command line in `sys.argv`."""
    for spec in script.options():
        if spec.secret is None:
            continue
        value = values.get(spec.name)
        if value:
            sys.argv[:] = [_hide(word, value) for word in sys.argv]
        elif from_environment := os.environ.get(spec.secret):
            values[spec.name], origins[spec.name] = from_environment, Origin("environment", f"${spec.secret}")


def _hide(word: str, secret: str) -> str:
    return word.removesuffix(secret) + "***" if word == secret or word.endswith("=" + secret) else word


def _check_required(script: Script, values: Mapping[str, object]) -> None:
    missing = [spec for spec in script.options() if spec.required and values.get(spec.name) in (None, "")]
    raise_all([UserError(f"{spec.flag} is missing", "command line", spec.help, code="E-OPTION") for spec in missing])


def _check_limits(script: Script, values: Mapping[str, object], origins: Mapping[str, Origin]) -> None:
    errors = []
    for spec in script.options():
        if spec.name in values and (hint := spec.beyond_limits(values[spec.name])):
            what = f"{spec.name} can't be {_show(values[spec.name])}"
            errors.append(UserError(what, origins[spec.name].where, hint, code="E-OPTION"))
    raise_all(errors)


def _show(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _write_config(options: Options) -> NoReturn:
    """Writes what differs from the defaults to `--config_file`, and ends the program."""
    target = options.value("config_file")
    if not target:
        raise UserError(
            "--output_config needs --config_file", "command line", "name the file to write", code="E-OPTION"
        )
    path = with_suffix(target)
    if path.exists():
        error = UserError(
            "the config file already exists", str(path), "remove it or give another name", code="E-CONFIG"
        )
        error.exit_code = 1
        raise error
    left_out = ("config_file", "output_config")
    public = {name: value for name, value in options.public().items() if name not in left_out}
    changed = {name: value for name, value in public.items() if value != _spec(options, name).default}
    for name, value in changed.items():
        if _spec(options, name).kind == "int_or_float" and isinstance(value, float) and value >= 1:
            changed[name] = f"{value * 100:g}%"
    write_config(path, changed)
    sys.stdout.write(f"options written to {path}\n")
    sys.exit(0)


def _spec(options: Options, name: str) -> Option:
    spec = options.script.option(name)
    assert spec is not None
    return spec


# judging


def refuse_custom_modules(options: Options) -> None:
    """Refuses code that a config file names but nobody knows. Errors: UserError.

    Config files are passed on between people; importing what they name would run it. `--allow_custom_modules` on the
    command line trusts the file.
    """
    if options.script.option("allow_custom_modules") is not None and options.value("allow_custom_modules"):
        return
    for name, known in KNOWN_MODULES.items():
        if options.source(name) != "config file":
            continue
        value = str(options.value(name) or "")
        is_code = "." in value or (name in ("network_module", "dataset_class") and value)
        if is_code and not any(value == start or (start[-1] == "." and value.startswith(start)) for start in known):
            hint = f"if you trust it, give --allow_custom_modules or --{name} {value} on the command line"
            raise UserError(f"the config file wants to run code of {value}", options.where(name), hint, code="E-CUSTOM")


def _refuse_unavailable(options: Options) -> None:
    later = [
        UserError(f"{name} is not available yet", options.where(name.split()[0]), hint, code="E-LATER")
        for name, hint in _hits(options, options.script.pending)
    ]
    never = [
        UserError(f"{name} can't be used here", options.where(name.split()[0]), hint, code="E-REFUSED")
        for name, hint in _hits(options, options.script.refused)
    ]
    raise_all(later + never)


def _does_nothing(options: Options) -> list[str]:
    """One line for all ignored options of the same reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in _hits(options, options.script.ignored):
        by_reason.setdefault(reason, []).append(name)
    return [f"without effect in {options.script.name}: {', '.join(n)} ({reason})" for reason, n in by_reason.items()]


def _hits(options: Options, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Those entries of a table that the options touch: name, or name and value, and the text."""
    for key, text in table.items():
        name, separator, value = key.partition("=")
        if separator and options.script.option(name) is not None and str(options.value(name)) == value:
            yield f"{name} {value}", text
        elif not separator and options.is_meant(name):
            yield name, text


def _set_up_logging(options: Options) -> None:
    setup(options[ConsoleOptions] if options.has(ConsoleOptions) else ConsoleOptions())
