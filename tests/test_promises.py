"""The promises of a whole run, on real files, real workers and real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import CaptureError, DataError, ModelError, ParityError
from pared.targets.onnxruntime import OnnxRuntime

SOURCE = Path(pared.__file__).parents[1]


class Sluggish(nn.Module):
    """Large enough that its file in integers is faster and smaller beyond doubt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(1024, 1024), nn.ReLU())))
        self.head = nn.Linear(1024, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def samples(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(32, 1024, generator=generator), torch.randint(0, 4, (32,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.slow
def test_the_ledger_states_what_the_shipped_file_does_when_a_model_is_quantized(tmp_path: Path) -> None:
    model = Sluggish().train()
    model.body[0].requires_grad_(False)
    before = {name: (t.clone(), t.requires_grad) for name, t in model.named_parameters()}
    torch.manual_seed(11)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    test = samples(2, seed=3)
    task = pared.Task(
        example_inputs=test[0][0][:1],
        calibration=samples(2, seed=1),
        validation=samples(1, seed=2),
        test=test,
        metrics=["accuracy", "f1"],
    )
    with torch.no_grad():
        artifact = pared.compress(model, [pared.QuantizeStatic()], task, out=tmp_path / "run")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]

    baseline, quantized = artifact.report.stages
    final = artifact.report.final
    assert final is not None and final.stage == "1 QuantizeStatic"
    assert artifact.report.environment["session"]["allow_spinning"] == "no"
    assert quantized.kept and set(quantized.changed) == {"body.0", "body.2", "body.4", "head"}
    assert quantized.speedup is not None and quantized.speedup.verdict == "faster"
    assert 1 < quantized.speedup.low <= quantized.speedup.value <= quantized.speedup.high
    assert final.size_bytes == artifact.file.stat().st_size < baseline.size_bytes / 3.5  # type: ignore[operator]
    assert baseline.params == quantized.params == sum(p.numel() for p in model.parameters())
    assert baseline.macs == 3 * 1024 * 1024 + 1024 * 4
    assert baseline.peak_memory_bytes > 2**24  # type: ignore[operator]

    # The final figures again, by the runtime itself and by hand.
    session = onnxruntime.InferenceSession(str(artifact.file), providers=["CPUExecutionProvider"])
    logits = [torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]) for x, _ in test]
    labels = torch.cat([target for _, target in test])
    assert final.metrics["accuracy"] == pytest.approx((torch.cat(logits).argmax(1) == labels).float().mean().item())
    model.eval()
    with torch.no_grad():
        exact = torch.cat([model(x) for x, _ in test])
    assert final.baseline_metrics["accuracy"] == pytest.approx((exact.argmax(1) == labels).float().mean().item())
    assert torch.equal(artifact.predict(test[0][0]), logits[0])
    assert quantized.parity is not None and quantized.fidelity is not None
    assert quantized.fidelity.sqnr_db is not None and 15 < quantized.fidelity.sqnr_db < 60
    noise = (torch.cat([artifact.predict(x) for x, _ in task.validation]) - validation_outputs(model, task)).square()
    signal_power = validation_outputs(model, task).square().sum()
    assert quantized.fidelity.sqnr_db == pytest.approx(10 * torch.log10(signal_power / noise.sum()).item(), abs=0.01)


def validation_outputs(model: nn.Module, task: pared.Task) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in task.validation])


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All files take the same time, at once."""
    monkeypatch.setattr("pared.pipeline.run.time_in_turn", lambda commands, **_: [[[[1.0]] * 2] * 2 for _ in commands])
    monkeypatch.setattr("pared.pipeline.run.peak_memory", lambda command: 1)
    yield


def test_the_run_stops_when_the_file_disagrees_with_its_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still_clock: None
) -> None:
    export = OnnxRuntime.export

    def wrong(self: OnnxRuntime, model: nn.Module, task: pared.Task, path: Path) -> None:
        with torch.no_grad():
            weight = next(model.parameters())  # of the model, or of a part that is looked at to find the layer
            weight *= 1.01
            export(self, model, task, path)
            weight /= 1.01

    monkeypatch.setattr(OnnxRuntime, "export", wrong)
    x = torch.randn(8, 4)
    model, task = nn.Sequential(nn.Linear(4, 4, bias=False)), pared.Task(example_inputs=x, calibration=[x])
    with pytest.raises(ParityError, match=r"baseline: the exported file and its PyTorch model disagree: SQNR 40\.0 dB"):
        pared.compress(model, [pared.QuantizeStatic()], task, out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            return x
        return -x


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # a wrong shape or dtype fails here


@pytest.mark.parametrize(
    ("model", "example", "line"),
    [
        (Deciding(), torch.ones(2, 3), "the line to be named"),
        (Narrow(), torch.ones(2, 4), "a wrong shape or dtype fails here"),
        (Narrow(), torch.ones(2, 3, dtype=torch.int64), "a wrong shape or dtype fails here"),
    ],
)
def test_the_line_of_the_callers_code_is_named_when_a_model_cannot_be_exported(
    tmp_path: Path, model: nn.Module, example: Tensor, line: str
) -> None:
    text = Path(__file__).read_text(encoding="utf8").splitlines()
    number = 1 + next(i for i, content in enumerate(text) if content.endswith(f"# {line}"))
    task = pared.Task(example_inputs=example, calibration=[example])
    with pytest.raises(CaptureError) as caught:
        pared.compress(model, [pared.QuantizeStatic()], task, out=tmp_path / "a")
    assert f"{Path(__file__).name}:{number}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([torch.ones(4, 3), torch.ones(4, 3)], "all 8 calibration samples are identical; give real, varied data"),
        ([torch.ones(4, 3, dtype=torch.float64)], r"calibration data, batch 0: input 0 is torch\.float64"),
        ([torch.ones(4, 4)], r"calibration data, batch 0: input 0 has shape \(4, 4\), the example has \(2, 3\)"),
    ],
)
def test_calibration_data_are_refused_when_they_do_not_fit(
    tmp_path: Path, calibration: Any, message: str, still_clock: None
) -> None:
    task = pared.Task(example_inputs=torch.ones(2, 3), calibration=calibration)
    with pytest.raises(DataError, match=message):
        pared.compress(Narrow(), [pared.QuantizeStatic()], task, out=tmp_path / "a")


def test_names_with_markup_are_escaped_when_layers_and_metrics_have_them(tmp_path: Path, still_clock: None) -> None:
    name = "<img src=x onerror=alert(1)>"
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 3))

    def metric(output: Tensor, target: Tensor) -> Tensor:
        return output.mean()

    metric.__name__ = "<script>alert(2)</script>"
    x = torch.randn(8, 3)
    task = pared.Task(example_inputs=x, calibration=[x], validation=[(x, x)], metrics=metric)
    budget = pared.Budget(allow_larger=True)
    artifact = pared.compress(model, [pared.QuantizeStatic()], task, out=tmp_path / "a", budget=budget)
    assert artifact.report.stages[1].changed == (name,)
    for page in (
        (artifact.path / "report.html").read_text(encoding="utf8"),
        artifact._repr_html_(),
    ):
        assert "<img src=x" not in page and "<script>alert(2)" not in page
        assert "&lt;script&gt;alert(2)" in page


def test_a_half_precision_model_ships_or_says_why(tmp_path: Path, still_clock: None) -> None:
    x = torch.randn(8, 3).half()
    model = Narrow().half()
    with pytest.raises(pared.ParedError, match="float16"):
        pared.compress(model, [pared.QuantizeStatic()], pared.Task(example_inputs=x, calibration=[x]), out=tmp_path)
    with pytest.raises(DataError, match="bfloat16, which exported files do not take; use float32"):
        task = pared.Task(example_inputs=x.bfloat16(), calibration=[x.bfloat16()])
        pared.compress(Narrow().bfloat16(), [pared.QuantizeStatic()], task, out=tmp_path)


def test_the_part_of_a_rich_output_is_named_when_the_task_picks_none(tmp_path: Path, still_clock: None) -> None:
    class Rich(Narrow):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x), "extra": x}

    x = torch.randn(8, 3)
    for output, message in (
        (None, r"the model's output is a dict, not a tensor; say which part counts with Task\(output=<key"),
        ("logit", r"Task\(output='logit'\): no such part; did you mean 'logits'"),
        (0, r"Task\(output=0\): the output is a dict; no such index"),
        (lambda found: found["logits"] * 2, "must pick one of the model's outputs as it is"),
    ):
        with pytest.raises(ModelError, match=message):
            task = pared.Task(example_inputs=x, calibration=[x], output=output)
            pared.compress(Rich(), [pared.QuantizeStatic()], task, out=tmp_path / "a")


NETS = """
import torch, time
from torch import nn
import pared

