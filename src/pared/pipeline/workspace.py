"""The folder of a run in progress: its lock, its journal of decisions, its finished stages; and the swap that ends it.

It lies beside the output folder, under a hidden name, so that the previous artifact stays whole until the new one is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from pared.artifact import MANIFEST
from pared.errors import ArtifactError


def write_file(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, then rename: a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, data: Any) -> None:
    """`write_file` of plain data."""
    write_file(path, json.dumps(data, indent=2, allow_nan=False).encode())


class Workspace:
    """Holds the lock of a run from `with` to its end, and keeps what resuming needs where that end was not its own.

    Args:
        out: The output folder.
        resume: Keep what a stopped run left.
        overwrite: Replace an artifact in `out`.

    Raises:
        ArtifactError: `out` is in use, cannot be written, holds something that is no artifact, or holds an artifact and
            neither `resume` nor `overwrite` is given.
    """

    def __init__(self, out: Path, *, resume: bool, overwrite: bool) -> None:
        self.out = out.absolute()
        self.path = self.out.with_name(f".{self.out.name}.work")
        if self.out.exists() and not self.out.is_dir():
            raise ArtifactError(f"{out} is a file; give a folder for the artifact")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / MANIFEST).exists():
                raise ArtifactError(f"{out} holds files that are no artifact; give another folder, nothing was touched")
            if not (resume or overwrite):
                raise ArtifactError(f"{out} holds an artifact; give another folder, or overwrite it (--overwrite)")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{out} cannot be written ({error.strerror}); give another folder") from None
        self.lock = filelock.FileLock(self.path / "lock")
        self.resume = resume

    def __enter__(self) -> Self:
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ArtifactError(f"{self.out} is in use by another run; wait for it, or give another folder") from None
        except OSError as error:
            raise ArtifactError(f"{self.out} cannot be written ({error.strerror}); give another folder") from None
        if not self.resume:
            for item in self.path.iterdir():
                if item.name != "lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()

    def stage(self, key: str) -> Path:
        """The folder of one stage; its `stage.json` is written last, so where that exists the stage is finished."""
        folder = self.path / "stages" / key[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def scratch(self) -> Path:
        """Where steps keep checkpoints of their own."""
        folder = self.path / "steps"
        folder.mkdir(exist_ok=True)
        return folder

    def journal(self) -> dict[str, Any]:
        """Decisions made by timing, by the key of their block's last stage; replayed on resume."""
        path = self.path / "journal.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
        return found

    def decide(self, key: str, decision: Mapping[str, Any]) -> None:
        """Add a decision to the journal."""
        write_json(self.path / "journal.json", self.journal() | {key: dict(decision)})

    def finish(self, artifact: Path) -> None:
        """Put the finished artifact in the place of the old one by renaming, and remove the workspace."""
        old = self.path / "replaced"
        if old.exists():
            shutil.rmtree(old)
        if self.out.exists():
            self.out.rename(old)
        artifact.rename(self.out)
        self.lock.release()
        shutil.rmtree(self.path, ignore_errors=True)
