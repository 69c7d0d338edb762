"""Captions into tokens of CLIP's tokenizers, up to 225 of them, with weights if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.models.text_chunks import CONTENT
from library.weighted_text import pieces


@dataclass(frozen=True)
class ClipTokenizing:
    """A tokenizer, and how it is used."""

    tokenizer: Any
    length: int = CONTENT
    """Tokens of a caption without marks: 75, 150 or 225."""
    weighted: bool = False
    """Whether brackets in captions mean weights."""
    padded: bool = True
    """Whether all captions become equally long; if not, a batch must hold one."""
    filler: int | None = None
    """What captions are filled up with; None: what the tokenizer says."""

    @property
    def eos(self) -> int:
        """The end mark."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """What captions are filled up with."""
        return int(self.tokenizer.pad_token_id) if self.filler is None else self.filler

    @property
    def rows(self) -> int:
        """Rows of a caption."""
        return self.length // CONTENT

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Ids (B, L) with both marks, L = length + 2, cut or filled up; weights (B, L) if wanted."""
        if not self.weighted:
            return self._plain(captions), None
        both = [self._weighted(caption) for caption in captions]
        return torch.tensor([ids for ids, _ in both]), torch.tensor([weights for _, weights in both])

    def counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, both marks included and nothing cut."""
        texts = ["".join(piece.text for piece in pieces(caption)) if self.weighted else caption for caption in captions]
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def _plain(self, captions: Sequence[str]) -> Tensor:
        length = self.length + 2
        found = self.tokenizer(list(captions), truncation=True, max_length=length)["input_ids"]
        return torch.tensor([[*ids, *[self.pad] * (length - len(ids) if self.padded else 0)] for ids in found])

    def _weighted(self, caption: str) -> tuple[list[int], list[float]]:
        """Each piece is turned into tokens alone; marks and filling weigh 1."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces(caption):
            found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += found
            weights += [weight] * len(found)
        ids, weights = ids[: self.length], weights[: self.length]
        filling = self.length - len(ids) if self.padded else 0
        ids = [int(self.tokenizer.bos_token_id), *ids, self.eos, *[self.pad] * filling]
        return ids, [1.0, *weights, 1.0, *[1.0] * filling]
