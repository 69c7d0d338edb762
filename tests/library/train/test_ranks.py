"""Two processes over gloo: they agree, average, save together and fail together."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from library.log import ResourceError
from library.train import resume
from library.train.checkpoints import Checkpoints
from library.train.control import Control
from library.train.ranks import Later, Ranks
from library.train.state import LossWindow, RunState


def test_one_process_needs_nobody():
    ranks = Ranks.of_this_process()
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert ranks.any(True)
    assert not ranks.any(False)
    ranks.barrier()
    assert ranks.numbers_later([1.0, 2.5]).read() == [1.0, 2.5]


def test_later_reads_again_and_again():
    later = Later(torch.tensor([1.0]))
    assert later.read() == later.read() == [1.0]


@pytest.mark.slow
def test_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_process, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert set(found) == {0, 1}
    for rank, answer in found.items():
        assert answer["any"] == [True, True, False]
        assert answer["losses"] == [1.5, 11.5]
        assert answer["stops"] == [False, True, False]
        assert answer["model failed"] == (True, True)
        assert answer["state failed"] == "another process failed" if rank == 0 else "rank 1 is full"
        assert answer["resumed"] == (2, 1, 2)
    # each process goes on with its own random numbers
    assert found[0]["drawn"] != found[1]["drawn"]
    assert all(answer["drawn"] == answer["drawn again"] for answer in found.values())
    assert (tmp_path / "s" / "rng_1.json").exists()
    assert not (tmp_path / "bad").exists()


def _process(rank: int, folder: Path, answers: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    try:
        answers.put((rank, _meet(rank, folder)))
    finally:
        dist.barrier()
        dist.destroy_process_group()


def _meet(rank: int, folder: Path) -> dict[str, Any]:
    ranks = Ranks.of_this_process()
    answer: dict[str, Any] = {"any": [ranks.any(rank == 1), ranks.any(True), ranks.any(False)]}

    window = LossWindow(4, ranks)
    readings = []
    for step in (1, 2):
        window.add(torch.tensor(10.0 * (step - 1) + rank + 1))
        readings += window.close(step, {"grad_norm": torch.tensor(1.0)})
    readings += window.drain()
    answer["losses"] = [reading.loss for reading in readings]

    control = Control(output_dir=folder, ranks=ranks)
    if rank == 1:
        control.ask("stop")
    answer["stops"] = [control.poll().stop for _ in range(3)]

    answer["model failed"] = _failing_save(ranks, folder)
    answer |= _states(ranks, folder)
    return answer


def _failing_save(ranks: Ranks, folder: Path) -> tuple[bool, bool]:
    class Save:
        output_dir, output_name, save_every_n_steps = str(folder), "my", 1
        save_last_n_epochs = save_last_n_steps = None

    class State:
        save_state = save_state_on_train_end = False
        save_last_n_epochs_state = save_last_n_steps_state = None

    def save_model(path: Path) -> None:
        raise OSError("disk full")

    checkpoints = Checkpoints(
        options=Save, state_options=State, save_model=save_model, save_state=lambda _: None, epochs=9, ranks=ranks
    )
    state = RunState(seed=1, total_steps=1, batches_per_epoch=4, loss=LossWindow(4), step=1)
    checkpoints.after_step(state)
    try:
        checkpoints.finish(state)
    except ResourceError:
        return True, not (folder / "my.safetensors").exists()
    return False, False


def _states(ranks: Ranks, folder: Path) -> dict[str, Any]:
    weight = torch.zeros(2)
    state = RunState(seed=1, total_steps=9, batches_per_epoch=4, loss=LossWindow(4), step=2, batch=2)
    parts = resume.Parts(
        state=state, model=lambda: {"w": weight}, load_model=lambda tensors: weight.copy_(tensors["w"]), ranks=ranks
    )
    random.seed(100 + ranks.rank)
    weight += 7
    resume.save_state(folder / "s", parts)
    drawn = random.random()
    random.seed(0)
    weight.zero_()
    state.step = state.batch = 0
    resume.load_state(folder / "s", parts)
    assert weight.tolist() == [7, 7]
    again = random.random()

    failed = ""
    if ranks.rank == 1:
        resume.rng_state = lambda _: (_ for _ in ()).throw(OSError("rank 1 is full"))
    try:
        resume.save_state(folder / "bad", parts)
    except ResourceError as error:
        failed = error.what.removeprefix("the state couldn't be saved: ")
    return {
        "resumed": (state.step, state.epoch, state.batch),
        "drawn": drawn,
        "drawn again": again,
        "state failed": failed,
    }
