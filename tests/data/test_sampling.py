from collections import Counter

import pytest
import torch
from torch import Tensor

from allreduce_sgd.data.options import SAMPLINGS
from allreduce_sgd.data.sampling import EpochSampler, build_sampler, evaluation_share, share, shares
from allreduce_sgd.errors import ConfigError


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 5, 7, 20])
def test_shares_are_contiguous_balanced_and_complete(length: int, parts: int) -> None:
    slices = shares(length, parts)
    assert [i for part in slices for i in range(length)[part]] == list(range(length))
    sizes = [part.stop - part.start for part in slices]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert slices == [evaluation_share(length, rank, parts) for rank in range(parts)]


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_does_not_exist(part: int, parts: int) -> None:
    with pytest.raises(ValueError, match="no part"):
        share(10, part, parts)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("length", "batch"), [(97, 10), (40, 8), (5, 5), (5, 100), (13, 2), (1, 1)])
def test_every_sample_once_an_epoch_and_the_same_steps_for_any_number_of_ranks(
    length: int, batch: int, size: int
) -> None:
    alone = EpochSampler(length, batch, seed=3)
    ranks = [EpochSampler(length, batch, seed=3) for _ in range(size)]
    seen = []
    for step in range(alone.steps_per_epoch):
        parts = [sampler.indices(2, step, rank, size) for rank, sampler in enumerate(ranks)]
        together = torch.cat(parts)
        assert torch.equal(together, alone.indices(2, step, 0, 1))
        assert len(together) == alone.global_count(step) == sum(map(len, parts))
        seen += together.tolist()
    assert sorted(seen) == list(range(length))


def test_the_last_step_is_shorter_and_a_rank_may_have_nothing() -> None:
    sampler = EpochSampler(21, 10, seed=0)
    assert sampler.steps_per_epoch == 3
    assert [sampler.global_count(step) for step in range(3)] == [10, 10, 1]
    assert [len(sampler.indices(0, 2, rank, 4)) for rank in range(4)] == [1, 0, 0, 0]
    assert sampler.indices(0, 2, 3, 4).dtype == torch.int64


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sampler = EpochSampler(50, 50, seed=1)
    first, second = sampler.indices(0, 0, 0, 1), sampler.indices(1, 0, 0, 1)
    assert not torch.equal(first, second)
    assert torch.equal(first, sampler.indices(0, 0, 0, 1))
    assert not torch.equal(second, EpochSampler(50, 50, seed=2).indices(0, 0, 0, 1))
    assert torch.equal(first, EpochSampler(50, 50, seed=1).permutation(0))


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="--global-batch-size 0"):
        EpochSampler(10, 0, 0)
    with pytest.raises(ValueError, match="no step 2"):
        EpochSampler(10, 5, 0).indices(0, 2, 0, 1)


# ---- uniform subsets, and samples drawn with replacement


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("length", "batch"), [(97, 10), (12, 12), (5, 100), (1, 1)])
def test_a_step_has_the_same_samples_for_any_number_of_ranks(sampling: str, length: int, batch: int) -> None:
    alone = build_sampler(sampling, length, batch, seed=3)
    for size in (2, 3, 7):
        # Every rank asks for other steps before, as ranks do that go at their own pace.
        ranks = [build_sampler(sampling, length, batch, seed=3) for _ in range(size)]
        for epoch, step in ((0, 0), (4, alone.steps_per_epoch - 1), (4, 0)):
            together = torch.cat([sampler.indices(epoch, step, rank, size) for rank, sampler in enumerate(ranks)])
            assert torch.equal(together, alone.indices(epoch, step, 0, 1))
            assert together.dtype == torch.int64
            assert len(together) == alone.global_count(step)
            assert set(together.tolist()) <= set(range(length))


@pytest.mark.parametrize("sampling", ["uniform", "replacement"])
def test_seeds_epochs_and_steps_draw_anew(sampling: str) -> None:
    def drawn(seed: int, epoch: int, step: int) -> list[int]:
        return build_sampler(sampling, 1000, 20, seed).indices(epoch, step, 0, 1).tolist()

    draws = [drawn(*place) for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]
    assert len({tuple(draw) for draw in draws}) == 4
    assert drawn(1, 0, 0) == draws[0]


