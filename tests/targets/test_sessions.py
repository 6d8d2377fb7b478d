from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pared.errors import TargetError, UsageError
from pared.targets import TARGETS, sessions
from pared.targets.sessions import RUNTIMES, InputSpec, Runtime, files_of, open_session, size_of
from tiny_onnx import weight, write_chain, write_lookup


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "chain.onnx")


@pytest.mark.parametrize("batch", [1, 3])
def test_session_computes_what_numpy_does_when_run(chain: Path, batch: int) -> None:
    x = np.random.default_rng(0).standard_normal((batch, 4)).astype(np.float32)
    (y,) = open_session("onnxruntime", chain, threads=1).run([x])
    # Four products a value: 4 roundings of 2^-24 relative to terms of about 1.
    np.testing.assert_allclose(y, x @ weight(4), rtol=1e-5, atol=1e-6)


def test_session_tells_its_inputs_when_opened(chain: Path, tmp_path: Path) -> None:
    assert open_session("onnxruntime", chain, threads=1).inputs == (InputSpec("t0", ("batch", 4), "float32"),)
    lookup = write_lookup(tmp_path / "lookup.onnx", (2, "length"))
    assert open_session("onnxruntime", lookup, threads=1).inputs == (InputSpec("ids", (2, "length"), "int64"),)


def test_session_states_what_it_set_when_opened(chain: Path) -> None:
    session = open_session("onnxruntime", chain, threads=2)
    assert session.options["intra_op_num_threads"] == "2"
    assert session.options["allow_spinning"] == "no"
    # What is stated is what the runtime was told.
    told = session.session.get_session_options()  # type: ignore[attr-defined]
    assert told.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (told.intra_op_num_threads, told.inter_op_num_threads) == (2, 1)


def test_open_session_says_what_is_wrong_when_the_file_is_no_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(TargetError, match=r"onnxruntime refuses broken\.onnx"):
        open_session("onnxruntime", broken, threads=1)


def test_open_session_names_the_nearest_target_when_it_is_misspelt(chain: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        open_session("onnxruntme", chain, threads=1)


def test_open_session_refuses_when_the_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file at"):
        open_session("onnxruntime", tmp_path / "missing.onnx", threads=1)


def test_open_session_refuses_when_there_is_no_thread(chain: Path) -> None:
    with pytest.raises(UsageError, match="at least one thread, found 0"):
        open_session("onnxruntime", chain, threads=0)


def test_open_session_says_what_to_install_when_the_runtime_is_missing(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match="pip install onnxruntime"):
        open_session("onnxruntime", chain, threads=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], r"takes 1 inputs \(t0\), found 0"),
        ([np.ones((1, 5), np.float32)], "cannot run the file on these inputs"),
        ([np.ones((1, 4), np.float64)], "cannot run the file on these inputs"),
    ],
)
def test_session_refuses_when_inputs_do_not_fit(chain: Path, inputs: list[np.ndarray], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        open_session("onnxruntime", chain, threads=1).run(inputs)


@pytest.fixture
def two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Runtime(
        about="For tests.",
        session="pared.targets.sessions:OnnxRuntimeSession",
        files=("model.xml", "model.bin", "model.more.bin"),
        packages=("pared",),
        install="pared[two]",
        carries_code=True,
    )
    monkeypatch.setattr(sessions, "RUNTIMES", {**RUNTIMES, "two": row})


def test_files_of_finds_those_beside_when_they_exist(tmp_path: Path, two_files: None) -> None:
    for name, size in {"a.xml": 1, "a.bin": 20, "b.bin": 300, "a.xml.data": 4000}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert [file.name for file in files_of("two", tmp_path / "a.xml")] == ["a.xml", "a.bin", "a.xml.data"]
    assert size_of("two", tmp_path / "a.xml") == 4021
    (tmp_path / "a.more.bin").write_bytes(b"x" * 50000)
    assert size_of("two", tmp_path / "a.xml") == 54021


def test_open_session_refuses_when_a_file_with_code_is_not_trusted(chain: Path, two_files: None) -> None:
    with pytest.raises(UsageError, match=r"chain\.onnx carries code .* trust=True"):
        open_session("two", chain, threads=1)
    assert open_session("two", chain, threads=1, trust=True).inputs


def test_every_target_has_a_runtime() -> None:
    assert RUNTIMES.keys() == TARGETS.keys()
