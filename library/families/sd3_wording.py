"""Captions of SD3: tokens for its three encoders, and what these say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.families.clip_text import ClipTokenizing
from library.families.sd_text import OPEN_CLIP_PAD
from library.families.tokenizers import CLIP_L as CLIP_L_TOKENIZER
from library.families.tokenizers import OPEN_CLIP_G, T5_XXL, load_tokenizer
from library.models import t5
from library.models.keymaps_sd3 import CLIP_G, CLIP_L, T5
from library.models.sd3_text import CLIP, CLIP_TOKENS, MASKS
from library.models.text_chunks import penultimate_and_pooled
from library.types import Cond, Tokens

TOKENIZERS = {CLIP_L: CLIP_L_TOKENIZER, CLIP_G: OPEN_CLIP_G, T5: T5_XXL}
FLAGS = {"apply_lg_attn_mask": (CLIP_L, CLIP_G), "apply_t5_attn_mask": (T5,)}
"""Arrays of the cache that say whether the masks of encoders were used."""


@dataclass
class Sd3Wording:
    """How captions become tokens, and tokens what encoders say."""

    encoders: Sequence[str]
    """Those that the model has, CLIP-L and CLIP-G first."""
    t5_length: int
    masked: Mapping[str, bool]
    """Whether padding is hidden from an encoder."""
    model: str | None
    """In the Diffusers layout it may hold tokenizers."""
    beside: Sequence[str | None] = ()
    """Files beside which tokenizers may lie."""
    cache_dir: str | None = None

    def load(self) -> None:
        """Loads the tokenizers. Errors: ResourceError when their files are nowhere."""
        _ = self._tokenizers

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        return {
            name: load_tokenizer(TOKENIZERS[name], self.cache_dir, self.beside, self._folder(number))
            for number, name in enumerate(self.encoders)
        }

    def _folder(self, number: int) -> Path | None:
        """Where a model in the Diffusers layout has the tokenizer of that number, from 0."""
        return Path(self.model) / f"tokenizer_{number + 1}".removesuffix("_1") if self.model else None

    @cached_property
    def _clip(self) -> dict[str, ClipTokenizing]:
        fillers = {CLIP_L: None, CLIP_G: OPEN_CLIP_PAD}
        return {name: ClipTokenizing(self._tokenizers[name], filler=filler) for name, filler in fillers.items()}

    def identity(self) -> list[str]:
        """Text that changes when captions become other tokens, or masks are used otherwise."""
        masked = [str(self.masked[names[0]]) for names in FLAGS.values()]
        vocabularies = [repr(sorted(tokenizer.get_vocab().items())) for tokenizer in self._tokenizers.values()]
        return [str(self.t5_length), *masked, *vocabularies]

    def limits(self) -> dict[str, int]:
        """See `Family.token_limits`."""
        return {name: self.t5_length if name == T5 else CLIP_TOKENS for name in self.encoders}

    def counts(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """See `Family.count_tokens`."""
        return {
            name: [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]]
            for name, tokenizer in self._tokenizers.items()
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """`clip_l`, `clip_g` (B, 77) and `t5xxl` (B, L) ids, and their masks under the names of the cache."""
        tokens: Tokens = {}
        for name, tokenizing in self._clip.items():
            ids, _ = tokenizing.tokens(captions)
            tokens |= {name: ids, MASKS[name]: _up_to_end(ids, tokenizing.eos)}
        if T5 in self.encoders:
            found = self._tokenizers[T5](
                list(captions), padding="max_length", truncation=True, max_length=self.t5_length, return_tensors="pt"
            )
            tokens |= {T5: found["input_ids"], MASKS[T5]: found["attention_mask"]}
        return tokens

    def said(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """What encoders say, each alone, their masks, and whether these were used; names: `library.models.sd3_text`."""
        cond: Cond = {}
        for name, encoder in encoders.items():
            ids, mask = tokens[name], tokens[MASKS[name]]
            place = next(encoder.parameters()).device
            shown = mask.to(place) if self.masked[name] else None
            if name == T5:
                cond["t5_out"] = t5.t5_hidden(encoder, ids.to(place), shown).to(ids.device)
            else:
                hidden, pooled = penultimate_and_pooled(encoder, ids.to(place), self._clip[name].eos, shown)
                cond |= {f"{CLIP[name]}_out": hidden.to(ids.device), f"{CLIP[name]}_pooled": pooled.to(ids.device)}
            cond[MASKS[name]] = mask
        for flag, names in FLAGS.items():
            if all(name in encoders for name in names):
                mask = tokens[MASKS[names[0]]]
                cond[flag] = torch.full((len(mask),), self.masked[names[0]], device=mask.device)
        return cond


def _up_to_end(ids: torch.Tensor, eos: int) -> torch.Tensor:
    """(B, L) int64: 1 up to the first end mark."""
    ends = (ids == eos).long()
    return ((ends.cumsum(dim=1) - ends) == 0).long()
