"""The embedded data set: what ships is what the script chooses, and no image is in two splits."""

import gzip
import hashlib
from importlib import resources

import numpy as np
import pytest
import torch

from pared.data import fashion_mnist
from pared.data.tasks import TASKS
from pared.errors import DataError

on_disk = pytest.mark.skipif(
    not fashion_mnist.FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed"
)


def digests(images: np.ndarray) -> set[str]:
    return {hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images}


@pytest.fixture(scope="module")
def embedded():
    return fashion_mnist.load()


def test_load_gives_balanced_normalised_splits_when_embedded(embedded):
    for (images, labels), size in zip(embedded, (8000, 2000, 2000), strict=True):
        assert images.shape == (size, 1, 28, 28)
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)
        assert np.bincount(labels).tolist() == [size // 10] * 10
    # Pixels have mean 0 and mean square 1 over the train file. Over 8,000 of its images: within four standard errors.
    for power, expected in ((1, 0.0), (2, 1.0)):
        each = (embedded.train[0] ** power).mean(axis=(1, 2, 3))
        assert abs(each.mean() - expected) < 4 * each.std() / len(each) ** 0.5
    levels = embedded.test[0] * 0.3530 + 0.2860
    assert np.allclose(levels * 255, np.round(levels * 255), atol=1e-3)
    assert (round(float(levels.min()), 6), round(float(levels.max()), 6)) == (0, 1)


def test_no_image_is_in_two_splits_when_embedded(embedded):
    kinds = [digests(images) for images, _ in embedded]
    assert [len(kind) for kind in kinds] == [8000, 2000, 2000]
    assert len(set.union(*kinds)) == 12000


def test_classes_are_mixed_when_only_the_first_images_are_read(embedded):
    for _, labels in embedded:
        assert np.bincount(labels[:500], minlength=10).min() >= 25


def test_embedded_file_is_small_and_its_licence_lies_beside_it():
    folder = resources.files("pared.data")
    assert len(folder.joinpath(fashion_mnist.FILE).read_bytes()) <= 6_000_000
    notice = folder.joinpath("LICENSE-fashion-mnist").read_text(encoding="utf8")
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in notice
    assert "Permission is hereby granted, free of charge" in notice


@on_disk
def test_embedded_images_are_what_the_script_chooses_when_the_full_set_is_there():
    for chosen, shipped in zip(
        fashion_mnist.choose(fashion_mnist.FOLDER), fashion_mnist.embedded_splits(), strict=True
    ):
        assert np.array_equal(chosen[0], shipped[0])
        assert np.array_equal(chosen[1], shipped[1])


@on_disk
def test_full_splits_hold_the_embedded_ones_when_the_full_set_is_there():
    full, embedded = fashion_mnist.full_splits(fashion_mnist.FOLDER), fashion_mnist.embedded_splits()
    assert [len(labels) for _, labels in full] == [55_000, 5_000, 10_000]
    kinds = [digests(images) for images, _ in full]
    for kind, (images, _) in zip(kinds, embedded, strict=True):
        assert digests(images) <= kind
    assert not kinds[0] & kinds[1]
    assert not kinds[0] & kinds[2]
    # The official test file, read apart from our reader: 16 bytes of header, then the pixels.
    content = gzip.decompress((fashion_mnist.FOLDER / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert full.test[0].tobytes() == content[16:]


def write_official(folder, count):
    """Small files in the official form: all zero but the last pixel, which tells the images apart."""
    for part in ("train", "t10k"):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 27, 27] = np.arange(count)
        header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b"\0\0\x08\x01" + np.array([count], ">u4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


def test_read_official_gives_images_with_their_labels_when_whole(tmp_path):
    write_official(tmp_path, 20)
    images, labels = fashion_mnist.read_official(tmp_path, "train")
    assert images[:, -1].tolist() == list(range(20))
    assert labels.tolist() == [i % 10 for i in range(20)]
    rank = fashion_mnist.ranks(images, labels)
    by_hand = sorted((3, 13), key=lambda i: hashlib.sha256(images[i].tobytes()).hexdigest())
    assert [rank[i] for i in by_hand] == [0, 1]


@pytest.mark.parametrize("damage", ["cut", "no gzip", "other type", "labels", "short"])
def test_load_says_what_to_do_when_the_official_files_are_damaged(tmp_path, damage):
    write_official(tmp_path, 20)
    path = tmp_path / ("train-labels-idx1-ubyte.gz" if damage == "labels" else "train-images-idx3-ubyte.gz")
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-20],
            "no gzip": b"<html>",
            "other type": gzip.compress(b"\0\0\x0d\x01" + bytes(8)),
            "labels": gzip.compress(b"\0\0\x08\x01" + np.array([3], ">u4").tobytes() + bytes(3)),
            "short": gzip.compress(gzip.decompress(content)[:-1]),
        }[damage]
    )
    with pytest.raises(DataError, match=r"fetch (it|the files) anew"):
        fashion_mnist.load(full=True, folder=tmp_path)


def test_load_names_the_package_when_the_full_set_is_not_there(tmp_path):
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte\.gz is missing; install the Debian package dataset-fash"
    ):
        fashion_mnist.load(full=True, folder=tmp_path)


def test_task_is_ready_to_use_when_embedded(embedded):
    task = TASKS["fashion_mnist"](batch_size=1000)
    assert [len(getattr(task, role)) for role in ("calibration", "train", "validation", "test")] == [1, 8, 2, 2]
    for role in ("calibration", "train", "validation", "test"):
        assert sum(batch.inputs.size for batch in task.batches(role)) == {"calibration": 512, "train": 8000}.get(
            role, 2000
        )
    assert task.metric is not None
    assert task.metric.name == "accuracy"
    (calibration,) = task.batches("calibration")
    assert torch.equal(calibration.inputs.args[0], torch.from_numpy(embedded.train[0][:512]))
    order = torch.cat([batch.target for batch in task.batches("train")])
    assert not torch.equal(order, torch.from_numpy(embedded.train[1]))
    perfect = nn_output(order)
    assert task.loss is not None
    assert float(task.loss(perfect, order)) < 1e-6


def nn_output(labels: torch.Tensor) -> torch.Tensor:
    """Logits that name the given labels beyond doubt."""
    return 100 * torch.nn.functional.one_hot(labels, 10).float()
