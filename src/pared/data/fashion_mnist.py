"""Fashion-MNIST: 12,000 images that ship with the package, or all 70,000 where they are on disk.

Images of the official train file are train or validation data, those of the official test file test data. Who is who is
decided by the SHA-256 of the image, within its class: an order that needs no random generator. The embedded
images were chosen by `scripts/choose_fashion_mnist.py`; each is in the split of the same name of the full set.

Source: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747. Licence: MIT, see `LICENSE-fashion-mnist` beside this file.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import zlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pared.errors import DataError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILE = "fashion_mnist.xz"
SIZES = {"train": 8000, "validation": 2000, "test": 2000}
PIXELS = 28 * 28
# Of the 60,000 official train images, as fractions of 255.
MEAN, STD = 0.2860, 0.3530
# By rank within the class: the first are validation, and the embedded train images come from the others.
FULL_VALIDATION = 500
Pair = tuple[np.ndarray, np.ndarray]


class Splits(NamedTuple):
    """Three parts, each (images, labels)."""

    train: Pair
    validation: Pair
    test: Pair


def load(full: bool = False, folder: str | Path | None = None) -> Splits:
    """Images float32 (N, 1, 28, 28), normalised to mean 0 and deviation 1 over the train file; labels int64 (N,).

    Args:
        full: All images (55,000 / 5,000 / 10,000) instead of the embedded ones (8,000 / 2,000 / 2,000).
        folder: Where the four official files are; only read with `full`.

    Raises:
        DataError: `full`, and the files are not there or damaged.
    """
    raw = full_splits(Path(folder or FOLDER)) if full else embedded_splits()
    return Splits(*(normalised(*pair) for pair in raw))


def normalised(images: np.ndarray, labels: np.ndarray) -> Pair:
    pixels = images.reshape(-1, 1, 28, 28).astype(np.float32) / np.float32(255)
    return (pixels - np.float32(MEAN)) / np.float32(STD), labels.astype(np.int64)


def full_splits(folder: Path) -> Splits:
    """The whole set as bytes. Raises: DataError."""
    images, labels = read_official(folder, "train")
    rank = ranks(images, labels)
    kept, held = rank >= FULL_VALIDATION, rank < FULL_VALIDATION
    return Splits((images[kept], labels[kept]), (images[held], labels[held]), read_official(folder, "t10k"))


def choose(folder: Path) -> Splits:
    """The embedded part of the whole set, as bytes, balanced by class. Raises: DataError."""
    train, test = read_official(folder, "train"), read_official(folder, "t10k")
    rank, test_rank = ranks(*train), ranks(*test)
    each = {name: size // len(CLASSES) for name, size in SIZES.items()}
    learnt = (rank >= FULL_VALIDATION) & (rank < FULL_VALIDATION + each["train"])
    held, tested = rank < each["validation"], test_rank < each["test"]
    return Splits(
        (train[0][learnt], train[1][learnt]), (train[0][held], train[1][held]), (test[0][tested], test[1][tested])
    )


def pack(splits: Splits) -> bytes:
    """All images, then all labels, compressed without loss."""
    parts = [images for images, _ in splits] + [labels for _, labels in splits]
    content = b"".join(np.ascontiguousarray(part, dtype=np.uint8).tobytes() for part in parts)
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_SHA256)


def embedded_splits() -> Splits:
    """What `pack` packed."""
    content = lzma.decompress(resources.files("pared.data").joinpath(FILE).read_bytes())
    count = sum(SIZES.values())
    images = np.frombuffer(content, np.uint8, count * PIXELS).reshape(count, PIXELS)
    labels = np.frombuffer(content, np.uint8, count, offset=count * PIXELS)
    ends = np.cumsum(list(SIZES.values()))[:-1]
    return Splits(*zip(np.split(images, ends), np.split(labels, ends), strict=True))


def read_official(folder: Path, part: str) -> Pair:
    """Images (N, 784) and labels (N,) of the files that start with `part` ("train" or "t10k"). Raises: DataError."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, PIXELS)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images and {len(labels)} labels; fetch the files anew")
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file: two zero bytes, type, number of dimensions, the dimensions, the data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"the full Fashion-MNIST is not in {path.parent}: {path.name} is missing; install the Debian package "
            "dataset-fashion-mnist, name the folder that holds the four official files, or use the embedded images"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it anew") from error
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").tolist()
    if rank == 0 or len(shape) != rank or len(content) != 4 + 4 * rank + math.prod(shape):
        raise DataError(f"{path} is not a whole IDX file of bytes; fetch it anew")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def ranks(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Place of each image within its class, by the SHA-256 of its bytes."""
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    rank = np.empty(len(images), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members[np.argsort(digests[members])]] = np.arange(len(members))
    return rank
