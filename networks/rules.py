r"""Rules that give modules a rank, an alpha, a learning rate, or no adapter: `--network_args "rules=..."`.

The grammar::

    rules    = rule { (";" | newline) rule }
    rule     = pattern ":" setting { (" " | ",") setting }
    setting  = "dim=" integer | "alpha=" number | "lr=" number | "train=" ("yes" | "no")

such as::

    double_blocks.*img_attn: dim=32 alpha=16 lr=1e-4; single_blocks\.\d+\.modulation: train=no

A pattern is a regular expression. It is searched in the path of a module in the model ("double_blocks.0.img_attn.qkv",
"clip_l.text_model.encoder.layers.0.mlp.fc1") and in its name in files ("lora_unet_double_blocks_0_img_attn_qkv"). It
may hold colons, but no semicolon. **The first rule that matches a module decides**; what that rule doesn't say stays as
the other arguments have it. `train=no`, or `dim=0`, leaves a module out; `train=yes` takes one in that the other
arguments leave out.

Mistakes are errors: a pattern that matches no module, one whose modules all have an earlier rule, and one that matches
only modules without adapters and doesn't say `train=yes`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from networks.arguments import FALSE, TRUE, Arguments, error
from networks.reading import Rank
from networks.targets import Target

EXAMPLE = r'such as "rules=double_blocks.*img_attn: dim=32 lr=1e-4; single_blocks: train=no"'


@dataclass(frozen=True)
class Rule:
    """What the modules get that a pattern matches; None: the rule doesn't say it."""

    pattern: re.Pattern[str]
    argument: str
    """The one that the rule is from."""
    dim: int | None = None
    alpha: float | None = None
    lr: float | None = None
    train: bool | None = None

    def matches(self, target: Target) -> bool:
        """Whether the rule is for a module."""
        return bool(self.pattern.search(target.path) or self.pattern.search(target.name))

    def __str__(self) -> str:
        return f"{self.pattern.pattern}: {self.settings}"

    @property
    def settings(self) -> str:
        """What the rule says, as it can be written."""
        said = {"dim": self.dim, "alpha": self.alpha, "lr": self.lr}
        words = [f"{key}={value:g}" for key, value in said.items() if value is not None]
        return " ".join([*words, *([] if self.train is None else [f"train={'yes' if self.train else 'no'}"])])


IN_FILE = Rank(0, 0.0)
"""Stands for the size that a module has in a file."""


@dataclass(frozen=True)
class Choice:
    """What becomes of a module."""

    size: Rank | None
    """None: it gets no adapter."""
    lr: float | None
    """None: that of its component."""


@dataclass
class _Record:
    """What a rule was good for so far."""

    matches: int = 0
    first: int = 0
    effects: int = 0


class Rules:
    """Lists of rules. In each list the first match decides; where lists say different things, the earlier one does."""

    def __init__(self, *lists: Sequence[Rule]) -> None:
        self._lists = [rules for rules in lists if rules]
        self._records = {id(rule): _Record() for rule in self._all()}
        self._unmatched: Counter[Rank] = Counter()
        self._example = ""

    @classmethod
    def from_arguments(cls, arguments: Arguments) -> Rules:
        """`rules`, and `network_reg_dims` and `network_reg_lrs`, which are two lists of their own.

        Errors: UserError for what can't be read.
        """
        return cls(
            parse(arguments.text("rules") or ""),
            _pairs(arguments, "network_reg_dims", "dim"),
            _pairs(arguments, "network_reg_lrs", "lr"),
        )

    def choose(self, target: Target, size: Rank | None, default: Rank) -> Choice:
        """What becomes of a module that the other arguments give this size; None: they leave it out.

        `default` is what it gets if a rule takes it in without a size.
        """
        firsts = []
        self._example = target.path
        for rules in self._lists:
            matching = [rule for rule in rules if rule.matches(target)]
            for rule in matching:
                self._records[id(rule)].matches += 1
            firsts += matching[:1]
        choice = _merged(firsts, size, default)
        for rule in firsts:
            record = self._records[id(rule)]
            record.first += 1
            record.effects += choice.size is not None or size is not None
        if not firsts and size is not None:
            self._unmatched[size] += 1
        return choice

    def check(self) -> None:
        """Complains about rules that did nothing for any of the modules so far. Errors: UserError."""
        for rule in self._all():
            record = self._records[id(rule)]
            where = f"{rule.argument}: {rule.pattern.pattern}"
            if not record.matches:
                hint = f"patterns are searched in paths such as {self._example}"
                raise error("it matches no module of what is trained", where, hint)
            if not record.first:
                raise error("every module that it matches has an earlier rule", where, "move it up, or leave it out")
            if not record.effects:
                raise error("it matches only modules that get no adapter", where, "say train=yes in the rule")

    def table(self) -> list[str]:
        """Lines that say what matched what; none without rules."""
        if not self._lists:
            return []
        rows = [(self._records[id(rule)].first, str(rule)) for rule in self._all()]
        rows += [(count, f"no rule: {_described(size)}") for size, count in self._unmatched.items()]
        return [f"{count:5} modules  {text}" for count, text in rows]

    def sized(self) -> list[Rule]:
        """The rules that say a dim or an alpha that the modules they match would get."""
        return [rule for rule in self._all() if rule.dim or rule.alpha is not None]

    def _all(self) -> Iterator[Rule]:
        for rules in self._lists:
            yield from rules


