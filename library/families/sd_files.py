"""What the families of SD 1.x, 2.x and SDXL share: the checkpoint that a run starts from, what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from library.epsilon import Epsilon, EpsilonSettings
from library.findings import error, of_error, warning
from library.log import UserError
from library.models import detect, loading_sd, saving_sd
from library.models.checkpoints_sd import (
    OPTION,
    UNET,
    VAE,
    Checkpoint,
    Part,
    Prediction,
    Role,
    find_checkpoint,
    find_vae,
    part_fingerprint,
    stated_prediction,
)
from library.models.loading import frozen
from library.option_groups import (
    LegacySDOptions,
    LossOptions,
    ModelOptions,
    NetworkOptions,
    NoiseOptions,
    OptimizerOptions,
    SnrOptions,
)
from library.places import check_readable
from library.types import DENOISER, Finding, Saving

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.models.keymaps import Shapes
    from library.models.loading import Finished
    from library.options import Options


@dataclass(frozen=True)
class SdFiles:
    """Where the parts of a model lie, and how to read them."""

    model: str | None
    """A single file or a Diffusers folder."""
    role: Role
    vae: str | None = None
    """What to take the autoencoder from instead."""
    option: str = OPTION
    """Which names the model."""
    tokenizer_cache_dir: str | None = None
    mmap: bool = True

    @classmethod
    def from_options(cls, options: Options, role: Role) -> SdFiles:
        """As the options of a training or caching script say."""
        group = options[ModelOptions]
        return cls(
            group.pretrained_model_name_or_path,
            role,
            vae=options[LegacySDOptions].vae,
            tokenizer_cache_dir=group.tokenizer_cache_dir,
            mmap=not group.disable_mmap_load_safetensors,
        )

    @property
    def path(self) -> str:
        """Of the model. Errors: UserError when the option wasn't given."""
        if not self.model:
            hint = f"give {self.option} FILE"
            raise UserError("a model file is missing from the command", self.option, hint, code="E-MODEL-NONE")
        return self.model

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What the path names. Errors: DataError when it is no model of the family."""
        return find_checkpoint(self.path, self.role, self.option, mmap=self.mmap)

    @cached_property
    def stated(self) -> Prediction:
        """What the checkpoint says of what its U-Net predicts."""
        return stated_prediction(self.checkpoint)

    def findings(self) -> list[Finding]:
        """What is wrong with the files, from their headers: kind, and missing parts."""
        found: list[Finding] = []
        for path, option, role in ((self.model, self.option, self.role), (self.vae, "--vae", "sd_vae")):
            if path:
                found += check_readable(path, option) or filter(None, [detect.check(path, option, role)])
        if not found and self.model:
            try:
                self.part_shapes()
                self.vae_identity()
            except UserError as mistake:
                found.append(of_error(mistake, ""))
        return found

    def part_shapes(self) -> dict[str, Shapes]:
        """See `Family.part_shapes`."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, Shapes]:
        checkpoint = self.checkpoint
        assert UNET == DENOISER
        return {name: checkpoint.part(name).shapes for name in (UNET, *checkpoint.encoders)}

    @cached_property
    def vae_part(self) -> Part:
        """Where the autoencoder lies. Errors: DataError when there is none."""
        return self.checkpoint.part(VAE) if self.vae is None else find_vae(self.vae, mmap=self.mmap)

    def vae_identity(self) -> str:
        """See `Family.vae_identity`."""
        return part_fingerprint(self.vae_part)

    def encoder_identities(self) -> list[str]:
        """Text that changes when an encoder changes, for each."""
        return [part_fingerprint(self.checkpoint.part(name)) for name in self.checkpoint.encoders]

    # loading

    def load_unet(
        self, device: torch.device, dtype: torch.dtype | None, finished: Finished | None, keep_float8: bool
    ) -> nn.Module:
        """See `Family.load_denoiser`."""
        return loading_sd.load_unet(
            self.path,
            dtype,
            device,
            role=self.role,
            mmap=self.mmap,
            option=self.option,
            finished=finished,
            keep_float8=keep_float8,
        ).eval()

    def load_encoders(
        self,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        finished: Finished | None,
        keep_float8: bool,
    ) -> dict[str, nn.Module]:
        """See `Family.load_encoders`."""
        loaded = loading_sd.load_encoders(
            self.path,
            dtype,
            device,
            role=self.role,
            names=names,
            mmap=self.mmap,
            option=self.option,
            finished=finished,
            keep_float8=keep_float8,
        )
        return {name: frozen(encoder) for name, encoder in loaded.items()}

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """See `Family.load_vae`."""
        return frozen(
            loading_sd.load_vae(
                self.path, dtype, device, role=self.role, vae=self.vae, mmap=self.mmap, option=self.option
            )
        )

    # whole models

    def model_elements(self) -> int:
        """Of all models of a checkpoint. See `Family.model_elements`."""
        parts = [*self.part_shapes().values(), self.vae_part.shapes]
        return sum(math.prod(shape) for shapes in parts for shape in shapes.values())

    def model_extension(self, kind: str | None) -> str:
        """See `Family.model_extension`."""
        return saving_sd.SINGLE.get(kind or saving_sd.default_kind(self.checkpoint), "")

    def save_model(
        self,
        path: Path,
        parts: Mapping[str, nn.Module],
        saving: Saving,
        settings: EpsilonSettings,
        tokenizers: Mapping[str, Any],
    ) -> None:
        """See `Family.save_model`; `settings` say what the U-Net predicts."""
        product = saving_sd.Product(
            source=self.checkpoint,
            trained=parts,
            vae=None if self.vae is None else self.vae_part,
            dtype=saving.dtype,
            epoch=saving.epoch,
            steps=saving.steps,
            v_prediction=settings.v_parameterization,
            zero_terminal=settings.zero_terminal_snr,
            tokenizers=tokenizers,
        )
        kind = cast("saving_sd.Kind", saving.kind or saving_sd.default_kind(self.checkpoint))
        saving_sd.save_checkpoint(path, kind, product, saving.metadata)


