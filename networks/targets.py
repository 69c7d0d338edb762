"""Which modules of which family get adapters, and what they are called in files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from library.log import UserError


@dataclass(frozen=True)
class Part:
    """A component of a model: its prefix in files, and the paths of its modules that can have an adapter.

    Modules are found by path, so the classes that a version of transformers happens to use don't matter.
    """

    prefix: str
    pattern: str
    """Regular expression on the module path; the group `path` is what file names are made of."""
    root: str = ""
    """Levels that file names have before the group `path`, whether the module tree has them or not."""
    name: str = ""
    """The component, as paths in rules begin; empty for denoisers, whose paths have no such beginning."""
    fused: str | None = None
    """Regular expression on the path of linear layers that hold queries, keys and values one below the other."""
    written: Callable[[str], str] | None = None
    """What file names call the path of a module; None: the same."""

    def target(self, path: str, module: nn.Module) -> Target | None:
        """The module at a path of the module tree; None: it has no adapter."""
        match = re.fullmatch(self.pattern, path)
        if match is None:
            return None
        tail = f"{self.root}{match['path']}"
        path = ".".join(filter(None, (self.name, tail)))
        written = tail if self.written is None else self.written(tail)
        return Target(self.file_name(written), path, module, self._parts(tail, module))

    def is_in(self, paths: Iterable[str]) -> bool:
        """Whether one of these modules, or modules with these tensors, can have an adapter."""
        return any(re.fullmatch(self.pattern, path.removesuffix(".weight")) for path in paths)

    def file_name(self, path: str) -> str:
        """The name of a module in files, by the path that they are to have it at."""
        return f"{self.prefix}_{path}".replace(".", "_")

    def _parts(self, path: str, module: nn.Module) -> tuple[int, ...]:
        """Three as wide as the input, which is the width of the model, and what is left."""
        if self.fused is None or not isinstance(module, nn.Linear) or not re.fullmatch(self.fused, path):
            return ()
        width = module.in_features
        rest = module.out_features - 3 * width
        return (width, width, width, *((rest,) if rest else ()))


class Target(NamedTuple):
    """A module that can have an adapter."""

    name: str
    """As in files: prefix and path with underscores."""
    path: str
    """As in rules: "double_blocks.0.img_attn.qkv", "clip_l.text_model.encoder.layers.0.mlp.fc1"."""
    module: nn.Module
    parts: tuple[int, ...] = ()
    """Numbers of outputs of the layers that are fused in it, queries first; empty: it is one layer."""


@dataclass(frozen=True)
class FamilyTargets:
    """The parts of a model family."""

    denoiser: Part
    """What gets adapters by default."""
    extras: Part | None
    """Modules of the denoiser that get an adapter only on request, or when a file has one."""
    encoders: Sequence[Part]
    """Text encoders, in the family's order."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that modules have in other people's files, and those that they have here."""


CLIP_PATHS = r"(.*\.)?(?P<path>encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))"
T5_PATHS = r"(.*\.)?(?P<path>encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo)))"

FLUX = FamilyTargets(
    denoiser=Part(
        "lora_unet", r"(?P<path>(double|single)_blocks\.\d+\..+)", fused=r".*\.(img_attn\.qkv|txt_attn\.qkv|linear1)"
    ),
    extras=Part("lora_unet", r"(?P<path>(img_in|txt_in|(time|vector|guidance)_in\.(in|out)_layer))"),
    encoders=(
        Part("lora_te1", CLIP_PATHS, root="text_model.", name="clip_l"),
        Part("lora_te3", T5_PATHS, name="t5xxl"),
    ),
)

SD3 = FamilyTargets(
    denoiser=Part("lora_unet", r"(?P<path>joint_blocks\.\d+\..+)", fused=r".*\.attn2?\.qkv"),
    extras=Part(
        "lora_unet",
        r"(?P<path>context_embedder|[ty]_embedder\.mlp\.[02]|x_embedder\.proj"
        r"|final_layer\.(adaLN_modulation\.1|linear))",
    ),
    encoders=(
        Part("lora_te1", CLIP_PATHS, root="text_model.", name="clip_l"),
        Part("lora_te2", CLIP_PATHS, root="text_model.", name="clip_g"),
        Part("lora_te3", T5_PATHS, name="t5xxl"),
    ),
)

UNET_BLOCKS = r"(?:(?:down|up)_blocks\.\d+|mid_block)"
"""Beginnings of the paths of modules in Diffusers' U-Nets."""

SD = FamilyTargets(
    denoiser=Part("lora_unet", rf"(?P<path>{UNET_BLOCKS}\.attentions\.\d+\..+)"),
    extras=Part("lora_unet", rf"(?P<path>{UNET_BLOCKS}\.(resnets|downsamplers|upsamplers)\.\d+\..+)"),
    encoders=(Part("lora_te", CLIP_PATHS, root="text_model.", name="text_encoder"),),
)
"""SD 1.x and 2.x. The extras are residual blocks and what changes the resolution."""

SDXL = FamilyTargets(
    denoiser=SD.denoiser,
    extras=SD.extras,
    encoders=(
        Part("lora_te1", CLIP_PATHS, root="text_model.", name="clip_l"),
        Part("lora_te2", CLIP_PATHS, root="text_model.", name="clip_g"),
    ),
)
"""As it is without its file names, which depend on the model, see `unet.py`."""


def find(model: nn.Module, part: Part) -> Iterator[Target]:
    """The linear and convolution modules of a model that belong to a part, in the order of the model."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # torch.compile puts a level of its own in between
            target = part.target(path.replace("_orig_mod.", ""), module)
            if target is not None:
                yield target


PLUGINS = (("networks.lora_flux", FLUX), ("networks.lora_sd3", SD3), ("networks.lora", SD))
"""Network modules for LoRA, and the families that each is for."""


def another_family(paths: Iterable[str]) -> UserError:
    """The mistake of giving a denoiser, which has these modules or tensors, to a network for another family."""
    names = list(paths)
    fitting = (module for module, family in PLUGINS if family.denoiser.is_in(names))
    hint = f"for this one give --network_module {next(fitting, 'PACKAGE.MODULE of a network that is for it')}"
    return UserError("the network is for another kind of model", "--network_module", hint, code="E-NETWORK")
