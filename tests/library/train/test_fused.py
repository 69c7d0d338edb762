"""Steps during the backward pass do what the plain stepper does, and hold few gradients."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from library.log import UserError
from library.methods.base import average_gradients
from library.option_groups import OptimizerOptions, ScheduleOptions
from library.train import optimizers, schedules, updates
from library.train.fused import BlockwiseStepper, FusedStepper, by_blocks, by_number
from library.train.resume import load_exactly
from library.train.rounding import Rounding
from library.train.steppers import Stepper
from library.train.trackers import learning_rates
from library.train.updates import depends_on_no_other

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "adafactor.json").read_text(encoding="utf-8"))
KINDS = ("plain", "fused", "blockwise", "grouped")


class Hooks:
    """A method with nothing of its own, in one process or several."""

    def reduce_gradients(self, accelerator, parameters=None):
        if accelerator.num_processes > 1:
            assert parameters is not None
            average_gradients(parameters, accelerator.num_processes)

    def after_step(self, step):
        return {"step": float(step)}


def accelerator(processes=1, scaler=None):
    return SimpleNamespace(
        scaler=scaler,
        num_processes=processes,
        clip_grad_norm_=nn.utils.clip_grad_norm_,
        unscale_gradients=lambda optimizer: None,
    )


class Model(nn.Module):
    """Two layers before, three blocks, one layer after."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)) for _ in range(3))
        self.outside = nn.Linear(4, 2)
        self.to(dtype)

    def forward(self, x):
        x = self.inside(x)
        for block in self.blocks:
            x = x + block(x)
        return self.outside(x)


def stepper_of(
    kind, model, name="AdamW", arguments=(), *, max_grad_norm=0.0, seed=None, lr=0.01, near=None, **schedule
):
    options = OptimizerOptions(optimizer_type=name, optimizer_args=arguments, learning_rate=lr)
    wanted = ScheduleOptions(**schedule)
    params = list(model.parameters())
    groups = [{"params": params[:5], "lr": lr}, {"params": params[5:], "lr": lr / 2}]
    parts = {"blockwise": by_blocks(groups, model.blocks), "grouped": by_number(groups, 4)}.get(kind, [groups])
    built = [optimizers.create(options, part) for part in parts]
    schedulers = [schedules.create(wanted, one.optimizer, 10, one.schedule_override) for one in built]
    more = {
        "accelerator": near or accelerator(),
        "max_grad_norm": max_grad_norm,
        "hooks": Hooks(),
        "alone": built[0].alone,
        "rounding": None if seed is None else Rounding(params, seed),
    }
    if kind in ("blockwise", "grouped"):
        return BlockwiseStepper(optimizers=[one.optimizer for one in built], schedulers=schedulers, **more)
    which = Stepper if kind == "plain" else FusedStepper
    return which(optimizer=built[0].optimizer, scheduler=schedulers[0], params=params, **more)


def loss(model, step):
    torch.manual_seed(step)
    x = torch.randn(5, 3, dtype=model.inside.weight.dtype)
    return (model(x) - x[:, :2]).float().square().mean()


def trained(kind, steps=4, dtype=torch.float32, **values):
    """The weights after some steps, and the norms."""
    model = Model(dtype)
    stepper = stepper_of(kind, model, **values)
    norms = []
    for step in range(1, steps + 1):
        loss(model, step).backward()
        norms.append(stepper.step(step)["grad_norm"].item())
        assert all(parameter.grad is None for parameter in model.parameters())
    return [parameter.detach() for parameter in model.parameters()], norms


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIMIZERS = [
    ("AdamW", ("weight_decay=0.1",)),
    ("torch.optim.SGD", ("momentum=0.9",)),
    ("Adafactor", ()),
    ("Adafactor", ("relative_step=False", "scale_parameter=False")),
]


