"""The artifact: a folder with the exported model, tensors, plans and report. Written whole, checked when opened.

Nothing in it is pickled, and opening it imports nothing that it names. The one file that can carry code is
`program.pt2`, the quantized program, which loads only with `trust=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import ExportedProgram

from pared.errors import ArtifactError, DataError, ModelError, nearest
from pared.interrupts import uninterrupted
from pared.loading import load_weights
from pared.measure.environment import usable_cores, version_of
from pared.report.data import Report
from pared.report.html import ledger_html, write_html
from pared.step import Plan
from pared.surgery import apply_edits
from pared.targets.risk import warning
from pared.targets.sessions import files_of, open_session, runtime
from pared.task import Inputs, as_inputs

if TYPE_CHECKING:
    from pared.step import Target
    from pared.targets.sessions import OpenSession

FORMAT = 1
MANIFEST = "artifact.json"
TENSORS = "tensors.safetensors"
PROGRAM = "program.pt2"


class Artifact:
    """A finished artifact on disk.

    Attributes:
        path: Its folder.
        report: The ledger.
        plans: What each kept step changed.
        trust: True where its exported file may run code that it carries.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, trust: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.trust = trust
        self.report = Report.read(path)
        try:
            plans = json.loads((path / "plans.json").read_text(encoding="utf8"))
            self.plans = tuple(Plan.from_json(plan) for plan in plans)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{path / 'plans.json'} is damaged ({error!r}); make the artifact again") from None
        self.session: OpenSession | None = None

    @property
    def file(self) -> Path:
        """The exported model: what ships."""
        return self.path / runtime(self.manifest["target"]).filename

    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the exported file in its runtime: `predict(x)`, or keyword arguments as the model takes them.

        Returns:
            The output that `Task.output` picks, on the CPU.

        Raises:
            DataError: The inputs are no tensors, or a keyword is none of the file's inputs.
            UsageError: The file carries code, and the artifact was opened without `trust=True`.
            TargetError: The runtime refuses them.
        """
        if self.session is None:
            self.session = open_session(self.manifest["target"], self.file, threads=usable_cores(), trust=self.trust)
            if told := warning(self.file, self.manifest["target"]):
                warnings.warn(told, stacklevel=2)
        names = [spec.name for spec in self.session.inputs]
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise DataError(f"predict: the file has no input {unknown[0]!r}; {nearest(unknown[0], names)}")
        inputs = Inputs(as_inputs(args).args, as_inputs(kwargs).kwargs)
        return torch.from_numpy(self.session.run(inputs.arrays(names))[self.manifest["output"]])

    def save(self, path: str | Path) -> Artifact:
        """Move the artifact to another folder. Raises: ArtifactError where something is there already."""
        target = Path(path)
        try:
            if target.exists():
                raise ArtifactError(f"{target} exists; give a folder that does not")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.path, target)
        except OSError as error:
            raise ArtifactError(
                f"{target} cannot be written ({error.strerror}); give another folder. The artifact is in {self.path}"
            ) from error
        self.path, self.session = target, None
        return self

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r})"

    def _repr_html_(self) -> str:
        return ledger_html(self.report)


def write_artifact(
    folder: Path,
    *,
    target: Target,
    file: Path,
    tensors: Mapping[str, Tensor],
    plans: Sequence[Plan],
    report: Report,
    program: ExportedProgram | None,
    output: int,
    run: Mapping[str, str],
) -> None:
    """Write all files of an artifact into a new folder; what was there is replaced.

    Args:
        program: The quantized program, or None.
        output: Which of the file's outputs the task looks at.
        run: Fingerprints of the run that made it, for the manifest.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in files_of(target.name, file):
        shutil.copyfile(part, folder / part.name)
    (folder / TENSORS).write_bytes(save(dict(tensors)))
    if program is not None:
        save_program(program, folder / PROGRAM)
    write_text(folder / "plans.json", [plan.to_json() for plan in plans])
    write_text(folder / "recipe.json", report.recipe)
    write_text(folder / "report.json", report.to_json())
    write_html(report, folder / "report.html")
    names = sorted(item.name for item in folder.iterdir())
    manifest = {
        "format": FORMAT,
        "pared": version_of("pared"),
        "target": target.name,
        "output": output,
        **run,
        "files": {name: digest(folder / name) for name in names},
    }
    write_text(folder / MANIFEST, manifest)


