"""Weights stored in fewer bits than they compute in: ways to store, which layers are stored, and what options ask for.

Stored are the linear layers of a model's repeated blocks, where nearly all weights are. What lies before and behind
them stays as it is: each value of input and output passes there, and it is less than a hundredth of the whole. Norms,
biases and embeddings always stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library import devices
from library.log import UserError, get_logger
from library.models import eight_bits, four_bits
from library.models.memory import is_narrow, keep
from library.models.products import dense, frozen_linear

logger = get_logger(__name__)

_IN_A_BLOCK = re.compile(r"(?:^|[._])(?:blocks?|layers?)\.\d+\.")


def is_float8(dtype: torch.dtype) -> bool:
    """Whether a type has eight bits and a floating point."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight (out, in)."""

    lower: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """The numbers in few bits, and their scales."""
    product: str
    """How to multiply with it, see `library.models.products.PRODUCTS`."""
    bytes_of: Callable[[int, int], float]
    """Bytes of a weight with so many rows and columns, scales included."""
    fits: Callable[[int, int], bool] = lambda rows, columns: True


SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(eight_bits.cast, "plain", lambda rows, columns: rows * columns),
    "fp8_scaled": Scheme(
        partial(eight_bits.lowered, dtype=eight_bits.FP8), "scaled", lambda rows, columns: rows * (columns + 4)
    ),
    "int8": Scheme(partial(eight_bits.lowered, dtype=torch.int8), "scaled", lambda rows, columns: rows * (columns + 4)),
    "nf4": Scheme(
        four_bits.lowered,
        "four bits",
        lambda rows, columns: rows * (columns / 2 + 4 * columns / four_bits.block_of(columns)),
        lambda rows, columns: four_bits.block_of(columns) >= four_bits.SMALLEST_BLOCK,
    ),
}
_FLOAT8 = ("fp8", "fp8_scaled")
_RAISED = torch.float32


