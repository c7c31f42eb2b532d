"""One SLURM cluster for all tests of this folder that ask for it."""

from collections.abc import Iterator

import pytest

from tests.launch.requirements import require_slurm
from tests.launch.slurm_cluster import SlurmCluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Two nodes of two cores each."""
    require_slurm()
    with SlurmCluster(nodes=2, cpus=2) as cluster:
        yield cluster
