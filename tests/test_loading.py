"""What a recipe names is found, called and filled with weights; no file of weights can run code."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pared.errors import ArtifactError, ModelError, RecipeError
from pared.loading import load_callable, load_model, load_task, load_weights
from pared.recipe import Factory

NETS = """
import torch
from torch import nn
import sibling_of_nets
import pared

def make(width=4):
    from second_sibling import DEPTH
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(DEPTH)])

class Holder:
    ready = nn.Linear(sibling_of_nets.WIDTH, 2)

task = pared.task.Task(example_inputs=torch.ones(2, 4))

def make_task(size=2):
    return pared.task.Task(example_inputs=torch.ones(size, 4))

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS.replace("import pared\n", "import pared.task\n"), encoding="utf8")
    (tmp_path / "sibling_of_nets.py").write_text("WIDTH = 5\n", encoding="utf8")
    (tmp_path / "second_sibling.py").write_text("DEPTH = 2\n", encoding="utf8")
    return tmp_path


@pytest.fixture(autouse=True)
def same_modules() -> Any:
    """Forget what a test imported."""
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        if name.startswith(("_pared_", "sibling_", "second_", "beside_")):
            del sys.modules[name]


def test_load_callable_finds_an_attribute_when_named_by_module() -> None:
    assert load_callable("collections.abc:Mapping.get") is __import__("collections").abc.Mapping.get


def test_load_callable_finds_a_module_beside_the_recipe(folder: Path) -> None:
    (folder / "beside_recipe.py").write_text("def make():\n    return 7\n", encoding="utf8")
    assert load_callable("beside_recipe:make", folder)() == 7


def test_load_callable_imports_a_file_once_and_under_a_name_of_its_own(folder: Path) -> None:
    first = load_callable("nets.py:make", folder)
    assert load_callable("nets.py:make", folder) is first
    assert first.__module__.startswith("_pared_nets_")
    assert "nets" not in sys.modules


def test_load_callable_reads_a_file_again_when_its_content_changed(folder: Path) -> None:
    first = load_callable("nets.py:number", folder)
    (folder / "nets.py").write_text("def number():\n    return 4\n", encoding="utf8")
    assert (first(), load_callable("nets.py:number", folder)()) == (3, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nets.py", "names no callable; write package.module:callable"),
        ("nets.py:", "names no callable"),
        (":make", "names no callable"),
        ("net.py:make", "no file .*net.py; relative paths start at the recipe's folder"),
        ("nets.py:mkae", "nets.py has no 'mkae'; did you mean 'make'?"),
        ("nets.py:Holder.redy", "did you mean 'ready'?"),
        ("no_such_package.module:make", "no module 'no_such_package.module'"),
        ("collections.no_such:make", "no module 'collections.no_such'"),
        ("..:make", "is no module name"),
    ],
)
def test_load_callable_says_what_is_missing_when_the_name_is_wrong(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_callable(spec, folder)


def test_load_callable_keeps_the_own_error_of_a_module_that_cannot_be_imported(folder: Path) -> None:
    (folder / "beside_broken.py").write_text("import no_such_dependency\n", encoding="utf8")
    for spec in ("beside_broken:make", "beside_broken.py:make"):
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            load_callable(spec, folder)
    assert not [name for name in sys.modules if name.startswith("_pared_beside_broken")]


def test_load_model_calls_with_arguments_when_they_fit(folder: Path) -> None:
    model = load_model(Factory(factory="nets.py:make", arguments={"width": 3}), folder=folder)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(3, 3), (3,), (3, 3), (3,)]


def test_load_model_takes_a_module_as_it_is(folder: Path) -> None:
    model = load_model("nets.py:Holder.ready", folder=folder)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 5


