"""Makes networks for any family: its targets, and the arguments that all low-rank networks have.

A plug-in for a family is a module that reads its own arguments and says which module gets which size (`Selection`);
`plugin.py` makes of it what calls `create` and `create_from_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from library.log import DataError, UserError, get_logger
from library.types import DENOISER
from networks import kinds, reading, splitting
from networks.arguments import Arguments, error
from networks.base import ModuleAdapter, Network, encoder_component
from networks.factored import Dropouts, FactoredAdapter
from networks.groups import LrRatios
from networks.reading import Rank
from networks.rules import IN_FILE, Choice, Rules
from networks.targets import FamilyTargets, Target, another_family, find

logger = get_logger(__name__)

DEFAULT_RANK = 4

Encoders = Sequence["nn.Module | None"]
Selection = Callable[[Target, str], "Rank | None"]
"""The size of the adapter of a module of a component; None: it gets none, unless a rule takes it in."""


@dataclass(frozen=True)
class Parts:
    """The parts of a model that are loaded."""

    family: FamilyTargets
    encoders: Encoders
    """In the family's order, None where one isn't loaded."""
    denoiser: nn.Module | None

    @classmethod
    def of(cls, family: FamilyTargets, text_encoders: Encoders | nn.Module | None, denoiser: nn.Module | None) -> Parts:
        """As plug-ins get them."""
        single = text_encoders is None or isinstance(text_encoders, nn.Module)
        return cls(family, [text_encoders] if single else text_encoders, denoiser)  # type: ignore[list-item, arg-type]

    def targets(self) -> Iterator[tuple[Target, str]]:
        """The modules that can have adapters, with their component: encoders first, extras of the denoiser last."""
        for index, (encoder, part) in enumerate(zip(self.encoders, self.family.encoders, strict=False)):
            if encoder is not None:
                for target in find(encoder, part):
                    yield target, encoder_component(index)
        if self.denoiser is not None:
            for part in filter(None, (self.family.denoiser, self.family.extras)):
                for target in find(self.denoiser, part):
                    yield target, DENOISER

    def prefixes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Beginnings of names in files: of the parts that are loaded, and of the others."""
        pairs = [*zip(self.family.encoders, self.encoders, strict=False), (self.family.denoiser, self.denoiser)]
        loaded = tuple(f"{part.prefix}_" for part, model in pairs if model is not None)
        others = (f"{part.prefix}_" for part in (*self.family.encoders, self.family.denoiser))
        return loaded, tuple(prefix for prefix in others if prefix not in loaded)


@dataclass(frozen=True)
class Settings:
    """What those `--network_args` say that have nothing to do with a family."""

    kind: kinds.Kind
    kind_settings: object
    dropouts: Dropouts
    lr_ratios: LrRatios
    rules: Rules
    split: bool
    """Whether the layers in a fused layer get adapters of their own."""
    verbose: bool
    notes: tuple[str, ...] = ()
    """What is said when a network is made, such as what has no effect."""

    @classmethod
    def from_arguments(
        cls, arguments: Arguments, neuron_dropout: float | None, kind: kinds.Kind | None = None
    ) -> Settings:
        """Reads them; the caller asks for its own and then calls `arguments.finish`.

        `kind` is that of a plug-in that has only one; None: the arguments choose. Errors: UserError.
        """
        neuron = arguments.number("dropout", high=1.0) if neuron_dropout is None else neuron_dropout
        arguments.given("dropout")
        ratio = arguments.number("loraplus_lr_ratio")
        denoiser = arguments.number("loraplus_unet_lr_ratio")
        encoders = arguments.number("loraplus_text_encoder_lr_ratio")
        kind = kind or _kind(arguments)
        return cls(
            kind=kind,
            kind_settings=kind.settings(arguments),
            dropouts=Dropouts(
                neuron=neuron or 0.0,
                rank=arguments.number("rank_dropout", high=1.0) or 0.0,
                module=arguments.number("module_dropout", high=1.0) or 0.0,
            ),
            lr_ratios=LrRatios(ratio if denoiser is None else denoiser, ratio if encoders is None else encoders),
            rules=Rules.from_arguments(arguments),
            split=_splits(arguments, kind),
            verbose=arguments.flag("verbose"),
        )

    def noting(self, note: str) -> Settings:
        """These settings with one more note."""
        return replace(self, notes=(*self.notes, note))

    def new_adapter(self, target: Target, component: str, choice: Choice, multiplier: float) -> ModuleAdapter:
        """A new adapter for a module that gets one."""
        assert choice.size is not None
        adapter: ModuleAdapter
        if self.split and target.parts:
            adapter = splitting.SplitAdapter(
                target, component, size=choice.size, multiplier=multiplier, dropouts=self.dropouts
            )
        else:
            adapter = self.kind.create(target, component, choice.size, multiplier, self.dropouts, self.kind_settings)
        adapter.lr = choice.lr
        return adapter

    def adapter_of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float
    ) -> ModuleAdapter | None:
        """An adapter of the kind and size that a module has in a file; None: the kind is unknown."""
        split = splitting.of_file(target, component, tensors, multiplier, self.dropouts) if self.split else None
        own = split or self.kind.of_file(target, component, tensors, multiplier, self.dropouts)
        return own or kinds.of_file(target, component, tensors, multiplier, self.dropouts)

    def network(self, parts: Parts, adapters: Sequence[ModuleAdapter]) -> Network:
        """The network of some adapters; says what they are where that was asked for, and what has no effect."""
        for note in self.notes:
            logger.warning("%s", note)
        for line in self.rules.table():
            logger.info("rules: %s", line)
        for adapter in adapters if self.verbose else ():
            logger.info("%s: %s", adapter.name, _described(adapter))
        return Network(adapters, self.lr_ratios, self.translation(parts))

    def translation(self, parts: Parts) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """What makes of the tensors of a file those that adapters load."""
        split_parts = _denoiser_parts(parts) if self.split else None
        return partial(_translated, aliases=parts.family.aliases, split_parts=split_parts)


