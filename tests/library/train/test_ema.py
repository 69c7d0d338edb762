"""The moving average is the closed form, survives a state, and leaves the training alone."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.train import ema
from library.train.ema import MovingAverage, ema_path
from library.train.trees import read_tree, write_tree


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.v = nn.Parameter(torch.randn(5))
        self.register_buffer("alpha", torch.tensor(0.3, dtype=dtype))
        self.register_buffer("count", torch.tensor(3))


def walk(model, steps, start=0):
    """Changes the weights, and gives what they were after each step."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        yield {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=["there", "on cpu", "sent"])
def place(request, monkeypatch):
    """`sent`: as if the model lay on an accelerator and the average in main memory."""
    if request.param == "sent":
        monkeypatch.setattr(ema, "_apart", lambda average, value: True)
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        monkeypatch.setattr(torch, "Event", lambda device: event)
    return request.param != "there"


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bunch", [1 << 24, 1])
def test_the_closed_form(monkeypatch, place, decay, dtype, bunch):
    monkeypatch.setattr(ema, "BUNCH_ELEMENTS", bunch)
    model = Model(dtype)
    first = weights(model)
    average = MovingAverage(model.state_dict, decay, on_cpu=place)
    seen = []
    for values in walk(model, 12):
        average.after_step(SimpleNamespace(step=0))
        seen.append(values)
    found = average.state_dict()["averages"]
    assert found.keys() == {"w", "v", "alpha"}
    for name in ("w", "v"):
        wanted = decay**12 * first[name].double()
        for index, values in enumerate(seen, start=1):
            wanted += (1 - decay) * decay ** (12 - index) * values[name].double()
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["alpha"], first["alpha"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_back(place, dtype):
    model = Model(dtype)
    average = MovingAverage(model.state_dict, 0.9, on_cpu=place)
    for _ in walk(model, 3):
        average.update()
    before, averages = weights(model), copy.deepcopy(average.state_dict())
    with average.in_place():
        for name in ("w", "v"):
            now = model.state_dict()[name]
            assert torch.equal(now, averages["averages"][name].to(now.dtype))
            assert not torch.equal(now, before[name])
        assert model.w.requires_grad
        assert torch.is_grad_enabled()
    assert same(weights(model), before)
    assert same(average.state_dict()["averages"], averages["averages"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_with_two_names_comes_back(place, dtype):
    """As the embeddings of T5 have."""
    model = Model(dtype)
    model.again = model.w
    average = MovingAverage(model.state_dict, 0.9, on_cpu=place)
    for _ in walk(model, 3):
        average.update()
    before, averages = weights(model), copy.deepcopy(average.state_dict()["averages"])
    for _ in range(2):
        with average.in_place():
            assert torch.equal(model.w, averages["w"].to(dtype))
        assert same(weights(model), before)
        assert same(average.state_dict()["averages"], averages)


def test_a_failing_save_puts_the_weights_back(monkeypatch):
    model = Model(torch.bfloat16)
    average = MovingAverage(model.state_dict, 0.5)
    for _ in walk(model, 2):
        average.update()
    before, averages = weights(model), copy.deepcopy(average.state_dict()["averages"])
    with pytest.raises(RuntimeError, match="disk"), average.in_place():
        raise RuntimeError("disk")
    assert same(weights(model), before)
    assert same(average.state_dict()["averages"], averages)

    def failing(name, value, kept):
        if name == "v":
            raise RuntimeError("memory")
        take(name, value, kept)

    take = average._take
    monkeypatch.setattr(average, "_take", failing)
    with pytest.raises(RuntimeError, match="memory"), average.in_place():
        pass
    assert same(weights(model), before)
    assert same(average.state_dict()["averages"], averages)


def test_a_resumed_average_is_the_same(place, tmp_path):
    model = Model(torch.bfloat16)
    straight = MovingAverage(model.state_dict, 0.9, on_cpu=place)
    for step, _ in enumerate(walk(model, 6)):
        straight.update()
        if step == 2:
            write_tree(straight.state_dict(), tmp_path, "ema")
            saved = weights(model)
    again = Model(torch.bfloat16)
    resumed = MovingAverage(again.state_dict, 0.9, on_cpu=place)
    again.load_state_dict(saved)
    resumed.load_state_dict(read_tree(tmp_path, "ema"))
    for _ in walk(again, 3, start=3):
        resumed.update()
    assert same(resumed.state_dict()["averages"], straight.state_dict()["averages"])


def test_a_state_of_other_weights_is_refused():
    average = MovingAverage(Model().state_dict, 0.9)
    state = copy.deepcopy(average.state_dict())
    del state["averages"]["v"]
    with pytest.raises(ValueError, match=r"other weights \(v\)"):
        average.load_state_dict(state)


def test_a_restart_forgets():
    model = Model()
    average = MovingAverage(model.state_dict, 0.9)
    for _ in walk(model, 2):
        average.update()
    average.restart()
    assert torch.equal(average.state_dict()["averages"]["w"], model.w)


def test_the_model_is_only_looked_at(place):
    model, watched = Model(), Model()
    average = MovingAverage(watched.state_dict, 0.9, on_cpu=place)
    before = torch.get_rng_state()
    for values, seen in zip(walk(model, 3), walk(watched, 3), strict=True):
        average.update()
        assert same(values, seen)
    average.after_epoch(SimpleNamespace(step=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_that_are_on_their_way_are_brought_home():
    calls = []
    model = Model()
    average = MovingAverage(model.state_dict, 0.9, settle=lambda: calls.append(1))
    for use in (average.update, average.restart, lambda: average.in_place().__enter__()):
        calls.clear()
        use()
        assert calls


def test_names():
    assert ema_path(Path("a/cat.v1-000003.safetensors")) == Path("a/cat.v1-000003-ema.safetensors")
    assert ema_path(Path("a/cat.v1.ckpt"), ".ckpt") == Path("a/cat.v1-ema.ckpt")
    assert ema_path(Path("a/cat.v1"), "") == Path("a/cat.v1-ema")  # a folder
