"""Artifacts: what is written is what is read, nothing runs code unasked, and damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import ArtifactError, DataError, ModelError, ParedError, TargetError


class TwoInputs(nn.Module):
    """Takes its inputs by name, in an order that is not the alphabet's, and gives several outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.image, self.head = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, image: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.words(words) + self.image(image))
        return {"hidden": hidden, "logits": self.head(hidden)}


def fake_clock(commands: Any, **_: Any) -> list[Any]:
    return [[[[1.0]] * 2] * 2 for _ in commands]


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"words": torch.randn(16, 4, generator=generator), "image": torch.randn(16, 6, generator=generator)}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A quantized artifact, and a float one; only the clock is not real."""
    folder = tmp_path_factory.mktemp("artifacts")
    batches = data()
    task = pared.Task(example_inputs=batches[0], calibration=batches, output="logits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pared.pipeline.run.time_in_turn", fake_clock)
        keep = pared.Budget(allow_larger=True)
        pared.compress(TwoInputs(), [pared.QuantizeStatic()], task, out=folder / "int8", budget=keep)
        refuse = pared.Budget()  # a file this small grows by its scales, so the change is rolled back
        float_only = pared.compress(TwoInputs(), [pared.QuantizeStatic()], task, out=folder / "float", budget=refuse)
    assert float_only.plans == ()
    yield folder / "int8", folder / "float"


@pytest.fixture
def folder(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the quantized artifact, to be spoilt."""
    return Path(shutil.copytree(made[0], tmp_path / "artifact"))


def test_predict_equals_the_runtime_when_inputs_come_by_name_or_place(made: tuple[Path, Path]) -> None:
    artifact = pared.open_artifact(made[0])
    inputs = data()[0]
    session = onnxruntime.InferenceSession(str(artifact.file), providers=["CPUExecutionProvider"])
    expected = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert [value.shape for value in expected] == [(16, 8), (16, 3)]
    for found in (
        artifact.predict(**inputs),
        artifact.predict(image=inputs["image"], words=inputs["words"]),
        artifact.predict(inputs["words"], inputs["image"]),
        artifact.predict(inputs["words"], image=inputs["image"]),
        artifact.predict(inputs["image"], words=inputs["words"]),
        artifact.predict(inputs["words"].numpy(), inputs["image"].requires_grad_().detach()),
    ):
        assert torch.equal(found, torch.from_numpy(expected[1]))
    assert artifact.predict(inputs["words"][:1], inputs["image"][:1]).shape == (1, 3)


def test_predict_says_what_is_wrong_when_inputs_do_not_fit(made: tuple[Path, Path]) -> None:
    artifact, inputs = pared.open_artifact(made[0]), data()[0]
    with pytest.raises(DataError, match="no input 'imag'; did you mean 'image'"):
        artifact.predict(words=inputs["words"], imag=inputs["image"])
    with pytest.raises(TargetError, match=r"takes 2 inputs \(words, image\), found 1"):
        artifact.predict(inputs["words"])
    with pytest.raises(TargetError, match="cannot run the file on these inputs"):
        artifact.predict(inputs["words"].double(), inputs["image"])
    with pytest.raises(DataError, match="bfloat16, which exported files do not take"):
        artifact.predict(inputs["words"].bfloat16(), inputs["image"])


def test_predict_and_report_work_when_the_artifact_was_moved(folder: Path, tmp_path: Path) -> None:
    inputs = data()[0]
    artifact = pared.open_artifact(folder)
    before = artifact.predict(**inputs)
    assert torch.equal(artifact.save(tmp_path / "there").predict(**inputs), before)
    again = pared.open_artifact(str(tmp_path / "there"))
    assert torch.equal(again.predict(**inputs), before)
    assert again.report.stages[-1].name == "1 QuantizeStatic"
    assert "QuantizeStatic" in again._repr_html_()
    assert repr(again) == f"Artifact({str(tmp_path / 'there')!r})"


def test_load_gives_the_bits_that_were_compressed_and_leaves_the_model_alone(made: tuple[Path, Path]) -> None:
    inputs = data()[0]
    for path in made:
        fresh = TwoInputs()
        with torch.no_grad():
            fresh.head.weight.zero_()
        loaded = pared.load(path, model=fresh)
        assert torch.equal(loaded(**inputs)["logits"], TwoInputs()(**inputs)["logits"])
        assert not fresh.head.weight.any()
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_load_says_so_when_the_model_is_of_another_class_or_none(made: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match=r"does not fit the model; missing: 0\.weight.*; unexpected: "):
        pared.load(made[0], model=nn.Sequential(nn.Linear(4, 8)))
    for nothing in (None, TwoInputs):
        with pytest.raises(ModelError, match=r"give a fresh model .* pared\.load\(path, model=MyNet\(\)\)"):
            pared.load(made[0], model=nothing)  # type: ignore[arg-type]


def test_load_gives_the_quantized_program_only_when_trusted(made: tuple[Path, Path]) -> None:
    inputs = data()[0]
    with pytest.raises(ArtifactError, match=r"program\.pt2 can carry code; load it with trust=True"):
        pared.load(made[0], quantized=True)
    program = pared.load(made[0], quantized=True, trust=True)
    found, expected = program(**inputs)["logits"], pared.open_artifact(made[0]).predict(**inputs)
    exact = TwoInputs()(**inputs)["logits"]
    # The file may flip single quanta against the program; both are one and the same quantization of the model.
    assert 0 < (found - exact).abs().max() < 0.2
    assert (found - expected).abs().mean() < (found - exact).abs().mean()
    with pytest.raises(ArtifactError, match=r"is not quantized: it holds no program\.pt2"):
        pared.load(made[1], quantized=True, trust=True)


