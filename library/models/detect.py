"""What a model file is, told from the names and shapes in its header alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.files import Header
from library.log import DataError
from library.models.locations import joint_header, locate
from library.models.scaled_files import odd_weight, without_scales
from library.types import Finding


@dataclass(frozen=True)
class Kind:
    """A kind of model file."""

    name: str
    description: str
    """With article, such as `a CLIP-L text encoder`."""
    roles: tuple[str, ...] = ()
    """What it can be used as, see `ROLES`."""
    hint: str = ""
    """What to do with it."""


@dataclass(frozen=True)
class Role:
    """What a script wants a file for."""

    description: str
    folders: tuple[str, ...]
    """Where it lies in a Diffusers folder."""


ROLES = {
    "flux": Role("a FLUX.1 transformer", ("transformer",)),
    "flux_ae": Role("a FLUX.1 autoencoder", ("vae",)),
    "sd_vae": Role("an SD or SDXL autoencoder", ("vae",)),
    "clip_l": Role("a CLIP-L text encoder", ("text_encoder",)),
    "clip_g": Role("a CLIP-G text encoder", ("text_encoder_2",)),
    "t5xxl": Role("a T5-XXL text encoder", ("text_encoder_3", "text_encoder_2")),
    "sd3": Role("an SD3 checkpoint", ("transformer",)),
    "sd3_vae": Role("an SD3 autoencoder", ("vae",)),
    "sdxl": Role("an SDXL checkpoint", ("unet",)),
    "sd": Role("an SD 1.x or 2.x checkpoint", ("unet",)),
    "network": Role("a LoRA or another network", ()),
    "textual_inversion": Role("a textual inversion embedding", ()),
    "controlnet": Role("a ControlNet", ()),
}


@dataclass(frozen=True)
class _Names:
    """The header, as the rules ask for it."""

    shapes: Mapping[str, tuple[int, ...]]

    def has(self, *ends: str) -> bool:
        """Whether some name ends in one of these."""
        return any(name.endswith(ends) for name in self.shapes)

    def starts(self, *starts: str) -> bool:
        return any(name.startswith(starts) for name in self.shapes)

    def contains(self, part: str) -> bool:
        return any(part in name for name in self.shapes)

    def size(self, end: str, axis: int) -> int:
        """Extent of the first tensor whose name ends so; 0 without one."""
        shape = next((shape for name, shape in self.shapes.items() if name.endswith(end)), ())
        return shape[axis] if len(shape) > axis else 0


Rule = Callable[[_Names], Kind | None]


def detect(header: Header | Mapping[str, tuple[int, ...]]) -> Kind:
    """The kind of file with this header, or with tensors of these shapes."""
    names = _Names(without_scales(header.shapes if isinstance(header, Header) else header))
    return next((kind for rule in _RULES if (kind := rule(names)) is not None), UNKNOWN)


def check(path: Path | str, option: str, wanted: str) -> Finding | None:
    """What is wrong with the file that `option` gives for the role `wanted`, None if nothing; reads the header only."""
    try:
        header = joint_header(locate(path, option, ROLES[wanted].folders), option)
    except DataError as error:
        return Finding(error=True, what=error.what, where=error.where, hint=error.hint, code=error.code)
    return refusal(header, path, option, wanted)


def refusal(header: Header, path: Path | str, option: str, wanted: str) -> Finding | None:
    """Why the file with this header cannot play the role `wanted`; None if it can."""
    name, where = Path(path).name, f"{option} {path}"
    kind = detect(header)
    if wanted not in kind.roles:
        what = f"{name} is {kind.description}, but {option} wants {ROLES[wanted].description}"
        hint = _OTHER_SCRIPTS if kind.hint.endswith(f" as {option}") else kind.hint
        return Finding(error=True, what=what, where=where, hint=hint, code="E-MODEL-KIND")
    types = {info.dtype for info in header.tensors.values()} & set(_REFUSED_TYPES)
    if types:
        stored = ", ".join(sorted(_REFUSED_TYPES[name] for name in types))
        hint = "use a bf16, fp16 or float8_e4m3fn file"
        what = f"{name} stores its weights as {stored}, which is not supported"
        return Finding(error=True, what=what, where=where, hint=hint, code="E-MODEL-DTYPE")
    if odd := odd_weight(header.tensors):
        what = f"{name} stores {odd} with scales, but not as float8_e4m3fn with one for all or for each row"
        hint = "use a bf16, fp16 or float8_e4m3fn file"
        return Finding(error=True, what=what, where=where, hint=hint, code="E-MODEL-DTYPE")
    return None


_OTHER_SCRIPTS = "use the scripts for that kind of model"
_REFUSED_TYPES = {
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

UNKNOWN = Kind("unknown", "of an unknown kind", hint="check that it is the right file")


def _quantized(names: _Names) -> Kind | None:
    if names.has(".weight_scale_2", ".pre_quant_scale"):
        what = "a model in 'scaled' form with more than one scale for a weight"
        return Kind("scaled", what, hint="use the bf16, fp16 or float8_e4m3fn file")
    if names.has(".absmax") or names.contains(".quant_state.") or names.has(".qweight"):
        return Kind("quantized", "a model quantised to 4 or 8 bits", hint="use the bf16 or fp16 file")
    return None


def _network(names: _Names) -> Kind | None:
    def kind(name: str, description: str) -> Kind:
        return Kind(name, description, ("network",), "give it as --network_weights or --base_weights")

    if names.starts("lllite_unet"):
        return kind("lllite", "a ControlNet-LLLite")
    if names.starts("oft_unet", "oft_te") or names.has(".oft_blocks", ".oft_diag"):
        return kind("oft", "an OFT network")
    if names.has(".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".lokr_w2", ".on_input", ".diff", ".diff_b"):
        return kind("lycoris", "a LyCORIS network")
    if names.starts("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_"):
        return kind("lora", "a LoRA (kohya format)")
    if names.has(".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight"):
        return kind("lora_diffusers", "a LoRA (Diffusers or PEFT format)")
    return None


def _embedding(names: _Names) -> Kind | None:
    all_names = set(names.shapes)
    if all_names in ({"emb_params"}, {"clip_l", "clip_g"}) or "string_to_param" in all_names or "IN01" in all_names:
        what = "a textual inversion embedding"
        return Kind("textual_inversion", what, ("textual_inversion",), "give it as --weights")
    return None


def _controlnet(names: _Names) -> Kind | None:
    if names.has("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight") or names.starts(
        "controlnet_blocks.", "controlnet_x_embedder.", "control_model.", "controlnet_mid_block."
    ):
        return Kind("controlnet", "a ControlNet", ("controlnet",))
    return None


def _flux(names: _Names) -> Kind | None:
    if names.has("double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight"):
        return Kind("flux2", "a FLUX.2 transformer", hint="this project trains FLUX.1")
    if names.contains("distilled_guidance_layer."):
        return Kind("chroma", "a Chroma transformer", hint="this project trains FLUX.1-dev and -schnell")
    if names.has("double_blocks.0.img_attn.norm.key_norm.scale"):
        if names.size("img_in.weight", 1) != names.size("final_layer.linear.weight", 0):
            what = "a FLUX.1 transformer with extra image inputs (Fill, Depth, Canny)"
            return Kind("flux_tools", what, hint="this project trains FLUX.1-dev and -schnell")
        variant = "dev" if names.has("guidance_in.in_layer.weight") else "schnell"
        if names.starts("text_encoders.", "vae."):
            return Kind("flux", f"a FLUX.1-{variant} checkpoint with everything in it", ("flux", "flux_ae"))
        return Kind("flux", f"a FLUX.1-{variant} transformer", ("flux",), "give it as --pretrained_model_name_or_path")
    if names.has("transformer_blocks.0.attn.add_k_proj.weight") and names.starts("single_transformer_blocks."):
        variant = "dev" if names.has("time_text_embed.guidance_embedder.linear_1.weight") else "schnell"
        hint = "give its folder as --pretrained_model_name_or_path"
        return Kind("flux_diffusers", f"a FLUX.1-{variant} transformer (Diffusers)", ("flux",), hint)
    return None


def _sd3(names: _Names) -> Kind | None:
    hint = "use the sd3 scripts"
    if names.has("joint_blocks.0.context_block.attn.qkv.weight"):
        version = "3" if not names.has("joint_blocks.0.context_block.attn.ln_k.weight") else _sd35(names)
        inside = [role for role, (start, end) in _SD3_PARTS.items() if names.has(f"{start}{end}")]
        what = "checkpoint" if inside else "transformer"
        return Kind("sd3", f"an SD{version} {what}", ("sd3", *inside), hint)
    if names.has("transformer_blocks.0.attn.add_k_proj.weight") and names.has("pos_embed.proj.weight"):
        return Kind("sd3_diffusers", "an SD3 transformer (Diffusers)", ("sd3",), hint)
    return None


def _sd35(names: _Names) -> str:
    return "3.5-medium" if names.has("joint_blocks.0.x_block.attn2.qkv.weight") else "3.5-large"


_SD3_PARTS = {
    "sd3_vae": ("first_stage_model.", "decoder.conv_in.weight"),
    "clip_l": ("text_encoders.clip_l.transformer.", "text_model.embeddings.token_embedding.weight"),
    "clip_g": ("text_encoders.clip_g.transformer.", "text_model.embeddings.token_embedding.weight"),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "encoder.block.0.layer.0.SelfAttention.q.weight"),
}
"""What may lie in an SD3 checkpoint beside the transformer: a role, and a tensor of it."""


def _stable_diffusion(names: _Names) -> Kind | None:
    """Single files and U-Nets of SD 1.x, 2.x and SDXL."""
    if names.has("input_blocks.1.0.in_layers.0.weight") or names.starts("cond_stage_model.", "conditioner."):
        kind = _single_file(names)
    elif names.has("down_blocks.0.resnets.0.time_emb_proj.weight"):
        kind = _diffusers_unet(names)
    else:
        return None
    channels = names.size("input_blocks.0.0.weight", 1) or names.size("conv_in.weight", 1)
    if channels in (0, 1, 4) or not kind.roles:  # 1: shapes unknown
        return kind
    what = _INPUTS.get(channels, f"a variant with {channels} input channels of")
    roles = tuple(role for role in kind.roles if role == "sd_vae")
    hint = "it cannot be trained here; use the model that it was made from"
    return Kind(f"{kind.name}_inputs", f"{what} {kind.description}", roles, hint)


_INPUTS = {
    5: "a depth variant (5 input channels) of",
    7: "an upscaler variant (7 input channels) of",
    8: "an InstructPix2Pix variant (8 input channels) of",
    9: "an inpainting variant (9 input channels) of",
}
"""Variants of SD and SDXL by what their U-Net sees: the noisy latents have 4 channels."""


def _single_file(names: _Names) -> Kind:
    """By the text encoders in it; without any, by what the U-Net embeds and the width of the text that it looks at."""
    labels = names.has("label_emb.0.0.weight")
    if names.starts("conditioner.embedders.1."):
        return _sdxl("sdxl", "an SDXL checkpoint", ("sdxl", "sd_vae"))
    refiner = names.size("label_emb.0.0.weight", 1) == _REFINER_LABELS
    if names.starts("conditioner.embedders.0.model.") or refiner:
        return Kind("sdxl_refiner", "an SDXL refiner checkpoint", hint="it cannot be trained; use the base model")
    if labels and names.starts("cond_stage_model.", "embedder."):
        return Kind("sd2_unclip", "an SD 2.x unCLIP checkpoint", ("sd_vae",), "it cannot be trained; use SD 2.1")
    if labels:
        return _sdxl("sdxl", "an SDXL checkpoint" if names.has(_DECODER) else "an SDXL U-Net", ("sdxl",))
    second = names.starts("cond_stage_model.model.") or names.size(_CROSS, 1) == 1024
    version = "2" if second else "1"
    whole = names.starts("cond_stage_model.")
    what = f"an SD {version}.x checkpoint" if whole or names.has(_DECODER) else f"an SD {version}.x U-Net"
    return Kind(f"sd{version}", what, ("sd", "sd_vae") if names.has(_DECODER) else ("sd",), "use the scripts for SD")


def _diffusers_unet(names: _Names) -> Kind:
    if names.size("add_embedding.linear_1.weight", 1) == _REFINER_LABELS:
        what = "an SDXL refiner U-Net (Diffusers)"
        return Kind("sdxl_refiner", what, hint="it cannot be trained; use the base model")
    if names.has("add_embedding.linear_1.weight"):
        return _sdxl("sdxl_diffusers", "an SDXL U-Net (Diffusers)", ("sdxl",))
    if names.has("class_embedding.linear_1.weight"):
        return Kind("sd2_unclip", "an SD 2.x unCLIP U-Net (Diffusers)", hint="it cannot be trained; use SD 2.1")
    return Kind("sd_diffusers", "an SD 1.x or 2.x U-Net (Diffusers)", ("sd",), "use the scripts for SD")


def _sdxl(name: str, description: str, roles: tuple[str, ...]) -> Kind:
    return Kind(name, description, roles, "use the sdxl scripts")


_CROSS = "attn2.to_k.weight"
_DECODER = "first_stage_model.decoder.conv_in.weight"
_REFINER_LABELS = 2560
"""Width of what the refiner's U-Net embeds: pooled text, and five sizes."""


