"""The order of samples: as the reference for one process, the same samples for several, nothing lost."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from library.data.order import Lane, Order, shared_out

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dataset_scan.json").read_text("utf-8"))


def golden_lanes() -> tuple[list[Lane], list[str]]:
    images = GOLDEN["cases"][0]["result"][0]["images"]
    names = list(images)
    lanes = []
    for bucket in GOLDEN["shuffle"]["bucket_resolutions"]:
        entries = [
            index for index, name in enumerate(names) if images[name]["bucket"] == bucket
            for _ in range(images[name]["num_repeats"])
        ]  # fmt: skip
        lanes.append(Lane(tuple(entries), 2))
    return lanes, names


@pytest.mark.parametrize("state", GOLDEN["shuffle"]["states"], ids=lambda state: f"epoch {state['epoch']}")
def test_order_of_one_process_is_that_of_the_reference(state):
    lanes, names = golden_lanes()
    epoch = Order(lanes, GOLDEN["shuffle"]["dataset_seed"]).epoch(state["epoch"])
    assert len(epoch) == len(state["batches"]) == 44
    for group, (bucket, size, batch) in zip(epoch, state["batches"], strict=True):
        (share,) = group.shares
        wanted = state["bucket_order"][bucket][batch * size : (batch + 1) * size]
        assert [names[entry] for entry in share.entries] == wanted


LANES = [Lane(tuple(range(7)), 2), Lane(tuple(range(7, 20)), 2), Lane((20,), 2), Lane(tuple(range(21, 30)), 3)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_entry_comes_once_and_weights_make_means(world, accumulation):
    order = Order(LANES, 5)
    assert order.batches == 4 + 7 + 1 + 3
    assert order.groups(world) == sum(-(-len(lane) // (lane.batch_size * world)) for lane in LANES)
    assert order.steps(world, accumulation) == -(-order.groups(world) // accumulation)
    for number in (1, 2):
        epoch = order.epoch(number, world, accumulation)
        assert len(epoch) == order.groups(world)
        seen, positions = Counter(), []
        total, weights = 0, 0.0
        steps = 0
        for index, group in enumerate(epoch):
            assert len(group.shares) == world
            for share in group.shares:
                assert (share.epoch, share.index) == (number, index)
                assert len({LANES.index(lane) for lane in LANES if set(share.entries) & set(lane.entries)}) == 1
                if share.weight:
                    seen.update(share.entries)
                    positions += range(share.position, share.position + len(share.entries))
                    total += len(share.entries)
                weights += share.weight * len(share.entries) / world
            if group.shares[0].completes_step:
                assert weights == pytest.approx(1)
                total, weights, steps = 0, 0.0, steps + 1
        assert seen == Counter(range(30))
        assert positions == list(range(30))
        assert total == 0
        assert steps == order.steps(world, accumulation)


@pytest.mark.parametrize("entries", [16, 17, 19])
def test_two_processes_do_what_one_does_with_double_batches(entries):
    one = Order([Lane(tuple(range(entries)), 4)], 3)
    two = Order([Lane(tuple(range(entries)), 2)], 3)
    four = Order([Lane(tuple(range(entries)), 1)], 3)
    for number in (1, 2, 3):
        for a, b, c in zip(one.epoch(number), two.epoch(number, 2), four.epoch(number, 4), strict=True):
            alone = {
                share.position + offset: (entry, share.weight)
                for share in a.shares
                for offset, entry in enumerate(share.entries)
            }
            for group, world in ((b, 2), (c, 4)):
                shared = {
                    share.position + offset: (entry, share.weight / world)
                    for share in group.shares
                    for offset, entry in enumerate(share.entries)
                    if share.weight
                }
                assert shared == alone


def test_epochs_can_be_asked_for_in_any_order():
    order = Order(LANES, 1)
    forward = [[group.shares[0].entries for group in order.epoch(number)] for number in (1, 2, 3)]
    backward = [[group.shares[0].entries for group in order.epoch(number)] for number in (3, 2, 1)]
    assert forward == backward[::-1]
    assert forward[0] != forward[1]
    assert [group.shares[0].entries for group in Order(LANES, 2).epoch(1)] != forward[0]


def test_idle_processes_get_a_copy_without_weight():
    epoch = Order([Lane((0, 1, 2), 1)], 0).epoch(1, world=2)
    last = min(epoch, key=lambda group: group.shares[1].weight)
    assert last.shares[1].weight == 0
    assert last.shares[1].entries == last.shares[0].entries
    assert last.shares[0].weight == 2


def test_big_sets_cost_nothing_per_step():
    order = Order([Lane(tuple(range(200_000)), 1)], 0)
    epoch = order.epoch(1, world=2, accumulation=4)
    started = time.perf_counter()
    for index in range(0, 100_000, 100):
        epoch.share(index, 1)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    ("slots", "counts", "wanted"),
    [
        (30, [100], [30]),
        (4, [1, 1, 8], [1, 1, 2]),
        (2, [5, 5, 5], [1, 1, 1]),
        (9, [2, 3], [2, 3]),
        (6, [10, 20], [2, 4]),
    ],
)
def test_turns_are_dealt_so_that_nobody_waits_long(slots, counts, wanted):
    assert shared_out(slots, counts) == wanted


@pytest.mark.parametrize("world", [1, 2])
def test_entries_that_take_turns_are_all_seen_soon(world):
    lane = Lane(tuple(range(30)), 4, taking_turns=tuple(range(100, 200)), turns=30)
    order = Order([lane], 3)
    seen: Counter[int] = Counter()
    for number in range(1, 5):
        epoch = [entry for group in order.epoch(number, world) for share in group.shares if share.weight
                 for entry in share.entries]  # fmt: skip
        assert sorted(entry for entry in epoch if entry < 100) == list(range(30))
        assert len(epoch) == 60
        seen.update(entry for entry in epoch if entry >= 100)
    assert len(seen) == 100
    assert set(seen.values()) == {1, 2}
    assert sorted(order.epoch(2)[0].shares[0].entries) == sorted(Order([lane], 3).epoch(2)[0].shares[0].entries)
