"""Texts as hashed bags of words (Weinberger et al. 2009, arXiv 0902.2206), for sparse linear models.

A word is two or more letters or digits, in lower case. Its feature is a hash of it, and so is the sign that its count
gets, so that words which share a feature cancel rather than add up on average. Each text is scaled to length one. The
hash is MurmurHash3 by way of scikit-learn's HashingVectorizer, the same in every process. No vocabulary is kept, so
texts are read one by one, and a new word is no special case.

Difference from the paper: of a text with very many different words only those with most weight are kept.
"""

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.data.sparse_split import SparseSplit

__all__ = ["hashed_words", "with_targets"]

_CHUNK = 256

_Rows = tuple[Tensor, Tensor, Tensor]


def hashed_words(texts: Iterable[str], features: int, most: int) -> _Rows:
    """Offsets (n + 1,) int64, features int64 and values float32 of n `texts`, as `SparseSplit` has them.

    Of each text at most `most` features, those with the largest values.
    """
    # It takes a second or two to import, which other data sets need not wait for.
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=features, dtype=np.float32)
    lengths, indices, values = [0], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    remaining = iter(texts)
    while chunk := list(islice(remaining, _CHUNK)):
        rows = hashing.transform(chunk)
        # Words that share a feature, with opposite signs.
        rows.eliminate_zeros()
        for start, end in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
            own, weights = rows.indices[start:end], rows.data[start:end]
            if len(own) > most:
                kept = np.sort(np.lexsort((own, -np.abs(weights)))[:most])
                own, weights = own[kept], weights[kept]
            lengths.append(len(own))
            indices.append(own.astype(np.int64))
            values.append(weights)
    offsets = torch.tensor(lengths).cumsum(0)
    return offsets, torch.from_numpy(np.concatenate(indices)), torch.from_numpy(np.concatenate(values))


def with_targets(rows: _Rows, targets: Tensor, features: int) -> SparseSplit:
    """The samples whose texts gave `rows` of `hashed_words`, with their targets (n,)."""
    offsets, indices, values = rows
    return SparseSplit(offsets, indices, values, targets, features, int(offsets.diff().max()) if len(targets) else 0)
