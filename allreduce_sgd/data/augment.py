"""Random changes of training images that leave their class: crop, flip and cutout, of a whole batch at once.

- crop: a window of the image's own size at a random place of the image with a border of zeros, an eighth of the side
  (4 pixels of 32 or 28, as in He et al. 2015, arXiv 1512.03385; 1 of 8).
- flip: left and right exchanged, for one image in two.
- cutout: zeros in a square of half the (shorter) side, whose centre is anywhere in the image, so that it may stand out
  of it (DeVries and Taylor 2017, arXiv 1708.04552).

They follow one another in this order. Zero is the mean of what is standardised, and black in other images.

What becomes of a sample depends on the run's seed, the sample's index and its visit (`Sampler.visit`) alone, not on
who takes it nor on its place in the batch: any number of ranks trains on the same images, and so does a resumed run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from allreduce_sgd.data.options import AUGMENTATIONS
from allreduce_sgd.data.splitmix import key_of, random_integers
from allreduce_sgd.errors import ConfigError

__all__ = ["Augmentation", "parse_augmentation"]


def parse_augmentation(text: str) -> tuple[str, ...]:
    """The names in `text`, such as "crop,flip".

    Raises:
        ConfigError: one of them is unknown, or stands there twice.
    """
    names = tuple(name.strip().lower() for name in text.split(","))
    if not set(names) <= set(AUGMENTATIONS) or len(set(names)) < len(names):
        raise ConfigError(f"--augment {text}: expected some of {','.join(AUGMENTATIONS)}, each once, with commas")
    return names


class Augmentation:
    """Changes batches of images (k, channels, height, width) at random, as `seed` and the samples' indices say."""

    def __init__(self, names: Sequence[str], image_shape: tuple[int, ...], seed: int) -> None:
        _, self._height, self._width = image_shape
        self._crops, self._flips, self._cuts = (name in names for name in AUGMENTATIONS)
        self._seed = seed

    def __call__(self, images: Tensor, indices: Tensor, visit: int) -> Tensor:
        """Changed copies of `images` (k, c, h, w), of any device, which are the samples `indices` (k,) int64."""
        height, width = self._height, self._width
        border = -(-height // 8), -(-width // 8)
        # All of them, wanted or not: so a crop is the same with and without a flip.
        limits = (2 * border[0] + 1, 2 * border[1] + 1, 2, height, width)
        drawn = random_integers(key_of("augment", self._seed, visit), indices.cpu().numpy(), limits)
        down, right, flipped, row, column = torch.from_numpy(drawn).to(images.device)[:, :, None]
        rows = torch.arange(height, device=images.device).expand(len(images), height)
        columns = torch.arange(width, device=images.device).expand(len(images), width)
        emptied: list[Tensor] = []
        if self._cuts:
            side = max(1, min(height, width) // 2)
            emptied.append(_within(rows, row, side)[:, :, None] & _within(columns, column, side)[:, None, :])
        if self._flips:
            columns = torch.where(flipped == 1, width - 1 - columns, columns)
        if self._crops:
            rows, columns = rows + down - border[0], columns + right - border[1]
            emptied += [((rows < 0) | (rows >= height))[:, :, None], ((columns < 0) | (columns >= width))[:, None, :]]
            rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        taken = images.flatten(2).gather(2, pixels[:, None, :].expand(-1, images.shape[1], -1)).view(images.shape)
        for mask in emptied:
            taken.masked_fill_(mask[:, None], 0)
        return taken


def _within(places: Tensor, centre: Tensor, side: int) -> Tensor:
    return (places >= centre - side // 2) & (places < centre - side // 2 + side)
