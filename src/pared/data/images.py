"""Images from parquet files, class folders and Hugging Face datasets, decoded a batch at a time.

Memory does not grow with the set: only the batch at hand is decoded, and shuffling a parquet file keeps a bounded
number of its images, still compressed. Needs `pip install pared[images]` (Pillow; pyarrow for parquet). No
augmentation: for that, give a DataLoader.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pared.data.batches import BATCH_SIZE, Batches, Items, stack_labelled
from pared.errors import DataError, nearest

MODES = {1: "L", 3: "RGB"}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
SHUFFLE_ROWS = 2048
READ_ROWS = 64
READ_BYTES = 1 << 20


def parquet_images(
    path: str | Path,
    *,
    size: int | tuple[int, int],
    resize: int | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 255.0,
    channels: int = 3,
    interpolation: str = "bicubic",
    batch_size: int = BATCH_SIZE,
    columns: tuple[str, str | None] | None = None,
    start: int = 0,
    limit: int | None = None,
) -> Batches:
    """Batches (images, labels) of a parquet file in the layout of Hugging Face: `image` = {bytes, path}, `label` = int.

    Shuffled (as train data are), row groups come in random order through a window of 2,048 images: a file sorted by
    class is mixed no further than that.

    Args:
        path: The file.
        size: Height and width of the images given out, cut from the centre.
        resize: Length of the shorter side before the cut; None is the least that covers it.
        mean: Subtracted, in units of 8-bit pixels (0 to 255): one number, or one a channel.
        std: Divided by, in the same units. The defaults give values in 0 to 1.
        channels: 3 for RGB, 1 for grey; images of another kind are converted.
        interpolation: nearest, bilinear, bicubic or lanczos; all average over what they shrink.
        batch_size: Images in a batch.
        columns: Names of the image and the label column; None finds `image` or `img`, and `label` or `labels`. A label
            column None gives images without target.
        start: First row that is read.
        limit: Number of rows that are read; None is all that follow.

    Raises:
        DataError: The file, a column or a row is missing; an image cannot be decoded (when it is reached).
    """
    prepare = Prepare(as_pair(size), resize, mean, std, channels, interpolation)
    return Batches(ParquetRows(Path(path), prepare, columns, start, limit), batch_size=batch_size)


def folder_images(
    path: str | Path,
    *,
    size: int | tuple[int, int],
    resize: int | None = None,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 255.0,
    channels: int = 3,
    interpolation: str = "bicubic",
    batch_size: int = BATCH_SIZE,
) -> Batches:
    """Batches (images, labels) of a folder with one folder a class, labelled 0, 1, ... in the order of their names.

    Unshuffled, the classes take turns, so that the first images (those for calibration) show all of them.
    The settings are those of `parquet_images`.

    Raises:
        DataError: There is no folder of images; an image cannot be decoded (when it is reached).
    """
    prepare = Prepare(as_pair(size), resize, mean, std, channels, interpolation)
    return Batches(Items(FolderImages(Path(path), prepare), stack_labelled), batch_size=batch_size)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """From a picture to a float32 tensor: resize, cut from the centre, normalise; rounds where torchvision does.

    Attributes:
        size: Height and width that come out.
        resize: Shorter side before the cut, or None for the least that covers it.
        mean: In units of 8-bit pixels.
        std: In units of 8-bit pixels.
        channels: 1 or 3.
        interpolation: Name of Pillow's filter.
    """

    size: tuple[int, int]
    resize: int | None = None
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 255.0
    channels: int = 3
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        need("PIL", "Pillow")
        if self.channels not in MODES:
            raise DataError(f"images have 1 channel (grey) or 3 (RGB), asked for {self.channels}")
        if min(self.size) < 1:
            raise DataError(f"size must be at least 1, found {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(f"no interpolation {self.interpolation!r}; {nearest(self.interpolation, INTERPOLATIONS)}")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if np.ndim(value) and len(np.ravel(value)) != self.channels:
                raise DataError(f"{name} needs one number, or one for each of {self.channels} channels, found {value}")
        if np.any(np.asarray(self.std) <= 0):
            raise DataError(f"std must be above 0, found {self.std}")

    def __call__(self, image: Any, where: str) -> Tensor:
        """The tensor (channels, height, width) of a Pillow image or of encoded bytes; `where` names it in errors."""
        from PIL import Image

        try:
            picture = (Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image).convert(
                MODES[self.channels]
            )
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{where} cannot be decoded: {error}; replace or remove it") from error
        pixels = np.asarray(self.fit(picture, where), dtype=np.float32)
        pixels = pixels.reshape(*self.size, self.channels)
        mean, std = (np.asarray(value, dtype=np.float32) for value in (self.mean, self.std))
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))

    def fit(self, picture: Any, where: str) -> Any:
        """Resize, then cut from the centre."""
        from PIL import Image

        height, width = self.size
        across, down = covering(picture.size, (width, height) if self.resize is None else (self.resize, self.resize))
        if across < width or down < height:
            raise DataError(
                f"{where} is {across} x {down} after resizing, smaller than {width} x {height}; "
                "raise resize, or leave it out"
            )
        if picture.size != (across, down):
            picture = picture.resize((across, down), Image.Resampling[self.interpolation.upper()])
        left, top = round((across - width) / 2), round((down - height) / 2)
        return picture.crop((left, top, left + width, top + height))


class ParquetRows:
    """Images in the rows of a parquet file, read in a stream."""

    def __init__(
        self, path: Path, prepare: Prepare, columns: tuple[str, str | None] | None, start: int, limit: int | None
    ) -> None:
        need("pyarrow.parquet", "pyarrow")
        self.path = path
        self.prepare = prepare
        with self.open() as file:
            rows: int = file.metadata.num_rows
            schema = file.schema_arrow
        self.columns = columns or find_columns(list(schema.names), str(path))
        for column in self.columns:
            if column is not None and column not in schema.names:
                raise DataError(f"{path} has no column {column!r}; {nearest(column, schema.names)}")
        self.start, self.stop = start, rows if limit is None else min(rows, start + limit)
        if not 0 <= self.start < self.stop:
            raise DataError(f"{path} has {rows} rows; start={start}, limit={limit} leaves none")
        self.classes = class_names(schema.metadata or {}, self.columns[1])

    def open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            # Buffered and without pre-buffering, a row group is read page by page, however large it is.
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=READ_BYTES, pre_buffer=False)
        except (OSError, pyarrow.ArrowInvalid) as error:
            reason = "there is no such file" if not self.path.is_file() else f"not a parquet file: {error}"
            raise DataError(f"{self.path} cannot be read: {reason}") from error

    def __len__(self) -> int:
        return self.stop - self.start

    def batches(self, size: int, rng: np.random.Generator | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        rows = self.rows(rng) if rng is None else mixed(self.rows(rng), rng, SHUFFLE_ROWS)
        batch = []
        for number, row in rows:
            batch.append(self.sample(number, row))
            if len(batch) == size:
                yield stack_labelled(batch)
                batch = []
        if batch:
            yield stack_labelled(batch)

    def rows(self, rng: np.random.Generator | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """The wanted rows with their numbers, still encoded; row groups in random order where there is an `rng`."""
        columns = [column for column in self.columns if column is not None]
        with self.open() as file:
            lengths = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            firsts = np.cumsum([0, *lengths])
            for group in range(len(lengths)) if rng is None else rng.permutation(len(lengths)):
                number = int(firsts[group])
                if number >= self.stop or firsts[group + 1] <= self.start:
                    continue
                for part in file.iter_batches(READ_ROWS, row_groups=[int(group)], columns=columns, use_threads=False):
                    low, high = max(self.start - number, 0), min(self.stop - number, part.num_rows)
                    if low < high:
                        yield from enumerate(part.slice(low, high - low).to_pylist(), start=number + low)
                    number += part.num_rows

    def sample(self, number: int, row: dict[str, Any]) -> tuple[Tensor, int | None]:
        image, label = self.columns
        where = f"{self.path}, row {number}"
        content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
        if not isinstance(content, bytes):
            raise DataError(f"{where}: column {image!r} holds no image bytes; write the images into the file")
        return self.prepare(content, where), None if label is None else whole(row[label], where)


class FolderImages:
    """Images in class folders; sample i, by class in turn."""

    def __init__(self, path: Path, prepare: Prepare) -> None:
        self.prepare = prepare
        folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
        if not folders:
            raise DataError(f"{path} holds no folders; put the images of each class into a folder of its own")
        found = [sorted(item for item in folder.rglob("*") if item.suffix.lower() in SUFFIXES) for folder in folders]
        for folder, files in zip(folders, found, strict=True):
            if not files:
                raise DataError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); fill or remove it")
        self.classes = tuple(folder.name for folder in folders)
        turns = [(turn, label, file) for label, files in enumerate(found) for turn, file in enumerate(files)]
        self.files = [(file, label) for _, label, file in sorted(turns)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        return self.prepare(file.read_bytes(), str(file)), label


class HubImages:
    """Images of a Hugging Face dataset. Known by its shape: the package `datasets` is not needed here.

    Pictures are prepared; tensors and arrays (of a dataset with a transform) are taken as they are.
    """

    def __init__(self, dataset: Any, prepare: Prepare) -> None:
        self.dataset = dataset
        self.prepare = prepare
        self.image, self.label = find_columns(list(dataset.column_names), "the dataset")
        self.classes = tuple(getattr(dataset.features.get(self.label), "names", ()))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        row = self.dataset[index]
        where = f"dataset row {index}"
        image = row[self.image]
        if isinstance(image, (Tensor, np.ndarray)):
            tensor = torch.as_tensor(image)
        else:
            tensor = self.prepare(image["bytes"] if isinstance(image, dict) else image, where)
        return tensor, None if self.label is None else whole(row[self.label], where)


def need(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"reading images needs {package}; pip install pared[images]") from error


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def covering(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The least (width, height) of an image's own proportions that covers the wanted one; the longer side rounds down.

    Example:
        >>> covering((500, 375), (256, 256))
        (341, 256)
    """
    width, height = size
    if wanted[0] * height >= wanted[1] * width:
        return wanted[0], height * wanted[0] // width
    return width * wanted[1] // height, wanted[1]


