"""A realistic report, and a headless Chromium to open pages in."""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pared.report.data import (
    Agreement,
    Final,
    Latency,
    Layer,
    LayerCost,
    Pruned,
    PrunedGroup,
    Report,
    Skipped,
    Speedup,
    Stage,
    Timing,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def layers(became: str) -> tuple[Layer, ...]:
    rows = [Layer(module="features.0.conv", kind="Conv2d", params=864, macs=10_838_016, became=became)]
    for block in range(1, 20):
        wide = 16 * block
        rows += [
            Layer(
                module=f"features.{block}.expand", kind="Conv2d", params=6 * wide * wide, macs=9_000_000, became=became
            ),
            Layer(
                module=f"features.{block}.depthwise",
                kind="Conv2d, grouped",
                params=54 * wide,
                macs=54 * wide * 784,
                became="float32" if block == 3 else became,
            ),
            Layer(module=f"features.{block}.project", kind="Conv2d", params=wide * wide, macs=7_000_000, became=became),
        ]
    rows.append(Layer(module="classifier.dropout", kind="Dropout", params=0, macs=0, became="removed on export"))
    rows.append(Layer(module="classifier.linear", kind="Linear", params=1_281_000, macs=1_280_000, became=became))
    return tuple(rows)


def pruned_by_half() -> Pruned:
    """Three convolutions and two linear layers: the first fragile, the last hardly so, one not to be pruned."""
    steep = {"features.0": 0.4, "features.1.expand": 0.2, "features.2.expand": 0.1, "mlp.0": -0.02, "mlp.2": 0.01}
    groups = [
        PrunedGroup(
            name=name,
            kind="fully connected" if name.startswith("mlp") else "convolution",
            kept=64 if name == "mlp.2" else 32,
            before=64,
            approximate="a layer norm's mean runs over fewer channels" if name == "mlp.0" else "",
            curve=tuple((ratio, 2 * ratio * drop) for ratio in (0.0, 0.25, 0.5, 0.75)),
        )
        for name, drop in steep.items()
    ]
    left = (
        Skipped(module="features.1.project", reason="it pads (up to 0.00804)"),
        Skipped(module="features.2.project", reason="it pads (up to 0.1)"),
    )
    return Pruned(params=0.329, macs=0.306, difference=2.6e-16, taken_in=42, groups=tuple(groups), left=left)


@pytest.fixture
def sample() -> Report:
    """Baseline, training, a roll back, int8: 60 layers, skips, test figures."""
    baseline = Stage(
        name="baseline",
        step=None,
        block=0,
        metrics={"accuracy": 0.9135},
        latency_ms=Latency(p50=8.132, p90=8.51),
        size_bytes=17_800_000,
        params=4_652_008,
        nonzero_params=4_652_008,
        macs=385_000_000,
        peak_memory_bytes=142_000_000,
        parity=Agreement(sqnr_db=118.2, max_abs=3.1e-6, agreement=1.0),
        layers=layers("float32"),
    )
    train = Stage(
        name="1 Train",
        step={"step": "Train", "epochs": 3, "lr": 0.01, "schedule": "cosine", "during": []},
        block=1,
        metrics={"accuracy": 0.9172},
        latency_ms=Latency(p50=8.101, p90=8.44),
        speedup=Speedup(value=1.004, low=0.989, high=1.017, verdict="no measurable change"),
        size_bytes=17_800_000,
        params=4_652_008,
        nonzero_params=4_652_008,
        macs=385_000_000,
        peak_memory_bytes=142_100_000,
        parity=Agreement(sqnr_db=117.9, max_abs=3.3e-6, agreement=1.0),
        fidelity=Agreement(sqnr_db=14.2, max_abs=4.1, agreement=0.956),
        seconds=201.4,
        changed=("features", "classifier"),
    )
    pruned = Stage(
        name="2 PruneChannels",
        step={"step": "PruneChannels", "ratio": 0.5},
        block=2,
        kept=False,
        why="accuracy on validation fell by 3.10 points, the budget allows 1.00",
        metrics={"accuracy": 0.8862},
        latency_ms=Latency(p50=4.312, p90=4.66),
        speedup=Speedup(value=1.886, low=1.851, high=1.921, verdict="faster"),
        size_bytes=6_120_000,
        params=1_530_224,
        nonzero_params=1_530_224,
        macs=118_000_000,
        peak_memory_bytes=101_000_000,
        parity=Agreement(sqnr_db=117.1, max_abs=3.3e-6, agreement=1.0),
        fidelity=Agreement(sqnr_db=5.8, max_abs=9.7, agreement=0.861),
        seconds=12.7,
        changed=tuple(f"features.{i}.expand" for i in range(1, 20)),
        skipped=(Skipped(module="classifier.linear", reason="its outputs are the model's classes"),),
        layers=layers("half its channels"),
        pruned=pruned_by_half(),
    )
    quantized = Stage(
        name="3 QuantizeStatic",
        step={"step": "QuantizeStatic", "ranges": "minmax", "include": ["*"], "exclude": ["features.3.depthwise"]},
        block=3,
        metrics={"accuracy": 0.9152},
        latency_ms=Latency(p50=2.804, p90=2.99),
        speedup=Speedup(value=2.902, low=2.861, high=2.938, verdict="faster"),
        size_bytes=4_550_000,
        params=4_652_008,
        nonzero_params=4_640_110,
        macs=385_000_000,
        peak_memory_bytes=88_000_000,
        parity=Agreement(sqnr_db=45.7, max_abs=0.031, agreement=0.999),
        fidelity=Agreement(sqnr_db=13.9, max_abs=4.4, agreement=0.953),
        seconds=6.2,
        changed=tuple(row.module for row in layers("int8") if row.became == "int8"),
        skipped=(
            Skipped(module="features.3.depthwise", reason="excluded by the setting exclude=['features.3.depthwise']"),
            Skipped(module="classifier.dropout", reason="does nothing at inference"),
            *(Skipped(module=f"features.{i}.act", reason="fused into the layer before it") for i in range(1, 14)),
        ),
        layers=layers("int8, one scale a channel"),
        warnings=("no speed-up is to be expected of features.3",),
        sensitivity=(
            LayerCost(module="features.1.depthwise", sqnr_db=21.4, drops={"accuracy": 0.0085}),
            LayerCost(module="classifier", sqnr_db=44.2, drops={"accuracy": -0.001}),
            LayerCost(module="features.0", sqnr_db=None, drops={"accuracy": 0.0}),
        ),
    )
    return Report(
        environment={
            "cpu": "AMD EPYC 9R14, 2 cores",
            "instructions": ["avx2", "avx512f", "avx512_vnni"],
            "libraries": {"torch": "2.13.0", "onnxruntime": "1.32.0", "pared": "0.1.0"},
            "python": "3.12.3",
            "seed": 0,
        },
        timing=Timing(batch_size=1, threads=2, host="build-17"),
        target="onnxruntime",
        task={"name": "fashion", "higher_is_better": {"accuracy": True}, "samples": {"validation": 2000, "test": 2000}},
        stages=(baseline, train, pruned, quantized),
        final=Final(
            stage="3 QuantizeStatic",
            metrics={"accuracy": 0.9122},
            baseline_metrics={"accuracy": 0.9142},
            baseline_size_bytes=17_800_000,
            latency_ms=Latency(p50=2.811, p90=3.02),
            speedup=Speedup(value=2.895, low=2.851, high=2.931, verdict="faster"),
            size_bytes=4_550_000,
            params=4_652_008,
            nonzero_params=4_640_110,
            macs=385_000_000,
            peak_memory_bytes=88_000_000,
            parity=Agreement(sqnr_db=45.6, max_abs=0.033, agreement=0.999),
            fidelity=Agreement(sqnr_db=13.8, max_abs=4.6, agreement=0.951),
        ),
        recipe={
            "model": "my.models:efficientnet_lite0",
            "task": "fashion",
            "target": "onnxruntime",
            "seed": 0,
            "budget": {"max_drop": 0.01},
            "steps": [
                {"step": "Train", "epochs": 3, "lr": 0.01},
                {"step": "PruneChannels", "ratio": 0.5},
                {"step": "QuantizeStatic", "exclude": ["features.3.depthwise"]},
            ],
        },
    )


@pytest.fixture
def unmeasured(sample: Report) -> Report:
    """The same, where the last stage's runtime cannot run on this machine."""
    none = dict.fromkeys(("latency_ms", "speedup", "size_bytes", "peak_memory_bytes", "parity", "fidelity"))
    last = dataclasses.replace(
        sample.stages[-1], measured=False, why="this machine has no such runtime", metrics={}, **none
    )
    assert sample.final is not None
    final = dataclasses.replace(sample.final, metrics={}, baseline_metrics={}, **none)
    return dataclasses.replace(sample, stages=(*sample.stages[:-1], last), final=final)


HOSTILE = "</script><img src=x onerror=alert(1)>\"' onload='x' {{ 7 * 7 }} \x1b[31m[bold]"


@pytest.fixture
def hostile(sample: Report) -> Report:
    """The same, where everything that a user may name is an attack."""
    last = dataclasses.replace(
        sample.stages[-1],
        name=HOSTILE,
        step={"step": HOSTILE, HOSTILE: HOSTILE},
        kept=False,
        why=HOSTILE,
        metrics={HOSTILE: 0.5},
        changed=(HOSTILE,),
        skipped=(Skipped(module=HOSTILE, reason=HOSTILE),),
        warnings=(HOSTILE,),
        pruned=Pruned(
            params=0.5,
            macs=0.5,
            difference=0.0,
            groups=(PrunedGroup(name=HOSTILE, kept=1, before=2, approximate=HOSTILE, curve=((0.0, 0.0), (0.5, 0.1))),),
            left=(Skipped(module=HOSTILE, reason=HOSTILE),),
        ),
        sensitivity=(LayerCost(module=HOSTILE, sqnr_db=1.0, drops={HOSTILE: 0.5}),),
        layers=(Layer(module=HOSTILE, kind=HOSTILE, params=1, macs=0, became=HOSTILE),),
    )
    assert sample.final is not None
    return dataclasses.replace(
        sample,
        environment={HOSTILE: HOSTILE},
        timing=Timing(batch_size=1, threads=1, host=HOSTILE),
        target=HOSTILE,
        task={HOSTILE: HOSTILE},
        stages=(dataclasses.replace(sample.stages[0], metrics={HOSTILE: 0.5}), last),
        final=dataclasses.replace(sample.final, stage=HOSTILE, metrics={HOSTILE: 1.0}, baseline_metrics={HOSTILE: 1.0}),
        recipe={HOSTILE: [HOSTILE]},
    )


class Browser:
    """A headless Chromium, spoken to over a pipe in the DevTools protocol: JSON messages that end in a null byte."""

    def __init__(self, executable: str, profile: str) -> None:
        child_in, self.to = os.pipe()
        self.back, child_out = os.pipe()
        command = [executable, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += [
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # The protocol's pipe is file descriptors 3 and 4 of the browser.
        shell = f'exec "$@" 3<&{child_in} 4>&{child_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command, "about:blank"],
            pass_fds=(child_in, child_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        self.ids = itertools.count(1)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that arrive meanwhile are kept."""
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self, seconds: float = 30) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            self.buffer += os.read(self.back, 1 << 16)
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Open a file from disk; `events` then holds what happened from here on."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """One stroke of a key."""
        for kind in ("keyDown", "keyUp"):
            down = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **down)

    def problems(self) -> list[Any]:
        """Everything the console or a policy complained about since `open`."""
        bad = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        return [event["params"] for event in self.events if event.get("method") in bad]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since `open`."""
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [item["request"]["url"] for item in asked]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def close(self) -> None:
        self.session = None
        with contextlib.suppress(OSError):
            os.write(self.to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser on the PATH: one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        made = Browser(executable, profile)
        yield made
        made.close()