def test_load_model_depends_on_the_seed_only_and_leaves_the_random_state(folder: Path) -> None:
    before = torch.get_rng_state()
    first, same, other = (load_model("nets.py:make", folder=folder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0].weight, same[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_load_model_says_what_is_wrong_when_it_makes_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"gave a int, not a torch.nn.Module"):
        load_model("nets.py:number", folder=folder)
    with pytest.raises(RecipeError, match=r"model.arguments: nets.py:make\(width=4\): .*unexpected.*'widht'"):
        load_model(Factory(factory="nets.py:make", arguments={"widht": 3}), folder=folder)
    with pytest.raises(RecipeError, match="is a int, which cannot be called"):
        load_model("second_sibling:DEPTH", folder=folder)
    with pytest.raises(
        RecipeError, match=r"no model 'fashion_cn'; did you mean 'fashion_cnn'.*or write module:callable"
    ):
        load_model("fashion_cn")


def test_load_task_makes_or_takes_a_task(folder: Path) -> None:
    assert load_task("nets.py:task", folder=folder).example_inputs.size == 2
    made = load_task(Factory(factory="nets.py:make_task", arguments={"size": 3}), folder=folder)
    assert made.example_inputs.size == 3


def test_load_task_says_what_is_wrong_when_it_makes_no_task(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"gave a int, not a pared.Task"):
        load_task("nets.py:number", folder=folder)
    with pytest.raises(RecipeError, match="full data belongs to embedded tasks"):
        load_task("nets.py:task", full=True, folder=folder)
    with pytest.raises(RecipeError, match="no task 'fashion_mnits'; did you mean 'fashion_mnist'"):
        load_task("fashion_mnits")


class Net(nn.Module):
    """A batch norm and two weights that are tied."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight


def other_state() -> dict[str, Tensor]:
    """Weights unlike those of a fresh `Net`."""
    return {name: torch.full_like(value, 2) for name, value in Net().state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


SAVED: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "safetensors": ("w.safetensors", lambda state, path: save_file(separate(state), path)),
    "safetensors without the tied name": (
        "w.safetensors",
        lambda state, path: save_file({k: v for k, v in separate(state).items() if k != "last.weight"}, path),
    ),
    "state dict": ("w.pt", torch.save),
    "state dict, old format": ("w.pth", lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=False)),
    "under state_dict": ("w.ckpt", lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path)),
    "under model": ("w.tar", lambda state, path: torch.save({"model": state, "optimizer": {}}, path)),
    "of a wrapper": ("w.pt", lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path)),
    "of two wrappers": (
        "w.pt",
        lambda state, path: torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, path),
    ),
}


@pytest.mark.parametrize("form", SAVED)
def test_load_weights_copies_every_tensor(tmp_path: Path, form: str) -> None:
    name, save = SAVED[form]
    save(other_state(), tmp_path / name)
    model = Net()
    assert not same(model, other_state())
    load_weights(model, tmp_path / name)
    assert same(model, other_state())
    assert model.last.weight is model.first.weight


def test_load_weights_takes_old_batch_norms_that_did_not_count(tmp_path: Path) -> None:
    state = other_state()
    del state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pt")
    model = Net()
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.norm.running_mean, state["norm.running_mean"])


def changed(**change: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = other_state() | {name.replace("__", "."): value for name, value in change.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(norm__weight=None), "missing: norm.weight$"),
        (changed(extra=torch.ones(1)), "unexpected: extra$"),
        (changed(norm__bias=torch.ones(4)), r"norm.bias float\[4\] where the model has float\[3\]"),
        (changed(norm__bias=torch.ones(3, dtype=torch.int8)), r"norm.bias integer\[3\] where the model has float\[3\]"),
        (changed(norm__bias=torch.tensor([0.0, torch.nan, 0.0])), "norm.bias holds NaN or infinity"),
        (changed(norm__bias=torch.tensor([0.0, torch.inf, 0.0])), "norm.bias holds NaN or infinity"),
        ({f"x{i}": torch.ones(1) for i in range(9)}, "unexpected: x0, x1, x2, x3, x4 and 4 more"),
    ],
)
def test_load_weights_leaves_the_model_when_a_tensor_is_wrong(
    tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    torch.save(state, tmp_path / "w.pt")
    model = Net()
    before = separate(model.state_dict())
    with pytest.raises(ModelError, match=message):
        load_weights(model, tmp_path / "w.pt")
    assert same(model, before)


class Payload:
    """Pickles into a call that makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_load_weights_refuses_and_runs_nothing_when_a_checkpoint_carries_code(tmp_path: Path, as_zip: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "w.pt"
    torch.save({"state_dict": Net().state_dict(), "x": Payload(mark)}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ArtifactError, match=r"carries code .* safetensors.torch.save_file\(model.state_dict\(\)"):
        load_weights(Net(), path)
    assert not mark.exists()


def test_load_weights_refuses_when_the_file_is_a_whole_model_or_a_plain_pickle(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Path("x")}))
    for name in ("whole.pt", "plain.pt"):
        with pytest.raises(ArtifactError, match="carries code"):
            load_weights(Net(), tmp_path / name)


def test_load_weights_says_so_when_the_file_is_missing_damaged_or_holds_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no weights at"):
        load_weights(Net(), tmp_path / "absent.pt")
    torch.save(other_state(), tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:700])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for name in ("half.pt", "empty.pt", "half.safetensors"):
        with pytest.raises(ArtifactError, match=r"is damaged or no checkpoint|is no safetensors file"):
            load_weights(Net(), tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="holds no state dict"):
        load_weights(Net(), tmp_path / "other.pt")


def test_load_model_reads_weights_relative_to_the_recipe(folder: Path) -> None:
    state = {
        name: torch.ones_like(value) for name, value in load_model("nets.py:make", folder=folder).state_dict().items()
    }
    save_file(state, folder / "w.safetensors")
    model = load_model("nets.py:make", weights="w.safetensors", folder=folder)
    assert all(bool((value == 1).all()) for value in model.state_dict().values())
