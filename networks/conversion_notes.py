"""What a converted file notes in its metadata of the layout that it was converted from, for the way back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from networks.layout_files import PEFT_KEY, Adapter
from networks.results import HASHES
from networks.scaling import Fact

NOTE = "convert_lora"
"""Key of the note in the metadata."""


@dataclass
class Note:
    """What a file says of the layout that it was converted from."""

    layout: str
    family: str
    starts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    """Names that aren't those written by default, see `Spelled`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """By component and path, or `*` for all that aren't named; None: there is nothing to say."""
    without_hashes: bool = False
    peft: str | None = None
    """Metadata of PEFT, which only are right in that layout."""
    before: str | None = None
    """The note that was there before."""

    def text(self) -> str:
        """As in metadata."""
        return json.dumps({name: value for name, value in vars(self).items() if value}, sort_keys=True)

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Note | None:
        """The note of a file; None: it has none that can be read."""
        try:
            return cls(**json.loads(metadata[NOTE]))
        except (KeyError, ValueError, TypeError):
            return None

    @property
    def needed(self) -> bool:
        """Whether it says more than where the file came from."""
        return bool(self.starts or self.tensors or self.facts or self.without_hashes or self.peft or self.before)


def metadata_of(
    source: Adapter,
    metadata: Mapping[str, str],
    note: Note | None,
    back: Note | None,
    facts: Mapping[str, Fact],
    keys: Iterable[str],
) -> tuple[dict[str, str], bool]:
    """Those of the new file, and whether hashes belong to them."""
    kept = {key: value for key, value in metadata.items() if key not in (NOTE, PEFT_KEY)}
    if back:
        earlier = {} if back.before is None else {NOTE: back.before}
        peft = {} if back.peft is None else {PEFT_KEY: back.peft}
        return {**kept, **peft, **earlier}, not back.without_hashes
    new = Note(
        source.row.layout,
        source.row.family,
        source.spelled.starts,
        source.spelled.tensors,
        _gathered(facts, keys),
        not any(key in metadata for key in HASHES),
        metadata.get(PEFT_KEY),
        metadata.get(NOTE) if note else None,
    )
    return ({**kept, NOTE: new.text()} if new.needed else kept), True


def _gathered(facts: Mapping[str, Fact], keys: Iterable[str]) -> dict[str, Any]:
    """The facts with those that most modules share said once."""
    texts = [json.dumps(fact, sort_keys=True) for fact in facts.values()]
    if not texts:
        return {}
    common = max(set(texts), key=lambda text: (texts.count(text), text))
    rest = {key: facts.get(key) for key in keys if json.dumps(facts.get(key), sort_keys=True) != common}
    return {"*": json.loads(common), **rest}
