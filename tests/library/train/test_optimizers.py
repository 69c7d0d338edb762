"""Every optimizer by name: what is built, what is recorded, at which rate it moves."""

import copy
import sys
from types import ModuleType

import pytest
import torch

from library.log import ResourceError, UserError
from library.option_groups import OptimizerOptions
from library.train import optimizers
from library.train.optimizers import ROWS, create, effective_lrs, evaluating
from library.train.schedules import SCHEDULE_FREE
from library.train.updates import depends_on_no_other

INSTALLED = [name for name, row in ROWS.items() if not row.path.startswith("bitsandbytes")]
FINDS_RATE = [name for name, row in ROWS.items() if row.habit is optimizers.Habit.FINDS_RATE]
FREE = [name for name, row in ROWS.items() if row.habit is optimizers.Habit.NO_SCHEDULE]


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor(value)) for value in values]


def build(groups=None, scheduler=None, **values):
    return create(OptimizerOptions(**values), groups or [{"params": parameters([1.0, 2.0])}], scheduler)


def available(name):
    pytest.importorskip(ROWS[name].path.partition(".")[0])
    return name


def descend(optimizer, steps=1):
    """Steps with the gradient of half the sum of squares."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach().clone()
        optimizer.step()


@pytest.mark.parametrize("name", INSTALLED)
def test_every_name_builds_and_descends(name):
    (parameter,) = parameters([[1.0, 2.0], [3.0, -4.0]])
    lr = 1.0 if name in FINDS_RATE else 0.01
    built = build([{"params": [parameter]}], optimizer_type=available(name).upper(), learning_rate=lr)
    before = parameter.detach().clone()
    descend(built.optimizer, 10)
    assert parameter.detach().square().sum() < before.square().sum()
    assert type(built.optimizer).__name__ == ROWS[name].path.rpartition(".")[2]
    assert all(rate >= 0 for rate in effective_lrs(built.optimizer))


@pytest.mark.parametrize("name", INSTALLED)
def test_resumed_optimizers_go_on_as_if_nothing_had_happened(name):
    """Six steps at once, and three, a copy of the state and three more."""
    available(name)
    values = {"optimizer_type": name, "learning_rate": 1.0 if name in FINDS_RATE else 0.01}
    straight, first, second = (torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -4.0]])) for _ in range(3))
    descend(build([{"params": [straight]}], **values).optimizer, 6)
    start = build([{"params": [first]}], **values).optimizer
    descend(start, 3)
    second.data.copy_(first.data)
    resumed = build([{"params": [second]}], **values).optimizer
    resumed.load_state_dict(copy.deepcopy(start.state_dict()))
    descend(resumed, 3)
    assert torch.equal(second, straight)


def test_the_default_is_adamw():
    built = build(learning_rate=1e-4, optimizer_args=("weight_decay=0.1", "betas=(0.9, 0.99)"))
    assert type(built.optimizer) is torch.optim.AdamW
    group = built.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 0.1, (0.9, 0.99))
    assert built.name == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert built.schedule_override is None
    assert built.warnings == []


def test_names_without_arguments():
    assert build().name == "torch.optim.adamw.AdamW"


def test_groups_keep_their_rates_and_names():
    groups = [{"params": iter(parameters([1.0])), "lr": 0.5, "name": "unet"}, {"params": parameters([2.0])}]
    built = build(groups, learning_rate=0.1)
    assert [group["lr"] for group in built.optimizer.param_groups] == [0.5, 0.1]
    assert built.optimizer.param_groups[0]["name"] == "unet"


def test_nesterov():
    group = build(optimizer_type="sgdnesterov").optimizer.param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (True, 0.9)
    assert build(optimizer_type="SGDNesterov").name == "torch.optim.sgd.SGD(momentum=0.9)"
    group = build(optimizer_type="SGDNesterov", optimizer_args=("momentum=0.5",)).optimizer.param_groups[0]
    assert group["momentum"] == 0.5


@pytest.mark.parametrize("name", ["Adamax", "torch.optim.Adamax", "torch.optim.adamax.Adamax"])
def test_classes_of_torch(name):
    assert type(build(optimizer_type=name).optimizer) is torch.optim.Adamax


def test_a_dotted_path_means_the_class_itself():
    assert build(optimizer_type="torch.optim.SGD").optimizer.param_groups[0]["nesterov"] is False


def test_a_dotted_path_has_the_habits_of_the_name():
    pytest.importorskip("schedulefree")
    assert build(optimizer_type="schedulefree.AdamWScheduleFree").schedule_override == SCHEDULE_FREE


def test_classes_of_strangers(monkeypatch):
    module = ModuleType("strange_optimizers")
    module.Mine = type("Mine", (torch.optim.SGD,), {"__module__": "strange_optimizers.deep"})
    module.__spec__ = torch.__spec__
    monkeypatch.setitem(sys.modules, "strange_optimizers", module)
    built = build(optimizer_type="strange_optimizers.Mine", optimizer_args=("momentum=0.5",))
    assert built.name == "strange_optimizers.deep.Mine(momentum=0.5)"
    assert optimizers.is_foreign(OptimizerOptions(optimizer_type="strange_optimizers.Mine"))
    assert not optimizers.is_foreign(OptimizerOptions(optimizer_type="bitsandbytes.optim.AdEMAMix8bit"))
    assert not optimizers.is_foreign(OptimizerOptions(optimizer_type="Lion"))


def test_old_switches():
    pytest.importorskip("lion_pytorch")
    assert type(build(use_lion_optimizer=True).optimizer).__name__ == "Lion"
    for values in (
        {"use_lion_optimizer": True, "use_8bit_adam": True},
        {"use_lion_optimizer": True, "optimizer_type": "AdamW"},
    ):
        with pytest.raises(UserError, match="more than one"):
            build(**values)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.path.startswith("bitsandbytes")])
def test_a_missing_package_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ResourceError, match="pip install bitsandbytes"):
        build(optimizer_type=name)
    with pytest.raises(ResourceError, match="pip install bitsandbytes"):
        build(use_8bit_adam=True)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"optimizer_type": "Lino"}, "did you mean Lion"),
        ({"optimizer_type": "adamax"}, "no optimizer"),
        ({"optimizer_type": "Optimizer"}, "no optimizer"),
        ({"optimizer_type": "DAdaptFoo"}, "did you mean DAdapt"),
        ({"optimizer_type": "torch.optim.NoSuch"}, "NoSuch"),
        ({"optimizer_args": ("momentum",)}, "key=value"),
        ({"optimizer_args": ("weight_decay=oops",)}, "weight_decay=oops"),
        ({"optimizer_args": ("no_such_argument=1",)}, "no_such_argument"),
        ({"optimizer_args": ("lr=1",)}, "--learning_rate"),
        ({"optimizer_args": ("weight_decay=-1",)}, "weight_decay"),
    ],
)
def test_what_cannot_be_is_refused(values, word):
    with pytest.raises(UserError, match=word):
        build(**values)


def test_arguments_may_contain_an_equals_sign():
    assert optimizers.resolve(OptimizerOptions(optimizer_args=("a='b=c'",))).arguments == {"a": "b=c"}


@pytest.mark.parametrize("name", FINDS_RATE)
def test_optimizers_that_find_their_rate(name):
    available(name)
    built = build(optimizer_type=name, learning_rate=1e-4)
    assert "1.0 is usual" in built.warnings[0]
    groups = [{"params": parameters([1.0]), "lr": 1.0}, {"params": parameters([2.0]), "lr": 0.5}]
    built = build(groups, optimizer_type=name, learning_rate=1.0)
    assert "0.5" in built.warnings[0]
    descend(built.optimizer, 2)
    assert len(set(effective_lrs(built.optimizer))) == 1
    group = built.optimizer.param_groups[0]
    assert effective_lrs(built.optimizer)[0] == group["d"] * group["lr"]


# the rate in the log


@pytest.mark.parametrize(
    "name", ["AdamW", "Lion", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "Prodigy"]
)
def test_the_logged_rate_is_the_size_of_the_update(name):
    """With a gradient of 1 everywhere and no decay, the first update of each of these is its rate."""
    available(name)
    weight_decay = () if name == "Prodigy" else ("weight_decay=0.0",)
    more = {
        "Prodigy": ("d0=0.01", "growth_rate=1.0", "use_bias_correction=False", "betas=(0.0, 0.0)", "beta3=0.5"),
        "RAdamScheduleFree": ("betas=(0.5, 0.99)", "silent_sgd_phase=False"),
        "AdamWScheduleFree": ("betas=(0.5, 0.99)",),
    }.get(name, ())
    (parameter,) = parameters([0.0, 0.0])
    lr = 1.0 if name == "Prodigy" else 0.25
    built = build([{"params": [parameter]}], optimizer_type=name, learning_rate=lr, optimizer_args=weight_decay + more)
    parameter.grad = torch.ones(2)
    built.optimizer.step()
    with evaluating(built.optimizer):
        moved = -parameter[0].item()
    assert effective_lrs(built.optimizer)[0] == pytest.approx(moved, rel=1e-3)


def test_the_rate_of_adafactor_is_its_own():
    pytest.importorskip("transformers")
    built = build(optimizer_type="Adafactor", learning_rate=1e-3)
    assert built.schedule_override == "adafactor:0.001"
    assert effective_lrs(built.optimizer) == [0.0]
    descend(built.optimizer)
    root_mean_square = (2.5) ** 0.5
    assert effective_lrs(built.optimizer)[0] == pytest.approx(0.01 * root_mean_square)


# habits


def test_adafactor_with_its_own_pace():
    pytest.importorskip("transformers")
    groups = [{"params": parameters([1.0]), "lr": 0.5}]
    built = build(groups, "cosine", optimizer_type="AdaFactor", learning_rate=1e-3)
    assert built.optimizer.param_groups[0]["lr"] is None
    assert built.name == "transformers.optimization.Adafactor(relative_step=True)"
    assert any("cosine is ignored" in warning for warning in built.warnings)
    assert any("learning rates of parts" in warning for warning in built.warnings)


def test_adafactor_with_a_given_rate():
    pytest.importorskip("transformers")
    arguments = ("relative_step=False", "scale_parameter=False", "clip_threshold=2.0")
    groups = [{"params": parameters([1.0]), "lr": 0.5}]
    built = build(groups, "constant", optimizer_type="Adafactor", learning_rate=1e-3, optimizer_args=arguments)
    assert built.schedule_override is None
    assert built.optimizer.param_groups[0]["lr"] == 0.5
    assert len(built.warnings) == 3
    descend(built.optimizer)
    assert effective_lrs(built.optimizer) == [0.5]


def test_adafactor_warmup_init_needs_relative_step():
    pytest.importorskip("transformers")
    built = build(optimizer_type="Adafactor", optimizer_args=("relative_step=False", "warmup_init=True"))
    assert built.optimizer.param_groups[0]["relative_step"] is True
    assert any("switched on" in warning for warning in built.warnings)


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_weights_are_used_and_saved_in_evaluation(name):
    available(name)
    (parameter,) = parameters([1.0, 2.0])
    built = build([{"params": [parameter]}], optimizer_type=name, learning_rate=0.1)
    assert built.schedule_override == SCHEDULE_FREE
    descend(built.optimizer, 12)
    training = parameter.detach().clone()
    with evaluating(built.optimizer):
        used = parameter.detach().clone()
        with evaluating(built.optimizer):
            assert torch.equal(parameter, used)
        assert torch.equal(parameter, used)
    assert not torch.allclose(training, used, atol=1e-7)
    assert torch.equal(parameter, training)
    descend(built.optimizer)


def test_training_goes_on_after_an_error_in_evaluation():
    pytest.importorskip("schedulefree")
    built = build(optimizer_type="AdamWScheduleFree", learning_rate=0.1)
    descend(built.optimizer)
    with pytest.raises(RuntimeError, match="broken"), evaluating(built.optimizer):
        raise RuntimeError("broken")
    descend(built.optimizer)


def test_evaluating_leaves_ordinary_optimizers_alone():
    built = build()
    with evaluating(built.optimizer):
        descend(built.optimizer)


@pytest.mark.parametrize("name", INSTALLED)
def test_which_optimizers_step_each_parameter_alone(name):
    """What the table says is what trying out shows."""
    built = build(optimizer_type=available(name), learning_rate=0.5)
    row = ROWS[name]
    arguments = {**row.fixed, **row.defaults}
    lr = None if arguments.get("relative_step") else 0.5
    assert built.alone is depends_on_no_other(type(built.optimizer), arguments, lr)


def test_who_rounds_bfloat16_badly_is_said():
    group = {"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]}
    pytest.importorskip("prodigyopt")
    assert any("rounds" in warning for warning in build([group], optimizer_type="Prodigy", learning_rate=1.0).warnings)
    assert build([group]).warnings == []
