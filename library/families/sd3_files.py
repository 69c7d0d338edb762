"""Where the parts of an SD3 model lie, and what the SD3 scripts do with them: find, check, load, write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from library.findings import error, of_error
from library.log import UserError
from library.models import loading_sd3
from library.models.checkpoints_sd import OPTION, Part, part_fingerprint
from library.models.keymaps import PROJECTION, T5_EMBEDDINGS, Shapes
from library.models.keymaps_sd3 import CLIP_G, CLIP_L, ENCODERS, T5
from library.models.loading import Finished, frozen
from library.models.loading_sd3 import VAE, Sd3Files
from library.models.mmdit import MMDiTConfig
from library.option_groups import (
    LegacySDOptions,
    ModelOptions,
    Sd3FullOptions,
    Sd3InferenceOptions,
    Sd3TextOptions,
    T5TextOptions,
)
from library.options import Options
from library.places import check_readable
from library.types import DENOISER, Finding, Saving

T5_OPTIONS = (
    *("t5xxl_max_token_length", "apply_t5_attn_mask", "t5xxl_dtype", "t5xxl_device", "t5_dropout_rate"),
    *("train_t5xxl", "learning_rate_te3", "save_t5xxl"),
)
"""Options that do nothing without T5."""
CLIP_EMBEDDING = "text_model.embeddings.token_embedding.weight"


@dataclass
class Sd3Model:
    """The files of a model, as a script's options name them."""

    path: str | None
    """The checkpoint."""
    separate: Mapping[str, str | None]
    """Files of parts, which win over the checkpoint; see `Sd3Files`."""
    option: str = OPTION
    mmap: bool = True
    uses_t5: bool = True
    """Whether T5 is used where there is one."""
    t5_options: tuple[str, ...] = ()
    """Options that were given and are about T5."""
    saved_encoders: tuple[str, ...] = ()
    """Text encoders that are written with a whole model; those that are trained always are."""

    @classmethod
    def from_options(cls, options: Options) -> Sd3Model:
        """As the options of a training or caching script say."""
        model, text, own = options[ModelOptions], options[T5TextOptions], options[Sd3TextOptions]
        saving = options[Sd3FullOptions] if options.has(Sd3FullOptions) else Sd3FullOptions()
        return cls(
            model.pretrained_model_name_or_path,
            {CLIP_L: text.clip_l, CLIP_G: own.clip_g, T5: text.t5xxl, VAE: options[LegacySDOptions].vae},
            mmap=not model.disable_mmap_load_safetensors,
            t5_options=tuple(name for name in T5_OPTIONS if options.script.option(name) and options.is_meant(name)),
            saved_encoders=(*((CLIP_L, CLIP_G) if saving.save_clip else ()), *((T5,) if saving.save_t5xxl else ())),
        )

    @classmethod
    def from_inference_options(cls, options: Sd3InferenceOptions) -> Sd3Model:
        """As the options of the inference script say."""
        uses_t5 = not options.do_not_use_t5xxl
        return cls(
            options.ckpt_path,
            {
                CLIP_L: options.clip_l,
                CLIP_G: options.clip_g,
                T5: options.t5xxl if uses_t5 else None,
                VAE: options.vae,
            },
            option="--ckpt_path",
            uses_t5=uses_t5,
        )

    @cached_property
    def files(self) -> Sd3Files:
        """Errors: UserError when no checkpoint was given."""
        if not self.path:
            hint = f"give {self.option} FILE"
            raise UserError("a model file is missing from the command", self.option, hint, code="E-MODEL-NONE")
        return Sd3Files(self.path, self.separate, option=self.option, mmap=self.mmap)

    @cached_property
    def encoder_names(self) -> tuple[str, ...]:
        """The encoders: those of CLIP, and T5 where there is one. Of files that can't be read `findings` tells."""
        try:
            has_t5 = self.uses_t5 and self.files.find(T5) is not None
        except UserError:
            has_t5 = self.uses_t5
        return ENCODERS if has_t5 else (CLIP_L, CLIP_G)

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """The transformer `unet`, the encoders and `vae`. Errors: DataError for a bad file, or when one is missing."""
        return {name: self.files.part(name) for name in (DENOISER, *self.encoder_names, VAE)}

    @cached_property
    def shapes(self) -> dict[str, Shapes]:
        """Of the tensors of the transformer and the encoders."""
        return {name: part.shapes for name, part in self.parts.items() if name != VAE}

    def findings(self) -> list[Finding]:
        """What is wrong with the files, from their headers: kind, and missing parts."""
        given = {self.option: self.path, **{f"--{name}": path for name, path in self.separate.items()}}
        found = [finding for option, path in given.items() if path for finding in check_readable(path, option)]
        if found or not self.path:
            return found
        try:
            return list(self._misfits())
        except UserError as mistake:
            return [of_error(mistake, "")]

    def _misfits(self) -> Iterator[Finding]:
        """Encoders that say more or less than the transformer listens to. Errors: as `parts`."""
        config = MMDiTConfig.from_shapes(self.parts[DENOISER].shapes)
        l_width, pooled = self.parts[CLIP_L].shapes[CLIP_EMBEDDING][1], self.parts[CLIP_G].shapes[PROJECTION][0]
        both = f"{self.parts[CLIP_L].where}, {self.parts[CLIP_G].where}"
        if l_width + pooled != config.pooled_width:
            what = f"of CLIP-L and CLIP-G come {l_width} and {pooled} numbers, of which this model wants "
            yield error(f"{what}{config.pooled_width} together", both, "give its own encoders", "E-MODEL-KIND")
        elif l_width > pooled:
            yield error("CLIP-L and CLIP-G are swapped", both, "swap --clip_l and --clip_g", "E-MODEL-KIND")
        if T5 in self.parts and (width := self.parts[T5].shapes[T5_EMBEDDINGS[0]][1]) != config.context_width:
            what = f"of this T5 come {width} numbers for each token, of which this model wants {config.context_width}"
            yield error(what, self.parts[T5].where, "give T5-XXL", "E-MODEL-KIND")

    def identity(self, name: str) -> str:
        """Changes when a part changes."""
        return part_fingerprint(self.parts[name])

    # loading

    def outline(self, name: str) -> nn.Module:
        """The transformer or an encoder without its weights."""
        return loading_sd3.outline(self.files, name)

    def load_denoiser(
        self, device: torch.device, dtype: torch.dtype | None, finished: Finished | None, keep_float8: bool
    ) -> nn.Module:
        """See `Family.load_denoiser`."""
        return loading_sd3.load_mmdit(self.files, dtype, device, finished=finished, keep_float8=keep_float8).eval()

    def load_encoders(
        self,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        finished: Finished | None,
        keep_float8: bool,
    ) -> dict[str, nn.Module]:
        """See `Family.load_encoders`."""
        wanted = (name for name in self.encoder_names if name in names)
        return {
            name: frozen(
                loading_sd3.load_encoder(self.files, name, dtype, device, finished=finished, keep_float8=keep_float8)
            )
            for name in wanted
        }

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """See `Family.load_vae`."""
        return frozen(loading_sd3.load_vae(self.files, dtype, device))

    # whole models

    def model_elements(self) -> int:
        """See `Family.model_elements`."""
        written = (DENOISER, VAE, *(name for name in self.saved_encoders if name in self.parts))
        return sum(math.prod(shape) for name in written for shape in self.parts[name].shapes.values())

    def save(self, path: Path, parts: Mapping[str, nn.Module], saving: Saving) -> None:
        """See `Family.save_model`."""
        encoders = tuple(name for name in self.encoder_names if name in parts or name in self.saved_encoders)
        with loading_sd3.single_file(self.files, parts, encoders, saving.dtype) as joined:
            joined.save_safetensors(path, saving.metadata)
