"""Gradients averaged over processes, and the table of what is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from library.log import UserError
from library.methods import base
from library.methods.base import ParamGroup, average_gradients, broadcast, require_something, table_lines, trained_table


def parameters() -> list[nn.Parameter]:
    shapes = [((3, 4), torch.float32), ((5,), torch.bfloat16), ((2, 2), torch.float32), ((7,), torch.float32)]
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]


def in_one_process(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for bucket in (1, 14, base.BUCKET_ELEMENTS):
        base.BUCKET_ELEMENTS = bucket
        average_and_check(rank)
    made = parameters()
    for parameter in made:
        parameter.data.fill_(rank + 1)
    broadcast(made)
    assert all(bool((parameter == 1).all()) for parameter in made)
    dist.destroy_process_group()


def average_and_check(rank: int) -> None:
    made = parameters()
    for index, parameter in enumerate(made):
        if index < 3 or rank == 0:  # the last has no gradient in the second process
            parameter.grad = torch.full_like(parameter, index + 1 + 2 * rank)
    average_gradients(made, 2)
    wanted = [2.0, 3.0, 4.0, 2.0]
    for parameter, value in zip(made, wanted, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.full_like(parameter, value))


def test_two_processes_get_the_mean(tmp_path: Path) -> None:
    mp.spawn(in_one_process, args=((tmp_path / "meet").as_uri(),), nprocs=2)


def test_few_pieces_are_on_the_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flying: list[int] = []
    most = 0

    class Work:
        def wait(self) -> None:
            flying.pop()

    def all_reduce(flat: torch.Tensor, async_op: bool) -> Work:
        nonlocal most
        assert async_op
        flat *= 2  # two processes with the same
        flying.append(1)
        most = max(most, len(flying))
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(base, "BUCKET_ELEMENTS", 6)
    made = [nn.Parameter(torch.zeros(shape)) for shape in [(3,), (3,), *[(2, 4)] * 9, (4, 2), (2,)]]
    for index, parameter in enumerate(made):
        parameter.grad = torch.arange(parameter.numel()).view(parameter.shape) + float(index)
    made[5].grad = made[6].grad.clone().T.contiguous().T  # type: ignore[union-attr] # not contiguous
    before = [parameter.grad.clone() for parameter in made if parameter.grad is not None]
    average_gradients(made, 2)
    assert (most, flying) == (base.BUCKETS_ON_THE_WAY, [])
    for parameter, gradient in zip(made, before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_one_process_reduces_nothing() -> None:
    class Nothing(base.Method):
        def _refuse(self, *_: object) -> None:
            raise AssertionError

        from_options = attach = param_groups = prepare = state_dict = load_state_dict = _refuse  # type: ignore[assignment]
        save = train_mode = trained_elements = _refuse  # type: ignore[assignment]
        trained_elements = _refuse  # type: ignore[assignment]

    Nothing().reduce_gradients(SimpleNamespace(num_processes=1))
    assert Nothing().trained_encoders() == set()
    assert Nothing().after_step(1) == {}


def test_the_table_says_what_is_trained_and_why() -> None:
    group = ParamGroup(name="unet plus", params=parameters(), lr=1e-4, lr_source="--unet_lr", component="unet")
    rows = trained_table([group], {"t5xxl": "--text_encoder_lr is 0"})
    assert (rows[0].component, rows[0].group, rows[0].tensors, rows[0].parameters) == ("unet", "unet plus", 4, 28)
    assert (rows[0].lr, rows[0].dtype) == ("0.0001", "bfloat16, float32")
    lines = table_lines(rows)
    assert len(lines) == 3
    assert "--unet_lr" in lines[1]
    assert "frozen" in lines[2]
    assert "--text_encoder_lr is 0" in lines[2]


def test_nothing_to_train_is_an_error() -> None:
    empty = ParamGroup(name="unet", params=[], lr=1.0, lr_source="", component="unet")
    with pytest.raises(UserError, match="nothing would be trained"):
        require_something([empty], "here")
