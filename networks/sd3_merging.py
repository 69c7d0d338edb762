"""Merging of networks into SD3 and SD3.5, their text encoders, and with each other."""

from __future__ import annotations

from functools import partial

from library.models.keymaps_sd3 import ENCODERS
from library.option_groups import Sd3MergeLoraOptions
from networks import model_merging, places
from networks.model_merging import MergeFamily, Part
from networks.sd3_files import SD3
from networks.targets import SD3 as TARGETS

BEGINNINGS = tuple(f"{part.prefix}_" for part in TARGETS.encoders)
PARTS = (
    *(
        Part(name, f"{name}_save_to", name, beginning, partial(places.sd3_encoder_places, encoder=name))
        for name, beginning in zip(ENCODERS, BEGINNINGS, strict=True)
    ),
    Part("sd3_model", "save_to", "sd3", "lora_unet_", places.sd3_places, inside=BEGINNINGS),
)


def merge(options: Sd3MergeLoraOptions) -> None:
    """What `networks/sd3_merge_lora.py` does. Errors: see `model_merging.merge`."""
    model_merging.merge(MergeFamily(SD3, PARTS), options)
