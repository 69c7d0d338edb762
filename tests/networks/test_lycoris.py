"""Files and answers against LyCORIS itself, both ways, and LyCORIS as a plug-in."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from library import files, options
from library.methods.adapter import Adapter
from library.option_groups import FLUX_TRAIN_NETWORK
from library.types import Batch, Models
from networks import kinds, kronecker
from networks.arguments import Arguments
from networks.base import DENOISER, ModuleAdapter
from networks.factored import Dropouts
from networks.reading import Rank
from networks.targets import Target
from tests.networks import tiny_models

with contextlib.redirect_stderr(io.StringIO()):
    pytest.importorskip("lycoris")
    from lycoris.functional import factorization
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

THEIRS = {"lora": LoConModule, "dora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
UNBALANCED = {"unbalanced_factorization": "True"}
CASES: list[tuple[str, dict[str, Any], dict[str, str], str, int]] = [
    ("lora", {}, {}, "linear", 3),
    ("dora", {"weight_decompose": True}, {}, "linear", 3),
    ("dora", {"weight_decompose": True, "wd_on_out": False}, {"wd_on_output": "False"}, "linear", 3),
    ("dora", {"weight_decompose": True}, {}, "conv", 3),
    ("dora", {"weight_decompose": True, "wd_on_out": False}, {"wd_on_output": "False"}, "conv", 3),
    ("loha", {}, {}, "linear", 2),
    ("loha", {}, {}, "linear", 7),
    ("loha", {}, {}, "conv", 2),
    ("loha", {"use_tucker": True}, {"use_tucker": "True"}, "conv", 2),
    ("lokr", {}, {}, "linear", 2),
    ("lokr", {"factor": 4}, {"factor": "4"}, "linear", 2),
    ("lokr", {"factor": 4, "unbalanced_factorization": True}, {"factor": "4", **UNBALANCED}, "linear", 2),
    ("lokr", {"decompose_both": True}, {"decompose_both": "True"}, "linear", 1),
    ("lokr", {"full_matrix": True}, {"full_matrix": "True"}, "linear", 2),
    ("lokr", {}, {}, "linear", 64),
    ("lokr", {"factor": 2}, {"factor": "2"}, "conv", 1),
    ("lokr", {"factor": 2, "use_tucker": True}, {"factor": "2", "use_tucker": "True"}, "conv", 1),
    ("lokr", {"full_matrix": True}, {"full_matrix": "True"}, "conv", 2),
]  # fmt: skip
ALPHA = 1.5
each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0]}-{case[3]}-{case[4]}-{'-'.join(case[2])}"
)


def base(shape: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(64, 36) if shape == "linear" else nn.Conv2d(8, 12, 3, padding=1)
    return module.requires_grad_(False)


def inputs(shape: str) -> Tensor:
    size = (2, 5, 64) if shape == "linear" else (2, 8, 6, 6)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def ours(case: tuple[str, dict[str, Any], dict[str, str], str, int]) -> ModuleAdapter:
    kind = kinds.KINDS[case[0]]
    settings = kind.settings(Arguments(case[2]))
    target = Target("lora_unet_x", "x", base(case[3]))
    torch.manual_seed(3)
    return kind.create(target, DENOISER, Rank(case[4], ALPHA), 1.0, Dropouts(), settings)


def theirs(case: tuple[str, dict[str, Any], dict[str, str], str, int]) -> Any:
    torch.manual_seed(3)
    return THEIRS[case[0]]("lora_unet_x", base(case[3]), 1.0, case[4], ALPHA, **case[1])


def shaken(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@each_case
def test_our_file_gives_the_same_answer_in_lycoris(case: Any) -> None:
    adapter, other = ours(case), theirs(case)
    tensors = shaken(adapter)
    assert {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert float(other.state_dict()["alpha"]) == float(tensors["alpha"])
    other.load_state_dict(tensors)
    x = inputs(case[3])
    torch.testing.assert_close(adapter(x), other(x), rtol=1e-4, atol=1e-4)


@each_case
def test_a_file_of_lycoris_gives_the_same_answer_here(case: Any) -> None:
    other = theirs(case)
    tensors = shaken(other)
    module = base(case[3])
    adapter = kinds.of_file(Target("lora_unet_x", "x", module), DENOISER, tensors, 1.0, Dropouts())
    assert adapter is not None
    assert adapter.fits(tensors)
    adapter.load(tensors)
    x = inputs(case[3])
    torch.testing.assert_close(adapter(x), other(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.weight + adapter.delta(), merged(other), rtol=1e-4, atol=1e-4)


def merged(other: Any) -> Tensor:
    """The weight that the module of LyCORIS applies: found by asking for the answers to a basis."""
    with torch.no_grad():
        if isinstance(other.org_module[0], nn.Linear):
            return (other(torch.eye(64)) - other.org_module[0].bias).T
        change = other.get_weight(other.shape) if case_has_plain_change(other) else None
        if change is not None:
            return other.org_weight + change * other.scalar
        weight = other.org_weight + other.make_weight() * other.scale
        return other.apply_weight_decompose(weight, 1)


def case_has_plain_change(other: Any) -> bool:
    return not isinstance(other, LoConModule)


@each_case
def test_new_adapters_are_distributed_as_in_lycoris(case: Any) -> None:
    """What starts at zero there does here, and the others have the same spread."""
    adapter, other = ours(case), theirs(case)
    for name, tensor in other.state_dict().items():
        mine = adapter.state_dict()[name]
        assert bool(mine.any()) == bool(tensor.any()), name
        if name == "dora_scale":
            torch.testing.assert_close(mine, tensor, rtol=1e-5, atol=1e-5)
        elif tensor.numel() > 200 and tensor.any():
            assert float(mine.std()) == pytest.approx(float(tensor.std()), rel=0.25), name


def test_sizes_are_divided_as_in_lycoris() -> None:
    for size in [*range(1, 130), 250, 360, 768, 3072, 9216, 12288, 15360, 18432, 21504]:
        for factor in (-1, 1, 2, 3, 4, 6, 8, 12, 16, 100):
            assert kronecker.divide(size, factor) == factorization(size, factor), (size, factor)


# as a plug-in


def method(*words: str, module: str = "lycoris.kohya") -> Adapter:
    arguments = ["--network_module", module, "--network_dim", "2", "--network_alpha", "1", *words]
    return Adapter.from_options(options.parse(FLUX_TRAIN_NETWORK, arguments), ("clip_l", "t5xxl"))


def answer(parts: Models) -> Tensor:
    assert parts.denoiser is not None
    given = tiny_models.flux_inputs()
    states = parts.encoders["clip_l"](input_ids=torch.arange(10)[None]).last_hidden_state
    return parts.denoiser(**{**given, "pooled": given["pooled"] + states.mean(1)})  # type: ignore[no-any-return]


def parts_of_a_model() -> Models:
    return Models(denoiser=tiny_models.flux(), encoders={"clip_l": tiny_models.clip_l()})


def train(trained: Adapter, parts: Models) -> None:
    trained.attach(parts)
    trained.prepare(SimpleNamespace(num_processes=1, device=torch.device("cpu")), parts)
    groups = [group.for_optimizer() for group in trained.param_groups()]
    optimizer = torch.optim.AdamW(groups)
    for step in range(2):
        trained.before_batch(cast("Batch", SimpleNamespace(multiplier=1.0)))
        answer(parts).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.after_step(step)


@pytest.mark.parametrize(("algo", "only_unet"), [("lora", True), ("loha", False), ("lokr", False)])
def test_lycoris_as_a_plug_in(algo: str, only_unet: bool, tmp_path: Path) -> None:
    words = ["--network_args", f"algo={algo}", "factor=4", "--learning_rate", "1e-2"]
    words += ["--network_train_unet_only"] if only_unet else []
    trained, parts = method(*words), parts_of_a_model()
    before = answer(parts)
    train(trained, parts)
    after = answer(parts)
    assert not torch.allclose(before, after)
    path = tmp_path / "n.safetensors"
    trained.save(path, None, {"ss_network_module": "lycoris.kohya"})
    keys = files.header(path).tensors
    assert any(key.startswith("lora_unet_double_blocks_0_") for key in keys)
    assert any(key.startswith("lora_te1_text_model_encoder_layers_0_") for key in keys) != only_unet

    again, fresh = method(*words, "--network_weights", str(path)), parts_of_a_model()
    again.attach(fresh)
    again.network.eval()
    torch.testing.assert_close(answer(fresh), after, rtol=1e-4, atol=1e-4)

    mine, fresh = (
        method("--network_weights", str(path), "--dim_from_weights", module="networks.lora_flux"),
        parts_of_a_model(),
    )
    mine.attach(fresh)
    mine.network.eval()
    torch.testing.assert_close(answer(fresh), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_lycoris_reads_our_file(algo: str, tmp_path: Path) -> None:
    words = ["--network_args", f"algo={algo}", "factor=4"] if algo == "lokr" else ["--network_args", f"algo={algo}"]
    trained, parts = method(*words, "--learning_rate", "1e-2", module="networks.lora_flux"), parts_of_a_model()
    train(trained, parts)
    trained.network.eval()
    after = answer(parts)
    path = tmp_path / "n.safetensors"
    trained.save(path, None, {})
    read, fresh = method(*words, "--network_weights", str(path)), parts_of_a_model()
    read.attach(fresh)
    read.network.eval()
    torch.testing.assert_close(answer(fresh), after, rtol=1e-4, atol=1e-4)


def test_lycoris_takes_the_sizes_from_a_file(tmp_path: Path) -> None:
    words = ["--network_args", "algo=lora", "--learning_rate", "1e-2"]
    trained, parts = method(*words), parts_of_a_model()
    train(trained, parts)
    after = answer(parts)
    path = tmp_path / "n.safetensors"
    trained.save(path, None, {})
    again, fresh = (
        method("--network_weights", str(path), "--dim_from_weights", "--network_dim", "9"),
        parts_of_a_model(),
    )
    again.attach(fresh)
    again.network.eval()
    torch.testing.assert_close(answer(fresh), after, rtol=1e-4, atol=1e-4)
