"""The public files of the data sets that can be downloaded: where they are, how long, and their checksums.

Sizes and checksums are those of the files as served, that is compressed. Fashion-MNIST: Xiao, Rasul, Vollgraf 2017,
checksums as in its README. MNIST: LeCun, Cortes, Burges, from the PyTorch project's mirror. CIFAR-10: Krizhevsky 2009.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["REMOTE_FILES", "RemoteFile"]

_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class RemoteFile:
    """One file to download; `size_bytes` is None where it is not known for certain."""

    name: str
    url: str
    md5: str
    size_bytes: int | None = None


def _file(base: str, name: str, md5: str, size_bytes: int) -> RemoteFile:
    return RemoteFile(name, base + name, md5, size_bytes)


REMOTE_FILES: Mapping[str, tuple[RemoteFile, ...]] = MappingProxyType(
    {
        "fashion-mnist": (
            _file(_FASHION, "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
            _file(_FASHION, "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", 29_515),
            _file(_FASHION, "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", 4_422_102),
            _file(_FASHION, "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", 5_148),
        ),
        "mnist": (
            _file(_MNIST, "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            _file(_MNIST, "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            _file(_MNIST, "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            _file(_MNIST, "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        ),
        "cifar10": (_file(_CIFAR, "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),),
    }
)
