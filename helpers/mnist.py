"""MNIST, without a download: 10,000 of its digits come with the package.

They are read by ``torchvision.datasets.MNIST``, as the full data set would be.
"""

import gzip
import math
import os
import struct
import tempfile
from importlib import resources
from pathlib import Path

from torchvision import datasets, transforms

from helpers.environment import cache_folder

# The mean and standard deviation of MNIST's pixels, as in the source article.
TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


def mnist(train: bool = True, full: bool = False) -> datasets.MNIST:
    """MNIST's images as normalised tensors (1, 28, 28), with their labels.

    Args:
        train: the training set, else the test set.
        full: all 70,000 digits (60,000 and 10,000), downloaded once into the
            cache folder, with progress; without a network, a line says so and the
            embedded digits take their place. By default the embedded 10,000
            (8,000 and 2,000), unpacked once into the cache folder.

    Raises:
        OSError: the cache folder cannot be written.
    """
    if full:
        try:
            return _full(train)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()  # after each mirror's own
            print(
                f"The full MNIST could not be downloaded ({reason}): "
                "going on with the 10,000 embedded digits."
            )
    root = cache_folder("mnist-10k")
    _unpack(root / "MNIST" / "raw")
    return datasets.MNIST(root, train=train, transform=TRANSFORM)


def _full(train: bool) -> datasets.MNIST:
    root = cache_folder("mnist")
    raw = root / "MNIST" / "raw"
    for path in raw.glob("*-ubyte"):
        if not is_whole_idx(path):
            path.unlink()  # torchvision downloads again what is missing, and only that
    return datasets.MNIST(root, train=train, transform=TRANSFORM, download=True)


def _unpack(raw: Path) -> None:
    """Unpack the embedded digits, where they are not there in every byte."""
    raw.mkdir(parents=True, exist_ok=True)
    packed = resources.files("helpers").joinpath("data", "mnist-10k")
    for source in packed.iterdir():
        if source.name.endswith(".gz"):
            digits = gzip.decompress(source.read_bytes())
            target = raw / source.name.removesuffix(".gz")
            if not target.is_file() or target.read_bytes() != digits:
                _replace(target, digits)


def _replace(target: Path, content: bytes) -> None:
    """Write beside, then move into place: nothing half written is ever found there."""
    descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise


def is_whole_idx(path: Path) -> bool:
    """Whether an IDX file of bytes is as long as its header says.

    The header: two zero bytes, the type (8: unsigned byte), the number of
    dimensions, then each dimension as a big-endian 32-bit integer.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08":
            return False
        dimensions = file.read(4 * magic[3])
    if len(dimensions) < 4 * magic[3]:
        return False
    shape = struct.unpack(f">{magic[3]}I", dimensions)
    return path.stat().st_size == 4 + len(dimensions) + math.prod(shape)