def test_a_float_artifact_ships_the_model_itself(made: tuple[Path, Path]) -> None:
    artifact, inputs = pared.open_artifact(made[1]), data()[0]
    assert artifact.plans == ()
    assert artifact.report.final is not None and artifact.report.final.stage == "baseline"
    assert torch.allclose(artifact.predict(**inputs), TwoInputs()(**inputs)["logits"], atol=1e-5)


def test_no_file_names_a_path_or_line_of_the_users_machine(made: tuple[Path, Path]) -> None:
    secrets = [Path(__file__).name, str(Path(torch.__file__).parents[1]), str(made[0].parent), "relu(self.words"]
    for path in made:
        for file in path.iterdir():
            contents = [file.read_bytes()]
            if file.suffix == ".pt2":
                with zipfile.ZipFile(file) as archive:
                    contents += [archive.read(name) for name in archive.namelist()]
            for secret in secrets:
                assert not any(secret.encode() in content for content in contents), (file.name, secret)


def test_opening_imports_nothing_that_the_recipe_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    rewrite(
        folder, "recipe.json", lambda _: {"model": "trap:make", "task": f"{tmp_path}/trap.py:task", "steps": ["trap"]}
    )
    sys.path.insert(0, str(tmp_path))
    try:
        pared.open_artifact(folder).predict(**data()[0])
        pared.load(folder, model=TwoInputs())
    finally:
        sys.path.remove(str(tmp_path))
    assert "trap" not in sys.modules


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of an artifact, with the digest that fits it."""
    file = folder / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    if name != "artifact.json":
        manifest = json.loads((folder / "artifact.json").read_text())
        manifest["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "artifact.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.onnx", "tensors.safetensors", "plans.json", "report.json", "program.pt2"])
@pytest.mark.parametrize("how", ["flipped", "short", "gone", "a folder"])
def test_opening_names_the_file_when_it_is_damaged(folder: Path, name: str, how: str) -> None:
    file = folder / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "short":
        file.write_bytes(content[:-1])
    elif how == "a folder":
        file.mkdir()
    for opening in (pared.open_artifact, lambda path: pared.load(path, model=TwoInputs())):
        with pytest.raises(ArtifactError, match=rf"{name}.* the artifact is damaged"):
            opening(folder)


def test_the_page_may_be_made_anew(folder: Path) -> None:
    (folder / "report.html").write_text("another version's page")
    assert pared.open_artifact(folder).report.target == "onnxruntime"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 2}, "not an artifact of format 1; open it with the pared that wrote it"),
        (lambda m: {}, "not an artifact of format 1"),
        (lambda m: [m], "not an artifact of format 1"),
        (lambda m: m | {"target": "tensorrt9"}, "no runtime opens files of target 'tensorrt9'"),
        (lambda m: m | {"target": ["onnxruntime"]}, "entry 'target' is missing or wrong"),
        (lambda m: m | {"output": "logits"}, "entry 'output' is missing or wrong"),
        (lambda m: m | {"output": -1}, "is damaged"),
        (lambda m: m | {"files": []}, "entry 'files' is missing or wrong"),
        (lambda m: m | {"files": {}}, "its list of files is wrong"),
        (lambda m: m | {"files": m["files"] | {"../outside": "0"}}, "its list of files is wrong"),
        (lambda m: m | {"files": m["files"] | {"/etc/passwd": "0"}}, "its list of files is wrong"),
        (lambda m: m | {"files": m["files"] | {"..": "0"}}, "its list of files is wrong"),
        (lambda m: m | {"files": m["files"] | {"": "0"}}, "its list of files is wrong"),
        (lambda m: m | {"files": m["files"] | {"a\\b": "0"}}, "its list of files is wrong"),
        (lambda m: {k: v for k, v in m.items() if k != "run"}, "entry 'run' is missing or wrong"),
    ],
)
def test_opening_says_what_is_wrong_when_the_manifest_is(
    folder: Path, change: Callable[[Any], Any], message: str
) -> None:
    rewrite(folder, "artifact.json", change)
    with pytest.raises(ParedError, match=message):
        pared.open_artifact(folder)


@pytest.mark.parametrize("plans", [[{}], [1], ["x"], [{"step": "A"}]])
def test_opening_says_what_is_wrong_when_plans_are_no_plans(folder: Path, plans: Any) -> None:
    rewrite(folder, "plans.json", lambda _: plans)
    with pytest.raises(ArtifactError, match=r"plans\.json is damaged"):
        pared.open_artifact(folder)


def test_opening_says_what_is_wrong_when_there_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for nowhere in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ArtifactError, match=r"is no artifact: it has no artifact\.json"):
            pared.open_artifact(nowhere)
    (tmp_path / "artifact.json").write_bytes(b"\xff{")
    with pytest.raises(ArtifactError, match="is damaged: it is not JSON"):
        pared.open_artifact(tmp_path)


def test_load_refuses_edits_that_are_none_of_surgerys(folder: Path) -> None:
    def call(plans: Any) -> Any:
        edit = {"kind": "replace", "module": "head", "detail": {"factory": "os:system", "arguments": {"command": "x"}}}
        return [plans[0] | {"edits": [edit]}]

    rewrite(folder, "plans.json", call)
    with pytest.raises(ParedError, match="os:system"):
        pared.load(folder, model=TwoInputs())
