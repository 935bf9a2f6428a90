"""Files of small image datasets, as torchvision reads them."""

from pathlib import Path

import numpy as np


def write_mnist(root: Path, folder: str = "MNIST") -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """The files of seven training and four test images, which are returned by `train`."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = {}
    for train, prefix, count in ((True, "train", 7), (False, "t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        samples[train] = images, labels
    return samples


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format of the MNIST files."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
