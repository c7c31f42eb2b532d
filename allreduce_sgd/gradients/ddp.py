"""DistributedDataParallel: wraps a module so that backward passes leave every rank with the average gradient.

The names and meaning are those of torch.nn.parallel.DistributedDataParallel; the communicator is passed in. What is
reduced when is told in `reducer.py`. Copies of a gradient: one, into its bucket, with the division folded in; `.grad`
is then a view of the bucket.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.reducer import Reducer
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model

__all__ = ["DistributedDataParallel"]


class DistributedDataParallel(nn.Module):
    """Data-parallel wrapper of `module`, whose parameters and buffers become those of rank 0.

    All ranks must construct it together, with the same model; a parameter that differs in name, shape, strides, dtype
    or requires_grad raises MismatchError with its name and the ranks. Afterwards all ranks must run the same number of
    synchronised backward passes.

    `bucket_mb` and `first_bucket_mb` are bucket sizes in MiB. `broadcast_buffers`: each forward pass in training mode
    first takes the buffers of rank 0, as torch does; False leaves every rank its own.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        bucket_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        broadcast_buffers: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.comm = comm
        self.broadcast_buffers = broadcast_buffers
        self._synchronised = True
        self._reducer: Reducer | None = None
        trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError("DistributedDataParallel: the module has no parameter that requires a gradient")
        if comm.size == 1:
            return
        check_same_model(module, comm)
        broadcast_tensors([*module.parameters(), *module.buffers()], comm)
        self._reducer = Reducer(trainable, comm, bucket_mb, first_bucket_mb)

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        self._follow_buffers()
        return self.module(*inputs, **named_inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this context backward passes accumulate locally; the first one after it reduces the sums."""
        before = self._synchronised
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def set_gradient_weight(self, weight: float) -> None:
        """Have the coming backward passes weigh this rank's gradient by `weight`; 1/size, the default, averages.

        With weight n_i / sum of n_i, where rank i's loss is the mean over n_i samples, the result is the true mean
        over all samples of all ranks. On one rank the weight must be 1.
        """
        if self._reducer is not None:
            self._reducer.weight = weight
        elif weight != 1.0:
            raise ValueError(f"set_gradient_weight: one rank alone has weight 1, not {weight}")

    def bucket_bytes(self) -> list[int]:
        """Return the sizes of the buckets in the order in which they are reduced; none on one rank alone."""
        return [] if self._reducer is None else [bucket.buffer.nbytes for bucket in self._reducer.buckets]

    def reduce_without_backward(self) -> None:
        """Take part in this step's reductions with what `.grad` holds now, zeros where it is None.

        For a rank without samples, while the other ranks run one forward and one synchronised backward pass.
        """
        if self._reducer is not None:
            self._follow_buffers()
            self._reducer.reduce_now()

    def _follow_buffers(self) -> None:
        if self.comm.size > 1 and self.broadcast_buffers and self.training and self._synchronised:
            broadcast_tensors(self.module.buffers(), self.comm)

    def _switch(self, synchronised: bool) -> None:
        self._synchronised = synchronised
        if self._reducer is not None:
            self._reducer.enabled = synchronised
