"""The commands: what they print, how they end, and that help needs no torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import pared
from pared.cli import main
from pared.errors import ParedError, ParityError, PlanError
from pared.recipe import AROUND, STEPS, Recipe, step_class
from pared.recipe_schema import option_table
from pared.report.data import Final, Latency, Report, Speedup, Stage, Timing
from pared.step import Context, Edit, Plan, Skip
from pared.targets.bench import BenchRow

SOURCE = Path(pared.__file__).parents[1]
NETS = """
import torch
from torch import nn
from pared.task import Task

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def task():
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    batches = [(x[:12], torch.arange(12) % 2), (x[12:], torch.arange(12) % 2)]
    return Task(example_inputs=x[:2], calibration=batches, validation=batches, test=batches, metrics="accuracy")

def broken():
    raise ZeroDivisionError("in the caller's own code")
"""
RECIPE = "model: nets.py:make\ntask: nets.py:task\nseed: 5\nsteps:\n  - QuantizeStatic\n"
REPORT = Report(
    environment={"seed": 5},
    timing=Timing(batch_size=1, threads=2, host="a machine"),
    target="onnxruntime",
    task={},
    stages=(Stage(name="baseline", step=None, block=0, size_bytes=1000),),
    final=Final(stage="baseline", size_bytes=1000),
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder of its own; the current folder is another one."""
    folder, here = tmp_path / "recipes", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("PARED_TRACEBACK", raising=False)
    (folder / "nets.py").write_text(NETS, encoding="utf8")
    path = folder / "small.yaml"
    path.write_text(RECIPE, encoding="utf8")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the commands ask of the pipeline, which is not run here."""
    made: list[dict[str, Any]] = []

    def compress(model: nn.Module, steps: Any, task: Any, **settings: Any) -> Any:
        made.append({"model": model, "steps": steps, "task": task} | settings)
        settings["progress"]("training [b]", 1, 2, "loss 0.5")
        return types.SimpleNamespace(report=REPORT, path=settings["out"])

    def dry_run(model: nn.Module, steps: Any, task: Any, **settings: Any) -> list[Plan]:
        made.append({"model": model, "steps": steps} | settings)
        edits = (Edit("quantize", "0", {"node": "linear"}), Edit("quantize", "head[red]", {}))
        skips = (Skip("2", "its input is not quantized"),)
        during = [Plan("Distill", facts={"notes": ["Distill: teacher 'big'"]}).to_json()]
        return [
            Plan("Train", facts={"during": during}),
            Plan("QuantizeStatic", edits=edits, skips=skips, estimate=True),
        ]

    fake = types.SimpleNamespace(compress=compress, dry_run=dry_run)
    monkeypatch.setitem(sys.modules, "pared.pipeline", fake)
    yield made


def test_run_compresses_into_a_folder_named_after_the_recipe(
    recipe: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe)]) == 0
    (call,) = calls
    assert (call["out"], call["seed"], call["resume"], call["overwrite"]) == (Path("runs/small"), 5, False, False)
    assert [type(step).__name__ for step in call["steps"]] == ["QuantizeStatic"]
    assert isinstance(call["model"], nn.Sequential)
    out, err = capsys.readouterr()
    assert "baseline" in out
    assert out.rstrip().endswith(f"report: {Path('runs/small/report.html')}")
    assert "error" not in err


def test_run_passes_every_option_on(recipe: Path, calls: list[dict[str, Any]]) -> None:
    options = ["--out", "elsewhere", "--resume", "--overwrite", "--set", "seed=6", "--set", "timing.threads=1"]
    assert main(["run", str(recipe), *options]) == 0
    (call,) = calls
    assert (call["out"], call["seed"], call["resume"], call["overwrite"]) == (Path("elsewhere"), 6, True, True)
    assert call["timing"].threads == 1


def test_run_prints_every_layer_with_its_fate_when_dry(
    recipe: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), "--dry-run"]) == 0
    assert "out" not in calls[0]
    out = capsys.readouterr().out
    assert "  Distill: teacher 'big'\n" in out
    assert "2 QuantizeStatic: 2 layers would change, 1 would not, as far as can be told" in out
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["0", "quantize"] in [[part.strip() for part in line] for line in lines]
    assert ["head[red]", "quantize"] in [[part.strip() for part in line] for line in lines]
    assert ["2", "stays: its input is not quantized"] in [[part.strip() for part in line] for line in lines]


def test_demo_trains_its_model_and_compresses_what_was_trained(
    recipe: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pared.cli import work

    class Train:
        """A training that sets every weight to 2."""

        def __init__(self, **settings: Any) -> None:
            assert settings["epochs"] >= 1

        def plan(self, model: nn.Module, ctx: Context) -> Plan:
            return Plan("Train")

        def apply(self, model: nn.Module, plan: Plan, ctx: Context) -> nn.Module:
            trained = copy.deepcopy(model)
            for parameter in trained.parameters():
                nn.init.constant_(parameter, 2)
            return trained

    monkeypatch.setattr(work, "Train", Train)
    assert main(["demo", "--out", "there/demo"]) == 0
    (call,) = calls
    assert (call["out"], call["overwrite"], call["target"]) == (Path("there/demo"), True, "onnxruntime")
    assert [type(step).__name__ for step in call["steps"]] == ["QuantizeStatic"]
    assert all(bool((parameter == 2).all()) for parameter in call["model"].parameters())
    assert call["task"].metric.name == "accuracy"
    assert Recipe.from_json(call["recipe"]).budget.max_drop is not None


def test_demo_reads_the_full_data_when_asked(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pared.cli import work

    seen: list[Any] = []
    monkeypatch.setattr(work, "demo", lambda given, *, out: seen.append((given.data, out)))
    assert main(["demo", "--data", "full"]) == 0
    assert main(["demo", "--out", "there"]) == 0
    assert seen == [("full", Path("runs/demo")), ("embedded", Path("there"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rn"], "error: No such command 'rn'"),
        (["run"], "error: Missing argument 'recipe'"),
        (["run", "absent.yaml"], "error: no recipe at absent.yaml"),
        (["run", "RECIPE", "--sett", "seed=1"], "error: No such option"),
        (["run", "RECIPE", "--set", "sede=1"], "error: sede: unknown key; did you mean 'seed'?"),
        (["run", "RECIPE", "--set", "seed=x"], "error: seed: should be a valid integer, found 'x'"),
        (["run", "RECIPE", "--set", "model=absent.py:make"], "error: no file "),
        (["run", "RECIPE", "--set", "weights=absent.pt"], "error: no weights at "),
        (["run", "RECIPE", "--data", "full"], "error: data: full data belongs to embedded tasks"),
        (["run", "RECIPE", "--data", "none"], "error: Invalid value for '--data'"),
        (["bench", "absent.onnx"], "error: "),
        (["bench", "absent.onnx", "--dimension", "n"], "error: "),
        (["report", "absent"], "error: no report at "),
        (["list", "stepz"], "error: Invalid value"),
        (["inspect", "nets.py:make"], "error: no file "),
    ],
)
def test_command_says_in_one_line_what_is_wrong_when_used_wrongly(
    recipe: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status = main([str(recipe) if argument == "RECIPE" else argument for argument in arguments])
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert (status, out) == (2, "")


@pytest.mark.parametrize(("error", "status"), [(PlanError, 2), (ParityError, 1), (ParedError, 1), (OSError, 1)])
def test_command_ends_with_the_status_of_the_error_and_appends_its_notes(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
    status: int,
) -> None:
    from pared.cli import work

    def stop(*_: Any, **__: Any) -> None:
        failure = error("layer conv1\ncannot change")
        failure.add_note("in step 1, QuantizeStatic")
        raise failure

    monkeypatch.setattr(work, "run", stop)
    assert main(["run", str(recipe)]) == status
    assert capsys.readouterr().err == "error: layer conv1 cannot change; in step 1, QuantizeStatic\n"
    monkeypatch.setenv("PARED_TRACEBACK", "1")
    with pytest.raises(error):
        main(["run", str(recipe)])


def test_run_says_how_to_go_on_when_stopped(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pared.cli import work

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run", stop)
    assert main(["run", str(recipe)]) == 130
    assert capsys.readouterr().err.strip() == "stopped; go on with --resume"


def test_run_lets_an_error_of_the_callers_own_code_through(recipe: Path, calls: list[dict[str, Any]]) -> None:
    with pytest.raises(ZeroDivisionError, match="own code"):
        main(["run", str(recipe), "--set", "model=nets.py:broken"])
    assert calls == []


def test_inspect_lists_layers_from_a_callable_and_from_a_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = recipe.parent / "nets.py"
    for arguments in (
        [f"{nets}:make", "--shape", "1,4"],
        [f"{nets}:make", "--task", f"{nets}:task"],
        [str(recipe)],
    ):
        assert main(["inspect", *arguments]) == 0
        out = capsys.readouterr().out
        assert "Linear" in out
        # 4 * 8 + 8 and 8 * 2 + 2 parameters, of 4 bytes each; 4 * 8 + 8 * 2 multiply-accumulates a sample.
        assert "58 parameters, 48 multiply-accumulates, 232 B" in out


def test_inspect_says_what_to_give_when_inputs_are_missing_or_no_shape(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = f"{recipe.parent / 'nets.py'}:make"
    assert main(["inspect", nets]) == 2
    assert "give --shape 1,3,224,224, or --task" in capsys.readouterr().err
    for shape in ("1,a", "", "0,4", "1,,4"):
        assert main(["inspect", nets, "--shape", shape]) == 2
        assert f"error: --shape {shape}: write the sizes with commas" in capsys.readouterr().err


def test_report_prints_the_ledger_and_rebuilds_the_page(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent
    (folder / "report.json").write_text(json.dumps(REPORT.to_json()), encoding="utf8")
    assert main(["report", str(folder)]) == 0
    assert "baseline" in capsys.readouterr().out
    assert not (folder / "report.html").exists()
    assert main(["report", str(folder), "--rebuild"]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert "baseline" in (folder / "report.html").read_text(encoding="utf8")


def test_list_steps_shows_every_setting(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "steps"]) == 0
    out = capsys.readouterr().out
    for name in (*STEPS, *AROUND):
        assert f"{name}: " in out
        for row in option_table(step_class(name)):
            assert any(line.split()[:1] == [row.name] for line in out.splitlines())


@pytest.mark.parametrize(
    ("what", "name"), [("targets", "onnxruntime"), ("models", "fashion_cnn"), ("data", "fashion_mnist")]
)
def test_list_shows_a_table_with_descriptions(
    recipe: Path, capsys: pytest.CaptureFixture[str], what: str, name: str
) -> None:
    assert main(["list", what]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [name]]
    assert len(row.split()) > 3


def test_help_version_report_and_recipe_errors_need_no_torch(recipe: Path) -> None:
    (recipe.parent / "report.json").write_text(json.dumps(REPORT.to_json()), encoding="utf8")
    code = (
        "import sys; from pared.cli import main\n"
        "ends = [main(line.split()) for line in sys.stdin.read().splitlines()]\n"
        "assert ends == [0, 0, 0, 0, 2, 2], ends\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    lines = f"--help\nrun --help\n--version\nreport {recipe.parent}\nrn\nrun absent.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=60, cwd=SOURCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"
    assert "Commands:" in done.stdout


def test_module_runs_as_the_command_and_gives_its_status() -> None:
    done = subprocess.run([sys.executable, "-m", "pared", "rn"], cwd=SOURCE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such command 'rn'")


def test_bench_shows_every_file_against_the_first(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def bench(files: Any, **settings: Any) -> list[BenchRow]:
        asked.append((files, settings))
        first = BenchRow(
            file=files[0],
            latency_ms=Latency(p50=8.1, p90=9.0),
            speedup=None,
            size_bytes=4_000_000,
            peak_memory_bytes=90_000_000,
        )
        speedup = Speedup(value=2.7, low=2.5, high=2.9, verdict="faster")
        return [first, dataclasses.replace(first, file=files[1], speedup=speedup, size_bytes=1_000_000)]

    monkeypatch.setattr("pared.targets.bench.bench", bench)
    monkeypatch.setenv("COLUMNS", "140")
    options = ["--batch-size", "4", "--threads", "1", "--dimension", "n=7", "--dimension", "m=8"]
    assert main(["bench", "a[1].onnx", "b.onnx", *options]) == 0
    settings = {"target": "onnxruntime", "batch_size": 4, "threads": 1, "dimensions": {"n": 7, "m": 8}, "trust": False}
    assert asked == [([Path("a[1].onnx"), Path("b.onnx")], settings)]
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "a[1].onnx 8.10 ms 9.00 ms baseline 4.00 MB 90.0 MB" in rows
    assert "b.onnx 8.10 ms 9.00 ms 2.70x (2.50x to 2.90x) faster 1.00 MB 90.0 MB" in rows
    assert main(["bench", "a.onnx", "--dimension", "n"]) == 2
    assert "error: --dimension n: write NAME=SIZE" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the last 12 of 24 calibration samples")
def test_run_ends_in_an_artifact_that_repeats_itself_from_its_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "timing={threads: 1, rounds: 12}", "--set", "budget={allow_slower: true, allow_larger: true}"]
    assert main(["run", str(recipe), "--dry-run", *options]) == 0
    assert "1 QuantizeStatic: 2 layers would change, 0 would not" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert main(["run", str(recipe), *options]) == 0
    out = capsys.readouterr().out
    assert "1 QuantizeStatic" in out
    assert out.rstrip().endswith(f"report: {Path.cwd() / 'runs/small/report.html'}")
    made = json.loads(Path("runs/small/recipe.json").read_text(encoding="utf8"))
    assert Recipe.from_json(made) == Recipe.read(recipe, options[1::2])
    assert main(["run", str(recipe), *options]) == 2
    assert "--overwrite" in capsys.readouterr().err
