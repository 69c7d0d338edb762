"""Captions for CLIP: what the families of SD 1.x, 2.x and SDXL share of tokenizing and of hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from library.families.clip_text import ClipTokenizing
from library.families.tokenizers import TokenizerSource, load_tokenizer
from library.models.text_chunks import CONTENT, joined, rows_of, weighted
from library.types import Tokens

OPEN_CLIP_PAD = 0
"""What OpenCLIP fills captions up with: the id of "!"."""
LAYER = r"text_model\.encoder\.layers\.(\d+)\."
"""Names of tensors in an encoder's layers."""
WEIGHTS = "_weights"
"""End of the names of tensors with the weights of tokens."""


@dataclass
class Wording:
    """How captions become tokens for each encoder."""

    sources: Mapping[str, TokenizerSource]
    """By encoder."""
    model: str | None
    """The model, beside or in which tokenizers may lie."""
    cache_dir: str | None = None
    length: int = CONTENT
    """Tokens of a caption without marks: 75, 150 or 225."""
    weighted: bool = False
    padded: bool = True

    def load(self) -> None:
        """Loads the tokenizers. Errors: ResourceError when their files are nowhere."""
        _ = self._all

    @cached_property
    def _all(self) -> dict[str, ClipTokenizing]:
        return {name: self._loaded(name, source) for name, source in self.sources.items()}

    def _loaded(self, encoder: str, source: TokenizerSource) -> ClipTokenizing:
        own = None if self.model is None else Path(self.model) / encoder.replace("text_encoder", "tokenizer")
        tokenizer = load_tokenizer(source, self.cache_dir, (self.model,), own)
        filler = OPEN_CLIP_PAD if source.open_clip else None
        return ClipTokenizing(tokenizer, self.length, self.weighted, self.padded, filler)

    def limits(self) -> dict[str, int]:
        """See `Family.token_limits`."""
        return dict.fromkeys(self.sources, self.length + 2)

    def counts(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """See `Family.count_tokens`."""
        return {name: tokenizing.counts(captions) for name, tokenizing in self._all.items()}

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids (B, L) by encoder, and weights (B, L) where captions have some."""
        tokens: Tokens = {}
        for name, tokenizing in self._all.items():
            ids, weights = tokenizing.tokens(captions)
            tokens[name] = ids
            if weights is not None:
                tokens[name + WEIGHTS] = weights
        return tokens

    def identity(self) -> list[str]:
        """Text that changes when captions become other tokens."""
        vocabularies = [repr(sorted(tokenizing.tokenizer.get_vocab().items())) for tokenizing in self._all.values()]
        return [str(self.length), str(self.weighted), *vocabularies]

    def rows(self, name: str, tokens: Tokens) -> Tensor:
        """(B, n, 77) of an encoder's tokens; of captions that aren't filled up, (1, 1, L)."""
        ids = tokens[name]
        if not self.padded:
            return ids[:, None]
        return rows_of(ids, eos=self.eos(name), pad=self._all[name].pad)

    def eos(self, name: str) -> int:
        """The end mark of an encoder."""
        return self._all[name].eos

    def finished(self, name: str, hidden: Tensor, rows: Tensor, tokens: Tokens) -> Tensor:
        """(B, L, D): the states (B n, 77, D) of rows joined, times the weights of their tokens."""
        whole = joined(hidden, rows.shape[1]) if self.padded else hidden
        return weighted(whole, tokens.get(name + WEIGHTS))

    def tokenizers(self) -> dict[str, Any]:
        """By the names of the folders that hold them in the Diffusers layout."""
        return {name.replace("text_encoder", "tokenizer"): one.tokenizer for name, one in self._all.items()}
