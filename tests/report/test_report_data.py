"""The report's schema."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from pared.errors import ArtifactError
from pared.report.data import Report


def test_report_is_the_same_when_it_went_through_json(sample: Report) -> None:
    assert Report.from_json(json.loads(json.dumps(sample.to_json(), allow_nan=False))) == sample


def test_report_reads_back_as_nan_when_a_metric_was_not_finite(sample: Report) -> None:
    broken = dataclasses.replace(sample.stages[1], metrics={"mse": math.inf})
    data = json.loads(json.dumps(dataclasses.replace(sample, stages=(broken,)).to_json(), allow_nan=False))
    assert data["stages"][0]["metrics"] == {"mse": None}
    assert math.isnan(Report.from_json(data).stages[0].metrics["mse"])


def test_read_names_the_entry_when_the_file_is_damaged(sample: Report, tmp_path: Path) -> None:
    data = sample.to_json()
    del data["stages"][1]["block"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"stages\.1\.block"):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        Report.read(tmp_path)
    with pytest.raises(ArtifactError, match="no report at"):
        Report.read(tmp_path / "elsewhere")


def test_report_is_refused_when_its_schema_is_of_another_version(sample: Report) -> None:
    with pytest.raises(ArtifactError, match="schema version 2"):
        Report.from_json(sample.to_json() | {"schema_version": 2})