def size_of(network_dim: int | None, network_alpha: float | None) -> Rank:
    """`--network_dim` and `--network_alpha`, or their defaults 4 and 1. Errors: UserError for a rank below 1."""
    rank = DEFAULT_RANK if network_dim is None else int(network_dim)
    if rank < 1:
        raise UserError(f"a rank of {rank}", "--network_dim", "give 1 or more", code="E-NETWORK-ARGS")
    return Rank(rank, 1.0 if network_alpha is None else network_alpha)


def create(parts: Parts, settings: Settings, select: Selection, default: Rank, multiplier: float) -> Network:
    """A new network that changes nothing yet.

    Args:
        parts: what is loaded of the model.
        settings: the arguments.
        select: the family's choice, which rules then change.
        default: size of modules that a rule takes in without saying one.
        multiplier: strength of the network.

    Errors: UserError for a rule without effect, when no module is left, and for a denoiser of another family.
    """
    if parts.denoiser is not None and all(component != DENOISER for _, component in parts.targets()):
        raise another_family(path for path, _ in parts.denoiser.named_modules())
    adapters = []
    wanted: dict[str, bool] = {}
    for target, component in parts.targets():
        size = select(target, component)
        choice = settings.rules.choose(target, size, default)
        wanted[component] = wanted.get(component, component == DENOISER) or size is not None
        if choice.size is not None:
            adapters.append(settings.new_adapter(target, component, choice, multiplier))
    if wanted:
        settings.rules.check()
    missing = [component for component in wanted if wanted[component]]
    for component in missing:
        if not any(adapter.component == component for adapter in adapters):
            option = "--network_train_text_encoder_only" if component == DENOISER else "--network_train_unet_only"
            what = f"no module of {component} is left to train"
            raise error(what, "", f"leave fewer out, or the part as a whole with {option} or a rate of 0")
    return settings.network(parts, adapters)


def create_from_weights(
    parts: Parts,
    settings: Settings,
    multiplier: float,
    file: str | Path | None,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
) -> tuple[Network, Mapping[str, Tensor]]:
    """A network with the modules, kinds and sizes of a file, and the file's tensors, not loaded into it yet.

    The tensors have the names that the network uses.

    Of the rules, learning rates and `train` count.

    Errors: DataError when nothing in the file fits the model.
    """
    if weights_sd is None:
        if file is None:
            raise UserError("no network file", "--network_weights", "give a .safetensors file")
        weights_sd = reading.read_weights(file)
    where = "" if file is None else str(file)
    for rule in settings.rules.sized():
        logger.warning("rule %s: dim and alpha have no effect, the file has the sizes", rule)
    weights_sd = settings.translation(parts)(weights_sd)
    modules = reading.by_module(weights_sd)
    found, adapters = [], []
    for target, component in parts.targets():
        tensors = modules.get(target.name)
        adapter = tensors and settings.adapter_of_file(target, component, tensors, multiplier)
        if not adapter:
            continue
        found.append(adapter)
        choice = settings.rules.choose(target, IN_FILE, IN_FILE)
        if choice.size is not None:
            adapter.lr = choice.lr
            adapters.append(adapter)
    _check_fit(parts, weights_sd, found, where)
    if found:
        settings.rules.check()
    network = settings.network(parts, adapters)
    return network.eval() if for_inference else network, weights_sd


def weights_for(parts: Parts, weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of a file that belong to parts of the model; empty when none does."""
    names = {target.name for target, _ in parts.targets()}
    renamed = reading.renamed(weights_sd, parts.family.aliases)
    return {key: tensor for key, tensor in renamed.items() if key.partition(".")[0] in names}


def _translated(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], split_parts: Mapping[str, Sequence[int]] | None
) -> Mapping[str, Tensor]:
    tensors = reading.renamed(tensors, aliases)
    return tensors if split_parts is None else splitting.as_trained(tensors, split_parts)


def _described(adapter: ModuleAdapter) -> str:
    size = f" dim={adapter.rank} alpha={float(adapter.alpha):g}" if isinstance(adapter, FactoredAdapter) else ""
    own = "" if adapter.lr is None else f" lr={adapter.lr:g}"
    return f"{type(adapter).__name__}{size}{own} on {adapter.module}"


def _kind(arguments: Arguments) -> kinds.Kind:
    name = arguments.choice("algo", tuple(kinds.KINDS)) or "lora"
    if arguments.flag("dora_wd"):
        if name not in ("lora", "dora"):
            raise error(f"it doesn't go with algo={name}", "dora_wd", "leave one of them out")
        name = "dora"
    return kinds.KINDS[name]


def _splits(arguments: Arguments, kind: kinds.Kind) -> bool:
    split = arguments.flag("split_qkv")
    if split and kind.name != "lora":
        raise error(f"only LoRA can be split, not {kind.name}", "split_qkv", "leave it or the other algorithm out")
    return split


def _denoiser_parts(parts: Parts) -> dict[str, tuple[int, ...]]:
    return {target.name: target.parts for target, component in parts.targets() if component == DENOISER}


def _check_fit(parts: Parts, tensors: Mapping[str, Tensor], adapters: Sequence[ModuleAdapter], where: str) -> None:
    """Complains when a file has something for a part of the model that is there, but nothing of it fits.

    Parts that aren't loaded now are not looked at: they may get theirs later.
    """
    present, absent = parts.prefixes()
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