def parse(text: str) -> list[Rule]:
    """The rules of a text. Errors: UserError with the piece that can't be read."""
    return [_rule(piece.strip()) for piece in re.split(r"[;\n]", text) if piece.strip()]


def _rule(piece: str) -> Rule:
    pattern, colon, rest = piece.rpartition(":")
    settings = re.sub(r"\s*=\s*", "=", rest.strip())
    if not colon or not pattern.strip() or not settings:
        raise error(f"{piece!r} isn't pattern: settings", "rules", EXAMPLE)
    values: dict[str, object] = {}
    for setting in re.split(r"[\s,]+", settings):
        key, equals, value = setting.partition("=")
        if not equals or key not in ("dim", "alpha", "lr", "train"):
            raise error(f"{setting!r} in {piece!r} is none of dim=, alpha=, lr=, train=", "rules", EXAMPLE)
        if key in values:
            raise error(f"{key} is given twice in {piece!r}", "rules", "give it once")
        values[key] = _value(key, value, piece, "rules")
    return Rule(_compiled(pattern.strip(), "rules"), "rules", **values)  # type: ignore[arg-type]


def _pairs(arguments: Arguments, name: str, key: str) -> list[Rule]:
    """`pattern=value` pairs with commas between them; a comma in a pattern is fine where no pair ends before it."""
    text = arguments.text(name) or ""
    rules = []
    while text:
        match = re.match(r"\s*(.+?)\s*=\s*([^=,\s]+)\s*(?:,|$)", text)
        if match is None:
            raise error(
                f"{text!r} isn't pattern=value", name, f"such as {name}=single_blocks={'1e-4' if key == 'lr' else 8}"
            )
        value = _value(key, match[2], match[0].strip(" ,"), name)
        rules.append(Rule(_compiled(match[1], name), name, **{key: value}))  # type: ignore[arg-type]
        text = text[match.end() :].strip()
    return rules


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as reason:
        raise error(f"{pattern!r} is no regular expression: {reason}", name, "a dot matches any character") from None


def _value(key: str, text: str, piece: str, name: str) -> int | float | bool:
    where = f"{key}={text} in {piece!r}"
    if key == "train":
        if text.lower() not in (*TRUE, *FALSE) or not text:
            raise error(f"{where} is neither yes nor no", name, "train=yes or train=no")
        return text.lower() in TRUE
    try:
        value = int(text) if key == "dim" else float(text)
    except ValueError:
        raise error(f"{where} is no {'whole ' if key == 'dim' else ''}number", name, EXAMPLE) from None
    if not 0 <= value < math.inf:
        raise error(f"{where} is out of range", name, "it must be at least 0")
    return value


def _merged(rules: Sequence[Rule], size: Rank | None, default: Rank) -> Choice:
    """What several rules of different lists say together, the earlier ones first."""

    def first(values: Sequence[float | None]) -> float | None:
        return next((value for value in values if value is not None), None)

    dim, alpha = first([rule.dim for rule in rules]), first([rule.alpha for rule in rules])
    train = first([rule.train for rule in rules])
    taken = size is not None if train is None else bool(train)
    if not taken or dim == 0:
        return Choice(None, None)
    base = size or default
    chosen = Rank(base.rank if dim is None else int(dim), base.alpha if alpha is None else alpha)
    return Choice(chosen, first([rule.lr for rule in rules]))


def _described(size: Rank) -> str:
    return "as in the file" if size == IN_FILE else f"dim={size.rank} alpha={size.alpha:g}"