class StoredLinear(nn.Linear):
    """An `nn.Linear` whose frozen weight is held in few bits. All there is of it are parameters and buffers."""

    weight_scale: Tensor | None
    scheme: str
    product: str

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`, in the type that a layer with a dense weight would compute in."""
        return frozen_linear(self, x, keep if is_narrow(self.out_features, self.in_features) else None)

    def extra_repr(self) -> str:
        """Sizes, and how the weight is stored and multiplied."""
        return f"{super().extra_repr()}, scheme={self.scheme}, product={self.product}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves to other devices move all; changes of type leave the weight and its scale alone."""
        held = (self.weight, self.weight_scale)

        def applied(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype == tensor.dtype or all(tensor is not one for one in held):
                return result
            return tensor.to(result.device)

        return super()._apply(applied, recurse)  # type: ignore[no-untyped-call]


# storing


def store(module: nn.Linear, scheme: str, product: str | None = None) -> None:
    """Stores the weight of a layer in place; one that doesn't fit the scheme stays as it is.

    Args:
        scheme: a key of `SCHEMES`. A weight that comes in float8_e4m3fn stays as it is with either of those in float8.
        product: how to multiply in eight bits, see `eight_bit_product`; None: with a weight raised for each product.
    """
    if not SCHEMES[scheme].fits(module.out_features, module.in_features):
        return
    if scheme in _FLOAT8 and module.weight.dtype == eight_bits.FP8:
        if not isinstance(module, StoredLinear):
            adopt(module, module.weight.detach(), None)
    elif not isinstance(module, StoredLinear) or module.scheme != scheme:
        weight = module.weight.detach()
        _hold(module, scheme, *SCHEMES[scheme].lower(weight if weight.element_size() > 1 else dense(module, _RAISED)))
    assert isinstance(module, StoredLinear)
    if product is not None and module.out_features % eight_bits.STEP == 0 == module.in_features % eight_bits.STEP:
        if module.weight_scale is None:
            module.weight_scale = torch.ones(module.out_features, 1, device=module.weight.device)
        module.product = product


def adopt(module: nn.Linear, weight: Tensor, scale: Tensor | None) -> None:
    """Makes a layer hold a weight (out, in) that comes in float8_e4m3fn, and its scale (out, 1) or none."""
    assert weight.dtype == eight_bits.FP8
    _hold(module, "fp8" if scale is None else "fp8_scaled", weight, scale)


def replace(module: nn.Module, weight: Tensor) -> None:
    """Gives a module another weight of the same shape, stored as the one it has; for merging networks."""
    held = module.weight
    assert isinstance(held, Tensor)
    with torch.no_grad():
        if not isinstance(module, StoredLinear):
            held.copy_(weight)
            return
        # a weight that came in float8 without scales may have got scales of one, for products that want some
        scheme = SCHEMES["fp8_scaled" if module.scheme == "fp8" and module.weight_scale is not None else module.scheme]
        for place, value in zip((held, module.weight_scale), scheme.lower(weight.to(held.device)), strict=True):
            if place is not None and value is not None:
                place.copy_(value)


def keeps_float8(scheme: str | None) -> bool:
    """Whether weights that a file has in float8 are left so, for `library.models.loading`."""
    return scheme in _FLOAT8


def is_in_a_block(name: str) -> bool:
    """Whether the module of this name lies in one of the repeated blocks of its model."""
    return _IN_A_BLOCK.search(name) is not None


def storing(
    scheme: str, product: str | None = None, wanted: Callable[[str], bool] = is_in_a_block
) -> Callable[[str, nn.Module], None]:
    """What to call for each module once its tensors are there, see `library.models.loading`: it stores linear layers.

    Args:
        scheme, product: see `store`.
        wanted: by the name of a layer, whether to store it.
    """

    def finished(name: str, module: nn.Module) -> None:
        if type(module) in (nn.Linear, StoredLinear) and wanted(name):
            assert isinstance(module, nn.Linear)
            store(module, scheme, product)

    return finished


def store_linears(
    model: nn.Module, scheme: str, product: str | None = None, wanted: Callable[[str], bool] = is_in_a_block
) -> nn.Module:
    """The model with its linear layers stored in place, one by one. See `storing`."""
    finished = storing(scheme, product, wanted)
    for name, module in list(model.named_modules()):
        finished(name, module)
    return model


def eight_bit_product(kind: str, device: torch.device) -> str | None:
    """How the device multiplies in eight bits, for `store`; None, and a line in the log, if it doesn't.

    Args:
        kind: "fp8" or "int8".
    """
    if kind == "int8":
        found = "int8" if devices.multiplies_int8(device) else None
    else:
        found = {"rows": "fp8 by rows", "tensor": "fp8"}.get(devices.multiplies_fp8(device))
    if found is None:
        logger.warning("--%s_compute: this device doesn't multiply in %s; weights are raised instead", kind, kind)
    return found


def _hold(module: nn.Linear, scheme: str, weight: Tensor, scale: Tensor | None) -> None:
    """Makes the module a `StoredLinear`. Its class is changed, so that whoever holds the module goes on holding it."""
    module.__class__ = StoredLinear
    assert isinstance(module, StoredLinear)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.register_buffer("weight_scale", scale)
    module.scheme, module.product = scheme, SCHEMES[scheme].product


# options


@dataclass(frozen=True)
class Storage:
    """How the frozen parts are held: keys of `SCHEMES`, None for as they come."""

    denoiser: str | None = None
    encoders: str | None = None
    compute: str | None = None
    """What to multiply the denoiser's frozen weights in: "fp8" or "int8"; None: in the type of mixed precision."""


def scheme_of(
    *,
    fp8_base: bool = False,
    fp8_base_unet: bool = False,
    fp8_scaled: bool = False,
    int8_base: bool = False,
    nf4_base: bool = False,
    fp8_compute: bool = False,
    int8_compute: bool = False,
) -> Storage:
    """What these options ask for.

    * One kind of storage: `fp8_base` (denoiser and encoders), `fp8_base_unet` and `fp8_scaled` (the denoiser only; all
      of fp8 combine), `int8_base`, or `nf4_base`. With both `fp8_base` and `fp8_base_unet` encoders stay as they are.
    * `fp8_compute` goes with fp8, and `int8_compute` with int8; alone they imply that storage. With `fp8_compute` the
      denoiser gets scales, unless its file is in fp8.

    Errors: UserError when two contradict each other.
    """
    fp8 = fp8_base or fp8_base_unet or fp8_scaled
    asked = {
        "fp8": "--fp8_base"
        if fp8_base
        else "--fp8_base_unet"
        if fp8_base_unet
        else "--fp8_scaled"
        if fp8_scaled
        else "",
        "int8": "--int8_base" if int8_base else "",
        "nf4": "--nf4_base" if nf4_base else "",
    }
    computed = {"fp8": "--fp8_compute" if fp8_compute else "", "int8": "--int8_compute" if int8_compute else ""}
    _at_most_one([option for option in asked.values() if option], "weights are stored in one way")
    _at_most_one([option for option in computed.values() if option], "weights are multiplied in one type")
    compute = next((kind for kind, option in computed.items() if option), None)
    kind = next((kind for kind, option in asked.items() if option), compute)
    if compute is not None and kind != compute:
        assert kind is not None
        hint = f"leave one of them out; --{compute}_compute needs no other option"
        what = f"weights in {kind} can't be multiplied in {compute}"
        raise UserError(what, f"{computed[compute]} {asked[kind]}", hint, code="E-CHECK")
    denoiser = {"fp8": "fp8_scaled" if fp8_scaled or compute else "fp8", "int8": "int8", "nf4": "nf4", None: None}[kind]
    encoders = ("fp8_scaled" if fp8_scaled else "fp8") if fp8 and fp8_base and not fp8_base_unet else None
    return Storage(denoiser, encoders, compute)


def _at_most_one(options: list[str], what: str) -> None:
    if len(options) > 1:
        raise UserError(what, " ".join(options), "leave one of them out", code="E-CHECK")
