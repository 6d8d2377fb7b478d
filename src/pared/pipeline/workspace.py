"""The folder of a run in progress: its lock, its journal of decisions, its finished stages; and the swap that ends it.

It lies beside the output folder, under a hidden name, so that the previous artifact stays whole until the new one is.
"""

from __future__ import annotations

import errno
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

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


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
    """Holds the lock of a run from `with` to its end; keeps what is needed to resume where the run did not reach it.

    Args:
        out: The output folder.
        resume: Keep what a stopped run left.
        overwrite: Replace an artifact in `out`. A run that may do so may still when it is resumed.

    Raises:
        ArtifactError: `out` is in use, cannot be written, holds something that is no artifact, or holds an artifact and
            neither `resume` nor `overwrite` is given. The disk is full: what is finished is kept for `resume`.
    """

    def __init__(self, out: Path, *, resume: bool, overwrite: bool) -> None:
        self.shown = out
        self.resume = resume
        self.overwrite = overwrite
        try:
            self.out = out.resolve()
            if self.out.is_mount():
                raise ArtifactError(
                    f"{out} is where a disk is mounted, so it cannot be renamed; give a folder inside it"
                )
            if self.out.exists() and not self.out.is_dir():
                raise ArtifactError(f"{out} is a file; give a folder for the artifact")
            self.check_content()
            self.path = self.out.with_name(f".{self.out.name}.work")
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(error) from None
        self.lock = filelock.FileLock(self.path / "lock")

    def __enter__(self) -> Self:
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ArtifactError(f"{self.shown} is in use by another run; wait for it, or give another folder") from None
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            self.restore()
            self.check_content()
            if not self.resume:
                for item in self.path.iterdir():
                    if item.name != "lock":
                        shutil.rmtree(item) if item.is_dir() else item.unlink()
            if self.overwrite:
                (self.path / "overwrite").touch()
        except OSError as error:
            self.lock.release()
            raise self.unwritable(error) from None
        except ArtifactError:
            self.lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = ("replaced", "stages/*/stage.json", "steps/*")
        if not any(any(self.path.glob(pattern)) for pattern in kept):  # nothing worth resuming
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()
        if isinstance(error, OSError) and error.errno in FULL:
            raise self.unwritable(error, "free some space and resume: what is finished is kept") from error

    def unwritable(self, error: OSError, hint: str = "give another folder") -> ArtifactError:
        """What to say about a folder that the system does not let us write."""
        return ArtifactError(f"{self.shown} cannot be written ({error.strerror}); {hint}")

    def check_content(self) -> None:
        """Raise `ArtifactError` where `out` holds what must not be replaced."""
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return
        if not (self.out / MANIFEST).exists():
            raise ArtifactError(
                f"{self.shown} holds files that are no artifact; give another folder, nothing was touched"
            )
        if not (self.resume or self.overwrite):
            raise ArtifactError(f"{self.shown} holds an artifact; give another folder, or overwrite it (--overwrite)")

    def check_replace(self) -> None:
        """Raise `ArtifactError` where a resumed run would replace an artifact that no one said it may."""
        if (self.out / MANIFEST).exists() and not (self.path / "overwrite").exists():
            raise ArtifactError(
                f"{self.shown} holds the artifact of another run; give another folder, or overwrite it (--overwrite)"
            )

    def restore(self) -> None:
        """Put back the artifact that a run was about to replace when it was killed."""
        old = self.path / "replaced"
        if old.exists() and not self.out.exists():
            old.rename(self.out)

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
        """Decisions made by timing, by what was decided on: replayed on resume, since time is not repeatable."""
        path = self.path / "journal.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
        return found

    def decide(self, key: str, decision: Mapping[str, Any]) -> None:
        """Add a decision to the journal."""
        write_json(self.path / "journal.json", self.journal() | {key: dict(decision)})

    def finish(self, artifact: Path) -> None:
        """Put the finished artifact in the place of the old one by renaming, and remove the workspace."""
        old = self.path / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        try:
            artifact.rename(self.out)
        except OSError:
            self.restore()
            raise
        self.clear()

    def clear(self) -> None:
        """Remove all that a resumed run would need, once there is nothing to resume."""
        for item in self.path.iterdir():
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
