"""Names of adapters in the layouts that programs write, as tables: one row for each layout and family of models.

A row says what names begin with, whether paths are those of the authors or of Diffusers, how they are joined, how the
tensors of a module are called, and which kinds of networks the layout knows. `convert_lora` is all there is besides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from library.models.keymaps import flux_names
from library.models.keymaps_sd import UnetLayout
from library.models.keymaps_sd3 import mmdit_names

FAMILIES = {"flux": "FLUX.1", "sdxl": "SDXL", "sd1": "SD 1.x", "sd2": "SD 2.x", "sd3": "SD3"}
"""In the order in which a file is tried."""
LAYOUTS = {
    "kohya": "sd-scripts (kohya)",
    "comfyui": "ComfyUI",
    "lycoris": "LyCORIS",
    "diffusers": "Diffusers and PEFT",
    "ai-toolkit": "AI-toolkit",
}
"""In the order in which a file is tried."""
KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}

DENOISER = "denoiser"


class Module(NamedTuple):
    """A layer of a model."""

    own: str
    """Path in the layout of its authors."""
    diffusers: tuple[str, ...]
    """Paths of the layers that hold its rows in Diffusers, first rows first."""
    swapped: bool = False
    """Whether the halves of its rows have changed places there, if there are twice as many rows as inputs.

    In SD3 that is so for one layer of the last block, whose namesakes in the others have more rows.
    """


class Unit(NamedTuple):
    """What a name in a file stands for: a module of a component, or one of the layers that it is in Diffusers."""

    component: str
    module: Module
    layer: int


# models


def _flux(blocks: int) -> list[Module]:
    return [
        Module(
            own.removesuffix(".weight"),
            tuple(path.removesuffix(".weight") for path in paths),
            own.startswith("final_layer.adaLN"),
        )
        for own, paths in flux_names(blocks, blocks).items()
        if own.endswith(".weight")
    ]


def _sd3(blocks: int) -> list[Module]:
    return [
        Module(
            own.removesuffix(".weight"),
            tuple(path.removesuffix(".weight") for path in paths),
            own.endswith("context_block.adaLN_modulation.1.weight") or own.startswith("final_layer.adaLN"),
        )
        for own, paths in mmdit_names(blocks).items()
        if own.endswith(".weight") and ".ln_" not in own
    ]


_TRANSFORMER = (
    *(f"{layer}.to_{part}" for layer in ("attn1", "attn2") for part in ("q", "k", "v", "out.0")),
    *("ff.net.0.proj", "ff.net.2"),
)
_UNETS = {
    "sdxl": UnetLayout((2, 2, 2), (False, True, True)),
    "sd": UnetLayout((2, 2, 2, 2), (True, True, True, False)),
}


def _unet(version: str, blocks: int) -> list[Module]:
    """Linear layers and convolutions; SD has one block in each transformer, SDXL has more."""
    layout, depth = _UNETS[version], blocks if version == "sdxl" else 1
    modules = []
    for own, path in layout.modules().items():
        if ".attentions." not in path:
            modules.append(Module(own, (path,)))
            continue
        level = re.match(r"down_blocks\.(\d+)", path)
        if level and not layout.attends_up[int(level[1])]:
            continue  # on the way down attention is where it is on the way up
        inner = [f"transformer_blocks.{number}.{rest}" for number in range(depth) for rest in _TRANSFORMER]
        modules += [Module(f"{own}.{rest}", (f"{path}.{rest}",)) for rest in ("proj_in", "proj_out", *inner)]
    return modules


_CLIP = (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5 = (
    *(f"layer.0.SelfAttention.{part}" for part in ("q", "k", "v", "o")),
    *(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
)


def _layers(start: str, names: Iterable[str], blocks: int) -> list[Module]:
    paths = [f"{start}.{number}.{name}" for number in range(blocks) for name in names]
    return [Module(path, (path,)) for path in paths]


_clip, _t5 = partial(_layers, "encoder.layers", _CLIP), partial(_layers, "encoder.block", _T5)

COMPONENTS: Mapping[str, Mapping[str, Callable[[int], list[Module]]]] = {
    "flux": {DENOISER: _flux, "clip_l": _clip, "t5xxl": _t5},
    "sdxl": {DENOISER: partial(_unet, "sdxl"), "clip_l": _clip, "clip_g": _clip},
    "sd1": {DENOISER: partial(_unet, "sd"), "clip": _clip},
    "sd2": {DENOISER: partial(_unet, "sd"), "clip": _clip},
    "sd3": {DENOISER: _sd3, "clip_l": _clip, "clip_g": _clip, "t5xxl": _t5},
}
"""The modules of each component of a family, for a number of blocks that is large enough."""


# tensors of a module, named as in files of sd-scripts and LyCORIS

FACTORS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
LENGTHS = "dora_scale"
BLOCKS = tuple(f"oft_blocks.{index}" for index in range(4))
TENSORS = (
    *FACTORS,
    *("alpha", LENGTHS),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *(*BLOCKS, "rescale"),
)
Spelling = Mapping[str, tuple[str, ...]]
"""What tensors are called in a layout; the first name is written, all are read."""

_PLAIN: Spelling = {name: (name,) for name in TENSORS}
_ONE_ROTATION: Spelling = {**_PLAIN, **dict.fromkeys(BLOCKS, ()), BLOCKS[0]: ("oft_blocks", BLOCKS[0])}
_EITHER: Spelling = {
    **_ONE_ROTATION,
    FACTORS[0]: ("lora_down.weight", "lora_A.weight"),
    FACTORS[1]: ("lora_up.weight", "lora_B.weight"),
}
_PEFT: Spelling = {
    FACTORS[0]: (
        *("lora_A.weight", "lora_A.default.weight", "lora_A.default_0.weight", "lora.down.weight"),
        *("lora_linear_layer.down.weight", "lora_down.weight"),
    ),
    FACTORS[1]: (
        *("lora_B.weight", "lora_B.default.weight", "lora_B.default_0.weight", "lora.up.weight"),
        *("lora_linear_layer.up.weight", "lora_up.weight"),
    ),
    "alpha": ("alpha",),
    LENGTHS: (
        *("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"),
        *("lora_magnitude_vector.default_0.weight", "dora_scale"),
    ),
}


# layouts


@dataclass(frozen=True)
class Row:
    """A layout, for a family."""

    layout: str
    family: str
    starts: Mapping[str, tuple[str, ...]]
    """By component, what names begin with; the first is written, all are read."""
    joiner: Literal[".", "_"]
    fused: bool
    """Paths are those of the authors, not of Diffusers."""
    spelling: Spelling = field(default_factory=lambda: _PLAIN)
    kinds: tuple[str, ...] = tuple(KINDS)
    folded: bool = False
    """Alpha is the rank, and isn't written."""
    needs_alpha: bool = False
    """Readers want to find alpha."""
    limit: Literal["ratio", "norm"] = "ratio"
    """What alpha of OFT is: the largest norm over the number of outputs, or that norm; 0: there is no limit."""

    @property
    def peft(self) -> bool:
        """Whether lengths of DoRA are in the shape that PEFT has them in."""
        return self.spelling is _PEFT

    def names(self, blocks: int) -> dict[str, Unit]:
        """All names of modules."""
        return {name: unit for unit, names in self._units(blocks) for name in names}

    def name(self, component: str, path: str, *, start: str | None = None, oft: bool = False) -> str:
        """What the layer at a path is called."""
        start = self.starts[component][0] if start is None else start
        return (start.replace("lora_", "oft_", 1) if oft and self.layout == "kohya" else start) + self._joined(path)

    def paths(self, module: Module) -> tuple[str, ...]:
        """The paths of a module, as this layout has them."""
        return (module.own,) if self.fused else module.diffusers

    def _units(self, blocks: int) -> Iterator[tuple[Unit, list[str]]]:
        for component, modules in COMPONENTS[self.family].items():
            for module in modules(blocks):
                for index, path in enumerate(self.paths(module)):
                    names = [self.name(component, path, start=start) for start in self.starts.get(component, ())]
                    if self.layout == "kohya" and component == DENOISER:
                        names.append(self.name(component, path, oft=True))
                    yield Unit(component, module, index), names

    def _joined(self, path: str) -> str:
        return path.replace(".", self.joiner)


