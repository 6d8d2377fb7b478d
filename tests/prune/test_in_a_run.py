"""Pruning in a whole run: trained on, quantized, written, read again, and gone on with after a stop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from contract_cases import WIDTHS, batch_of, model_and_task
from pared.graph.counts import count
from pared.task import call

PATTERN = "conv_bn_relu"
SMALLER = pared.PruneChannels(ratio=0.5, widths=WIDTHS)
STEPS = [pared.Repeat(2, [SMALLER]), pared.Train(epochs=1, lr=0.01), pared.QuantizeStatic()]
BUDGET = pared.Budget(allow_larger=True)  # files are so small that scales and zero points make them larger


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(commands: Sequence[Any], **_: Any) -> list[list[list[list[float]]]]:
        return [[[[1.0]] * 2] * 2 for _ in commands]

    monkeypatch.setattr("pared.pipeline.run.time_in_turn", alike)
    monkeypatch.setattr("pared.pipeline.run.peak_memory", lambda command: 1)


def run(out: Path, **settings: Any) -> pared.Artifact:
    model, task = model_and_task(PATTERN)
    return pared.compress(model, STEPS, task, out=out, budget=BUDGET, **settings)


@pytest.mark.slow
def test_a_pruned_trained_and_quantized_model_is_shipped_and_read_again_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped in the second round, after its choice.
    calls: list[str] = []
    apply = pared.PruneChannels.apply

    def stopping(self: Any, *args: Any) -> nn.Module:
        calls.append(str(self.ratio))
        if len(calls) == 2:
            raise KeyboardInterrupt
        made: nn.Module = apply(self, *args)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(pared.PruneChannels, "apply", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a")
    assert calls == ["0.25", "0.5"]
    artifact = run(tmp_path / "a", resume=True)

    rows = artifact.report.stages
    assert [row.kept for row in rows] == [True] * 5
    assert all(row.parity is not None and row.parity.sqnr_db > 30 for row in rows)
    # Widths 8 -> 6 -> 4: what is shipped has the parameters of a network built so.
    built = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5))
    norms = (4 + 4) * 2  # scales and shifts, in the place of the convolutions' biases
    expected = sum(tensor.numel() for tensor in built.parameters()) - (4 + 4) + norms
    assert rows[3].params == expected

    fresh, task = model_and_task(PATTERN)
    program = pared.load(artifact.path, model=fresh, quantized=True, trust=True)
    floating = pared.load(artifact.path, model=model_and_task(PATTERN)[0])
    assert sum(layer.macs for layer in count(floating, task.example_inputs)) == rows[3].macs
    inputs = batch_of(task.example_inputs, 3, 9)
    predicted = artifact.predict(*inputs.args, **inputs.kwargs)
    with torch.no_grad():
        assert (call(program, inputs) - predicted).norm() < 1e-3 * predicted.norm()
        exact = call(floating.eval(), inputs)
    assert (exact - predicted).norm() < 0.2 * exact.norm()
    plans = json.loads((artifact.path / "plans.json").read_text())
    assert str(Path(__file__).parent) not in json.dumps(plans)


def test_the_timing_of_a_run_is_that_of_its_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None]] = []

    class Clock:
        def __init__(self, ctx: Any) -> None:
            seen.append((ctx.batch_size, ctx.threads))

        def shares(self, models: Sequence[nn.Module]) -> list[float]:
            raise KeyboardInterrupt

    monkeypatch.setattr("pared.prune.choosing.Clock", Clock)
    model, task = model_and_task(PATTERN)
    with pytest.raises(KeyboardInterrupt):
        pared.compress(
            model,
            [pared.PruneChannels(latency=0.5, widths=WIDTHS)],
            task,
            out=tmp_path / "a",
            timing=pared.TimingSettings(batch_size=4, threads=1),
        )
    assert seen == [(4, 1)]
