"""Images from files. Oracle: the same preprocessing written out with Pillow and numpy, in torchvision's formulas."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pared.data import images as images_module
from pared.data.images import folder_images, parquet_images
from pared.errors import DataError


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Smooth enough that interpolation matters, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return buffer.getvalue()


def write_parquet(path, contents, labels=None, row_group_size=4, names=None):
    columns = {"image": [{"bytes": content, "path": None} for content in contents]}
    label_type = {}
    if labels is not None:
        columns["label"] = labels
        label_type = {"label": {"names": names or ["a", "b"], "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(columns["image"], kind), **({"label": labels} if labels is not None else {})})
    info = {"info": {"features": {"image": {"_type": "Image"}, **label_type}}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(info)}), path, row_group_size=row_group_size
    )
    return path


def written_out(image: Image.Image, resize: int, size: int, mean: float, std: float) -> np.ndarray:
    """torchvision's Resize(resize, BICUBIC), CenterCrop(size), then (pixel - mean) / std."""
    image = image.convert("RGB")
    width, height = image.size
    short, long = sorted((width, height))
    longer = int(resize * long / short)
    width, height = (resize, longer) if width <= height else (longer, resize)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    pixels = np.asarray(image).astype(np.float32)[top : top + size, left : left + size]
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(500, 333), (333, 500), (288, 288), (289, 411), (120, 90)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_parquet_images_equal_efficientnet_preprocessing_when_asked_for_it(tmp_path, shape, form):
    content = encoded(picture(1, shape), form)
    path = write_parquet(tmp_path / "a.parquet", [content], [1])
    ((found, label),) = parquet_images(path, size=224, resize=256, mean=127, std=128)
    want = written_out(Image.open(io.BytesIO(content)), 256, 224, np.float32(127), np.float32(128))
    assert found.dtype == torch.float32
    assert np.array_equal(found[0].numpy(), want)
    assert label.tolist() == [1]


def test_parquet_images_are_zero_to_one_when_nothing_is_said(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded(Image.new("RGB", (8, 8), (0, 51, 255)))], [0])
    ((found, _),) = parquet_images(path, size=4)
    assert torch.equal(found[0, :, 0, 0], torch.tensor([0.0, 51 / 255, 1.0]))


def test_parquet_images_cut_the_least_that_covers_when_not_square(tmp_path):
    wide = Image.new("RGB", (90, 30), (0, 0, 0))
    wide.paste((255, 255, 255), (30, 0, 60, 30))
    path = write_parquet(tmp_path / "a.parquet", [encoded(wide)])
    ((found, label),) = parquet_images(path, size=(30, 30), channels=1)
    assert found.shape == (1, 1, 30, 30)
    assert torch.equal(found, torch.ones_like(found))
    assert label is None
    ((tall, _),) = parquet_images(path, size=(30, 90), mean=(0, 0, 0), std=(255, 255, 255))
    assert torch.equal(tall[0, 0, 0], torch.tensor([0.0] * 30 + [1.0] * 30 + [0.0] * 30))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "1"])
def test_parquet_images_convert_colours_when_the_file_has_others(tmp_path, mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    path = write_parquet(tmp_path / "a.parquet", [encoded(picture(2, mode=mode), form)], [0])
    for channels in (1, 3):
        ((found, _),) = parquet_images(path, size=16, channels=channels)
        assert found.shape == (1, channels, 16, 16)
        assert 0 <= found.min() < found.max() <= 1


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet_images_give_the_asked_rows_when_started_and_limited(tmp_path, group):
    contents = [encoded(Image.new("L", (2, 2), number)) for number in range(11)]
    path = write_parquet(tmp_path / "a.parquet", contents, list(range(11)), group, names=[str(i) for i in range(11)])
    for start, limit in ((0, None), (0, 4), (4, None), (3, 5), (10, 9)):
        batches = parquet_images(path, size=2, std=1, channels=1, batch_size=2, start=start, limit=limit)
        labels = [int(label) for _, target in batches for label in target]
        values = [int(value) for found, _ in batches for value in found[:, 0, 0, 0]]
        assert labels == values == list(range(11))[start:][:limit]
        assert len(batches) == len(list(batches))
        mixed = batches.shuffled()
        assert sorted(int(label) for _, target in mixed for label in target) == labels
    assert batches.classes == tuple(str(i) for i in range(11))


def test_parquet_images_are_mixed_across_row_groups_when_shuffled(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "SHUFFLE_ROWS", 6)
    contents = [encoded(Image.new("L", (2, 2), number)) for number in range(40)]
    path = write_parquet(tmp_path / "a.parquet", contents, list(range(40)))
    batches = parquet_images(path, size=2, std=1, batch_size=7).shuffled(seed=5)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        pairs = [(int(x[0, 0, 0]), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
        assert all(x == y for x, y in pairs)
        orders.append([y for _, y in pairs])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))


def test_parquet_images_read_named_columns_when_told(tmp_path):
    table = pa.table({"photo": [encoded(picture(0))], "kind": pa.array([7])})
    pq.write_table(table, tmp_path / "a.parquet")
    ((_, label),) = parquet_images(tmp_path / "a.parquet", size=8, columns=("photo", "kind"))
    assert label.tolist() == [7]
    with pytest.raises(DataError, match=r"no column image or img, found photo, kind.*columns="):
        parquet_images(tmp_path / "a.parquet", size=8)
    with pytest.raises(DataError, match=r"no column 'knd'; did you mean 'kind'"):
        parquet_images(tmp_path / "a.parquet", size=8, columns=("photo", "knd"))


def test_parquet_images_name_the_row_when_it_is_damaged(tmp_path):
    good = encoded(picture(0))
    cases = {
        "cannot be decoded": ([good, good[:60]], [0, 1]),
        "holds no image bytes": ([good, None], [0, 1]),
        "label must be a class index, found None": ([good, good], [0, None]),
    }
    for message, (contents, labels) in cases.items():
        path = write_parquet(tmp_path / "a.parquet", contents, labels)
        with pytest.raises(DataError, match=rf"a\.parquet, row 1.*{message}"):
            list(parquet_images(path, size=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "1 channel .grey. or 3"),
        ({"size": 0}, "size must be at least 1"),
        ({"std": 0}, "std must be above 0"),
        ({"mean": (1, 2)}, "one for each of 3 channels"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"start": 9}, "has 2 rows; start=9"),
        ({"limit": 0}, "limit=0 leaves none"),
        ({"start": -1}, "start=-1"),
    ],
)
def test_parquet_images_refuse_when_a_setting_is_wrong(tmp_path, options, message):
    path = write_parquet(tmp_path / "a.parquet", [encoded(picture(0))] * 2, [0, 1])
    with pytest.raises(DataError, match=message):
        parquet_images(path, **{"size": 8, **options})


