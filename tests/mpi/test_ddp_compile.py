"""Modules compiled by torch.compile, inside the wrapper and around it."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from tests.mpi.replicas import Replicas, network, samples


def mean_square(model: nn.Module, rank: int, step: int) -> Tensor:
    return model(samples(rank, step=step)[0]).square().mean()


def compiler_missing(backend: str) -> str | None:
    """Say why the back end of torch.compile cannot be used here."""
    if backend != "inductor":
        return None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as problem:
        return f"inductor has no C++ compiler here: {problem}"
    return None


@pytest.mark.parametrize("outside", [False, True], ids=["module_compiled", "wrapper_compiled"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_modules(comm: Communicator, backend: str, outside: bool) -> None:
    why = compiler_missing(backend)
    if why is not None:
        pytest.skip(why)
    if comm.size not in ({2} if backend == "inductor" else {2, 3}):
        pytest.skip("takes long: on a few numbers of ranks only")
    torch._dynamo.reset()
    inner: Any = network() if outside else torch.compile(network(), backend=backend)
    ddp = DistributedDataParallel(inner, comm, bucket_mb=1e-4, first_bucket_mb=1e-4)
    model: Any = torch.compile(ddp, backend=backend) if outside else ddp
    replicas = Replicas(network, comm.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(4):
            if step == 1:
                with ddp.no_sync():
                    mean_square(model, comm.rank, step).backward()
            else:
                mean_square(model, comm.rank, step).backward()
            replicas.backward(mean_square, step, step != 1)
            found = dict(ddp.module.named_parameters())
            for name, wanted in replicas.models[comm.rank].named_parameters():
                torch.testing.assert_close(found[name if outside else f"_orig_mod.{name}"].grad, wanted.grad)
    torch._dynamo.reset()
