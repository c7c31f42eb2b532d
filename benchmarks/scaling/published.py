"""published: what this model says of clusters whose scaling efficiency has been published, and where it disagrees.

Inputs are the numbers of parameters of the models, what one GPU does alone, and nominal prices of the networks, each
with its source. Forward and backward are taken as a third and two thirds of a step. Gradients arrive by groups of
layers, in the order and at the share of the backward pass that the layers' multiplications say (for a model whose
groups are not listed, evenly). Stragglers, input pipelines, launching of kernels and everything by which a network
falls short of its line rate are left out: they explain most of what is simulated above what was published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import Network
from benchmarks.arguments import Parser, check_writable
from benchmarks.record import write_record
from benchmarks.scaling.folder import check_folder, draw_figures
from benchmarks.scaling.profile import Compute
from benchmarks.scaling.reductions import Reductions
from benchmarks.scaling.stepping import Plan, step_time
from benchmarks.scaling.tables import published_table

__all__ = ["CASES", "Case", "Model", "main", "published_rows"]

_EVEN = tuple((1.0, 1.0) for _ in range(20))
_TF = "TensorFlow's benchmarks of May 2017 (one P100 of a DGX-1, synthetic data)"
_HOROVOD = "25 Gbit/s RoCE, nominal, 4 GPUs and one NIC a server; 5 µs and PCIe 3 x16 (126 Gbit/s) inside are assumed"
_UNTOLD = "Left out: stragglers, input, tensors negotiated and fused, RoCE below its line rate"


@dataclass(frozen=True)
class Model:
    """`groups` of layers, the first to arrive first: (parameters, multiplications), in units that are the same within.

    They are scaled to `parameters` in all.
    """

    name: str
    parameters: int
    groups: tuple[tuple[float, float], ...]

    def compute(self, batch_size: int, samples_per_second: float) -> Compute:
        """Return the computing of a GPU that does so many samples a second alone."""
        seconds = batch_size / samples_per_second
        total = sum(size for size, _ in self.groups)
        sizes = tuple(4 * round(self.parameters * size / total) for size, _ in self.groups)
        work = sum(flops for _, flops in self.groups)
        done, arrivals = 0.0, []
        for _, flops in self.groups:
            done += flops / work
            arrivals.append(done * seconds * 2 / 3)
        return Compute(
            f"{self.name}-b{batch_size}", batch_size, sizes, seconds / 3, seconds * 2 / 3, 0.0, tuple(arrivals), 1.0
        )


# Parameters in millions, multiplications in 10^9: of the fully connected layers, then of stages 4 to 1 and the stem,
# counted from the papers' tables (He et al. 2015, arXiv 1512.03385; Simonyan and Zisserman 2014, arXiv 1409.1556).
_RESNET_50 = Model(
    "ResNet-50",
    25_557_032,
    ((2.05, 0.002), (14.96, 0.81), (7.10, 1.47), (1.22, 1.03), (0.22, 0.67), (0.01, 0.12)),
)
_RESNET_101 = Model(
    "ResNet-101",
    44_549_160,
    ((2.05, 0.002), (14.96, 0.81), *((26.09 / 4, 5.18 / 4),) * 4, (1.22, 1.03), (0.22, 0.67), (0.01, 0.12)),
)
_VGG_16 = Model(
    "VGG-16",
    138_357_544,
    ((4.1, 0.004), (16.8, 0.017), (102.8, 0.103), (7.08, 1.39), (5.9, 4.62), (1.48, 4.62), (0.22, 2.77), (0.04, 1.94)),
)
_INCEPTION_V3 = Model("Inception V3", 23_800_000, _EVEN)


@dataclass(frozen=True)
class Case:
    """A published efficiency of `ranks` GPUs over `baseline_ranks`; `check`: from a secondary source."""

    source: str
    model: Model
    ranks: int
    baseline_ranks: int
    efficiency: float
    check: bool
    batch_size: int
    samples_per_second: float
    network: Network
    inputs: str
    comment: str


def _network(latency_us: float, gigabits: float, inside_us: float, inside_gigabits: float, per_node: int) -> Network:
    inside = LinkCost(1e-6 * inside_us, 8e-9 / inside_gigabits, 0.0)
    between = LinkCost(1e-6 * latency_us, 8e-9 / gigabits, 0.0)
    return Network(inside, between, per_node)


_ROCE = _network(5.0, 25.0, 5.0, 126.0, 4)

CASES: Sequence[Case] = (
    Case(
        "Goyal et al. 2017",
        _RESNET_50,
        256,
        8,
        0.90,
        False,
        32,
        195.0,
        _network(25.0, 50.0, 5.0, 160.0, 8),
        f"32 images a GPU, 195 images/s: {_TF}, batch 32, as a stand-in for Caffe2; 50 Gbit/s Ethernet, nominal, 8 "
        "GPUs and one NIC a server; 25 µs, and one NVLink 1 (160 Gbit/s) inside, are assumed",
        "Left out: stragglers, input, TCP below its line rate, copies between GPU and host for the network",
    ),
    Case(
        "Horovod",
        _INCEPTION_V3,
        512,
        1,
        0.90,
        False,
        64,
        142.0,
        _ROCE,
        f"64 images a GPU, 142 images/s: {_TF}; {_HOROVOD}; parameters: less than 25 million (arXiv 1512.00567), "
        "23.8 million taken, spread evenly",
        _UNTOLD,
    ),
    Case(
        "Horovod",
        _RESNET_101,
        512,
        1,
        0.90,
        False,
        64,
        1656.82 / 16,
        _ROCE,
        f"64 images a GPU, 103.6 images/s: Horovod's documentation, of 16 GPUs, so with what those lose; {_HOROVOD}",
        _UNTOLD,
    ),
    Case(
        "Horovod",
        _VGG_16,
        128,
        1,
        0.79,
        True,
        64,
        154.0,
        _ROCE,
        "as for 512 GPUs; published in an earlier README of Horovod, of 32 servers",
        _UNTOLD,
    ),
    Case(
        "Horovod",
        _VGG_16,
        512,
        1,
        0.68,
        False,
        64,
        154.0,
        _ROCE,
        f"64 images a GPU, 154 images/s: {_TF}; {_HOROVOD}",
        f"{_UNTOLD}; 553 MB a step make it the case that the real rate of the network decides",
    ),
    Case(
        "PyTorch DDP, Li et al. 2020",
        _RESNET_50,
        256,
        1,
        0.50,
        True,
        32,
        360.0,
        _network(25.0, 100.0, 5.0, 1200.0, 8),
        "all assumed, to be checked: 32 images a GPU, 360 images/s (a V100 in float32), 100 Gbit/s nominal and one "
        "NIC for 8 GPUs, NVLink 2 (1200 Gbit/s) inside",
        "Published is 128 x of 256 GPUs, on a cluster shared with other jobs, to be checked; their traffic and the "
        "stragglers they make are left out",
    ),
)


def published_rows(cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Return a row for each case."""
    rows = []
    for case in cases:
        compute = case.model.compute(case.batch_size, case.samples_per_second)
        reductions = Reductions(case.network)
        step = step_time(compute, case.ranks, reductions, Plan())
        baseline = step_time(compute, case.baseline_ranks, reductions, Plan())
        rows.append(
            {
                "kind": "published",
                "simulated": True,
                "source": case.source,
                "model": case.model.name,
                "model_bytes": compute.total_bytes,
                "ranks": case.ranks,
                "baseline_ranks": case.baseline_ranks,
                "check": case.check,
                "published_efficiency": case.efficiency,
                "predicted_efficiency": baseline.seconds / step.seconds,
                **step.fields(),
                "inputs": case.inputs,
                "comment": case.comment,
            }
        )
    return rows


def main(arguments: Sequence[str]) -> int:
    """Simulate, print and write. Raises ConfigError for bad arguments."""
    parser = Parser("scaling published", "Simulated beside published scaling efficiencies.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw PNGs into this folder")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    check_folder("--figures", options.figures)
    rows = published_rows()
    print(published_table(rows))
    if options.json is not None:
        write_record(options.json, "scaling", ["published", *arguments], rows)
    draw_figures(rows, options.figures)
    return 0
