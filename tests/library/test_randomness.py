"""Random numbers depend on the sample alone."""

import subprocess
import sys

import torch

from library.randomness import Draws, Stream, mix


def test_mix_is_the_published_splitmix64():
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317


def test_mix_depends_on_every_number_and_their_order():
    arguments = [(7,), (7, 0), (7, 1), (7, 1, 2), (7, 2, 1), (8, 1, 2), (7, 0, 0), (-7,), (7, -1)]
    numbers = {mix(*numbers) for numbers in arguments}
    assert len(numbers) == 9
    assert all(0 <= number < 1 << 64 for number in numbers)
    assert mix(1 << 64) == mix(0)


def test_neighbouring_seeds_differ_in_about_half_of_the_bits():
    flips = [(mix(seed, 3) ^ mix(seed + 1, 3)).bit_count() for seed in range(500)]
    assert 31 < sum(flips) / len(flips) < 33


def test_a_sample_draws_the_same_whatever_batch_it_is_in():
    seeds = [mix(0, index) for index in range(4)]
    together = Draws(seeds)
    for index, seed in enumerate(seeds):
        alone = Draws([seed])
        assert torch.equal(alone.normal((16, 4, 6))[0], together.normal((16, 4, 6))[index])
        assert alone.uniform_scalars()[0] == together.uniform_scalars()[index]
        assert alone.normal_scalars()[0] == together.normal_scalars()[index]


def test_draws_do_not_depend_on_the_order_of_calls():
    first, second = Draws([5, 6]), Draws([5, 6])
    noise, t = first.normal((3, 8)), first.uniform_scalars()
    assert torch.equal(second.uniform_scalars(), t)
    assert torch.equal(second.normal((3, 8)), noise)
    assert torch.equal(second.normal((3, 8)), noise)


def test_streams_are_independent():
    draws = Draws([11])
    tensors = [draws.normal((4096,), stream).flatten() for stream in Stream]
    correlations = torch.corrcoef(torch.stack(tensors)) - torch.eye(len(tensors))
    assert correlations.abs().max() < 0.07
    assert torch.equal(draws.posterior((4096,)), draws.normal((4096,), Stream.POSTERIOR))


def test_moments():
    draws = Draws([mix(1, index) for index in range(4000)])
    assert abs(draws.normal_scalars().mean()) < 0.06
    assert abs(draws.normal_scalars().std() - 1) < 0.04
    uniform = draws.uniform_scalars()
    assert abs(uniform.mean() - 0.5) < 0.02
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Draws([1, 2]).normal((4,))
    Draws([1, 2]).uniform_scalars()
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_needs_no_torch():
    code = "import sys, library.randomness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
