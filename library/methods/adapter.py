"""Trains an adapter network beside a frozen model; the network is a plug-in named by `--network_module`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from library import files
from library.findings import of_error
from library.log import UserError, get_logger
from library.methods import plugins, preservation
from library.methods.base import Method, ParamGroup, broadcast, require_something
from library.methods.rates import Rate, Rates
from library.option_groups import MemoryOptions, NetworkOptions, PrecisionOptions
from library.types import DENOISER, Chance, Finding

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.methods.base import Answer
    from library.options import Options
    from library.types import Batch, Cond, Models, Noised

logger = get_logger(__name__)

LIKELY_RANK = 4
"""What plug-ins take where no rank is given, for estimates."""


class Adapter(Method):
    """See `library.methods.base.Method`."""

    keeps_base = True

    def __init__(
        self,
        network: NetworkOptions,
        rates: Rates,
        *,
        dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        alpha_given: bool = True,
        all_options: Mapping[str, object] | None = None,
    ) -> None:
        """What the options say. `dtype`: of the trained weights, None: as the plug-in makes them.

        Where `alpha_given` is False the plug-in takes its own default, which depends on the kind of network.

        Errors: UserError when nothing would be trained, options exclude one another, or there is no such plug-in.
        """
        self.options, self.rates, self.dtype = network, rates, dtype
        self.gradient_checkpointing, self.all_options = gradient_checkpointing, dict(all_options or {})
        if network.network_train_unet_only and network.network_train_text_encoder_only:
            where = "--network_train_unet_only and --network_train_text_encoder_only"
            raise UserError("together they leave nothing to train", where, "give one of them", code="E-NOTHING")
        if network.dim_from_weights and not network.network_weights:
            raise UserError("there are no weights", "--dim_from_weights", "give --network_weights FILE")
        self.plugin = plugins.load(network.network_module)
        self._alpha_given = alpha_given or not hasattr(self.plugin, "trained_encoders")
        self.arguments = plugins.pairs(network.network_args or ())
        self.max_norm = network.scale_weight_norms
        self.trains_denoiser = not network.network_train_text_encoder_only and rates.denoiser.value != 0
        self._encoders = self._trained_encoders()
        if not self.trains_denoiser and not self._encoders:
            raise UserError(
                "nothing would be trained", "; ".join(dict.fromkeys(self.frozen().values())), code="E-NOTHING"
            )
        self._merged: WeakSet[nn.Module] = WeakSet()
        self._network: Any = None
        self._multiplier = 1.0
        self._groups: list[ParamGroup] | None = None
        self._idle: frozenset[int] = frozenset()

    @classmethod
    def from_options(cls, options: Options, encoder_names: Sequence[str] = ()) -> Adapter:
        """See `Method.from_options`."""
        import torch

        precision = options[PrecisionOptions]
        dtype = torch.float16 if precision.full_fp16 else torch.bfloat16 if precision.full_bf16 else None
        return cls(
            options[NetworkOptions],
            Rates.from_options(options, encoder_names),
            dtype=dtype,
            gradient_checkpointing=options[MemoryOptions].gradient_checkpointing,
            alpha_given=options.given("network_alpha"),
            all_options=options.public(),
        )

    @property
    def network(self) -> Any:
        """The plug-in's network."""
        assert self._network is not None, "not attached yet"
        return self._network

    @property
    def recorded_arguments(self) -> dict[str, str]:
        """`--network_args` as they are recorded in files; empty when none were given."""
        return self._keywords() if self.arguments and not self.options.dim_from_weights else dict(self.arguments)

    def trained_encoders(self) -> set[str]:
        """Names of the text encoders that get adapters."""
        return set(self._encoders)

    def frozen(self) -> dict[str, str]:
        """Components without adapters, and why."""
        reasons = {}
        if self.options.network_train_text_encoder_only:
            reasons[DENOISER] = "--network_train_text_encoder_only"
        elif not self.trains_denoiser:
            reasons[DENOISER] = f"{self.rates.denoiser.source} is 0"
        for name, rate in self.rates.encoders.items():
            if name not in self._encoders:
                covered = "the network has no adapters for it" if rate.value else f"{rate.source} is 0"
                reasons[name] = "--network_train_unet_only" if self.options.network_train_unet_only else covered
        return reasons

    def _trained_encoders(self) -> list[str]:
        if self.options.network_train_unet_only:
            return []
        names = list(self.rates.encoders)
        ask = getattr(self.plugin, "trained_encoders", plugins.trained_encoders)
        covered = set(ask(names, self.arguments))
        return [name for name in names if name in covered and self.rates.encoders[name].value != 0]

    def findings(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[Finding]:
        """Whether the network is for another kind of model; those of other packages can't be asked."""
        require_fit = getattr(self.plugin, "require_fit", None)
        if require_fit is None or not self.trains_denoiser:
            return []
        try:
            require_fit(shapes[DENOISER])
        except UserError as mistake:
            return [of_error(mistake, "")]
        return []

    def trained_elements(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> int:
        """Two matrices for each matrix of the trained parts, as low-rank networks have; or what the file holds."""
        if self.options.dim_from_weights:
            return sum(map(math.prod, files.header(str(self.options.network_weights)).shapes.values()))
        rank = self.options.network_dim or LIKELY_RANK
        parts = [shapes[name] for name in ([DENOISER] if self.trains_denoiser else []) + self._encoders]
        matrices = [
            shape for part in parts for name, shape in part.items() if len(shape) == 2 and "embedding" not in name
        ]
        return sum(rank * sum(shape) for shape in matrices)

    def changes_to_encoders(self) -> str:
        """Content and strength of the files of `--base_weights`."""
        multipliers = chain(self.options.base_weights_multiplier or (), repeat(1.0))
        used = zip(self.options.base_weights or (), multipliers, strict=False)
        return "".join(f"+{files.fingerprint(path)}*{multiplier:g}" for path, multiplier in used)

    # attaching

    def loaded(self, models: Models) -> None:
        """Merges the files of `--base_weights` into the parts that are there, each part once."""
        if not self.options.base_weights:
            return
        denoiser = None if models.denoiser in self._merged else models.denoiser
        fresh = {name: part for name, part in models.encoders.items() if part not in self._merged}
        if denoiser is None and not fresh:
            return
        encoders = self._encoder_argument(fresh)
        multipliers = list(self.options.base_weights_multiplier or ())
        for index, path in enumerate(self.options.base_weights):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            network, weights = self.plugin.create_network_from_weights(
                multiplier, path, None, encoders, denoiser, for_inference=True
            )
            if not getattr(network, "is_mergeable", lambda: True)():
                raise UserError("this network kind can't be merged", f"--base_weights {path}", code="E-NETWORK-MERGE")
            network.merge_to(encoders, denoiser, weights, None, None)
            logger.info("merged %s with %g into the base model", path, multiplier)
        self._merged.update(part for part in (denoiser, *fresh.values()) if part is not None)

    def attach(self, models: Models) -> None:
        """Freezes the model and hooks the network onto it."""
        self.loaded(models)
        for part in (models.denoiser, *models.encoders.values()):
            if part is not None:
                part.requires_grad_(False)
        trained = {name: models.encoders[name] for name in self._encoders if name in models.encoders}
        assert len(trained) == len(self._encoders), "a trained text encoder isn't loaded"
        denoiser, encoders = models.denoiser, self._encoder_argument(trained)
        self._network = network = self._create(encoders, denoiser)
        if hasattr(network, "prepare_network"):
            network.prepare_network(SimpleNamespace(**self.all_options))
        network.apply_to(encoders, denoiser, bool(trained), self.trains_denoiser)
        if self.options.network_weights:
            report = network.load_weights(self.options.network_weights)
            logger.info("%s: %s", self.options.network_weights, report)
        if self.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        if self.dtype is not None:
            network.to(dtype=self.dtype)
        if hasattr(network, "prepare_grad_etc"):
            network.prepare_grad_etc(encoders, denoiser)
        if self.max_norm and not hasattr(network, "apply_max_norm_regularization"):
            logger.warning("--scale_weight_norms has no effect: %s doesn't support it", self.options.network_module)
            self.max_norm = None
        self._idle = plugins.idle_parameters(network, trained, models.unused)
        self._parts = encoders, denoiser

    def _create(self, encoders: object, denoiser: nn.Module | None) -> Any:
        options = self.options
        keywords = self._keywords()
        if options.dim_from_weights:
            network, _ = self.plugin.create_network_from_weights(
                1.0, options.network_weights, None, encoders, denoiser, **keywords
            )
        else:
            network = self.plugin.create_network(
                1.0,
                options.network_dim,
                options.network_alpha if self._alpha_given else None,
                None,
                encoders,
                denoiser,
                neuron_dropout=options.network_dropout,
                **keywords,
            )
        if network is None:
            raise UserError(
                "the plug-in made no network", f"--network_module {options.network_module}", code="E-NETWORK"
            )
        return network

    def _keywords(self) -> dict[str, str]:
        dropout = self.options.network_dropout
        return self.arguments if dropout is None else {"dropout": str(dropout), **self.arguments}

    def _encoder_argument(self, encoders: Mapping[str, nn.Module]) -> list[nn.Module | None]:
        """Encoders as a plug-in expects them.

        Ours get None for those that aren't there. Foreign ones get no gaps, and the module paths that they make file
        names of.
        """
        names = list(self.rates.encoders) or list(encoders)
        places: list[nn.Module | None] = [encoders.get(name) for name in names]
        if hasattr(self.plugin, "trained_encoders"):
            return places
        return [plugins.with_file_paths(encoder) for encoder in places if encoder is not None]

    # training

    def param_groups(self) -> list[ParamGroup]:
        """One group for each component, and one more with LoRA+; what is in none of them is frozen."""
        if self._groups is None:
            groups = require_something(self._ask_groups(), f"--network_module {self.options.network_module}")
            grouped = {id(parameter) for group in groups for parameter in group.params}
            for parameter in self.network.parameters():
                parameter.requires_grad_(id(parameter) in grouped)
            self._groups = groups
        return self._groups

    def _ask_groups(self) -> list[ParamGroup]:
        network, rates = self.network, self.rates
        encoder_rates = [rate.value for rate in rates.encoders.values()]
        several = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None:
            answer = several(encoder_rates, rates.denoiser.value, rates.default.value)
        else:
            trained = [rates.encoders[name].value for name in self._encoders]
            older = network.prepare_optimizer_params
            arguments = [trained[0] if trained else None, rates.denoiser.value, rates.default.value]
            answer = older(*arguments[: plugins.positional_limit(older, len(arguments))])
        groups, descriptions = answer if isinstance(answer, tuple) else (answer, None)
        groups = [group if isinstance(group, dict) else {"params": group} for group in list(groups)]
        names = list(descriptions or []) or plugins.group_names(len(groups))
        return [self._group(name.strip(), group) for name, group in zip(names, groups, strict=True)]

    def _group(self, name: str, group: Mapping[str, Any]) -> ParamGroup:
        component, rate = DENOISER, self.rates.denoiser
        if name.startswith(("textencoder", "text_encoder")):
            component, rate = self._encoder_of(name)
        lr = rate.value if group.get("lr") is None else float(group["lr"])
        ratio = f" x {lr / rate.value:g}" if rate.value and lr != rate.value else ""
        source = "--network_args rules" if " lr=" in name else rate.source + ratio
        params = [parameter for parameter in group["params"] if id(parameter) not in self._idle]
        return ParamGroup(name=name, params=params, lr=lr, lr_source=source, component=component)

    def _encoder_of(self, name: str) -> tuple[str, Rate]:
        found, names = re.search(r"\d+", name), list(self.rates.encoders)
        if found is not None and 0 < int(found[0]) <= len(names):
            chosen = names[int(found[0]) - 1]
            return chosen, self.rates.encoders[chosen]
        first = self._encoders[0] if self._encoders else None
        return first or "text encoder", self.rates.encoders[first] if first else self.rates.default

    def prepare(self, accelerator: Any, models: Models) -> None:
        """Brings the network to the device, equal in all processes, and switches it to training."""
        self.network.to(accelerator.device)
        if accelerator.num_processes > 1:
            broadcast(list(self.network.state_dict().values()), accelerator.device)
        self.train_mode(True)

    def train_mode(self, training: bool) -> None:
        """Switches the network between training and evaluation."""
        self.network.train(training)
        if training and hasattr(self.network, "on_epoch_start"):
            self.network.on_epoch_start(*self._parts)

    def chance(self) -> Chance:
        """As the network says; those of other packages can't be asked."""
        ask = getattr(self.network, "chance", None)
        return Chance.HOST if ask is None else ask()

    def before_batch(self, batch: Batch) -> None:
        """Tells the network that a micro-step begins, and sets the strength that the batch's dataset wants."""
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start()
        if batch.multiplier != self._multiplier:
            self._require_multiplier(f"a network_multiplier of {batch.multiplier:g}")
            self.network.set_multiplier(batch.multiplier)
            self._multiplier = batch.multiplier

    def target(self, noised: Noised, batch: Batch, cond: Cond, answer: Answer) -> Noised:
        """What the model says without the network, for samples with `diff_output_preservation`."""
        chosen = preservation.rows(batch.attributes)
        if not chosen:
            return noised
        self._require_multiplier(preservation.ATTRIBUTE)
        with preservation.without(self.network, self._multiplier):
            return preservation.with_base_target(noised, chosen, cond, answer)

    def _require_multiplier(self, wanted: str) -> None:
        if not hasattr(self.network, "set_multiplier"):
            what = f"{self.options.network_module} doesn't support it: the network has no set_multiplier"
            raise UserError(f"{wanted} is asked for", "dataset config", what, code="E-PRESERVATION")

    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Keeps the norms below `--scale_weight_norms`."""
        if not self.max_norm:
            return {}
        device = next(self.network.parameters()).device
        scaled, mean, largest = self.network.apply_max_norm_regularization(self.max_norm, device)
        return {
            "max_norm/keys_scaled": scaled,
            "max_norm/average_key_norm": mean,
            "max_norm/max_key_norm": largest,
        }

    # files

    def state_dict(self) -> dict[str, Tensor]:
        """The network's tensors."""
        tensors: dict[str, Tensor] = self.network.state_dict()
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of `state_dict`."""
        self.network.load_state_dict(dict(tensors))

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Has the network write its file under a temporary name with the same extension, and renames it."""
        with files.atomic_write(path) as temporary:
            written = temporary.with_suffix(path.suffix)
            try:
                self.network.save_weights(str(written), dtype, dict(metadata) if metadata is not None else None)
                written.replace(temporary)
            finally:
                written.unlink(missing_ok=True)
