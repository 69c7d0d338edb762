"""The last blocks of a transformer, which `--num_last_block_to_freeze` leaves as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from library.log import UserError

_NUMBER = re.compile(r"\w*blocks\.(\d+)\.")


def of_last_blocks(names: Iterable[str], count: int) -> frozenset[str]:
    """Those of a transformer's tensors that lie in its last blocks. Errors: UserError when it has fewer blocks."""
    found = {name: int(match[1]) for name in names if (match := _NUMBER.match(name))}
    depth = 1 + max(found.values(), default=-1)
    if count > depth:
        what = f"the model has {depth} blocks, {count} of which can't be frozen"
        raise UserError(what, "--num_last_block_to_freeze", f"give {depth} or less", code="E-OPTION")
    return frozenset(name for name, number in found.items() if number >= depth - count)
