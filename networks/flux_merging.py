"""Merging of networks into FLUX.1 and its text encoders, and with each other."""

from __future__ import annotations

from functools import partial

from library.option_groups import FluxMergeLoraOptions
from networks import model_merging, places
from networks.base import encoder_component
from networks.flux_files import FLUX
from networks.model_merging import MergeFamily, Part

PARTS = (
    Part(
        "clip_l",
        "clip_l_save_to",
        "clip_l",
        "lora_te1_",
        partial(places.clip_places, prefix="lora_te1", component=encoder_component(0)),
    ),
    Part("t5xxl", "t5xxl_save_to", "t5xxl", "lora_te3_", places.t5_places),
    Part("flux_model", "save_to", "flux", "lora_unet_", places.flux_places),
)


def merge(options: FluxMergeLoraOptions) -> None:
    """What `networks/flux_merge_lora.py` does. Errors: see `model_merging.merge`."""
    model_merging.merge(MergeFamily(FLUX, PARTS), options)