def mixed(rows: Iterator[Any], rng: np.random.Generator, window: int) -> Iterator[Any]:
    """The rows in random order, at most `window` of them held at a time; a full shuffle where there are no more."""
    held: list[Any] = []
    for row in rows:
        if len(held) < window:
            held.append(row)
            continue
        place = int(rng.integers(window))
        yield held[place]
        held[place] = row
    for place in rng.permutation(len(held)):
        yield held[place]


def find_columns(names: Sequence[str], where: str) -> tuple[str, str | None]:
    """The image and label column among the names. Raises: DataError where there is no image column."""
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise DataError(
            f"{where} has no column {' or '.join(IMAGE_COLUMNS)}, found {', '.join(names)}; "
            "rename its image column, or name it with parquet_images(columns=...)"
        )
    return image, next((name for name in LABEL_COLUMNS if name in names), None)


def class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """Class names as Hugging Face writes them into a parquet file's schema; none where it holds none."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, feature["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def whole(label: Any, where: str) -> int:
    """A label as an int. Raises: DataError where it is none."""
    value = label.item() if isinstance(label, (Tensor, np.ndarray, np.generic)) and np.size(label) == 1 else label
    if isinstance(value, int):
        return value
    raise DataError(f"{where}: the label must be a class index, found {label!r}")
