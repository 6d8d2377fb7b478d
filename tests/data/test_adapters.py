"""Every source a Task takes gives the same samples; what cannot be read again is refused."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pared.task
from pared.data.adapters import adapt
from pared.data.batches import Arrays, Batches
from pared.errors import DataError

COUNT, SHAPE = 37, (2, 1, 6, 5)


def greys() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5), dtype=np.uint8)


class Rows:
    """A Hugging Face dataset, as far as it is read here."""

    column_names = ("image", "label")

    def __init__(self, transformed: bool = False) -> None:
        names = type("ClassLabel", (), {"names": ["even", "odd"]})()
        self.features = {"image": object(), "label": names}
        self.transformed = transformed

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict:
        grey = greys()[index]
        image = torch.from_numpy(grey / np.float32(255))[None] if self.transformed else Image.fromarray(grey)
        return {"image": image, "label": np.int64(index % 2) if self.transformed else index % 2}


class Samples(Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(greys()[index] / np.float32(255))[None], index % 2


class Again:
    """Starts anew each time it is read."""

    def __iter__(self):
        return iter([(x[None], y[None]) for x, y in zip(*pair(), strict=True)])


def png(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG")
    return buffer.getvalue()


def pair() -> tuple[np.ndarray, np.ndarray]:
    return greys()[:, None] / np.float32(255), np.arange(COUNT) % 2


def parquet(folder) -> str:
    table = pa.table({"image": [{"bytes": png(g), "path": None} for g in greys()], "label": pair()[1]})
    pq.write_table(table, folder / "a.parquet", row_group_size=10)
    return str(folder / "a.parquet")


def class_folder(folder):
    for number, grey in enumerate(greys()):
        place = folder / "images" / ("odd" if number % 2 else "even")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(png(grey))
    return folder / "images"


SOURCES = {
    "arrays": lambda folder: pair(),
    "tensors": lambda folder: tuple(map(torch.from_numpy, pair())),
    "list of arrays": lambda folder: list(pair()),
    "small labels": lambda folder: (pair()[0], pair()[1].astype(np.uint8)),
    "dataset": lambda folder: Samples(),
    "tensor dataset": lambda folder: TensorDataset(*map(torch.from_numpy, pair())),
    "loader": lambda folder: DataLoader(Samples(), batch_size=5),
    "list of batches": lambda folder: list(DataLoader(Samples(), batch_size=5)),
    "tuple of batches": lambda folder: tuple(DataLoader(Samples(), batch_size=20)),  # two pairs
    "re-iterable": lambda folder: Again(),
    "hugging face": lambda folder: Rows(),
    "hugging face with a transform": lambda folder: Rows(transformed=True),
    "parquet": parquet,
    "folder": class_folder,
    "batches": lambda folder: Batches(Arrays(*pair()), batch_size=4),
}


def collect(source) -> tuple[torch.Tensor, torch.Tensor]:
    read = [pared.task.as_batch(item) for item in source]
    return torch.cat([batch.inputs.args[0] for batch in read]), torch.cat([batch.target for batch in read])


@pytest.mark.parametrize("name", SOURCES)
def test_adapt_gives_the_same_samples_when_sources_differ(name, tmp_path):
    adapted = adapt(SOURCES[name](tmp_path), role="validation", example_shape=SHAPE)
    images, labels = collect(adapted)
    want_images, want_labels = map(torch.from_numpy, pair())
    assert torch.equal(images, want_images)
    assert torch.equal(labels, want_labels)
    assert labels.dtype == torch.int64
    again, _ = collect(adapted)
    assert torch.equal(again, images)


@pytest.mark.parametrize(
    "name", [n for n in SOURCES if n not in ("loader", "list of batches", "tuple of batches", "re-iterable")]
)
def test_adapt_shuffles_anew_each_epoch_when_the_role_is_train(name, tmp_path):
    adapted = adapt(SOURCES[name](tmp_path), role="train", example_shape=SHAPE)
    orders = []
    for epoch in (0, 1):
        adapted.set_epoch(epoch)
        orders.append(collect(adapted)[0].flatten(1))
    assert not torch.equal(orders[0], orders[1])
    everything = torch.from_numpy(pair()[0]).flatten(1)
    for order in orders:
        assert not torch.equal(order, everything)
        assert sorted(order.tolist()) == sorted(everything.tolist())


@pytest.mark.parametrize("name", ["loader", "list of batches", "re-iterable"])
def test_adapt_leaves_batches_as_they_are_when_given_batches(name, tmp_path):
    source = SOURCES[name](tmp_path)
    assert adapt(source, role="train", example_shape=SHAPE) is source


def test_adapt_keeps_an_order_that_was_chosen_when_the_role_is_train():
    batches = Batches(Arrays(*pair()), shuffle=False)
    assert adapt(batches, role="train", example_shape=SHAPE) is batches


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.booleans())
def test_adapt_tells_a_set_from_batches_when_there_are_two_arrays(length, as_list):
    x, y = np.zeros((length, 3), np.float32), np.zeros(length, np.int64)
    source = [x, y] if as_list else (x, y)
    batches = list(adapt(source, role="calibration", example_shape=(1, 3)))
    assert sum(len(inputs) for inputs, _ in batches) == length
    assert all(len(inputs) == len(target) for inputs, target in batches)
    two = [torch.zeros(length, 3), torch.zeros(length, 3)]
    assert adapt(two, role="calibration", example_shape=(1, 3)) is two
    ((autoencoded, target),) = list(adapt((x[:1], x[:1]), role="train", example_shape=(1, 3)))
    assert autoencoded.shape == target.shape


@pytest.mark.parametrize(
    ("form", "labelled"),
    [
        (lambda x: x, True),
        (lambda x: x, False),
        (lambda x: {"a": x, "b": x}, True),
        (lambda x: {"a": x, "b": x}, False),
        (lambda x: (x, x), True),  # unlabelled, it would be (inputs, target)
    ],
)
def test_adapt_takes_several_inputs_when_they_are_arrays(form, labelled):
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    inputs = form(x)
    (item,) = adapt((inputs, np.arange(5)) if labelled else inputs, role="test", example_shape=(1, 3))
    batch = pared.task.as_batch(item)
    assert len(batch.inputs.tensors) == (1 if inputs is x else 2)
    assert all(np.array_equal(tensor.numpy(), x) for tensor in batch.inputs.tensors.values())
    assert (batch.target is not None) == labelled


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(3)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: iter([1]), "list_iterator can be read only once.*DataLoader"),
        (lambda: (batch for batch in []), "generator can be read only once"),
        (lambda: zip([1], [2], strict=True), "zip can be read only once"),
        (list, "there is no batch in it"),
        (lambda: TensorDataset(torch.zeros(0, 3)), "hold no sample"),
        (lambda: (np.zeros((0, 3)), np.zeros(0)), "hold no sample"),
        (lambda: (np.zeros((4, 3)), np.zeros(3)), "target has 3, input 0 has 4"),
        (lambda: Stream(), "Stream gives single samples"),
        (lambda: {"train": [1], "test": [2]}, "found entries train, test; choose one"),
        (lambda: 3, "int is no data source; give a DataLoader"),
        (lambda: "nowhere.parquet", "nowhere.parquet does not exist"),
        (lambda: __file__, "neither a parquet file of images nor a folder"),
    ],
)
def test_adapt_says_what_to_do_when_the_source_cannot_be_used(source, message):
    with pytest.raises(DataError, match=rf"^validation data: .*{message}"):
        adapt(source(), role="validation", example_shape=(1, 3))


def test_adapt_refuses_image_files_when_the_model_takes_no_images(tmp_path):
    with pytest.raises(DataError, match=r"shape \(batch, 1 or 3, height, width\), found \(1, 3\)"):
        adapt(parquet(tmp_path), role="train", example_shape=(1, 3))


def test_task_names_the_role_when_its_data_can_be_read_only_once():
    with pytest.raises(DataError, match="train data: generator can be read only once"):
        pared.task.Task(example_inputs=torch.zeros(1, 3), train=(item for item in [torch.zeros(1, 3)]))


def test_task_id_is_the_same_when_sources_are_equal():
    ids = [
        pared.task.Task(example_inputs=torch.zeros(SHAPE), train=SOURCES[name](None), validation=SOURCES[name](None)).id
        for name in ("arrays", "tensors", "dataset")
    ]
    assert len(set(ids)) == 1
