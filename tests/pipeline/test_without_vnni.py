"""What the report says of a file on processors without VNNI."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared.report import words
from pared.targets import risk
from saturating import on_avx2, run_file

SAMPLES = 40


def data() -> Tensor:
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def labels(x: Tensor) -> Tensor:
    """Some of each class: a class a row of pixels."""
    return x.mean((1, 3)).argmax(1) % 5


def quantize(folder: Path, cpu: Any) -> pared.Artifact:
    """A network that saturates, compressed as on a processor with VNNI; the clock and the parity gate stand still."""
    generator, x = torch.Generator().manual_seed(0), data()
    convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 5))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.uniform_(parameter, -0.05, 0.25, generator=generator)
    task = pared.Task(example_inputs=x[:1], calibration=[x], validation=[(x, labels(x))], metrics="accuracy")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("pared.quantize.static", "pared.targets.risk"):
            patched.setattr(f"{name}.saturates_here", lambda: False)
        patched.setattr("pared.pipeline.without_vnni.SAMPLES", SAMPLES)
        patched.setattr("pared.pipeline.run.time_in_turn", lambda files, **_: [[[[1.0] * 3] * 2] * 2 for _ in files])
        patched.setattr("pared.pipeline.run.peak_memory", lambda command: 1)
        # Where there is no VNNI the file itself saturates, and is refused: rightly, and not here.
        patched.setattr("pared.pipeline.stage.check_parity", lambda *_, **__: None)
        return pared.compress(
            model, [pared.QuantizeStatic(weights={"cpu": cpu})], task, target="onnxruntime", out=folder
        )


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> pared.Artifact:
    return quantize(tmp_path_factory.mktemp("runs") / "a", "here")


def test_report_says_what_the_file_scores_without_vnni(eight_bits: pared.Artifact, tmp_path: Path) -> None:
    found = eight_bits.report.stages[-1].without_vnni
    assert found is not None and found.samples == SAMPLES
    # The oracle is the file itself, on ONNX Runtime's kernels that saturate and on those that do not.
    x = data()[:SAMPLES]
    without = on_avx2("run_file", x.numpy(), folder=tmp_path, path=str(eight_bits.file))
    exact = run_file(x.numpy(), path=str(eight_bits.file), exact=True)
    noise = np.square(exact - without).sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10(np.square(exact).sum() / noise), abs=1e-3)
    expected = labels(x).numpy()
    assert found.metrics == {"accuracy": pytest.approx((without.argmax(1) == expected).mean())}
    assert found.metrics_with == {"accuracy": pytest.approx((exact.argmax(1) == expected).mean())}
    assert found.agreement == pytest.approx((without.argmax(1) == exact.argmax(1)).mean())
    assert eight_bits.report.final is not None and eight_bits.report.final.without_vnni == found
    text = " ".join(str(eight_bits.report).split())
    assert "On x86 without VNNI" in text and f"emulated on {SAMPLES} samples" in text


def test_report_is_silent_when_nothing_can_saturate(tmp_path: Path) -> None:
    artifact = quantize(tmp_path / "a", "any")
    assert artifact.report.stages[-1].without_vnni is None
    assert words.without_vnni(artifact.report) == []
    assert risk.layers_at_risk(artifact.file) == []


def test_predict_warns_when_the_file_is_wrong_here(eight_bits: pared.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    eight_bits.session = None
    monkeypatch.setattr(risk, "saturates_here", lambda: True)
    with pytest.warns(UserWarning, match=r"model\.onnx may be wrong here: this processor has no VNNI"):
        eight_bits.predict(data()[:1])
