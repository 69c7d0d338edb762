"""What the inference scripts do alike, whatever the family: one model, and images of one prompt or of typed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library import devices
from library.generate.painter import LoraFile, Painter, Plugin
from library.generate.session import Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.base import Family
    from library.option_groups import InferenceOptions
    from library.sampling import SampleRequest


def run(
    group: InferenceOptions,
    family: Family,
    types: Mapping[str, torch.dtype],
    plugin_of: Callable[[Mapping[str, Tensor]], Plugin],
    loras: Sequence[LoraFile],
    first: SampleRequest,
) -> None:
    """Makes the image that is asked for first, or those of the prompts that are typed.

    Args:
        family: with its tokenizers loaded.
        types: of the parts, by name.
        plugin_of: the network module for a file with such tensors.
        loras: the networks to apply.
        first: the image that the options ask for; typed prompts begin with its sizes and the like.
    """
    painter = Painter(
        family,
        types,
        devices.best_device(),
        plugin_of,
        offload=group.offload,
        loras=loras,
        merge=group.merge_lora_weights,
        keep_encoders=group.interactive,
    )
    session = Session(
        painter.render,
        Path(group.output_dir),
        set_multipliers=painter.set_multipliers,
        multiple=family.traits.latent_stride * family.traits.patch,
    )
    if group.interactive:
        session.run_interactive(first)
    else:
        session.run([first])
