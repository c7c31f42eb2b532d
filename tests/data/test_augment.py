"""Crop, flip and cutout, against a plain loop over images, and their independence of rank and batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from allreduce_sgd.data.augment import Augmentation
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.sampling import build_sampler
from allreduce_sgd.data.splitmix import key_of, random_bits, random_integers
from allreduce_sgd.errors import ConfigError

SHAPE = (2, 10, 7)
IMAGES = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))
INDICES = torch.arange(100, 140)


def augmented(*names: str, images: Tensor = IMAGES, indices: Tensor = INDICES, visit: int = 3, seed: int = 5) -> Tensor:
    return Augmentation(names, tuple(images.shape[1:]), seed)(images, indices, visit)


def test_splitmix_gives_the_published_sequence() -> None:
    """The outputs of the reference code for the seed 1234567, as public test suites have them."""
    seeds = np.array([1234567], np.uint64)
    drawn = [int(random_bits(seeds, position)[0]) for position in range(5)]
    assert drawn == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_integers_are_uniform_and_streams_unrelated() -> None:
    drawn = random_integers(key_of("test", 1), np.arange(30_000), (9, 2, 31))
    for values, limit in zip(drawn, (9, 2, 31), strict=True):
        counts = np.bincount(values, minlength=limit)
        expected = len(values) / limit
        # The sum of squares is chi-squared with limit - 1 degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < limit - 1 + 5 * (2 * (limit - 1)) ** 0.5
    centred = drawn - drawn.mean(1, keepdims=True)
    scaled = centred / centred.std(1, keepdims=True)
    assert abs((scaled[0] * scaled[1]).mean()) < 0.03
    assert abs((scaled[2, 1:] * scaled[2, :-1]).mean()) < 0.03


def plain(names: tuple[str, ...], visit: int = 3, seed: int = 5) -> Tensor:
    """One image and one change after another."""
    height, width = SHAPE[1:]
    border = 2, 1
    drawn = random_integers(key_of("augment", seed, visit), INDICES.numpy(), (5, 3, 2, height, width))
    results = []
    for image, (down, right, flipped, row, column) in zip(IMAGES, drawn.T.tolist(), strict=True):
        if "crop" in names:
            padded = torch.nn.functional.pad(image, (border[1], border[1], border[0], border[0]))
            image = padded[:, down : down + height, right : right + width]
        if "flip" in names and flipped:
            image = image.flip(2)
        image = image.clone()
        if "cutout" in names:
            # Half of the shorter side.
            image[:, max(0, row - 1) : max(0, row + 2), max(0, column - 1) : max(0, column + 2)] = 0
        results.append(image)
    return torch.stack(results)


@pytest.mark.parametrize("names", [("crop",), ("flip",), ("cutout",), ("crop", "flip", "cutout"), ("cutout", "crop")])
def test_it_is_what_a_plain_loop_makes(names: tuple[str, ...]) -> None:
    before = IMAGES.clone()
    assert torch.equal(augmented(*names), plain(names))
    assert torch.equal(IMAGES, before)
    assert not torch.equal(augmented(*names), IMAGES)


def test_sizes_of_borders_and_squares() -> None:
    for side, border in ((32, 4), (28, 4), (8, 1), (1, 1)):
        ones = torch.ones(600, 1, side, side)
        cropped = augmented("crop", images=ones, indices=torch.arange(600))
        rows = cropped.amax(3).sum(2).squeeze(1)
        assert (int(rows.min()), int(rows.max())) == (side - border, side)
        cut = (augmented("cutout", images=ones, indices=torch.arange(600)) == 0).sum((1, 2, 3))
        # Whole in the middle, a quarter of it in a corner.
        assert int(cut.max()) == max(1, side // 2) ** 2
        assert int(cut.min()) == max(1, side // 4) ** 2


def test_what_becomes_of_a_sample_depends_on_seed_visit_and_index_alone() -> None:
    names = ("crop", "flip", "cutout")
    whole = augmented(*names)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for own in order.split(7):
        assert torch.equal(augmented(*names, images=IMAGES[own], indices=INDICES[own]), whole[own])
    assert augmented(*names, images=IMAGES[:0], indices=INDICES[:0]).shape == (0, *SHAPE)
    for other in (
        augmented(*names, visit=4),
        augmented(*names, seed=6),
        augmented(*names, indices=INDICES + 1),
    ):
        same = (other == whole).flatten(1).all(1)
        assert int(same.sum()) < 5


def test_visits_tell_uses_of_a_sample_apart() -> None:
    epoch = build_sampler("epoch", 100, 30, 0)
    assert [epoch.visit(2, step) for step in range(4)] == [2] * 4
    # Whatever the mini-batch, so that more ranks of one --batch-size see the same images.
    assert build_sampler("epoch", 100, 60, 0).visit(2, 1) == 2
    uniform = build_sampler("uniform", 100, 30, 0)
    assert len({uniform.visit(epoch, step) for epoch in range(3) for step in range(4)}) == 12


def test_the_data_set_carries_it() -> None:
    dataset = load_dataset(DataOptions(augment=" Crop,flip"), 3)
    assert dataset.augmentation is not None
    inputs, _ = dataset.train.batch(torch.arange(5))
    changed = dataset.augmentation(inputs, torch.arange(5), 0)
    assert torch.equal(changed, augmented("crop", "flip", images=inputs, indices=torch.arange(5), visit=0, seed=3))
    assert load_dataset(DataOptions(), 3).augmentation is None
    assert replace(dataset, augmentation=None).train is dataset.train


@pytest.mark.parametrize("text", ["rotate", "crop,crop", "", "crop,", "crop flip"])
def test_unknown_names(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--augment {text}: expected some of crop,flip,cutout"):
        load_dataset(DataOptions(augment=text), 0)


@pytest.mark.parametrize(
    ("dataset", "gives"),
    [
        ("synthetic:10,5,2", r"features of the shape \(5,\)"),
        ("synthetic-sparse:10,100,2", r"sparse of the shape \(1, 2\)"),
    ],
)
def test_only_images_are_augmented(dataset: str, gives: str) -> None:
    problem = rf"--augment flip: it needs images \(channels, height, width\), but --dataset {dataset} gives {gives}"
    with pytest.raises(ConfigError, match=problem):
        load_dataset(DataOptions(dataset=dataset, augment="flip"), 0)
