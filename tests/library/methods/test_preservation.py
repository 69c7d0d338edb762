"""Differential output preservation: the target of marked samples is what the model says without the network."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library import options
from library.families.flux import Flux, FluxFiles
from library.log import UserError
from library.methods import preservation
from library.methods.adapter import Adapter
from library.methods.full import Full
from library.models import memory
from library.objectives import Flow, FlowSettings
from library.option_groups import FLUX_TRAIN_NETWORK
from library.randomness import Draws
from library.train.loop import sample_losses, targeted
from library.types import Batch, Cond, Models, Noised, Size
from tests.networks import tiny_models

MARKED = {preservation.ATTRIBUTE: True}
TEXT: Cond = {
    "t5_out": torch.randn(3, 5, tiny_models.TINY.context_width, generator=torch.Generator().manual_seed(1)),
    "txt_ids": torch.zeros(3, 5, 3),
    "l_pooled": torch.randn(3, tiny_models.TINY.pooled_width, generator=torch.Generator().manual_seed(2)),
    "t5_attn_mask": torch.ones(3, 5),
}


class Asked(Flux):
    """Notes the number of samples of each question, and whether gradients were wanted."""

    def predict(self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None):
        self.asked = [*getattr(self, "asked", []), (len(x), torch.is_grad_enabled())]
        return super().predict(denoiser, x, timesteps, cond, guidance)


def batch(attributes: list[dict[str, object]], multiplier: float = 1.0) -> Batch:
    size = Size(64, 64)
    return Batch(
        names=["a", "b", "c"],
        captions=["", "", ""],
        loss_weights=torch.ones(3),
        draws=[1, 2, 3],
        image_seeds=[1, 2, 3],
        size=size,
        original_sizes=[size] * 3,
        crops=[(0, 0)] * 3,
        multiplier=multiplier,
        attributes=attributes,
    )


class Trained:
    """A tiny model with a trained network, ready to compute losses."""

    def __init__(self, prediction: str = "raw", *words: str, checkpointing: bool = False) -> None:
        chosen = ["--network_module", "networks.lora_flux", "--network_train_unet_only", *words]
        self.method = Adapter.from_options(options.parse(FLUX_TRAIN_NETWORK, chosen), ("clip_l", "t5xxl"))
        self.base, self.model = tiny_models.flux(), tiny_models.flux()
        models = Models(denoiser=self.model)
        self.method.attach(models)
        if checkpointing:
            memory.checkpoint_blocks(self.model)
        self.method.param_groups()
        self.method.prepare(SimpleNamespace(num_processes=1, device=torch.device("cpu")), models)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in self.method.network.parameters():
                parameter.normal_(std=0.1)
        self.objective = Flow(FlowSettings(model_prediction_type=prediction, timestep_sampling="sigmoid"))
        self.family = Asked(FluxFiles(None, None, None, None))
        self.noised = self.objective.noise(Draws([7, 8, 9]).posterior((16, 8, 8)), Draws([1, 2, 3]))
        self.targets: list[Noised] = []

    @property
    def run(self) -> Any:
        return SimpleNamespace(
            accelerator=SimpleNamespace(autocast=nullcontext),
            method=self.method,
            family=self.family,
            objective=self,
            denoiser=self.model,
        )

    def estimate(self, prediction: Tensor, noised: Noised) -> Tensor:
        return self.objective.estimate(prediction, noised)

    def loss(self, prediction: Tensor, noised: Noised, mask: Tensor | None) -> Tensor:
        self.targets.append(noised)
        return self.objective.loss(prediction, noised, mask)

    def losses(self, attributes: list[dict[str, object]], multiplier: float = 1.0) -> Tensor:
        """With the random numbers of the same dropouts each time."""
        torch.manual_seed(5)
        made = batch(attributes, multiplier)
        self.method.before_batch(made)
        return sample_losses(self.run, targeted(self.run, made, self.noised, TEXT), TEXT, None)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        loss.backward()
        found = []
        for parameter in self.method.network.parameters():
            assert parameter.grad is not None
            found.append(parameter.grad)
            parameter.grad = None
        return found


@pytest.mark.parametrize("prediction", ["raw", "sigma_scaled", "additive"])
def test_the_target_is_the_answer_of_the_base_model(prediction: str) -> None:
    made = Trained(prediction)
    losses = made.losses([{}, MARKED, {}])
    answer = made.family.predict(made.base, made.noised.input, made.noised.timesteps, TEXT)
    expected = made.objective.estimate(answer, made.noised)
    assert torch.allclose(made.targets[0].target[1], expected[1], atol=1e-5)
    assert made.family.asked[:2] == [(1, False), (3, True)]
    plain = made.losses([{}, {}, {}])
    assert torch.equal(losses[[0, 2]], plain[[0, 2]])
    assert losses[1] != plain[1]
    assert torch.equal(made.targets[0].target[[0, 2]], made.noised.target[[0, 2]])
    assert made.targets[1].target is made.noised.target


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_samples_learn_the_same_to_the_last_bit(checkpointing: bool) -> None:
    """Also with dropouts: the question to the base model draws nothing."""
    made = Trained("raw", "--network_dropout", "0.3", checkpointing=checkpointing)
    with_marked = made.gradients(made.losses([{}, MARKED, {}])[[0, 2]].sum())
    after = torch.rand(2)
    without = made.gradients(made.losses([{}, {}, {}])[[0, 2]].sum())
    assert torch.equal(after, torch.rand(2))
    assert all(map(torch.equal, with_marked, without))


def test_a_network_that_does_nothing_has_nothing_to_learn_from_it() -> None:
    made = Trained()
    with torch.no_grad():
        for name, parameter in made.method.network.named_parameters():
            if "lora_up" in name:
                parameter.zero_()
    losses = made.losses([MARKED, MARKED, MARKED])
    assert torch.allclose(losses, torch.zeros(3), atol=1e-10)
    assert made.family.asked == [(3, False), (3, True)]


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_the_multiplier_is_what_it_was(multiplier: float) -> None:
    made = Trained()
    made.losses([MARKED, {}, {}], multiplier)
    assert made.method.network.training
    assert {adapter.multiplier for adapter in made.method.network.adapters} == {multiplier}


def test_the_network_is_back_when_the_question_fails() -> None:
    made = Trained()

    def gone(noised: Noised, cond: Cond) -> Tensor:
        assert not made.method.network.training
        raise OSError("gone")

    made.method.before_batch(batch([], 0.7))
    with pytest.raises(OSError, match="gone"):
        made.method.target(made.noised, batch([{}, MARKED, {}]), TEXT, gone)
    assert made.method.network.training
    assert {adapter.multiplier for adapter in made.method.network.adapters} == {0.7}


def test_a_network_that_cannot_be_switched_off() -> None:
    made = Trained()
    made.method._network = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"diff_output_preservation.*set_multiplier"):
        made.losses([{}, MARKED, {}])
    made.losses([{}, {preservation.ATTRIBUTE: False}, {}])


def test_the_whole_model_cannot_be_preserved() -> None:
    subsets = [("a.toml:3", {}), ("a.toml:7", MARKED)]
    (found,) = preservation.findings(subsets, Full)
    assert (found.error, found.where, found.code) == (True, "a.toml:7", "E-PRESERVATION")
    assert not list(preservation.findings(subsets, Adapter))
