"""Keeps the model with the least validation loss, and ends a run in which that loss doesn't fall any more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from library.log import get_logger
from library.train.checkpoints import best_stem
from library.train.state import RunState

logger = get_logger(__name__)

MEMORY = "best"
"""Name of what the state remembers: the least `loss`, its `step`, and the validations `without_gain` since then."""


@dataclass(kw_only=True)
class Best:
    """Judges each validation. All processes must ask it with the same loss."""

    save_as: Callable[[RunState, str], bool] | None = None
    """Writes the model under a name and tells whether it could, see `Checkpoints.save_as`; None: none is kept."""
    output_name: str | None = None
    patience: int | None = None
    """Validations in a row without a lower loss after which the run ends; None: it never does."""

    def judge(self, state: RunState, loss: float) -> None:
        """Takes the loss of a validation; one that isn't finite is no gain."""
        memory = state.remembered.setdefault(MEMORY, {"without_gain": 0})
        if math.isfinite(loss) and loss < memory.get("loss", math.inf):
            memory["without_gain"] = 0
            # where it can't be saved the file is still the earlier one, and that is what must be beaten
            if self.save_as is None or self.save_as(state, best_stem(self.output_name)):
                memory |= {"loss": loss, "step": state.step}
            return
        memory["without_gain"] += 1
        if self.patience is not None and memory["without_gain"] >= self.patience:
            self._end(state, memory)

    def finish(self, state: RunState) -> None:
        """Says which model was the best."""
        memory = state.remembered.get(MEMORY, {})
        if "loss" in memory:
            kept = f", kept as {best_stem(self.output_name)}" if self.save_as is not None else ""
            logger.info("least validation loss: %.6g at step %d%s", memory["loss"], memory["step"], kept)

    def _end(self, state: RunState, memory: dict[str, float]) -> None:
        logger.info(
            "the validation loss has not fallen for %d validations%s: the training ends at step %d",
            memory["without_gain"],
            f" (least: {memory['loss']:.6g} at step {memory['step']})" if "loss" in memory else "",
            state.step,
        )
        state.ended = True
