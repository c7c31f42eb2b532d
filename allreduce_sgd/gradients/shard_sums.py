"""The gradient of a mini-batch out of those of its shards, which are added up in an order of their own.

Every shard's gradient, weighed by its part of the mini-batch, is a leaf of a tree (`fixed_tree.py`) over all shards of
all ranks. It is weighed when it is moved into its bucket, as a whole and by itself: a multiplication that were fused
with the addition would round differently where a rank has but one leaf. A parameter that no shard had a gradient of is
left alone: which those are is summed by an all-reduce of one number per parameter, of exact counts.

Bytes per rank and step: those of the tree. The exchanges of all buckets start when the back-propagation of a rank's
last shard has ended: they overlap with one another, not with computing.
"""

from itertools import chain

import torch
from torch import nn

from allreduce_sgd.gradients.buckets import Bucket, build_buckets
from allreduce_sgd.gradients.fixed_tree import FixedTree, PartialSums
from allreduce_sgd.gradients.members import Member, named_briefly, non_finite, report_non_finite
from allreduce_sgd.gradients.options import GradientOptions

__all__ = ["ShardSums"]


class ShardSums:
    """Adds up the gradients of `model` over the shards of a step, the leaves of `tree`.

    All ranks must construct it, and call `hand_out` together. What of `options` has a meaning here: bucket sizes,
    find_unused_parameters, check_finite. Sparse gradients travel as dense ones.
    """

    def __init__(self, model: nn.Module, tree: FixedTree, options: GradientOptions) -> None:
        self._comm = tree.comm
        self._find_unused, self._check_finite = options.find_unused_parameters, options.check_finite
        named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        self._members = [Member(name, parameter) for name, parameter in named]
        limits = options.first_bucket_mb * 2**20, options.bucket_mb * 2**20
        with torch.no_grad():
            first = build_buckets([parameter for _, parameter in named], tree.comm, *limits)
        self._levels = [first]
        self._sums = PartialSums(tree, [bucket.buffer for bucket in first])
        self._used = [0] * len(named)
        place = {id(parameter): index for index, (_, parameter) in enumerate(named)}
        self._places = [[place[id(one)] for one in bucket.parameters] for bucket in first]

    @torch.no_grad()
    def take(self, weight: float | None) -> None:
        """Take `weight` times what `.grad` holds as the gradient of the next shard, None: zero, for a shard without
        samples; and leave `.grad` None. Raises RuntimeError for a parameter without a gradient, where that is asked."""
        missing = []
        for bucket, places in zip(self._leaf(), self._places, strict=True):
            for slot, place in zip(bucket.slots, places, strict=True):
                parameter = self._members[place].parameter
                gradient, parameter.grad = parameter.grad, None
                if gradient is None or weight is None:
                    slot.zero_()
                    missing.append(place)
                else:
                    torch.mul(gradient.to_dense() if gradient.is_sparse else gradient, weight, out=slot)
                    self._used[place] += 1
        if missing and weight is not None and not self._find_unused:
            names = named_briefly([self._members[place] for place in sorted(missing)])
            raise RuntimeError(
                f"rank {self._comm.rank}: parameters got no gradient in this step: {names}; use them in the loss, "
                f"freeze them with requires_grad_(False), or allow it with find_unused_parameters"
            )
        self._sums.add()

    @torch.no_grad()
    def hand_out(self) -> None:
        """Make `.grad` of the parameters the sum over all shards, None where no shard had a gradient.

        They are views of buckets, valid until the next `take`. All ranks must call, when every shard has been taken.
        """
        bad: list[str] = []
        if self._check_finite:
            for bucket in chain.from_iterable(self._levels[: self._sums.depth]):
                bad += non_finite(bucket, self._members)
        device = self._levels[0][0].buffer.device
        flags = self._comm.all_reduce(torch.tensor([*self._used, len(bad)], device=device))
        self._used = [0] * len(self._used)
        self._sums.finish()
        *used, bad_everywhere = flags.wait().tolist()
        if bad_everywhere:
            report_non_finite(list(dict.fromkeys(bad)), self._comm)
        for bucket, places in zip(self._levels[0], self._places, strict=True):
            for slot, place in zip(bucket.slots, places, strict=True):
                self._members[place].parameter.grad = slot if used[place] else None

    def _leaf(self) -> list[Bucket]:
        """Return the buckets in which the next shard's gradient belongs."""
        buffers, depth = self._sums.leaf(), self._sums.depth
        if depth == len(self._levels):
            self._levels.append(
                [Bucket(one.parameters, buffer) for one, buffer in zip(self._levels[0], buffers, strict=True)]
            )
        return self._levels[depth]