@pytest.mark.parametrize("kind", ["fused", "blockwise", "grouped"])
@pytest.mark.parametrize(("name", "arguments"), OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 7)])
def test_the_result_is_that_of_the_plain_stepper(kind, name, arguments, dtype, seed):
    values = {"name": name, "arguments": arguments, "dtype": dtype, "seed": seed}
    plain, plain_norms = trained("plain", **values)
    other, norms = trained(kind, **values)
    assert same(plain, other)
    assert norms == pytest.approx(plain_norms, rel=1e-5 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_and_the_rates_of_the_groups(kind):
    model = Model()
    stepper = stepper_of(kind, model, lr_scheduler="linear", lr_warmup_steps=2)
    for step, factor in enumerate((0, 0.5, 1, 0.875), start=1):
        assert stepper.learning_rates() == pytest.approx([0.01 * factor, 0.005 * factor])
        rates = learning_rates(stepper.param_groups, ["a", "b"], stepper.learning_rates)
        assert rates == pytest.approx({"lr/a": 0.01 * factor, "lr/b": 0.005 * factor})
        loss(model, step).backward()
        assert stepper.step()["step"] == step
    assert stepper.number == 4


def test_gradients_live_no_longer_than_needed(monkeypatch):
    most = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        model = Model()
        stepper = stepper_of(kind, model)

        def count(parameter, model=model, kind=kind):
            live = sum(parameter.grad is not None for parameter in model.parameters())
            most[kind] = max(most[kind], live)

        for parameter in model.parameters():  # after the stepper's own hook
            parameter.register_post_accumulate_grad_hook(count)
        loss(model, 1).backward()
        stepper.step()
    # a block and the layers outside the blocks that came before it
    assert most == {"plain": 16, "fused": 0, "blockwise": 2 + 3, "grouped": 3}


@pytest.mark.parametrize("kind", ["fused", "blockwise"])
def test_clipping_by_parameter_and_by_block(kind):
    model, clipped = Model(), Model()
    loss(model, 1).backward()
    wanted = {}
    owners = [[parameter] for parameter in model.parameters()]
    if kind == "blockwise":
        owners = [list(block.parameters()) for block in model.blocks]
        owners.append([*model.inside.parameters(), *model.outside.parameters()])
    for owned in owners:
        norm = torch.cat([parameter.grad.flatten() for parameter in owned]).norm()
        for parameter in owned:
            wanted[parameter] = parameter - parameter.grad * (0.1 / norm).clamp(max=1)
    stepper = stepper_of(kind, clipped, "torch.optim.SGD", lr=1.0, max_grad_norm=0.1)
    for group in (group for optimizer in optimizers_of(stepper) for group in optimizer.param_groups):
        group["lr"] = 1.0
    loss(clipped, 1).backward()
    stepper.step()
    for before, after in zip(model.parameters(), clipped.parameters(), strict=True):
        torch.testing.assert_close(after.detach(), wanted[before].detach())


def optimizers_of(stepper):
    return stepper.optimizers if isinstance(stepper, BlockwiseStepper) else [stepper.optimizer]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, 7)])
def test_a_step_that_is_not_finite_moves_nothing(monkeypatch, kind, looks, dtype, seed):
    if not looks:
        monkeypatch.setattr(updates.Updates, "_looks", lambda updates, norm, parameters: False)
    model = Model(dtype)
    stepper = stepper_of(kind, model, seed=seed, max_grad_norm=1.0)
    loss(model, 1).backward()
    stepper.step()
    weights = copy.deepcopy(list(model.parameters()))
    moments = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers_of(stepper)]
    (loss(model, 2) * float("nan")).backward()
    assert not torch.isfinite(stepper.step()["grad_norm"])
    assert same(model.parameters(), weights)
    assert sum(map(len, moments)) == len(weights)
    for optimizer, before in zip(optimizers_of(stepper), moments, strict=True):
        assert optimizer.state_dict()["state"].keys() == before.keys()
        for index, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[key], before[index][key]) for key in ("exp_avg", "exp_avg_sq"))
            assert state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "arguments"), [OPTIMIZERS[0], OPTIMIZERS[2]])
@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, 7)])
def test_resuming_is_exact(kind, name, arguments, dtype, seed):
    values = {"name": name, "arguments": arguments, "seed": seed, "lr_scheduler": "cosine"}
    straight, _ = trained(kind, dtype=dtype, **values)
    first, second = Model(dtype), Model(dtype)
    start = stepper_of(kind, first, **values)
    for step in (1, 2):
        loss(first, step).backward()
        start.step()
    resumed = stepper_of(kind, second, **values)
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(optimizers_of(start), optimizers_of(resumed), strict=True):
        load_exactly(theirs, copy.deepcopy(ours.state_dict()))
    for ours, theirs in zip(schedulers_of(start), schedulers_of(resumed), strict=True):
        theirs.load_state_dict(ours.state_dict())
    resumed.number = 2
    for step in (3, 4):
        loss(second, step).backward()
        resumed.step(step)
    assert same([parameter.detach() for parameter in second.parameters()], straight)


