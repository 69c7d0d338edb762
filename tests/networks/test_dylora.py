"""DyLoRA: some of the ranks in training, all of them otherwise; files are those of LoRA."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.log import DataError, UserError
from library.types import DENOISER, Chance
from networks import dylora, lora
from networks.base import Network
from networks.dylora import NestedAdapter
from networks.reading import Rank
from networks.targets import Target
from tests.networks import tiny_unets

MODULES = [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(3, 5, 3, padding=1), lambda: nn.Conv2d(3, 5, 1)]
each_module = pytest.mark.parametrize("make", MODULES, ids=["linear", "conv", "pointwise"])


def adapter(module: nn.Module, rank: int = 6, unit: int = 2, multiplier: float = 0.5) -> NestedAdapter:
    torch.manual_seed(1)
    target = Target("m", "m", module.requires_grad_(False))
    made = NestedAdapter(target, DENOISER, size=Rank(rank, 3.0), unit=unit, multiplier=multiplier)
    for part in made.parameters():
        nn.init.normal_(part)
    return made


def inputs(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((2, 4, 6) if isinstance(module, nn.Linear) else (2, 3, 5, 5), generator=generator)


def expected(made: NestedAdapter, x: Tensor, ranks: int) -> Tensor:
    """With the first ranks only, as written down."""
    down, up = (tensor.flatten(1) for name, tensor in made.file_tensors().items() if name != "alpha")
    scale = made.multiplier * 3.0 / 6 * math.sqrt(6 / ranks)
    change = scale * (up[:, :ranks] @ down[:ranks]).view_as(made.module.weight)  # type: ignore[arg-type]
    return torch.func.functional_call(made.module, {"weight": made.module.weight + change}, (x,))


@each_module
def test_in_training_the_first_ranks_count_and_the_last_of_them_learn(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    made, x = adapter(module := make()).train(), inputs(module)
    assert made.chance is Chance.HOST
    seen: Counter[int] = Counter()
    for seed in range(40):
        torch.manual_seed(seed)
        made.zero_grad()
        out = made(x)
        out.square().sum().backward()
        learned = [index for index, part in enumerate(made.lora_down) if part.grad is not None]
        assert learned == [index for index, part in enumerate(made.lora_up) if part.grad is not None]
        (group,) = learned
        assert all(bool(part.grad.any()) for part in (made.lora_down[group], made.lora_up[group]))  # type: ignore[union-attr]
        torch.testing.assert_close(out, expected(made, x, 2 * (group + 1)), rtol=1e-4, atol=1e-5)
        seen[group] += 1
    assert set(seen) == {0, 1, 2}
    assert min(seen.values()) > 5


@each_module
def test_otherwise_all_ranks_count(make) -> None:  # type: ignore[no-untyped-def]
    made, x = adapter(module := make()).eval(), inputs(module)
    torch.testing.assert_close(made(x), expected(made, x, 6), rtol=1e-4, atol=1e-5)
    state = torch.get_rng_state()
    made(x)
    assert torch.equal(torch.get_rng_state(), state)
    merged = torch.func.functional_call(module, {"weight": module.weight + 0.5 * made.delta()}, (x,))
    torch.testing.assert_close(made(x), merged, rtol=1e-4, atol=1e-5)
    before = made.delta()
    assert float(made.delta_norm()) == pytest.approx(float(before.norm()), rel=1e-4)
    made.scale_by(torch.tensor(0.25))
    torch.testing.assert_close(made.delta(), before / 4)


def test_gradients_are_those_of_the_formula() -> None:
    made, x = adapter(module := nn.Linear(6, 5)).train(), inputs(nn.Linear(6, 5)).requires_grad_()
    torch.manual_seed(3)
    made(x).square().sum().backward()
    (group,) = (index for index, part in enumerate(made.lora_down) if part.grad is not None)
    down = torch.cat(list(made.lora_down)).detach().requires_grad_()
    up = torch.cat(list(made.lora_up), 1).detach().requires_grad_()
    stop = 2 * (group + 1)
    scale = 0.5 * 3.0 / 6 * math.sqrt(6 / stop)
    other = x.detach().requires_grad_()
    (module(other) + scale * other @ down[:stop].T @ up[:, :stop].T).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert down.grad is not None
    assert up.grad is not None
    torch.testing.assert_close(made.lora_down[group].grad, down.grad[stop - 2 : stop], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.lora_up[group].grad, up.grad[:, stop - 2 : stop], rtol=1e-4, atol=1e-4)


def test_recomputed_activations_are_of_the_same_ranks() -> None:
    made, x = adapter(nn.Linear(6, 5), unit=1).train(), inputs(nn.Linear(6, 5)).requires_grad_()
    gradients = []
    for run in (lambda: made(x), lambda: checkpoint(made, x, use_reentrant=False)):
        for seed in range(3):
            torch.manual_seed(seed)
            made.zero_grad()
            run().square().sum().backward()
            gradients.append([part.grad if part.grad is None else part.grad.clone() for part in made.parameters()])
    for one, other in zip(gradients[:3], gradients[3:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def create(unit: str = "2", rank: int = 4, **arguments: object) -> tuple[Network, nn.Module, list[nn.Module]]:
    unet, encoders = tiny_unets.unet(), tiny_unets.encoders(sdxl=True)[:1]
    torch.manual_seed(1)
    return dylora.create_network(1.0, rank, 2.0, None, encoders, unet, unit=unit, **arguments), unet, encoders


def test_groups_without_gradient_are_left_alone_by_the_optimizer() -> None:
    network, unet, encoders = create("1", loraplus_lr_ratio="4")
    network.apply_to()
    network.prepare_grad_etc()
    network.on_epoch_start()
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, None)
    assert names == ["textencoder 1", "textencoder 1 plus", "unet", "unet plus"]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):  # the second time there is momentum
        before = {name: tensor.clone() for name, tensor in network.named_parameters()}
        sum(said.square().mean() for said in tiny_unets.say(unet, encoders)).backward()  # type: ignore[union-attr]
        optimizer.step()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None or torch.equal(parameter, before[name])
        optimizer.zero_grad()


def test_files_are_those_of_lora(tmp_path: Path) -> None:
    network, unet, encoders = create(conv_dim="6", conv_alpha="3")
    tiny_unets.fill(network).apply_to()
    network.eval()
    applied = tiny_unets.say(unet, encoders)
    path = tmp_path / "dy.safetensors"
    network.save_weights(path, None, {})
    network.restore()
    plain, *_ = lora.create_network(1.0, 4, 2.0, None, encoders, unet, conv_dim="6").created
    assert network.created[0].file_tensors().keys() == plain.file_tensors().keys()
    for module, kind in ((lora, "LoraAdapter"), (dylora, "NestedAdapter")):
        again, tensors = module.create_network_from_weights(1.0, path, None, encoders, unet, for_inference=True)
        assert {type(adapter).__name__ for adapter in again.created} == {kind}
        again.apply_to()
        assert "0 not in the file, 0 of the file" in again.load_weights(path)
        for wanted, found in zip(applied, tiny_unets.say(unet, encoders), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        written = again.file_tensors()
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
        again.restore()
    again.merge_to(encoders, unet, tensors)
    for wanted, found in zip(applied, tiny_unets.say(unet, encoders), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_encoders_of_sdxl_have_names_of_their_own() -> None:
    unet, encoders = tiny_unets.unet(sdxl=True), tiny_unets.encoders(sdxl=True)
    names = [adapter.name for adapter in dylora.create_network(1.0, 2, 1, None, encoders, unet).created]
    assert len(names) == len(set(names))
    assert {name[:9] for name in names if "_te" in name} == {"lora_te1_", "lora_te2_"}


def test_ranks_that_do_not_fit() -> None:
    for arguments in ({"unit": "3"}, {"unit": "2", "conv_dim": "3"}):
        with pytest.raises(UserError, match=r"doesn't divide \d, the rank of"):
            create(**arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="out of range"):
        create("0")
    network, unet, encoders = create()
    network.apply_to()
    tensors = network.file_tensors()
    network.restore()
    other, *_ = create(rank=2)
    other.apply_to()
    with pytest.raises(DataError, match="has rank 4 in the file, 2 in this network"):
        other.load_tensors(tensors)
    with pytest.raises(UserError, match="3 doesn't divide 4"):
        dylora.create_network_from_weights(1.0, None, None, encoders, unet, tensors, unit="3")


def test_dropouts_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    network, *_ = create(rank_dropout="0.5", module_dropout="0.5")
    assert "dropouts have no effect" in caplog.text
    assert not any(adapter.dropouts.module for adapter in network.created)  # type: ignore[union-attr]
