"""Noise follows from the seed, the prompt and the sample alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from utils.errors import InputError
from utils.seed import NoiseStream, video_seed

SHAPE = (3, 16, 4, 6)


def test_seeds_are_fixed_for_all_time() -> None:
    # Published: a changed value changes every video that anybody has made.
    assert video_seed(0, 0, 0) == 6229990121472182273
    assert video_seed(-1, 945, 24) == 11977122530994077070


def test_seeds_differ_and_fit() -> None:
    seeds = [video_seed(*key) for key in itertools.product((-1, 0, 1, 2**63), range(20), range(20))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    # PyTorch's CPU generator looks at the low half only.
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)


def test_absurd_seed_is_refused() -> None:
    with pytest.raises(InputError, match=r"seed: .* out of range"):
        video_seed(2**127, 0, 0)


def test_a_video_does_not_depend_on_its_batch() -> None:
    pair = NoiseStream([5, 2**64 - 1])
    alone = NoiseStream([2**64 - 1])
    for _ in range(3):
        both, one = pair.normal(SHAPE), alone.normal(SHAPE)
        assert both.shape == (2, *SHAPE)
        assert both.dtype == torch.float32
        assert torch.equal(both[1], one[0])
        assert not torch.equal(both[0], both[1])


def test_noise_is_what_torch_draws_from_the_seed() -> None:
    generator = torch.Generator().manual_seed(7)
    stream = NoiseStream([7])
    for _ in range(2):
        assert torch.equal(stream.normal(SHAPE)[0], torch.randn(SHAPE, generator=generator))


def test_pieces_are_fresh_and_standard_normal() -> None:
    stream = NoiseStream([1])
    first = stream.normal((3, 16, 30, 40))
    kept = first.clone()
    second = stream.normal((3, 16, 30, 40))
    assert torch.equal(first, kept)
    assert abs(float((first * second).mean())) < 0.02
    assert abs(float(second.mean())) < 0.02
    assert abs(float(second.std()) - 1) < 0.02


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    NoiseStream([3]).normal(SHAPE)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    one = NoiseStream([3]).normal(SHAPE)
    torch.manual_seed(1)
    assert torch.equal(one, NoiseStream([3]).normal(SHAPE))


def test_pinning_needs_a_gpu_but_asking_does_not() -> None:
    noise = NoiseStream([3]).normal(SHAPE, pin=True)
    assert noise.is_pinned() == torch.cuda.is_available()
    assert torch.equal(noise, NoiseStream([3]).normal(SHAPE))


def test_no_seeds() -> None:
    with pytest.raises(ValueError, match="seeds is empty"):
        NoiseStream([])