# the objective


def epsilon_settings(options: Options) -> EpsilonSettings:
    """The objective's settings from the option groups that a script has."""
    sources = [
        options[group] for group in (LegacySDOptions, LossOptions, NoiseOptions, SnrOptions) if options.has(group)
    ]
    values: dict[str, object] = {}
    for name in EpsilonSettings.__dataclass_fields__:
        if (source := next((group for group in sources if hasattr(group, name)), None)) is not None:
            values[name] = getattr(source, name)
    return EpsilonSettings(**values)  # type: ignore[arg-type]


def settled(settings: EpsilonSettings, stated: Prediction) -> EpsilonSettings:
    """The settings with what the checkpoint says, where the options say nothing."""
    return replace(
        settings,
        v_parameterization=settings.v_parameterization or stated.kind == "v",
        zero_terminal_snr=settings.zero_terminal_snr or bool(stated.zero_terminal),
    )


@dataclass(frozen=True)
class Asked:
    """What was said on the command line about what the model predicts; None: nothing."""

    velocity: bool | None = None
    zero_terminal: bool | None = None
    relearns: bool = False
    """Whether the U-Net itself is trained, and so may learn to predict something else."""

    @classmethod
    def of(cls, options: Options) -> Asked | None:
        """Of a training script; None: of a caching script, to which it is all the same."""
        if not options.has(OptimizerOptions):
            return None
        group = options[LegacySDOptions]

        def said(name: str) -> bool | None:
            value: bool = getattr(group, name)
            return value if value or options.given(name) else None

        return cls(said("v_parameterization"), said("zero_terminal_snr"), not options.has(NetworkOptions))


def objective_findings(asked: Asked | None, stated: Prediction, settings: EpsilonSettings) -> Iterator[Finding]:
    """What is wrong with what is to be learned; nothing where nothing is (`asked` None)."""
    if asked is None:
        return
    yield from _prediction_findings(asked, stated)
    try:
        Epsilon(settings)
    except UserError as mistake:
        yield of_error(mistake, "")


def _prediction_findings(asked: Asked, stated: Prediction) -> Iterator[Finding]:
    """Where the options say something else about what the U-Net predicts than the checkpoint does."""
    names: Mapping[bool, str] = {True: "velocity", False: "noise"}
    said = None if stated.kind is None else stated.kind == "v"
    if said is not None and asked.velocity is not None and said != asked.velocity:
        what = f"the model predicts {names[said]}, as {stated.said_by} says, and not {names[asked.velocity]}"
        hint = "leave the option out" if asked.velocity else "give --v_parameterization, or neither"
        if asked.relearns:
            yield warning(f"{what}: it will have to learn that anew", "--v_parameterization", hint)
        else:
            yield error(what, "--v_parameterization", hint, code="E-PREDICTION")
    elif said and asked.velocity is None:
        ending = ", and was trained down to pure noise" if stated.zero_terminal else ""
        what = f"switched on: the model predicts velocity{ending}, as {stated.said_by} says"
        yield warning(what, "--v_parameterization")
    if stated.zero_terminal and asked.zero_terminal is False:
        what = f"the model was trained down to pure noise, as {stated.said_by or 'it'} says, and it stays on"
        yield warning(what, "--zero_terminal_snr")
    if asked.zero_terminal and not (asked.velocity or said):
        what = "a model that predicts noise learns nothing from pure noise, and can't begin with it"
        yield warning(what, "--zero_terminal_snr", "it is for models that predict velocity (--v_parameterization)")
