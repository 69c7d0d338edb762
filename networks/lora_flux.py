"""LoRA for FLUX.1: transformer blocks and CLIP-L (`--network_module networks.lora_flux`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from library.log import DataError, UserError, get_logger
from networks import reading
from networks.arguments import Arguments
from networks.base import DENOISER, LrRatios, ModuleAdapter, Network, encoder_component
from networks.low_rank import Dropouts, LoraAdapter
from networks.targets import FLUX, Target, find

logger = get_logger(__name__)

DEFAULT_RANK = 4
TRAINED_ENCODERS = 1
"""How many of the family's text encoders get new adapters; files may have them for all."""

LATER = (
    *("train_blocks", "train_double_block_indices", "train_single_block_indices"),
    *("split_qkv", "train_t5xxl", "in_dims"),
    *("img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim"),
    *("single_dim", "single_mod_dim", "ggpo_sigma", "ggpo_beta", "network_reg_dims", "network_reg_lrs"),
)
"""Arguments whose feature isn't there yet."""

Encoders = Sequence["nn.Module | None"]


def trained_encoders(encoder_names: Sequence[str], network_args: Mapping[str, str]) -> Sequence[str]:
    """Names of the text encoders that get adapters, of all those of the family; asked before anything is loaded."""
    return encoder_names[:TRAINED_ENCODERS]


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoders: Encoders | nn.Module | None,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> Network:
    """A new network that changes nothing yet, for the parts of the model that are there.

    Args:
        multiplier: strength of the network.
        network_dim: rank, default 4.
        network_alpha: scale times rank, default 1; 0 means the rank.
        vae: not used.
        text_encoders: CLIP-L, T5-XXL; None where one isn't loaded.
        unet: the transformer.
        neuron_dropout: probability of dropping an element between the two matrices.
        kwargs: `--network_args`.

    Errors: UserError for an argument that doesn't exist or has a wrong value.
    """
    settings = _Settings(kwargs, neuron_dropout)
    rank = DEFAULT_RANK if network_dim is None else int(network_dim)
    if rank < 1:
        raise UserError(f"a rank of {rank}", "--network_dim", "give 1 or more", code="E-NETWORK-ARGS")
    alpha = 1.0 if network_alpha is None else network_alpha
    size = reading.Rank(rank, alpha)
    adapters = [
        settings.adapter(target, component, size, multiplier)
        for target, component in _targets(text_encoders, unet)
        if component != encoder_component(1)
    ]
    return settings.network(adapters)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: nn.Module | None,
    text_encoders: Encoders | nn.Module | None,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: object,
) -> tuple[Network, Mapping[str, Tensor]]:
    """A network with the modules and ranks of a file, and the file's tensors; they aren't loaded into it yet.

    Errors: DataError when nothing in the file fits the model.
    """
    if weights_sd is None:
        if file is None:
            raise UserError("no network file", "--network_weights", "give a .safetensors file")
        weights_sd = reading.read_weights(file)
    settings = _Settings(kwargs, None)
    ranks = reading.ranks(weights_sd)
    adapters = [
        settings.adapter(target, component, ranks[target.name], multiplier)
        for target, component in _targets(text_encoders, unet, with_extras=True)
        if target.name in ranks
    ]
    _check_fit(weights_sd, adapters, "" if file is None else str(file), text_encoders, unet)
    return settings.network(adapters).eval() if for_inference else settings.network(adapters), weights_sd


def weights_for(
    weights_sd: Mapping[str, Tensor], text_encoders: Encoders | nn.Module | None, unet: nn.Module | None
) -> dict[str, Tensor]:
    """Those tensors of a file that belong to these parts of the model; empty when none does."""
    names = {target.name for target, _ in _targets(text_encoders, unet, with_extras=True)}
    return {key: tensor for key, tensor in weights_sd.items() if key.partition(".")[0] in names}


