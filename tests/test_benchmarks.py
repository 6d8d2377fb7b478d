"""What the benchmarks share, and that the committed figures say of their claims what is true."""

from __future__ import annotations

import importlib.util
import json
import operator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMITTED = sorted((FOLDER / "results").glob("*.json"))
RELATIONS = {">=": operator.ge, "<=": operator.le}


def imported(name: str) -> ModuleType:
    """A module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    return imported("harness")


def test_committed_plot_is_what_the_committed_rows_draw() -> None:
    rows = json.loads((FOLDER / "results" / "prune_planning.json").read_text(encoding="utf8"))["rows"]
    drawn = (FOLDER.parent / "docs" / "prune_planning.svg").read_text(encoding="utf8")
    assert drawn == imported("depth_plot").depth_plot(rows)
    assert all(f"{row['model']}, {tool}: " in drawn for row in rows for tool in row["seconds"])


def test_results_keep_rows_when_a_run_was_stopped(harness: ModuleType, tmp_path: Path) -> None:
    harness.Results("subject", folder=tmp_path).add({"tool": "a", "seconds": 1.5})
    again = harness.Results("subject", folder=tmp_path)
    assert again.done(tool="a") == {"tool": "a", "seconds": 1.5}
    assert again.done(tool="b") is None
    assert harness.Results("subject", fresh=True, folder=tmp_path).rows == []


@pytest.mark.parametrize(("value", "relation", "holds"), [(2.0, ">=", True), (1.9, ">=", False), (2.1, "<=", False)])
def test_claim_is_judged_when_it_is_made(
    harness: ModuleType, tmp_path: Path, value: float, relation: str, holds: bool
) -> None:
    results = harness.Results("subject", folder=tmp_path)
    results.claim(2, "a line", value, relation, 2.0)
    (claim,) = json.loads((tmp_path / "subject.json").read_text(encoding="utf8"))["claims"]
    assert claim == {"issue": 2, "what": "a line", "value": value, "relation": relation, "bound": 2.0, "holds": holds}


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_committed_results_are_honest_when_read_again(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf8"))
    assert data["rows"]
    assert data["claims"]
    assert {"cpu", "versions"} <= data["environment"].keys()
    for claim in data["claims"]:
        assert claim["holds"] == RELATIONS[claim["relation"]](claim["value"], claim["bound"]), claim["what"]