def schedulers_of(stepper):
    return stepper.schedulers if isinstance(stepper, BlockwiseStepper) else [stepper.scheduler]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [key for key in GOLDEN if key not in ("inputs", "_about")])
def test_adafactor_gives_the_recorded_numbers(kind, case):
    arguments = [argument for argument in case.split(",") if argument not in ("lr=0.01", "no scale", "relative_step")]
    relative = case == "relative_step"
    arguments += [] if relative or "relative_step=False" in arguments else ["relative_step=False"]
    arguments += ["scale_parameter=False"] if "no scale" in case else []
    inputs = GOLDEN["inputs"]
    model = nn.Module()
    model.p, model.q = (nn.Parameter(torch.tensor(inputs[name])) for name in "pq")
    model.blocks = nn.ModuleList()
    stepper = stepper_of(kind, model, "Adafactor", tuple(arguments), lr=0.01, near=accelerator())
    for optimizer in optimizers_of(stepper):
        for group in optimizer.param_groups:
            group["lr"] = None if relative else 0.01
    for gradients, wanted in zip(inputs["grads"], GOLDEN[case], strict=True):
        sum((getattr(model, name) * torch.tensor(gradients[name])).sum() for name in "pq").backward()
        stepper.step()
        for name in "pq":
            torch.testing.assert_close(getattr(model, name).detach(), torch.tensor(wanted[name]), rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_follow_float32_ones():
    """Hundreds of steps, each too small for bfloat16."""
    ends = {}
    for kind, dtype, seed in (
        ("exact", torch.float32, None),
        ("nearest", torch.bfloat16, None),
        ("ours", torch.bfloat16, 1),
    ):
        weight = nn.Parameter(torch.ones(4000, dtype=dtype))
        options = OptimizerOptions(optimizer_type="AdamW", learning_rate=1e-4)
        built = optimizers.create(options, [{"params": [weight]}])
        stepper = Stepper(
            accelerator=accelerator(),
            optimizer=built.optimizer,
            scheduler=schedules.create(ScheduleOptions(), built.optimizer, 300),
            params=[weight],
            max_grad_norm=0,
            hooks=Hooks(),
            alone=True,
            rounding=None if seed is None else Rounding([weight], seed),
        )
        for _ in range(300):
            weight.sum().backward()
            stepper.step()
        ends[kind] = weight.detach().float().mean().item()
    assert ends["nearest"] == 1
    assert ends["exact"] == pytest.approx(0.97, abs=1e-3)
    assert ends["ours"] == pytest.approx(ends["exact"], abs=1e-3)


def test_small_bunches_give_the_same(monkeypatch):
    whole, _ = trained("plain", dtype=torch.bfloat16, seed=3)
    monkeypatch.setattr(updates, "BUNCH_ELEMENTS", 20)
    assert same(trained("plain", dtype=torch.bfloat16, seed=3)[0], whole)


def test_parameters_that_are_not_used():
    for kind in ("fused", "blockwise"):
        model = Model()
        unused = copy.deepcopy(model.blocks[1])
        stepper = stepper_of(kind, model)
        model.blocks[1].forward = lambda x: x
        loss(model, 1).backward()
        stepper.step()
        assert same(model.blocks[1].parameters(), unused.parameters())
        model.blocks[1][2].forward = lambda x: x[:, :4]
        del model.blocks[1].forward
        loss(model, 2).backward()
        assert stepper.step()["grad_norm"].isfinite()
        assert same(model.blocks[1][2].parameters(), unused[2].parameters())
        assert not same(model.blocks[1][0].parameters(), unused[0].parameters())


def test_mistakes():
    model = Model()
    for kind in ("fused", "blockwise"):
        with pytest.raises(UserError, match="fp16"):
            stepper_of(kind, model, near=accelerator(scaler=object()))
        stepper = stepper_of(kind, model)
        loss(model, 1).backward()
        with pytest.raises(AssertionError, match="one backward pass"):
            loss(model, 1).backward()
        with pytest.raises(AssertionError, match="follows step 0"):
            stepper.step(2)
        stepper.close()
        loss(model, 1).backward()
        assert model.inside.weight.grad is not None
        model.zero_grad()


@pytest.mark.parametrize("name", ["Prodigy", "AdamWScheduleFree"])
def test_optimizers_that_need_everything_at_once(name):
    pytest.importorskip(optimizers.ROWS[name].path.partition(".")[0])
    with pytest.raises(UserError, match="all parameters at once"):
        stepper_of("fused", Model(), name)
    if name == "Prodigy":
        trained("blockwise", name=name, lr=1.0)
    else:
        with pytest.raises(UserError, match="schedule-free"):
            stepper_of("blockwise", Model(), name)


class Sharing(torch.optim.SGD):
    """All parameters go as far as the largest gradient says."""

    def step(self, closure=None):
        largest = max(p.grad.abs().max() for group in self.param_groups for p in group["params"] if p.grad is not None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad.sign() * largest * group["lr"])


class Counting(torch.optim.SGD):
    """Counts steps in its group, as some do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad * group["lr"] / group["k"])


def test_classes_of_strangers_are_tried_out():
    before = torch.get_rng_state()
    assert depends_on_no_other(torch.optim.NAdam, {}, 0.1)
    assert depends_on_no_other(torch.optim.SGD, {"momentum": 0.9}, 0.1)
    assert not depends_on_no_other(Sharing, {}, 0.1)
    assert not depends_on_no_other(Counting, {}, 0.1)
    assert not depends_on_no_other(Counting, {"odd": 1}, 0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_of_several_groups():
    model = Model()
    params = list(model.parameters())
    groups = [{"params": params[:5], "lr": 1.0}, {"params": params[5:], "lr": 2.0, "name": "b"}]
    parts = by_blocks(groups, model.blocks)
    assert [sum(len(group["params"]) for group in part) for part in parts] == [4, 4, 4, 4]
    assert [group["lr"] for group in parts[0]] == [1.0, 2.0]
    assert sorted(id(p) for part in parts for group in part for p in group["params"]) == sorted(map(id, params))
    assert by_blocks([{"params": params[:2]}], model.blocks) == [[{"params": params[:2], "place": 0}]]


def in_one_process(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for kind in ("fused", "blockwise"):
        for dtype, seed in ((torch.float32, None), (torch.bfloat16, 5)):
            model = Model(dtype)
            stepper = stepper_of(kind, model, near=accelerator(2), seed=seed)
            for step in (1, 2):
                loss(model, 10 * step + rank).backward()
                stepper.step()
            flat = torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])
            others = [torch.empty_like(flat) for _ in range(2)]
            dist.all_gather(others, flat)
            assert torch.equal(*others)
            assert not same([parameter.detach() for parameter in model.parameters()], list(Model(dtype).parameters()))
    dist.destroy_process_group()


def test_two_processes_stay_equal(tmp_path: Path) -> None:
    mp.spawn(in_one_process, args=((tmp_path / "meet").as_uri(),), nprocs=2)


@pytest.mark.parametrize(
    ("rates", "number", "sizes"),
    [
        ((1.0, 1.0), 4, [[4], [1, 3], [4], [4]]),  # 5 and 11 parameters
        ((1.0, 2.0), 4, [[4], [1], [4], [4], [3]]),
        ((1.0, 1.0), 1, [[5, 11]]),
        ((1.0, 2.0), 1, [[5], [11]]),
        ((1.0, 1.0), 99, [[1]] * 16),
    ],
)
def test_parts_of_as_many_parameters_in_their_order(rates, number, sizes):
    params = list(Model().parameters())
    groups = [{"params": params[:5], "lr": rates[0]}, {"params": params[5:], "lr": rates[1]}]
    parts = by_number(groups, number)
    assert [[len(group["params"]) for group in part] for part in parts] == sizes
    assert [parameter for part in parts for group in part for parameter in group["params"]] == params
    assert all(len({group["lr"] for group in part}) == 1 for part in parts)
    assert {group["place"] for part in parts for group in part} == {0, 1}