def _check_fit(
    tensors: Mapping[str, Tensor],
    adapters: Sequence[ModuleAdapter],
    where: str,
    text_encoders: Encoders | nn.Module | None,
    unet: nn.Module | None,
) -> None:
    """Complains when a file has something for a part of the model that is there, but nothing of it fits.

    Parts that aren't loaded now are not looked at: they may get theirs later.
    """
    parts = [*zip(FLUX.encoders, _as_list(text_encoders), strict=False), (FLUX.denoiser, unet)]
    present = tuple(f"{part.prefix}_" for part, model in parts if model is not None)
    absent = tuple(f"{part.prefix}_" for part in (*FLUX.encoders, FLUX.denoiser) if f"{part.prefix}_" not in present)
    names, fitting = reading.by_module(tensors), {adapter.name for adapter in adapters}
    for prefix in present:
        given = [name for name in names if name.startswith(prefix)]
        if given and not fitting.intersection(given):
            raise _misfit(tensors, where)
    if not adapters and not any(name.startswith(absent) for name in names):
        raise _misfit(tensors, where)
    unknown = [name for name in names if name not in fitting and not name.startswith(absent)]
    if unknown:
        logger.warning("%s: %d modules of the file are unknown, such as %s", where, len(unknown), unknown[0])


def _misfit(tensors: Mapping[str, Tensor], where: str) -> DataError:
    return DataError(f"no weight fits this model: {reading.describe(tensors)}", where, code="E-NETWORK-FILE")


def _as_list(text_encoders: Encoders | nn.Module | None) -> Encoders:
    return [text_encoders] if text_encoders is None or isinstance(text_encoders, nn.Module) else text_encoders


class _Settings:
    """What `--network_args` say."""

    def __init__(self, kwargs: Mapping[str, object], neuron_dropout: float | None) -> None:
        arguments = Arguments(kwargs, LATER)
        for name in ("conv_dim", "conv_alpha"):
            if arguments.given(name):
                logger.warning("%s has no effect: FLUX has no convolutions", name)
        neuron = arguments.number("dropout", high=1.0) if neuron_dropout is None else neuron_dropout
        self.dropouts = Dropouts(
            neuron=neuron or 0.0,
            rank=arguments.number("rank_dropout", high=1.0) or 0.0,
            module=arguments.number("module_dropout", high=1.0) or 0.0,
        )
        ratio = arguments.number("loraplus_lr_ratio")
        denoiser = arguments.number("loraplus_unet_lr_ratio")
        encoders = arguments.number("loraplus_text_encoder_lr_ratio")
        self.lr_ratios = LrRatios(ratio if denoiser is None else denoiser, ratio if encoders is None else encoders)
        self.verbose = arguments.flag("verbose")
        arguments.given("dropout")
        arguments.finish()

    def adapter(self, target: Target, component: str, size: reading.Rank, multiplier: float) -> LoraAdapter:
        """The adapter of one module."""
        return LoraAdapter(
            target.name,
            target.module,
            component,
            rank=size.rank,
            alpha=size.alpha,
            multiplier=multiplier,
            dropouts=self.dropouts,
        )

    def network(self, adapters: Sequence[ModuleAdapter]) -> Network:
        """The network of the adapters."""
        if self.verbose:
            for adapter in adapters:
                logger.info("%s: %s", adapter.name, adapter.module)
        return Network(adapters, self.lr_ratios)


def _targets(
    text_encoders: Encoders | nn.Module | None, unet: nn.Module | None, with_extras: bool = False
) -> Iterator[tuple[Target, str]]:
    """The modules that can have adapters, with their component, in the order of files: encoders first."""
    for index, (encoder, part) in enumerate(zip(_as_list(text_encoders), FLUX.encoders, strict=False)):
        if encoder is not None:
            for target in find(encoder, part):
                yield target, encoder_component(index)
    if unet is None:
        return
    for wanted in [FLUX.denoiser, FLUX.extras] if with_extras else [FLUX.denoiser]:
        if wanted is not None:
            for target in find(unet, wanted):
                yield target, DENOISER