def make():
    return nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.1), nn.Linear(512, 3))

def data(seed):
    torch.manual_seed(seed)
    return [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(4)]

def task():
    return pared.Task(
        example_inputs=torch.ones(1, 8), train=data(1), validation=data(2), test=data(3),
        loss=nn.CrossEntropyLoss(), metrics="accuracy",
    )
"""
RECIPE = """
model: nets.py:make
task: nets.py:task
budget: {allow_slower: true, allow_larger: true}
timing: {rounds: 1, threads: 1}
steps:
  - Train: {epochs: 80, patience: 80}
  - QuantizeStatic
"""


def command(folder: Path, out: str, *options: str) -> subprocess.Popen[str]:
    """`pared run` in a process of its own, as a user starts it."""
    (folder / "nets.py").write_text(NETS)
    (folder / "recipe.yaml").write_text(RECIPE)
    # Eight lives of the workers are what takes longest, and are not the subject here.
    start = (
        "import sys; from pared.measure import latency; latency.SITTINGS = 2;"
        "from pared.cli import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start, "run", "recipe.yaml", "--out", out, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        # Shells start what runs in the background with Ctrl-C ignored, and processes inherit that from the tests.
        preexec_fn=hear_ctrl_c,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - start < 240
        time.sleep(0.01)


def ends(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: (folder / name).read_bytes()
        for name in ("model.onnx", "tensors.safetensors", "plans.json", "recipe.json")
    }
    ledger = json.loads((folder / "report.json").read_text())
    metrics = [(row["metrics"], row["fidelity"], row["kept"]) for row in ledger["stages"]]
    return found | {"metrics": metrics, "test": ledger["final"]["metrics"]}


@pytest.mark.slow
def test_a_run_ends_alike_when_stopped_by_ctrl_c_and_by_kill_and_resumed(tmp_path: Path) -> None:
    ends(command(tmp_path, "whole"), 0)

    work = tmp_path / ".cut.work"
    cut = command(tmp_path, "cut")
    wait_for(".cut.work/steps/train-*.pt", tmp_path, cut)  # an epoch is done
    cut.send_signal(signal.SIGINT)
    _, err = ends(cut, 130)
    assert err.rstrip().endswith("stopped; go on with --resume")
    assert "Traceback" not in err
    assert list(work.glob("steps/train-*.pt")), "the checkpoint was not kept"
    assert not (tmp_path / "cut").exists()

    cut = command(tmp_path, "cut", "--resume")
    wait_for(".cut.work/stages/*/plan.json", tmp_path, cut)  # the training is done
    delay = random.Random(time.time_ns()).uniform(0, 4)
    time.sleep(delay)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    out, _ = ends(command(tmp_path, "cut", "--resume"), 0)
    assert content(tmp_path / "cut") == content(tmp_path / "whole"), delay
    assert not work.exists()
    assert out.rstrip().endswith("cut/report.html")