def test_their_epochs_have_as_many_steps_and_all_are_whole() -> None:
    for sampling in ("uniform", "replacement"):
        sampler = build_sampler(sampling, 21, 10, seed=0)
        assert sampler.steps_per_epoch == EpochSampler(21, 10, seed=0).steps_per_epoch == 3
        assert [sampler.global_count(step) for step in range(3)] == [10, 10, 10]
        with pytest.raises(ValueError, match="no step 3"):
            sampler.indices(0, 3, 0, 1)
    assert build_sampler("uniform", 5, 100, seed=0).global_count(0) == 5
    assert build_sampler("replacement", 5, 100, seed=0).global_count(0) == 100


def drawn_batches(sampling: str, length: int, batch: int, draws: int) -> Tensor:
    sampler = build_sampler(sampling, length, batch, seed=11)
    return torch.stack([sampler.indices(epoch, 0, 0, 1) for epoch in range(draws)])


def test_uniform_draws_every_subset_equally_often_in_every_order() -> None:
    batches = drawn_batches("uniform", 4, 2, 6000)
    counts = Counter(map(tuple, batches.tolist()))
    assert len(counts) == 12
    # The standard error of a count: some 21.
    error = (6000 / 12 * (1 - 1 / 12)) ** 0.5
    assert max(abs(count - 500) for count in counts.values()) < 4 * error


def test_replacement_draws_every_sequence_equally_often() -> None:
    counts = Counter(map(tuple, drawn_batches("replacement", 3, 2, 4500).tolist()))
    assert len(counts) == 9
    error = (4500 / 9 * (1 - 1 / 9)) ** 0.5
    assert max(abs(count - 500) for count in counts.values()) < 4 * error


def test_frequencies_in_a_large_population() -> None:
    batches = drawn_batches("uniform", 500, 40, 2000)
    assert all(len(set(batch)) == 40 for batch in batches.tolist())
    frequency = torch.bincount(batches.flatten(), minlength=500).double()
    error = (2000 * 0.08 * 0.92) ** 0.5
    assert float((frequency - 160).abs().max()) < 4.5 * error
    # Of 500 standardised counts, whose sum is fixed, the mean square is 1 give or take sqrt(2 / 499).
    assert float(((frequency - 160) / error).square().mean()) == pytest.approx(1.0, abs=4 * (2 / 499) ** 0.5)


@pytest.mark.parametrize(("length", "batch"), [(20, 10), (20, 4), (8, 7)])
@pytest.mark.parametrize("sampling", ["uniform", "replacement"])
def test_the_noise_ball_is_what_theory_says(sampling: str, length: int, batch: int) -> None:
    """SGD on the mean of (x - c_i)^2 / 2 with a step a: E x^2 = a / (2 - a) times the variance of a batch's mean."""
    chains, steps, settling, rate = 300, 50, 15, 0.5
    centres = torch.linspace(-1, 1, length, dtype=torch.float64)
    sampler = build_sampler(sampling, length, batch, seed=5)
    variance = float(centres.square().mean()) / batch
    factors = {"uniform": (length - batch) / (length - 1), "replacement": 1.0}
    x = torch.zeros(chains, dtype=torch.float64)
    squares = torch.zeros(chains, dtype=torch.float64)
    for step in range(steps):
        batches = torch.stack([sampler.indices(chain * steps + step, 0, 0, 1) for chain in range(chains)])
        x -= rate * (x - centres[batches].mean(1))
        if step >= settling:
            squares += x.square() / (steps - settling)
    expected = {name: rate / (2 - rate) * variance * factor for name, factor in factors.items()}
    # Chains are independent of one another.
    error = float(squares.std()) / chains**0.5
    assert abs(float(squares.mean()) - expected[sampling]) < 4 * error
    other = expected["uniform" if sampling == "replacement" else "replacement"]
    assert abs(float(squares.mean()) - other) > 6 * error
