import pytest
import torch

from allreduce_sgd.data.sampling import EpochSampler, evaluation_share, share, shares
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