def _starts(denoiser: tuple[str, ...], **encoders: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    return {DENOISER: denoiser, **encoders}


_KOHYA = {
    "flux": _starts(("lora_unet_",), clip_l=("lora_te1_text_model_",), t5xxl=("lora_te3_", "lora_te2_")),
    "sdxl": _starts(("lora_unet_",), clip_l=("lora_te1_text_model_",), clip_g=("lora_te2_text_model_",)),
    "sd": _starts(("lora_unet_",), clip=("lora_te_text_model_",)),
    "sd3": _starts(
        ("lora_unet_",),
        clip_l=("lora_te1_text_model_",),
        clip_g=("lora_te2_text_model_",),
        t5xxl=("lora_te3_",),
    ),
}
_COMFYUI = "text_encoders.{}.transformer."
_PEFT_UNET = ("unet.", "base_model.model.unet.", "base_model.model.", "")
_PEFT_CLIP = ("text_encoder.text_model.", "text_encoder.")
_PEFT_CLIP_2 = ("text_encoder_2.text_model.", "text_encoder_2.")
_PEFT_TRANSFORMER = ("transformer.", "base_model.model.transformer.", "base_model.model.", "")
_DIFFUSERS = {
    "flux": _starts(_PEFT_TRANSFORMER, clip_l=_PEFT_CLIP, t5xxl=("text_encoder_2.",)),
    "sd3": _starts(_PEFT_TRANSFORMER, clip_l=_PEFT_CLIP, clip_g=_PEFT_CLIP_2, t5xxl=("text_encoder_3.",)),
    "sdxl": _starts(_PEFT_UNET, clip_l=_PEFT_CLIP, clip_g=_PEFT_CLIP_2),
    "sd": _starts(_PEFT_UNET, clip=_PEFT_CLIP),
}


def _of_family(family: str) -> Iterator[Row]:
    version = "sd" if family in ("sd1", "sd2") else family
    kohya, many = _KOHYA[version], version in ("flux", "sd3")
    encoders = {name: starts for name, starts in kohya.items() if name != DENOISER}
    once = _PLAIN if many else _ONE_ROTATION
    yield Row("kohya", family, kohya, "_", version != "sd", once, needs_alpha=True)
    towers = {name: {"clip": "clip_h" if family == "sd2" else "clip_l"}.get(name, name) for name in encoders}
    levels = {name: "" if name == "t5xxl" else "text_model." for name in encoders}
    dotted = {name: (_COMFYUI.format(tower) + levels[name],) for name, tower in towers.items()}
    yield Row("comfyui", family, _starts(("diffusion_model.",), **dotted), ".", True, _EITHER, limit="norm")
    lycoris = _starts(("lycoris_",), **encoders)
    yield Row("lycoris", family, lycoris, "_", False, _ONE_ROTATION, needs_alpha=True)
    yield Row("diffusers", family, _DIFFUSERS[version], ".", False, _PEFT, ("lora", "dora"), folded=True)
    if many:
        yield Row("ai-toolkit", family, _DIFFUSERS[version], ".", False, _PEFT, ("lora",), folded=True)
    else:
        yield Row("ai-toolkit", family, kohya, "_", False, _ONE_ROTATION, ("lora",), needs_alpha=True)


ROWS = {(row.layout, row.family): row for family in FAMILIES for row in _of_family(family)}
"""By layout and family."""


# what is left of older ways to name things

_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")


def modern(key: str) -> str:
    """A key as it is called today, where Diffusers put LoRA into processors of attention."""
    return _PROCESSOR.sub(lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora.{m[2]}.weight", key)


def blocks_of(keys: Iterable[str]) -> int:
    """More than the largest number of a block or a layer in these keys."""
    found = (int(number) for key in keys for number in re.findall(r"(?:blocks|layers|block|layer)[._](\d+)", key))
    return 1 + max(found, default=0)
