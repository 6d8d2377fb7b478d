"""The output folder: what is there stays whole, and what cannot be written says so."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pared
from fake_pipeline import Change, make_task
from pared.errors import ArtifactError
from pared.pipeline.workspace import Workspace

Compress = Callable[..., pared.Artifact]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def enter(out: Path, *, resume: bool = False, overwrite: bool = False) -> Workspace:
    return Workspace(out, resume=resume, overwrite=overwrite)


def test_a_temporary_folder_is_made_when_none_is_given_and_save_moves_it(compress: Compress, tmp_path: Path) -> None:
    artifact = compress(Change(), out=None)
    temporary = artifact.path
    before = snapshot(temporary)
    assert artifact.save(tmp_path / "a" / "b") is artifact
    assert artifact.path == tmp_path / "a" / "b"
    assert snapshot(artifact.path) == before
    assert not temporary.exists()
    assert pared.open_artifact(artifact.path).report == artifact.report


def test_save_is_refused_and_loses_nothing_when_the_place_is_taken_or_no_folder(
    compress: Compress, tmp_path: Path
) -> None:
    artifact = compress(Change())
    before = snapshot(artifact.path)
    (tmp_path / "file").write_text("mine")
    for place, message in ((tmp_path / "file", "exists"), (tmp_path / "file" / "below", "cannot be written")):
        with pytest.raises(ArtifactError, match=message):
            artifact.save(place)
        assert snapshot(artifact.path) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_when_a_run_into_a_temporary_folder_fails(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        compress(Change(error=True), out=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_refused_and_untouched_when_told_to_overwrite(
    compress: Compress, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ArtifactError, match="holds files that are no artifact; give another folder, nothing was"):
            compress(Change(), **settings)
    assert snapshot(tmp_path) == {"out/thesis.tex": b"years of work"}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out"]


def test_an_empty_folder_is_used_and_an_artifact_only_when_overwritten(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    first = snapshot(compress(Change()).path)
    with pytest.raises(ArtifactError, match="holds an artifact"):
        compress(Change(level=1.0))
    assert snapshot(tmp_path / "out") == first
    second = snapshot(compress(Change(level=1.0), overwrite=True).path)
    assert second["tensors.safetensors"] != first["tensors.safetensors"]
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_the_folder_behind_a_link_is_used_when_out_is_one(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "disk" / "there").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "there")
    compress(Change())
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "there" / "model.onnx").exists()


@pytest.mark.parametrize("below", ["file", "file/deeper", "a" * 300])
def test_out_is_refused_when_it_cannot_be_a_folder(compress: Compress, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"is a file; give a folder|cannot be written \(.*\); give another folder"):
        compress(Change(), out=tmp_path / below)
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_out_is_refused_before_the_work_when_a_disk_is_mounted_there() -> None:
    with pytest.raises(ArtifactError, match="a disk is mounted, so it cannot be renamed; give a folder inside it"):
        enter(Path("/proc"))


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works on the folder `out`."""
    work = tmp_path / ".out.work"
    work.mkdir()
    command = [sys.executable, "-c", HOLD, str(work / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_out_is_refused_when_another_run_works_there(
    compress: Compress, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(ArtifactError, match="is in use by another run; wait for it, or give another folder"):
        compress(Change())
    with enter(tmp_path / "other"), pytest.raises(ArtifactError, match="in use"), enter(tmp_path / "other"):
        pass


def test_the_lock_is_free_again_when_its_holder_was_killed(
    compress: Compress, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert compress(Change()).path == tmp_path / "out"


def test_the_old_artifact_comes_back_when_a_run_is_killed_between_the_two_renames(
    compress: Compress, tmp_path: Path
) -> None:
    before = snapshot(compress(Change()).path)
    # What a kill at that moment leaves: the old one moved away, the new one not there yet.
    work = tmp_path / ".out.work"
    work.mkdir()
    (tmp_path / "out").rename(work / "replaced")
    with pytest.raises(ArtifactError, match="holds an artifact"):
        compress(Change(level=1.0))
    assert snapshot(tmp_path / "out") == before


def test_the_old_artifact_comes_back_when_the_second_rename_fails(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(compress(Change()).path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "artifact":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(ArtifactError, match=r"cannot be written .*free some space and resume"):
            compress(Change(level=1.0), overwrite=True)
    assert snapshot(tmp_path / "out") == before
    assert compress(Change(level=1.0), resume=True).report.final is not None


class Disk:
    """Counts writes, and refuses those beyond what fits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes, self.room = 0, 10**6
        for owner, name in ((os, "fsync"), (Path, "write_bytes"), (Path, "write_text"), (shutil, "copyfile")):
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name)))

    def limited(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def limited_write(*args: Any, **kwargs: Any) -> Any:
            self.writes += 1
            if self.writes > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args, **kwargs)

        return limited_write


def test_the_previous_artifact_stays_whole_and_resume_goes_on_when_the_disk_is_full_at_any_write(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    wanted = snapshot(compress(Change(level=1.0), out=tmp_path / "wanted").path)
    total = disk.writes
    assert total > 10
    first = snapshot(compress(Change()).path)
    for room in range(total):
        disk.writes, disk.room = 0, room
        with pytest.raises(ArtifactError, match=r"out cannot be written \(No space left on device\); free some space"):
            compress(Change(level=1.0), overwrite=True)
        disk.room = 10**6
        assert snapshot(tmp_path / "out") == first
    again = compress(Change(level=1.0), overwrite=True, resume=True)
    assert (again.path / "model.onnx").read_bytes() == wanted["model.onnx"]


LIMITED = """
import resource, signal, sys
import torch
from torch import nn
import pared
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 2))
x = torch.randn(8, 1, 8, 8)
try:
    pared.compress(net, [pared.QuantizeStatic()], pared.Task(example_inputs=x, calibration=[x]), out=sys.argv[1])
except pared.ParedError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_run_says_so_when_the_system_itself_refuses_to_write(tmp_path: Path) -> None:
    source = Path(pared.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert done.returncode == 0, done.stderr
    assert "out cannot be written (File too large); free some space and resume" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_callers_data_goes_through_as_it_is(compress: Compress) -> None:
    class Missing:
        def __iter__(self) -> Iterator[Any]:
            raise FileNotFoundError(errno.ENOENT, "No such file", "images/7.png")

    with pytest.raises(FileNotFoundError, match=r"images/7\.png"):
        compress(Change(), task=make_task(validation=Missing()))


def test_what_is_finished_is_kept_and_what_is_not_is_removed_when_a_run_fails(
    compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        compress(Change(), Change(error=True))
    assert len(list((tmp_path / ".out.work").glob("stages/*/stage.json"))) == 2
    with pytest.raises(ZeroDivisionError):
        compress(Change(), task=make_task(metrics=lambda *_: 1 / 0), out=tmp_path / "nothing")
    assert not (tmp_path / ".nothing.work").exists()
