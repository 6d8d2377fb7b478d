"""A teacher's outputs on disk: one row a sample, found by the content of the sample's inputs.

Shuffled and batched anew, the data find their rows again; another teacher does not find its own in them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pared.errors import ArtifactError, DataError
from pared.graph.capture import evaluating
from pared.identity import identity
from pared.task import Inputs

FORMAT = 1
HEADER, KEY = 4096, 16  # bytes of the header, and of a digest: 2^64 samples before two are likely to share one
SHARE = 4  # at most one in so many samples may be new in a later epoch


def teacher_id(model: nn.Module, *more: object) -> str:
    """A fingerprint of a model's code, tensors and types, the version of PyTorch, and what else matters."""
    with evaluating(model):  # the mode that it teaches in, whatever mode it came in
        return identity([model, torch.__version__, *more])


class OutputCache:
    """A file of rows, written while the teacher first runs, and memory-mapped afterwards.

    Args:
        path: The file; made where there is none.
        teacher: Fingerprint of the teacher.
        shape: Shape of one sample's output.

    Raises:
        ArtifactError: The file is of another teacher, or no such file.
    """

    def __init__(self, path: Path, teacher: str, shape: tuple[int, ...]) -> None:
        self.path = path
        self.shape = shape
        self.row = np.dtype([("key", f"V{KEY}"), ("value", "<f4", shape)])
        header = {"format": FORMAT, "teacher": teacher, "shape": list(shape)}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(json.dumps(header).encode().ljust(HEADER))
        self.check(header)
        self.index: dict[bytes, int] = {}
        self.rows = np.empty(0, self.row)
        self.new: list[np.ndarray] = []
        self.read()

    def check(self, wanted: dict[str, object]) -> None:
        """Raise `ArtifactError` unless the file's header is the wanted one."""
        with self.path.open("rb") as file:
            head = file.read(HEADER)
        try:
            found = json.loads(head)
        except ValueError:
            raise ArtifactError(f"{self.path} is no cache of a teacher's outputs; delete it") from None
        if found != wanted:
            raise ArtifactError(
                f"{self.path} holds outputs of another teacher ({str(found.get('teacher'))[:12]}, this one is "
                f"{str(wanted['teacher'])[:12]}); delete it, and they are computed anew"
            )

    def read(self) -> None:
        """Map the rows of the file. A row that a killed run has not finished is cut off."""
        count = (self.path.stat().st_size - HEADER) // self.row.itemsize
        with self.path.open("r+b") as file:
            file.truncate(HEADER + count * self.row.itemsize)
        self.rows = np.memmap(self.path, self.row, "r", HEADER, (count,)) if count else np.empty(0, self.row)
        self.index = {key.tobytes(): i for i, key in enumerate(self.rows["key"])}

    def find(self, keys: list[bytes]) -> Tensor | None:
        """The outputs of samples in their order, float32; None unless all are there."""
        try:
            places = [self.index[key] for key in keys]
        except KeyError:
            return None
        if max(places) >= len(self.rows):
            self.flush()
        return torch.from_numpy(self.rows["value"][places])

    def missing(self, keys: list[bytes]) -> int:
        """How many of the samples are not there."""
        return sum(key not in self.index for key in keys)

    def add(self, keys: list[bytes], outputs: Tensor) -> None:
        """Append the outputs of samples that are not there yet. Raises: DataError."""
        if tuple(outputs.shape) != (len(keys), *self.shape):
            raise DataError(
                f"the teacher's outputs are {tuple(outputs.shape)}, where {(len(keys), *self.shape)} was expected; "
                "set cache=False for outputs of changing shape"
            )
        values = outputs.detach().float().cpu().numpy()
        block = np.empty(len(keys), self.row)
        block["key"], block["value"] = np.frombuffer(b"".join(keys), f"V{KEY}"), values
        fresh: list[int] = []
        for i, key in enumerate(keys):
            if key not in self.index:
                self.index[key] = len(self.index)
                fresh.append(i)
        self.new.append(block[fresh])
        if len(self.new) >= 64:
            self.write()

    def write(self) -> None:
        """Bring what is new to the file."""
        with self.path.open("ab") as file:
            for block in self.new:
                file.write(block.tobytes())
        self.new = []

    def flush(self) -> None:
        """Bring what is new to the file, and map it."""
        if self.new:
            self.write()
        count = (self.path.stat().st_size - HEADER) // self.row.itemsize
        if count > len(self.rows):
            self.rows = np.memmap(self.path, self.row, "r", HEADER, (count,))


def keys_of(inputs: Inputs) -> list[bytes]:
    """A digest of each sample's inputs: their names, types, shapes and values."""
    arrays = {name: np.ascontiguousarray(as_bytes(tensor)) for name, tensor in inputs.tensors.items()}
    form = repr([(name, tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in inputs.tensors.items()])
    person = hashlib.blake2b(form.encode(), digest_size=KEY).digest()
    if len(arrays) == 1:
        rows = next(iter(arrays.values()))
        return [hashlib.blake2b(row.data, digest_size=KEY, person=person).digest() for row in rows]
    keys = []
    for i in range(inputs.size):
        digest = hashlib.blake2b(digest_size=KEY, person=person)
        for rows in arrays.values():
            digest.update(rows[i].data)
        keys.append(digest.digest())
    return keys


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The values of each sample as bytes, shape (samples, bytes)."""
    flat = tensor.detach().cpu().contiguous().reshape(len(tensor), -1)
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array


class CachedOutputs:
    """The rule of the cache over epochs: the first one fills it, later ones must find their samples in it.

    Samples that differ from epoch to epoch would be computed again and again, and the file would grow with each.
    """

    def __init__(self, cache: OutputCache) -> None:
        self.cache = cache
        self.filled = 0  # samples of the last whole epoch
        self.seen = self.missed = 0

    def begin(self) -> None:
        """An epoch begins."""
        self.seen = self.missed = 0

    def end(self) -> None:
        """An epoch is done."""
        self.filled = self.seen
        self.cache.flush()

    def find(self, keys: list[bytes]) -> Tensor | None:
        """The outputs of a batch, or None where the teacher has to run.

        Raises:
            DataError: In a later epoch, too many samples were never seen before.
        """
        found = self.cache.find(keys)
        self.seen += len(keys)
        if found is None:
            self.missed += self.cache.missing(keys)
            if self.filled and self.missed > max(len(keys), self.filled // SHARE):
                raise DataError(
                    f"{self.missed} of {self.seen} samples differ from those of all epochs before, as random "
                    "augmentation makes them, so outputs cannot be kept; set cache=False, or leave the augmentation out"
                )
        return found
