"""The adapter method: which parts are trained, what is saved, and plug-ins of any age."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from library import files, options
from library.log import DataError, UserError
from library.methods.adapter import Adapter
from library.methods.base import trained_table
from library.methods.rates import Rates
from library.option_groups import FLUX_TRAIN_NETWORK
from library.types import Batch, Chance, Models
from networks.lora_flux import create_network
from tests.networks import tiny_models

NAMES = ("clip_l", "t5xxl")
ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))


def adapter(*words: str, module: str = "networks.lora_flux") -> Adapter:
    chosen = options.parse(FLUX_TRAIN_NETWORK, ["--network_module", module, *words])
    return Adapter.from_options(chosen, NAMES)


def models() -> Models:
    return Models(denoiser=tiny_models.flux(), encoders={"clip_l": tiny_models.clip_l()})


def answer(parts: Models) -> torch.Tensor:
    assert parts.denoiser is not None
    inputs = tiny_models.flux_inputs()
    states = parts.encoders["clip_l"](input_ids=torch.arange(10)[None]).last_hidden_state
    return parts.denoiser(**{**inputs, "pooled": inputs["pooled"] + states.mean(1)})  # type: ignore[no-any-return]


def train(method: Adapter, parts: Models, steps: int = 2) -> None:
    method.attach(parts)
    method.prepare(ALONE, parts)
    optimizer = torch.optim.AdamW([group.for_optimizer() for group in method.param_groups()])
    for step in range(steps):
        method.before_batch(batch(1.0))
        answer(parts).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)


LR = (None, "0", "1e-3")


@pytest.mark.parametrize(("unet", "text", "both"), [*itertools.product(LR, LR, ("0", "1e-2"))])
def test_exactly_what_the_table_calls_trained_moves_and_is_saved(
    unet: str | None, text: str | None, both: str, tmp_path: Path
) -> None:
    words = ["--learning_rate", both]
    words += ["--unet_lr", unet] if unet is not None else []
    words += ["--text_encoder_lr", text] if text is not None else []
    rates = {"unet": float(unet or both if unet is None else unet), "clip_l": float(both if text is None else text)}
    wanted = {name for name, rate in rates.items() if rate}
    if not wanted:
        with pytest.raises(UserError, match="nothing would be trained"):
            adapter(*words)
        return
    method, parts = adapter(*words), models()
    train(method, parts)
    rows = trained_table(method.param_groups(), method.frozen())
    assert {row.component for row in rows if row.lr != "frozen"} == wanted
    assert {row.component for row in rows if row.lr == "frozen"} == {"unet", "clip_l", "t5xxl"} - wanted
    for row in rows:
        if row.component in wanted:
            assert float(row.lr) == rates[row.component]
            given = {"unet": unet, "clip_l": text}[row.component]
            option = {"unet": "--unet_lr", "clip_l": "--text_encoder_lr"}[row.component]
            assert row.lr_source == ("--learning_rate" if given is None else option)
    path = tmp_path / "n.safetensors"
    method.save(path, None, {})
    saved = set(files.header(path).tensors)
    prefixes = {"unet": "lora_unet_", "clip_l": "lora_te1_"}
    assert {name for name, prefix in prefixes.items() if any(key.startswith(prefix) for key in saved)} == wanted
    moved = {name for name, tensor in method.state_dict().items() if name.endswith("lora_up.weight") and tensor.any()}
    assert {name for name, prefix in prefixes.items() if any(key.startswith(prefix) for key in moved)} == wanted
    assert method.trained_encoders() == wanted - {"unet"}
    for part in (parts.denoiser, parts.encoders["clip_l"]):
        assert part is not None
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in part.parameters())


def test_switched_off_parts() -> None:
    only = adapter("--network_train_unet_only", "--text_encoder_lr", "1e-3")
    assert only.trained_encoders() == set()
    assert only.frozen()["clip_l"] == "--network_train_unet_only"
    text = adapter("--network_train_text_encoder_only")
    parts = models()
    train(text, parts)
    assert all(name.startswith("lora_te1_") for name in text.state_dict())
    with pytest.raises(UserError, match="nothing to train"):
        adapter("--network_train_unet_only", "--network_train_text_encoder_only")
    with pytest.raises(UserError, match="nothing would be trained"):
        adapter("--network_train_text_encoder_only", "--text_encoder_lr", "0")


def test_rates_of_encoders() -> None:
    def rates(*words: str) -> list[float]:
        chosen = options.parse(FLUX_TRAIN_NETWORK, ["--network_module", "networks.lora_flux", *words])
        return [rate.value for rate in Rates.from_options(chosen, NAMES).encoders.values()]

    assert rates("--text_encoder_lr", "1", "2") == [1, 2]
    assert rates("--text_encoder_lr", "3") == [3, 3]
    assert rates("--learning_rate", "4") == [4, 4]
    with pytest.raises(UserError, match="3 rates for 2"):
        rates("--text_encoder_lr", "1", "2", "3")


def test_a_saved_network_goes_on_where_it_was(tmp_path: Path) -> None:
    first, parts = adapter("--network_dim", "3", "--network_alpha", "2.5"), models()
    train(first, parts)
    path = tmp_path / "n.safetensors"
    first.save(path, None, {"ss_a": "b"})
    wanted = answer(parts)
    for words in (["--network_dim", "3"], ["--dim_from_weights"]):
        again, fresh = adapter("--network_weights", str(path), *words), models()
        again.attach(fresh)
        torch.testing.assert_close(answer(fresh), wanted)
        for name, tensor in first.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["n.safetensors"]
    wrong = adapter("--network_weights", str(path), "--network_dim", "5")
    with pytest.raises(DataError, match="dim_from_weights"):
        wrong.attach(models())
    with pytest.raises(UserError, match="give --network_weights"):
        adapter("--dim_from_weights")


def test_state_survives_a_resume() -> None:
    first, second = adapter("--network_dim", "2"), adapter("--network_dim", "2")
    parts, fresh = models(), models()
    train(first, parts)
    second.attach(fresh)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(answer(fresh), answer(parts), rtol=0, atol=0)


def test_base_weights_are_merged_once_into_each_part(tmp_path: Path) -> None:
    source = models()
    other = create_network(1.0, 2, 2.0, None, [source.encoders["clip_l"], None], source.denoiser)
    for made in other.created:
        nn.init.normal_(made.lora_up.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    other.apply_to()
    other.save_weights(tmp_path / "base.safetensors", None, None)
    other.set_multiplier(0.5)
    wanted = answer(source)
    method = adapter("--base_weights", str(tmp_path / "base.safetensors"), "--base_weights_multiplier", "0.5")
    parts = models()
    method.loaded(Models(encoders=parts.encoders))  # the text phase: no denoiser yet
    method.attach(parts)
    torch.testing.assert_close(answer(parts), wanted, rtol=1e-4, atol=1e-5)


def test_a_base_weight_of_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "xl.safetensors"
    names = ["lora_unet_input_blocks_4_1_proj_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    shapes = [((2, 8), (8, 2)), ((2, 16), (64, 2))]
    tensors = {}
    for name, (down, up) in zip(names, shapes, strict=True):
        tensors |= {f"{name}.lora_down.weight": torch.zeros(down), f"{name}.lora_up.weight": torch.zeros(up)}
    files.save_safetensors(tensors, path, {})
    method = adapter("--base_weights", str(path))
    with pytest.raises(DataError, match="SDXL"):
        method.attach(models())


def test_precision_and_recorded_arguments() -> None:
    method = adapter("--full_bf16", "--mixed_precision", "bf16", "--network_args", "rank_dropout=0.1")
    parts = models()
    method.attach(parts)
    assert {parameter.dtype for parameter in method.parameters()} == {torch.bfloat16}
    assert method.recorded_arguments == {"rank_dropout": "0.1"}
    dropped = adapter("--network_dropout", "0.5", "--network_args", "rank_dropout=0.1")
    assert dropped.recorded_arguments == {"dropout": "0.5", "rank_dropout": "0.1"}
    dropped.attach(models())
    assert dropped.network.created[0].dropouts.neuron == 0.5
    assert adapter("--network_dropout", "0.5").recorded_arguments == {}
    for words in (["novalue"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="network_args"):
            adapter("--network_args", *words)


def test_norms_are_limited_and_reported() -> None:
    method, parts = adapter("--scale_weight_norms", "0.001", "--learning_rate", "0.1"), models()
    train(method, parts)
    values = method.after_step(3)
    assert set(values) == {"max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm"}
    assert max(float(made.delta().norm()) for made in method.network.adapters) <= 0.00101


def batch(multiplier: float) -> Batch:
    return cast("Batch", SimpleNamespace(multiplier=multiplier))


def test_batches_set_the_strength() -> None:
    method, parts = adapter(), models()
    train(method, parts)
    for multiplier in (0.5, 1.0):
        method.before_batch(batch(multiplier))
        assert {made.multiplier for made in method.network.adapters} == {multiplier}


def test_unknown_modules_are_named() -> None:
    with pytest.raises(UserError, match="no such module"):
        adapter(module="networks.lora_fluks")
    with pytest.raises(UserError, match="isn't a network module"):
        adapter(module="networks.base")
    with pytest.raises(UserError, match="no network type"):
        Adapter.from_options(options.parse(FLUX_TRAIN_NETWORK, []), NAMES)


# plug-ins of others


@pytest.mark.parametrize(
    ("words", "chance"),
    [
        ((), Chance.NOWHERE),
        (("--network_dropout", "0.1"), Chance.DEVICE),
        (("--network_args", "rank_dropout=0.1"), Chance.DEVICE),
        (("--network_args", "module_dropout=0.1", "rank_dropout=0.1"), Chance.HOST),
    ],
)
def test_where_numbers_are_drawn_is_known(words: tuple[str, ...], chance: Chance) -> None:
    method = adapter("--network_train_unet_only", *words)
    method.attach(models())
    assert method.chance() is chance


class OldNetwork(nn.Module):
    """What the protocol was years ago: one rate for all text encoders, no descriptions, nothing optional."""

    def __init__(self, encoders: list[nn.Module], unet: nn.Module, keywords: dict[str, object]) -> None:
        super().__init__()
        self.encoders, self.keywords = len(encoders), keywords
        self.paths = [path for encoder in encoders for path, _ in encoder.named_parameters()]
        self.text, self.image = nn.Linear(2, 2), nn.Linear(2, 2)
        self.applied: tuple[object, ...] = ()

    def apply_to(self, encoders: object, unet: object, with_text: bool = True, with_unet: bool = True) -> None:
        self.applied = (with_text, with_unet)

    def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float) -> list[dict[str, object]]:
        self.rates = (text_encoder_lr, unet_lr)
        return [
            {"params": self.text.parameters(), "lr": text_encoder_lr},
            {"params": [self.image.weight], "lr": unet_lr},
        ]

    def save_weights(self, file: str, dtype: object, metadata: dict[str, str] | None) -> None:
        assert file.endswith(".safetensors")
        Path(file).write_text(json.dumps(metadata), encoding="utf-8")


@pytest.fixture
def old_plugin() -> Iterator[str]:
    module = ModuleType("an_old_plugin")

    def create(
        m: float, dim: int, alpha: float, vae: None, te: list[nn.Module], unet: nn.Module, **rest: object
    ) -> nn.Module:
        return OldNetwork(te, unet, rest)

    module.create_network = create  # type: ignore[attr-defined]
    sys.modules["an_old_plugin"] = module
    yield "an_old_plugin"
    del sys.modules["an_old_plugin"]


def test_an_old_plugin_works(old_plugin: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--text_encoder_lr", "0.1", "--unet_lr", "0.2", "--network_dropout", "0.3", "--scale_weight_norms", "1"]
    method = adapter(*words, "--network_args", "algo=a=b", module=old_plugin)
    assert method.trained_encoders() == {"clip_l"}
    parts = models()
    method.attach(parts)
    method.prepare(ALONE, parts)
    network = method.network
    assert network.applied == (True, True)
    assert network.encoders == 1
    assert all(path.startswith("text_model.") for path in network.paths)
    assert network.keywords == {"neuron_dropout": 0.3, "dropout": "0.3", "algo": "a=b"}
    groups = method.param_groups()
    assert network.rates == (0.1, 0.2)
    assert [(group.component, group.lr, len(group.params)) for group in groups] == [
        ("clip_l", 0.1, 2),
        ("unet", 0.2, 1),
    ]
    assert not network.image.bias.requires_grad
    assert "--scale_weight_norms has no effect" in caplog.text
    assert method.after_step(1) == {}
    method.before_batch(batch(1.0))
    with pytest.raises(UserError, match="network_multiplier"):
        method.before_batch(batch(0.5))
    method.save(tmp_path / "n.safetensors", None, {"a": "b"})
    assert json.loads((tmp_path / "n.safetensors").read_text("utf-8")) == {"a": "b"}
    assert len(list(tmp_path.iterdir())) == 1


def test_foreign_networks_may_do_anything_by_chance(old_plugin: str) -> None:
    method = adapter("--network_train_unet_only", module=old_plugin)
    method.attach(models())
    assert method.chance() is Chance.HOST


def test_a_plugin_hears_of_every_micro_step(old_plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(OldNetwork, "on_step_start", lambda network: heard.append("step"), raising=False)
    method, parts = adapter(module=old_plugin), models()
    method.attach(parts)
    method.prepare(ALONE, parts)
    for _ in range(3):
        method.before_batch(batch(1.0))
    assert len(heard) == 3


def test_foreign_plugins_train_t5_on_request(old_plugin: str) -> None:
    method = adapter("--network_args", "train_t5xxl=True", module=old_plugin)
    assert method.trained_encoders() == {"clip_l", "t5xxl"}
    parts = models()
    parts.encoders["t5xxl"] = tiny_models.t5()
    method.attach(parts)
    assert method.network.encoders == 2
    assert any(path.startswith("encoder.block.") for path in method.network.paths)


def test_a_plugin_without_text_gets_no_gaps(old_plugin: str) -> None:
    method = adapter("--network_train_unet_only", module=old_plugin)
    parts = models()
    method.attach(parts)
    assert method.network.applied == (False, True)
    assert method.network.encoders == 0