def test_parquet_images_refuse_when_resized_below_the_cut(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [encoded(picture(0))], [0])
    with pytest.raises(DataError, match="row 0 is 10 x 8 after resizing, smaller than 16 x 16; raise resize"):
        list(parquet_images(path, size=16, resize=8))


def test_parquet_images_refuse_when_the_file_is_missing_or_no_parquet(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        parquet_images(tmp_path / "a.parquet", size=8)
    (tmp_path / "b.parquet").write_bytes(b"PNG")
    with pytest.raises(DataError, match="not a parquet file"):
        parquet_images(tmp_path / "b.parquet", size=8)


def test_images_name_the_extra_when_pillow_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"needs Pillow; pip install pared\[images\]"):
        parquet_images(tmp_path / "a.parquet", size=8)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow; pip install pared\[images\]"):
        parquet_images(tmp_path / "a.parquet", size=8)


def test_memory_does_not_grow_when_one_row_group_holds_more_rows(tmp_path):
    # Random bytes behind each image. Arrow writes pages of 1,024 rows; reading may hold a few, however many there are.
    rng = np.random.default_rng(0)
    start = encoded(Image.new("L", (2, 2), 9))
    peaks = []
    for count in (2048, 6144):
        contents = [start + rng.bytes(3000) for _ in range(count)]
        path = write_parquet(tmp_path / f"{count}.parquet", contents, [0] * count, row_group_size=count)
        assert pq.ParquetFile(path).metadata.num_row_groups == 1
        before, peak = pa.total_allocated_bytes(), 0
        for _ in parquet_images(path, size=2, batch_size=256):
            peak = max(peak, pa.total_allocated_bytes() - before)
        peaks.append(peak)
    # The larger file is 18 MB; reading it may take a fifth more than the smaller one, for rounding in the pool.
    assert 0 < peaks[1] < 1.2 * peaks[0] < 18e6


def make_folder(path, counts):
    for label, (name, count) in enumerate(counts.items()):
        (path / name / "deeper").mkdir(parents=True)
        for number in range(count):
            place = path / name / ("deeper" if number == 1 else ".")
            Image.new("L", (4, 4), 10 * label + number).save(place / f"{number}.png")
    return path


def test_folder_images_take_classes_in_turn_when_unshuffled(tmp_path):
    make_folder(tmp_path, {"cat": 3, "ant": 1, "dog": 2})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    batches = folder_images(tmp_path, size=4, std=1, channels=1, batch_size=4)
    labels = [int(label) for _, target in batches for label in target]
    assert batches.classes == ("ant", "cat", "dog")
    assert labels == [0, 1, 2, 1, 2, 1]
    by_label = {0: 10, 1: 0, 2: 20}  # first grey of ant, cat, dog
    greys = [int(value) for found, _ in batches for value in found[:, 0, 0, 0]]
    assert sorted(g - by_label[label] for g, label in zip(greys, labels, strict=True)) == [0, 0, 0, 1, 1, 2]


def test_folder_images_refuse_when_there_are_none(tmp_path):
    with pytest.raises(DataError, match="holds no folders"):
        folder_images(tmp_path, size=4)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no image"):
        folder_images(tmp_path, size=4)
    (tmp_path / "cat" / "a.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"a\.png cannot be decoded"):
        list(folder_images(tmp_path, size=4))
