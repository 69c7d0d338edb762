"""Weights in few bits: how exact, how small, which layers, and what options ask for."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.files import LazyTensors, save_safetensors
from library.log import DataError, UserError
from library.models import keymaps, loading, quantized
from library.models.products import dense
from library.models.quantized import SCHEMES, Storage, StoredLinear, scheme_of, store, store_linears
from networks.base import Network
from networks.factored import covers_plain_linear
from networks.low_rank import LoraAdapter
from tests import tiny
from tests.networks import tiny_models

BOUNDS = {"fp8": (0.045, 0.045), "fp8_scaled": (0.03, 0.03), "int8": (0.01, 0.06), "nf4": (0.11, 0.15)}
"""Relative error of the answer of a layer, for weights that are normal and for some with heavy tails."""


def normal(size: float = 0.02, rows: int = 64, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * size


def heavy(rows: int = 64, columns: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02


def layer(weight: Tensor, scheme: str | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    made.weight.copy_(weight)
    if scheme is not None:
        store(made, scheme)
    return made


def error_of(weight: Tensor, scheme: str) -> float:
    x = torch.randn(32, weight.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = F.linear(x, weight)
    return float((layer(weight, scheme)(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_of_a_layer_is_within_its_bound(scheme: str) -> None:
    for weight, bound in zip((normal(), heavy()), BOUNDS[scheme], strict=True):
        error = error_of(weight, scheme)
        assert bound / 10 < error < bound, error


def test_scales_help_where_weights_are_small_or_rows_differ() -> None:
    assert error_of(normal(1e-3), "fp8_scaled") < error_of(normal(1e-3), "fp8") / 5
    rows = normal(1.0) * torch.logspace(-4, 0, 64)[:, None]
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    wanted = x @ rows.T
    worst = {
        scheme: float(((layer(rows, scheme)(x) - wanted).norm(dim=0) / wanted.norm(dim=0)).max()) for scheme in SCHEMES
    }
    assert worst["fp8_scaled"] < 0.05 < 0.5 < worst["fp8"]
    assert worst["int8"] < 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_per_weight(scheme: str) -> None:
    table = {"fp8": 1.0, "fp8_scaled": 1 + 4 / 256, "int8": 1 + 4 / 256, "nf4": 0.5 + 4 / 64}
    module = layer(normal(), scheme)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    assert held == table[scheme] * 64 * 256 == SCHEMES[scheme].bytes_of(64, 256)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_a_linear_layer_still(scheme: str) -> None:
    module = nn.Linear(32, 16).requires_grad_(False)
    known = module
    store(module, scheme)
    assert isinstance(known, StoredLinear)
    assert isinstance(known, nn.Linear)
    assert (known.in_features, known.out_features) == (32, 16)
    assert known.bias.dtype == torch.float32
    assert scheme in repr(known)
    copied = copy.deepcopy(known)
    x = torch.randn(2, 32)
    assert torch.equal(copied(x), known(x))
    copied.load_state_dict(known.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_changes_of_type_leave_what_is_stored_alone(scheme: str) -> None:
    module = nn.Linear(32, 16).requires_grad_(False)
    store(module, scheme)
    weight, scale = module.weight.clone(), getattr(module, "weight_scale", None)
    nn.Sequential(module).to(torch.bfloat16)
    assert torch.equal(module.weight.view(torch.uint8), weight.view(torch.uint8))
    assert module.weight.dtype == weight.dtype
    assert scale is None or torch.equal(module.weight_scale, scale)
    assert module.bias.dtype == torch.bfloat16
    module.to("meta")
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_data_can_be_swapped_from_outside(scheme: str) -> None:
    """Whoever moves the data of parameters and buffers moves all there is; nothing made of it is left behind."""
    one, other = layer(normal(), scheme), layer(normal().flip(0) * 3, scheme)
    x = torch.randn(4, 256)
    one(x)
    for mine, theirs in zip((*one.parameters(), *one.buffers()), (*other.parameters(), *other.buffers()), strict=True):
        mine.data = theirs.data.clone()
    assert torch.equal(one(x), other(x))


def test_storing_again() -> None:
    module = layer(normal(), "fp8_scaled")
    before = module.weight
    store(module, "fp8")
    store(module, "fp8_scaled")
    assert module.weight is before
    exact = dense(module, torch.float32)
    store(module, "int8")
    assert module.weight.dtype == torch.int8
    assert (dense(module, torch.float32) - exact).norm() / exact.norm() < 0.01


def test_what_does_not_fit_stays_as_it_is() -> None:
    module = layer(normal(columns=40))
    store(module, "nf4")
    assert type(module) is nn.Linear
    store(module, "int8", "int8")
    assert (module.scheme, module.product) == ("int8", "scaled")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_weight_is_stored_in_the_same_way(scheme: str) -> None:
    module = layer(normal(), scheme)
    quantized.replace(module, normal(0.5).flip(1))
    assert torch.equal(dense(module, torch.float32), dense(layer(normal(0.5).flip(1), scheme), torch.float32))
    plain = layer(normal())
    quantized.replace(plain, normal(0.5))
    assert torch.equal(plain.weight, normal(0.5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_networks_are_merged_into_what_is_stored(scheme: str) -> None:
    module = layer(normal(), scheme)
    adapter = LoraAdapter("m", module, "unet", rank=4, alpha=4)
    nn.init.normal_(adapter.lora_up.weight)
    wanted = layer(dense(module, torch.float32) + adapter.delta(), scheme)
    Network([adapter]).merge_to()
    assert torch.equal(dense(module, torch.float32), dense(wanted, torch.float32))


# which layers


def test_the_layers_of_blocks_are_stored_and_no_others() -> None:
    for model, first in (
        (tiny_models.flux(), "double_blocks.0.img_attn.qkv"),
        (tiny_models.t5(), "encoder.block.0.layer.0.SelfAttention.q"),
        (tiny_models.clip_l(), "encoder.layers.0.self_attn.k_proj"),
    ):
        store_linears(model, "int8")
        names = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert any(name.endswith(first) for name in names)
        outside = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
        assert linears - names == {name for name in linears if name.startswith(outside)}


@pytest.mark.parametrize(("scheme", "bound"), [("fp8_scaled", 0.06), ("int8", 0.03), ("nf4", 0.2)])
def test_a_whole_model_answers_nearly_the_same(scheme: str, bound: float) -> None:
    inputs = tiny_models.flux_inputs()
    with torch.no_grad():
        wanted = tiny_models.flux()(**inputs)
        found = store_linears(tiny_models.flux(), scheme)(**inputs)
    assert 0 < (found - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize(("scheme", "product"), [("nf4", None), ("int8", "int8"), ("fp8_scaled", "fp8")])
def test_adapters_on_stored_layers(scheme: str, product: str | None) -> None:
    torch.manual_seed(0)
    for out in (16, 64):  # kept by checkpointing, and not
        module = nn.Linear(64, out).requires_grad_(False)
        store(module, scheme, product)
        adapter = LoraAdapter("m", module, "unet", rank=4, alpha=2)
        nn.init.normal_(adapter.lora_up.weight)
        adapter.hook()
        assert covers_plain_linear(adapter)
        x = torch.randn(8, 64, requires_grad=True)
        module(x).sum().backward()
        found = x.grad
        changed = dense(module, torch.float32) + adapter.delta()
        wanted = changed.sum(0).expand(8, -1)
        assert found is not None
        assert (found - wanted).norm() / wanted.norm() < (0.03 if product else 1e-5)
        assert adapter.lora_up.weight.grad is not None


# files


def scaled(state: dict[str, Tensor], ends: tuple[str, str], prefix: str = "") -> dict[str, Tensor]:
    """A file in 'scaled fp8' form: weights of blocks in float8, with the given ends for scales of weight and input."""
    tensors: dict[str, Tensor] = {prefix + "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if quantized.is_in_a_block(name) and tensor.ndim == 2 and layer != name and "bias." not in name:
            scale = tensor.abs().max() / 448
            tensors[prefix + name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[prefix + layer + ends[0]] = scale
            tensors[prefix + layer + ends[1]] = torch.ones(())
        else:
            tensors[prefix + name] = tensor
    return tensors


@pytest.mark.parametrize("ends", [(".scale_weight", ".scale_input"), (".weight_scale", ".input_scale")])
@pytest.mark.parametrize("layout", ["", "model.diffusion_model.", "diffusers"])
def test_files_in_scaled_form(tmp_path: Path, ends: tuple[str, str], layout: str) -> None:
    state = dict(tiny.flux_model().state_dict())
    if layout == "diffusers":
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        state, layout = dict(keymaps.Mapped(state, keymaps.flux_to_diffusers(shapes))), ""
    path = tmp_path / "scaled.safetensors"
    save_safetensors({name: value.contiguous() for name, value in scaled(state, ends, layout).items()}, path)
    raised = loading.load_flux(path, torch.float32)
    held = loading.load_flux(path, torch.float32, keep_float8=True)
    plain = tiny.flux_model()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            one, other = raised.get_submodule(name), held.get_submodule(name)
            assert isinstance(other, StoredLinear) == quantized.is_in_a_block(name)
            assert torch.equal(dense(one, torch.float32), dense(other, torch.float32)), name
            assert (dense(one, torch.float32) - module.weight).norm() / module.weight.norm() < 0.03
    assert loading.flux_shapes(path, "--x").keys() == plain.state_dict().keys()
    before = {name: module.weight for name, module in held.named_modules() if isinstance(module, StoredLinear)}
    store_linears(held, "fp8_scaled")
    assert all(held.get_submodule(name).weight is weight for name, weight in before.items())


def test_plain_float8_files_are_kept_bit_for_bit(tmp_path: Path) -> None:
    path = tiny.write_flux(tmp_path / "flux.safetensors", dtype=torch.float8_e4m3fn)
    for scheme in ("fp8", "fp8_scaled"):
        model = loading.load_flux(
            path, torch.bfloat16, finished=quantized.storing(scheme, "fp8"), keep_float8=quantized.keeps_float8(scheme)
        )
        module = model.get_submodule("single_blocks.0.linear1")
        assert isinstance(module, StoredLinear)
        wanted = tiny.flux_model().get_submodule("single_blocks.0.linear1").weight.to(torch.float8_e4m3fn)
        assert torch.equal(dense(module, torch.float32), wanted.float())
        assert model.img_in.weight.dtype == model.single_blocks[0].norm.key_norm.scale.dtype == torch.bfloat16
    raised = loading.load_flux(path, torch.bfloat16, finished=quantized.storing("int8"))
    assert raised.get_submodule("single_blocks.0.linear1").weight.dtype == torch.int8


def test_scales_of_another_form_are_refused(tmp_path: Path) -> None:
    state = scaled(dict(tiny.flux_model().state_dict()), (".scale_weight", ".scale_input"))
    name = "double_blocks.0.img_attn.qkv"
    for change in (
        {f"{name}.scale_weight": torch.ones(3)},
        {f"{name}.weight": torch.zeros(192, 64).to(torch.float8_e5m2)},
        {f"{name}.weight": torch.zeros(192, 64, dtype=torch.int8)},
    ):
        save_safetensors({**state, **change}, tmp_path / "flux.safetensors")
        with pytest.raises(DataError, match=r"E-MODEL-DTYPE|not supported|with scales") as caught:
            loading.load_flux(tmp_path / "flux.safetensors")
        assert caught.value.code == "E-MODEL-DTYPE"


def test_t5_in_scaled_form(tmp_path: Path) -> None:
    whole = tiny.write_t5(tmp_path / "t5.safetensors")
    state = dict(LazyTensors(whole))
    save_safetensors(scaled(state, (".scale_weight", ".scale_input")), tmp_path / "scaled.safetensors")
    model = loading.load_t5(tmp_path / "scaled.safetensors", torch.bfloat16, keep_float8=True)
    kinds = {name.split(".")[-1]: type(module) for name, module in model.named_modules()}
    assert kinds["q"] is kinds["wo"] is StoredLinear
    assert kinds["relative_attention_bias"] is nn.Embedding


# layer by layer


def test_layers_are_finished_one_after_another_and_never_all_dense(tmp_path: Path) -> None:
    """The most that is held at once is what is stored so far and one layer."""
    path = tiny.write_flux(tmp_path / "flux.safetensors")
    names: list[str] = []
    most = [0]
    model: list[nn.Module] = []
    build = loading._empty
    held = {"now": 0}
    finish = quantized.storing("int8")

    def size(module: nn.Module) -> int:
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)

    def finished(name: str, module: nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in module.parameters(recurse=False))
        names.append(name)
        most[0] = max(most[0], sum(size(each) for each in model[0].modules()))
        finish(name, module)
        held["now"] = sum(size(each) for each in model[0].modules())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_empty", lambda make: model.append(build(make)) or model[0])
        loaded = loading.load_flux(path, torch.float32, finished=finished)
    own = [name for name, module in loaded.named_modules() if list(module.parameters(recurse=False))]
    assert sorted(names) == sorted(own)
    largest = max(size(module) for module in tiny.flux_model().modules())
    whole = sum(parameter.numel() * 4 for parameter in loaded.parameters())
    # files are in the order of names, so that a bias may be read some tensors before its weight
    assert most[0] <= held["now"] + 2 * largest < whole


def test_wo_of_t5_is_exact_in_float16(tmp_path: Path) -> None:
    path = tiny.write_t5(tmp_path / "t5.safetensors")
    model = loading.load_t5(path, torch.float16)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {types[name] for name in types if ".wo." in name} == {torch.float32}
    assert {types[name] for name in types if ".wo." not in name} == {torch.float16}
    assert {p.dtype for p in loading.load_t5(path, torch.bfloat16).parameters()} == {torch.bfloat16}
    dense_layer = model.encoder.block[0].layer[1].DenseReluDense
    for stored_too in (False, True):
        if stored_too:
            store_linears(model, "fp8_scaled")
        large = torch.full((1, 2, dense_layer.wi_0.in_features), 300.0, dtype=torch.float16)
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            out = dense_layer(large)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


# options


def test_what_options_ask_for() -> None:
    assert scheme_of() == Storage()
    assert scheme_of(fp8_base=True) == Storage("fp8", "fp8")
    assert scheme_of(fp8_base=True, fp8_base_unet=True) == scheme_of(fp8_base_unet=True) == Storage("fp8")
    assert scheme_of(fp8_scaled=True) == Storage("fp8_scaled")
    assert scheme_of(fp8_scaled=True, fp8_base=True) == Storage("fp8_scaled", "fp8_scaled")
    assert scheme_of(int8_base=True) == Storage("int8")
    assert scheme_of(nf4_base=True) == Storage("nf4")
    assert scheme_of(int8_compute=True) == scheme_of(int8_base=True, int8_compute=True) == Storage("int8", None, "int8")
    assert scheme_of(fp8_compute=True) == Storage("fp8_scaled", None, "fp8")
    assert scheme_of(fp8_base=True, fp8_compute=True) == Storage("fp8_scaled", "fp8", "fp8")


OPTIONS = ("fp8_base", "fp8_base_unet", "fp8_scaled", "int8_base", "nf4_base", "fp8_compute", "int8_compute")


def test_every_combination_is_one_that_works_or_a_line() -> None:
    """What comes out can be stored and multiplied; what contradicts itself is refused with the options in question."""
    for given in itertools.product((False, True), repeat=len(OPTIONS)):
        options = dict(zip(OPTIONS, given, strict=True))
        fp8 = options["fp8_base"] or options["fp8_base_unet"] or options["fp8_scaled"]
        kinds = [fp8, options["int8_base"], options["nf4_base"]]
        wrong = sum(kinds) > 1 or (options["fp8_compute"] and options["int8_compute"])
        wrong |= options["fp8_compute"] and (options["int8_base"] or options["nf4_base"])
        wrong |= options["int8_compute"] and (fp8 or options["nf4_base"])
        if wrong:
            with pytest.raises(UserError) as caught:
                scheme_of(**options)
            assert "\n" not in str(caught.value)
            assert all(options[word.removeprefix("--")] for word in caught.value.where.split())
            continue
        storage = scheme_of(**options)
        assert (storage.denoiser is not None) == any(given)
        module = layer(normal(0.02, 32, 64))
        if storage.denoiser is not None:
            store(module, storage.denoiser, storage.compute)
        assert module(torch.randn(2, 64)).isfinite().all()


@pytest.mark.parametrize(("can", "product"), [("rows", "fp8 by rows"), ("tensor", "fp8"), ("", None)])
def test_products_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch, can: str, product: str | None) -> None:
    monkeypatch.setattr("library.devices.multiplies_fp8", lambda device: can)
    assert quantized.eight_bit_product("fp8", torch.device("cuda")) == product
    assert quantized.eight_bit_product("int8", torch.device("cpu")) == "int8"
    monkeypatch.setattr("library.devices.multiplies_int8", lambda device: False)
    assert quantized.eight_bit_product("int8", torch.device("cuda")) is None
