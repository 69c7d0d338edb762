"""Differential output preservation: samples whose target is what the model said before it was trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from library import devices
from library.types import Finding

if TYPE_CHECKING:
    from library.methods.base import Answer, Method
    from library.types import Cond, Noised

ATTRIBUTE = "diff_output_preservation"
"""Name among `custom_attributes` of a subset."""


def is_wanted(attributes: Mapping[str, object]) -> bool:
    """Whether samples with these attributes are meant."""
    return bool(attributes.get(ATTRIBUTE))


def rows(attributes: Sequence[Mapping[str, object]]) -> list[int]:
    """The samples of a batch that are meant."""
    return [row for row, own in enumerate(attributes) if is_wanted(own)]


@contextmanager
def without(network: Any, multiplier: float) -> Iterator[None]:
    """The network, whose multiplier is this, does nothing meanwhile, and draws nothing for its dropouts."""
    training = network.training
    network.set_multiplier(0.0)
    network.train(False)
    try:
        yield
    finally:
        network.train(training)
        network.set_multiplier(multiplier)


def with_base_target(noised: Noised, chosen: Sequence[int], cond: Cond, answer: Answer) -> Noised:
    """The task with other targets for the chosen samples: what the model answers now; only they are computed."""
    rows = devices.send(torch.tensor(chosen), noised.input.device)
    some = {name: tensor.index_select(0, rows) for name, tensor in cond.items()}
    with torch.no_grad():
        base = answer(noised.rows(rows), some)
    return replace(noised, target=noised.target.index_copy(0, rows, base.to(noised.target.dtype)))


def findings(subsets: Iterable[tuple[str, Mapping[str, object]]], method: Method | type[Method]) -> Iterator[Finding]:
    """Errors for subsets, given as place and attributes, that ask for what a method can't do."""
    for where, attributes in subsets:
        if is_wanted(attributes) and not method.keeps_base:
            what = f"{ATTRIBUTE} needs the model as it was before, which training the whole model overwrites"
            hint = "leave it out, or train an adapter network"
            yield Finding(error=True, what=what, where=where, hint=hint, code="E-PRESERVATION")