def _vae(names: _Names) -> Kind | None:
    if not names.has("decoder.conv_in.weight") or not names.has("encoder.conv_in.weight"):
        return None
    layout = " (Diffusers)" if names.has("decoder.up_blocks.0.resnets.0.conv1.weight") else ""
    channels = names.size("decoder.conv_in.weight", 1)
    if channels == 4:
        return Kind("sd_vae", f"an SD or SDXL autoencoder{layout}", ("sd_vae",), "give it as --vae")
    if channels == 16:
        hint = "give it as --ae (FLUX.1) or --vae (SD3)"
        return Kind("flux_ae", f"a FLUX.1 or SD3 autoencoder{layout}", ("flux_ae", "sd3_vae"), hint)
    return Kind("vae", f"an autoencoder with {channels} latent channels{layout}")


def _clip(names: _Names) -> Kind | None:
    width = names.size("embeddings.token_embedding.weight", 1)
    if width == 1280:
        return Kind("clip_g", "a CLIP-G text encoder", ("clip_g",), "give it as --clip_g")
    if width == 1024:
        return Kind("clip_h", "a CLIP-H text encoder")
    if width == 768:
        return Kind("clip_l", "a CLIP-L text encoder", ("clip_l",), "give it as --clip_l")
    if width:
        return Kind("clip", "a CLIP text encoder", ("clip_l", "clip_g"), "give it as --clip_l or --clip_g")
    if names.has("transformer.resblocks.0.attn.in_proj_weight"):
        return Kind("open_clip", "an OpenCLIP model in its own format", hint="use the Hugging Face format")
    if names.starts("vision_model.", "visual."):
        return Kind("clip_vision", "a CLIP image encoder")
    return None


def _t5(names: _Names) -> Kind | None:
    if not names.has("encoder.block.0.layer.0.SelfAttention.q.weight"):
        return None
    if names.has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"):
        return Kind("umt5", "a UMT5 text encoder", hint="FLUX and SD3 use T5-XXL v1.1")
    if not names.has("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"):
        return Kind("t5_v1", "a T5 text encoder of version 1.0", hint="FLUX and SD3 use T5-XXL v1.1")
    if names.has("decoder.block.0.layer.0.SelfAttention.q.weight"):
        return Kind("t5_full", "a T5 model with its decoder", ("t5xxl",), "give it as --t5xxl")
    return Kind("t5xxl", "a T5 text encoder", ("t5xxl",), "give it as --t5xxl")


_RULES: tuple[Rule, ...] = (
    _quantized,
    _network,
    _embedding,
    _controlnet,
    _flux,
    _sd3,
    _stable_diffusion,
    _vae,
    _clip,
    _t5,
)