def write_text(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False), encoding="utf8")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program, after taking out of it the notes that name the user's paths and source lines, and the inputs."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            kept = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
            node.meta.clear()
            node.meta.update(kept)
    program._example_inputs = None
    buffer = io.BytesIO()  # PyTorch's own writer says of a full disk only that it failed
    with uninterrupted():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def open_artifact(path: str | Path, *, trust: bool = False) -> Artifact:
    """The artifact in a folder, its files checked against their fingerprints.

    Args:
        path: The artifact's folder.
        trust: Say that it comes from someone you trust: the files of some targets carry code, and `predict` runs it.

    Raises:
        ArtifactError: The artifact is missing or damaged.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        # The page is made from report.json and may be made anew, with another version of pared.
        if name == "report.html":
            continue
        if not file.is_file():
            raise ArtifactError(f"{folder} lacks {name}; the artifact is damaged, make it again")
        if digest(file) != expected:
            raise ArtifactError(f"{folder}: {name} is not the file that was written; the artifact is damaged")
    return Artifact(folder, manifest, trust=trust)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `artifact.json` says. Raises: ArtifactError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: not an artifact of format {FORMAT}; open it with the pared that wrote it")
    shape = {"target": str, "output": int, "run": str, "test": str, "files": dict}
    wrong = [name for name, kind in shape.items() if type(manifest.get(name)) is not kind]
    if wrong:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: its entry {wrong[0]!r} is missing or wrong")
    needed = {*runtime(manifest["target"]).files, TENSORS, "plans.json", "report.json"}
    names = manifest["files"]
    if not needed <= names.keys() or not all(map(is_plain, names)) or manifest["output"] < 0:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: its list of files is wrong")
    return manifest


def is_plain(name: str) -> bool:
    """True for the name of a file in the folder itself."""
    return name not in {"", ".", ".."} and not any(character in name for character in "/\\:\0")


def load(
    path: str | Path, model: nn.Module | None = None, *, quantized: bool = False, trust: bool = False
) -> nn.Module:
    """A PyTorch module from an artifact.

    Args:
        path: The artifact's folder.
        model: A fresh, uncompressed model of the class that was compressed; it is not changed. The kept plans are
            replayed on a copy of it, which then gets the artifact's tensors.
        quantized: Give the quantized program instead, for inference; needs no `model`.
        trust: Say that the artifact comes from someone you trust: a program can carry code.

    Returns:
        The module as it was before activation quantization, or the quantized program.

    Raises:
        ArtifactError: The artifact is missing, damaged, not trusted or not quantized.
        ModelError: `model` is missing, or does not match the tensors.
    """
    artifact = open_artifact(path)
    if quantized:
        if PROGRAM not in artifact.manifest["files"]:
            raise ArtifactError(f"{path} is not quantized: it holds no {PROGRAM}; load it without quantized=True")
        if not trust:
            raise ArtifactError(
                f"{path}/{PROGRAM} can carry code; load it with trust=True if you trust whoever made it, "
                "or run the exported file with predict()"
            )
        # Reading a program needs the quantize operators, which importing this registers.
        from pared.quantize import emission  # noqa: F401

        program: nn.Module = torch.export.load(artifact.path / PROGRAM).module(check_guards=False)
        return program
    if not isinstance(model, nn.Module):
        raise ModelError("give a fresh model of the class that was compressed: pared.load(path, model=MyNet())")
    edits = [edit for plan in artifact.plans for edit in plan.edits if edit.kind != "quantize"]
    replayed = apply_edits(model, edits, {})
    load_weights(replayed, artifact.path / TENSORS)
    return replayed
