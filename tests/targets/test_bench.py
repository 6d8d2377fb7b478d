from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pared.errors import UsageError
from pared.targets.bench import bench, random_inputs
from pared.targets.sessions import InputSpec
from tiny_onnx import write_chain, write_lookup


def test_bench_measures_every_file_when_given_a_file_and_an_artifact(tmp_path: Path) -> None:
    file = write_chain(tmp_path / "plain.onnx", width=64, layers=4, shape=("batch", 64))
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    write_chain(artifact / "model.onnx", width=64, layers=200, shape=("batch", 64))
    (artifact / "model.onnx.data").write_bytes(b"x" * 1000)
    first, second = bench([file, artifact], batch_size=16, threads=1, rounds=2)
    assert [row.file for row in (first, second)] == [file, artifact]
    assert first.speedup is None
    assert second.speedup is not None and second.speedup.value < 0.5
    assert first.size_bytes == file.stat().st_size
    assert second.size_bytes == (artifact / "model.onnx").stat().st_size + 1000
    assert 0 < first.latency_ms.p50 <= first.latency_ms.p90
    assert min(first.peak_memory_bytes, second.peak_memory_bytes) > 10 << 20


def test_random_inputs_have_the_declared_shape_when_dimensions_are_free() -> None:
    specs = [InputSpec("x", ("batch", 3, "height"), "float16"), InputSpec("ids", ("batch", 5), "int64")]
    x, ids = random_inputs(specs, "a.onnx", batch_size=2, dimensions={"height": 7}, seed=0)
    assert (x.shape, x.dtype) == ((2, 3, 7), np.float16)
    assert (ids.shape, ids.dtype) == ((2, 5), np.int64)
    assert set(np.unique(ids)) <= {0, 1}
    assert np.isfinite(x).all() and x.std() > 0.5


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            ("batch", "length"),
            r"lookup\.onnx: input 'ids' has a free dimension 'length' .* dimensions=\{'length': 128\}",
        ),
        ((4, 2), "fixed batch of 4, not 1; ask for batch size 4"),
    ],
)
def test_bench_refuses_when_a_shape_is_open(tmp_path: Path, shape: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench([write_lookup(tmp_path / "lookup.onnx", shape)], threads=1)


def test_bench_refuses_when_there_is_nothing_to_time() -> None:
    with pytest.raises(UsageError, match="nothing to time"):
        bench([])


def test_bench_refuses_when_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file at"):
        bench([tmp_path / "missing.onnx"])
