"""The U-Nets of SD 1.x, SD 2.x and SDXL: the Diffusers class, sized by the checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from library.log import DataError
from library.models.attention import attention
from library.models.keymaps import Shapes, count_indices
from library.models.keymaps_sd import unet_version
from library.models.quantized import is_float8
from library.models.unet_blocks import block_paths

if TYPE_CHECKING:
    from torch import nn

SD1_HEADS = 8
HEAD_WIDTH = 64
"""Of SD 2.x and SDXL."""
SIZE_WIDTH = 256
"""Of the embedding of each of SDXL's six sizes."""
SIZES = 6
GROUPS = 32


def build_unet(shapes: Shapes) -> nn.Module:
    """A Diffusers `UNet2DConditionModel` for the checkpoint with these tensors, Diffusers names.

    Raises:
        DataError: a tensor that tells a size is missing.
    """
    from diffusers import UNet2DConditionModel

    try:
        model: nn.Module = UNet2DConditionModel(**unet_config(shapes))
    except (KeyError, IndexError) as missing:
        raise DataError(f"not a U-Net: it has no tensor {missing}", code="E-MODEL-KIND") from None
    attended: Any = model
    attended.set_attn_processor(Attend())
    model.block_paths = block_paths(shapes)  # type: ignore[assignment]
    return model


class Attend:
    """Has the attention of Diffusers' modules computed by `library.models.attention`."""

    def __call__(
        self,
        module: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What a module makes of tokens (B, L, D) that look at themselves, or at text (B, T, C)."""
        assert attention_mask is None, "texts are looked at as a whole"
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = module.to_q(hidden_states), module.to_k(text), module.to_v(text)
        q, k, v = (part.unflatten(-1, (module.heads, -1)) for part in (q, k, v))  # (B, L, H, d)
        answer: Tensor = module.to_out[0](attention(q, k, v))
        return answer


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """The arguments of Diffusers' class that the shapes tell."""
    levels = count_indices(shapes, r"down_blocks\.(\d+)\.")
    blocks = [count_indices(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in range(levels)]
    channels = tuple(shapes[f"down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels))
    down = [_depths(shapes, f"down_blocks.{level}.") for level in range(levels)]
    up = [_depths(shapes, f"up_blocks.{level}.") for level in range(levels)]
    time_width = shapes["time_embedding.linear_1.weight"][0]
    version = unet_version(shapes)
    heads = [SD1_HEADS if version == "1" else max(1, width // HEAD_WIDTH) for width in channels]
    config: dict[str, Any] = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up),
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else tuple(blocks),
        "cross_attention_dim": next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")),
        "attention_head_dim": heads[0]
        if len(set(heads)) == 1
        else tuple(heads),  # the number of heads, despite its name
        "use_linear_projection": version != "1",
        "norm_num_groups": math.gcd(GROUPS, *channels),
        "time_embedding_dim": None if time_width == 4 * channels[0] else time_width,
    }
    return config | _depth_config(shapes, down, up) | _size_config(shapes)


def _depths(shapes: Shapes, block: str) -> list[int]:
    """Layers of each transformer in a block."""
    count = count_indices(shapes, re.escape(block) + r"attentions\.(\d+)\.")
    return [_depth(shapes, f"{block}attentions.{index}.") for index in range(count)]


def _depth(shapes: Shapes, transformer: str) -> int:
    return count_indices(shapes, re.escape(transformer) + r"transformer_blocks\.(\d+)\.")


def _depth_config(shapes: Shapes, down: list[list[int]], up: list[list[int]]) -> dict[str, Any]:
    """The depths of the transformers, in the shortest form that Diffusers knows."""
    middle = _depth(shapes, "mid_block.attentions.0.")
    has_middle = any(name.startswith("mid_block.") for name in shapes)
    levels: list[int | list[int]] = [_short(depths) for depths in down]
    if not down[-1]:
        levels[-1] = middle or 1
    kind = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D" if has_middle else None
    config: dict[str, Any] = {"mid_block_type": kind}
    mirrored = [_short(depths) for depths in reversed(up)]
    if all(isinstance(depth, int) for depth in levels) and all(
        not ups or depth == above for depth, above, ups in zip(levels, mirrored, reversed(up), strict=True)
    ):
        same = len(set(map(str, levels))) == 1
        return config | {"transformer_layers_per_block": levels[0] if same else tuple(levels)}
    config["transformer_layers_per_block"] = tuple(levels)
    return config | {"reverse_transformer_layers_per_block": tuple(_short(depths) for depths in up)}


def _short(depths: list[int]) -> int | list[int]:
    return 1 if not depths else depths[0] if len(set(depths)) == 1 else depths


def _size_config(shapes: Shapes) -> dict[str, Any]:
    """SDXL's embedding of pooled text and sizes."""
    if "add_embedding.linear_1.weight" not in shapes:
        return {}
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
    }


def predict(
    unet: Any,
    sample: Tensor,
    timesteps: Tensor,
    context: Tensor,
    pooled: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """The answer (B, C, h, w) of a U-Net.

    Args:
        sample: noisy latents (B, C, h, w).
        timesteps: (B,), in [0, 1000).
        context: what the text encoders say, (B, L, D).
        pooled: SDXL: the projected state (B, P) of the second encoder.
        sizes: SDXL: (B, 6), original height and width, top and left of the crop, target height and width.
    """
    stored = unet.conv_in.weight.dtype
    dtype = (
        sample.dtype if is_float8(stored) else stored
    )  # eight bits are for storage; autocast says what to compute in
    added: Mapping[str, Tensor] | None = None
    if pooled is not None and sizes is not None:
        added = {"text_embeds": pooled.to(dtype), "time_ids": sizes}
    answer: Tensor = unet(
        sample.to(dtype),
        timesteps,
        encoder_hidden_states=context.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return answer
