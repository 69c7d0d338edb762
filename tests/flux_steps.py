"""Training steps of FLUX.1 transformers of any size, and how much memory they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.activations import Amount
from library.models.flux import Flux, FluxConfig
from library.models.memory import checkpoint_blocks
from library.models.quantized import store_linears
from networks.lora_flux import create_network
from tests.allocations import Allocations, without_data


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, and how."""

    width: int = 256
    head: int = 64
    double: int = 2
    single: int = 3
    amount: Amount
    rank: int = 0
    """0: the model itself is trained."""
    every: int = 0
    offload: bool = False
    scheme: str | None = None
    """How frozen weights are stored, see `library.models.quantized`."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def config(self) -> FluxConfig:
        """The model's sizes."""
        return FluxConfig(
            width=self.width,
            head_width=self.head,
            mlp_width=4 * self.width,
            double_blocks=self.double,
            single_blocks=self.single,
            context_width=4 * self.head,
            pooled_width=self.head,
        )


class Trained:
    """A model with a batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        config, amount = case.config, case.amount
        with torch.device(case.device), in_type(case.dtype):
            self.model = Flux(config)
            self.tokens = torch.randn(amount.images, amount.image_tokens, config.in_channels)
            self.text = torch.randn(amount.images, amount.text_tokens, config.context_width)
            self.pooled = torch.randn(amount.images, config.pooled_width)
            self.strength = torch.ones(amount.images)
        self.params: list[nn.Parameter] = list(self.model.parameters())
        if case.rank:
            self.model.requires_grad_(False)
            if case.scheme:
                store_linears(self.model, case.scheme)
            network = create_network(1.0, case.rank, case.rank, None, None, self.model)
            network.apply_to(None, self.model, False, True)
            network.prepare_grad_etc(None, self.model)
            self.network = network.to(case.device) if case.device != "cpu" else network
            self.params = list(network.parameters())
        self.model.train()

    def recompute(self) -> None:
        """As the case says."""
        if self.case.every:
            checkpoint_blocks(self.model, self.case.every, offload=self.case.offload)

    @property
    def held(self) -> list[Tensor]:
        """Weights and batch."""
        batch = (self.tokens, self.text, self.pooled, self.strength)
        own = (*self.model.parameters(), *self.model.buffers(), *self.params)
        return [*{id(one): one for one in (*own, *batch)}.values()]

    def loss(self) -> Tensor:
        """Of the batch, whose positions don't matter."""
        images, (tokens, text) = len(self.text), (self.tokens.shape[1], self.text.shape[1])
        places = torch.zeros(images, tokens + text, 3, device=self.text.device)
        mixed = self.case.dtype != torch.float32
        with torch.autocast(self.text.device.type, self.case.dtype if mixed else torch.bfloat16, enabled=mixed):
            ids = places[:, text:], places[:, :text]
            out = self.model(self.tokens, ids[0], self.text, ids[1], self.strength / 2, self.pooled, self.strength)
        return out.float().square().mean()

    def backward(self) -> None:
        """Forward and backward."""
        self.loss().backward()  # type: ignore[no-untyped-call]


def peak_of(case: Case, *, data: bool = False, prepare: Callable[[Trained], Any] | None = None) -> int:
    """Most bytes that activations and gradients take in a step, beside weights and batch.

    Args:
        data: whether numbers are computed; without them it is as exact, and models may be as large as they like.
        prepare: is called before the step, and what it gives is held meanwhile.
    """
    with ExitStack() as stack:
        if not data:
            stack.enter_context(without_data())
        trained = Trained(case)
        trained.recompute()
        kept = prepare(trained) if prepare else None
        counter = Allocations(trained.held)
        before = counter.live
        with counter:
            trained.backward()
        del kept
        return counter.peak - before


@contextmanager
def like_cuda(monkeypatch: Any) -> Iterator[None]:
    """Norms as autocast runs them on CUDA: in float32, the RMS norm by one kernel; the rest as on the CPU."""
    layer_norm, addcmul = F.layer_norm, torch.addcmul

    class Normed(torch.autograd.Function):
        """The RMS norm of one kernel, as far as memory goes."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight, _ = ctx.saved_tensors
            return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None

    def promoted(*values: Tensor) -> Tensor:
        wide = any(value.dtype == torch.float32 for value in values)
        return addcmul(*(value.float() if wide else value for value in values))

    with monkeypatch.context() as patched:
        patched.setattr(F, "layer_norm", lambda x, *args, **named: layer_norm(x.float(), *args, **named))
        patched.setattr(F, "rms_norm", lambda x, shape, weight, eps: Normed.apply(x.float(), weight.float()))
        patched.setattr(torch, "addcmul", promoted)
        yield


@contextmanager
def in_type(dtype: torch.dtype) -> Iterator[None]:
    """What is made meanwhile is of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shapes_of(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Of the parameters."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
