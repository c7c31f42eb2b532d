"""Text for a language model of characters: `text:FILE`, after Karpathy's char-rnn.

The first part of the text is for training, the last for testing. Each is cut into blocks that do not overlap, so an
epoch predicts every character once; the target of a position is the character that follows. A rest shorter than a
block is left out. Unlike char-rnn's streams, a block does not continue the one before it.
"""

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.data.files import named_file, read_file
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["load_text"]


def load_text(options: DataOptions, name: str) -> Dataset:
    """The UTF-8 text `name` (.gz is decompressed): inputs and targets (n, block_length) int64, codes of characters.

    The vocabulary is the sorted characters of the whole text; `classes` is its size.

    Raises:
        ConfigError: the file is missing, is not UTF-8, or is too short for one block in either part.
    """
    path = named_file(options, name)
    content = read_file(path)
    with refusing(f"{path}: is not UTF-8 text"):
        text = content.decode("utf-8")
    if len(text) < 2:
        raise ConfigError(f"{path}: has {len(text)} characters; a text to learn needs many")
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    characters, codes = np.unique(points, return_inverse=True)
    encoded = torch.from_numpy(codes.astype(np.int64))
    boundary = len(encoded) - round(len(encoded) * options.test_fraction)
    train, test = (
        _blocks(part, options.block_length, f"{path}: the {which} part")
        for part, which in ((encoded[:boundary], "train"), (encoded[boundary:], "test"))
    )
    vocabulary = "".join(map(chr, characters.tolist()))
    return Dataset(f"text:{name}", train, test, (options.block_length,), max(len(vocabulary), 2), vocabulary)


def _blocks(codes: Tensor, length: int, where: str) -> Split:
    blocks = (len(codes) - 1) // length
    if blocks < 1:
        raise ConfigError(f"{where} has {len(codes)} characters; --block-length {length} needs at least {length + 1}")
    used = blocks * length
    return Split(codes[:used].view(blocks, length), codes[1 : used + 1].view(blocks, length))
