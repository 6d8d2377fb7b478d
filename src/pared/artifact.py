"""The artifact: a folder with the exported model, tensors, plans and report. Written whole, checked when opened.

Nothing in it is pickled, and opening it imports nothing that it names. The one file that can carry code is
`program.pt2`, the quantized program, which loads only with `trust=True`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from pared.errors import ArtifactError, ModelError
from pared.loading import load_weights
from pared.measure.environment import usable_cores, version_of
from pared.report.data import Report
from pared.report.html import ledger_html, write_html
from pared.step import Plan
from pared.surgery import apply_edits
from pared.targets.sessions import open_session, runtime
from pared.task import as_inputs

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
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.report = Report.read(path)
        plans = json.loads((path / "plans.json").read_text(encoding="utf8"))
        self.plans = tuple(Plan.from_json(plan) for plan in plans)
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
            DataError: The inputs are no tensors.
            TargetError: The runtime refuses them.
        """
        inputs = as_inputs(kwargs if kwargs else args)
        if self.session is None:
            self.session = open_session(self.manifest["target"], self.file, threads=usable_cores())
        names = [spec.name for spec in self.session.inputs]
        named = set(names) == set(inputs.kwargs)
        arrays = [inputs.kwargs[name].numpy() for name in names] if named else inputs.arrays()
        return torch.from_numpy(self.session.run(arrays)[self.manifest["output"]])

    def save(self, path: str | Path) -> Artifact:
        """Move the artifact to another folder. Raises: ArtifactError where something is there already."""
        target = Path(path)
        if target.exists():
            raise ArtifactError(f"{target} exists; give a folder that does not")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(self.path, target)
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
    run: str,
) -> None:
    """Write all files of an artifact into a new folder; what was there is replaced.

    Args:
        program: The quantized program, or None.
        output: Which of the file's outputs the task looks at.
        run: Fingerprint of the run that made it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(file, folder / target.filename)
    save_file(dict(tensors), folder / TENSORS)
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
        "run": run,
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
    torch.export.save(program, path)


def open_artifact(path: str | Path) -> Artifact:
    """The artifact in a folder, its files checked against their fingerprints. Raises: ArtifactError."""
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        # The page is made from report.json and may be made anew, with another version of pared.
        if name == "report.html":
            continue
        if not file.exists():
            raise ArtifactError(f"{folder} lacks {name}; the artifact is damaged, make it again")
        if digest(file) != expected:
            raise ArtifactError(f"{folder}: {name} is not the file that was written; the artifact is damaged")
    return Artifact(folder, manifest)


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
    names = manifest.get("files")
    if not isinstance(names, dict) or any(Path(name).name != name for name in names):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: its list of files is wrong")
    return manifest


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
        if not (artifact.path / PROGRAM).exists():
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
    if model is None:
        raise ModelError("give a fresh model of the class that was compressed: pared.load(path, model=MyNet())")
    edits = [edit for plan in artifact.plans for edit in plan.edits if edit.kind != "quantize"]
    replayed = apply_edits(model, edits, {})
    load_weights(replayed, artifact.path / TENSORS)
    return replayed
