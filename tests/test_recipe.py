"""Recipes are read strictly: every mistake is named with its path and the nearest valid name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from pared.errors import RecipeError, SettingError, UsageError
from pared.quantize.static import QuantizeStatic
from pared.recipe import AROUND, STEPS, Budget, Factory, Recipe, Repeat, TimingSettings, step_class, unrolled
from pared.recipe_schema import json_schema, option_table
from pared.step import settings
from pared.train.step import Train

PLAIN = {"model": "fashion_cnn", "task": "fashion_mnist", "steps": [{"Train": {"epochs": 4}}, "QuantizeStatic"]}
SCHEMA = Path(__file__).parents[1] / "docs" / "recipe.schema.json"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf8")
    return path


def test_recipe_takes_defaults_when_only_the_required_entries_are_given() -> None:
    recipe = Recipe.from_json(PLAIN)
    assert (recipe.model, recipe.task, recipe.target, recipe.seed) == ("fashion_cnn", "fashion_mnist", "onnxruntime", 0)
    assert recipe.budget == Budget(max_drop=None, allow_slower=False, allow_larger=False)
    assert [type(step).__name__ for step in recipe.steps] == ["Train", "QuantizeStatic"]
    assert recipe.steps[0].epochs == 4


def test_recipe_survives_json_when_every_entry_is_set() -> None:
    given = {
        "model": {"factory": "nets.py:make", "arguments": {"width": 8, "names": ["a", None, 0.5]}},
        "weights": "weights.safetensors",
        "task": {"factory": "package.tasks:make", "arguments": {"limit": 10}},
        "data": "full",
        "target": "other",
        "seed": 7,
        "budget": {"max_drop": 0.01, "allow_slower": True, "allow_larger": True},
        "timing": {"batch_size": 2, "threads": 1, "rounds": 20},
        "steps": ["QuantizeStatic", {"Train": {"epochs": 2, "lr": 0.5, "optimizer": {"kind": "adamw"}}}],
    }
    recipe = Recipe.from_json(given)
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert {name: again.to_json()[name] for name in given if name != "steps"} == {
        name: value for name, value in given.items() if name != "steps"
    }
    assert again.to_json()["steps"][1]["Train"]["optimizer"]["kind"] == "adamw"


def test_recipe_is_the_same_when_made_in_python_or_read(tmp_path: Path) -> None:
    text = "model: {factory: nets.py:make}\ntask: fashion_mnist\nsteps: [QuantizeStatic]\ntiming: {threads: 2}\n"
    made = Recipe(
        model=Factory(factory="nets.py:make"),
        task="fashion_mnist",
        steps=[step_class("QuantizeStatic")()],
        timing=TimingSettings(threads=2),
    )
    assert Recipe.read(write(tmp_path, text)) == made
    assert Recipe.read(write(tmp_path, json.dumps(made.to_json()), "recipe.json")) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": 1}, "modle: unknown key; did you mean 'model'?"),
        ({"model": 3}, "model: should be a name or a mapping with factory and arguments, found 3"),
        ({"model": {"factory": "x", "argument": {}}}, "model.argument: unknown key; did you mean 'arguments'?"),
        ({"model": {"factory": "x", "arguments": 3}}, "model.arguments: should be a mapping, found 3"),
        ({"model": {"arguments": {}}}, "model.factory is missing"),
        ({"budget": {"max_dorp": 1}}, "budget.max_dorp: unknown key; did you mean 'max_drop'?"),
        ({"budget": {"max_drop": "0.1"}}, "budget.max_drop: should be a valid number, found '0.1'"),
        ({"budget": {"max_drop": -1}}, "budget.max_drop: should be greater than or equal to 0, found -1"),
        ({"timing": {"threads": 1.5}}, "timing.threads: should be a valid integer"),
        ({"data": "ful"}, "data: should be 'embedded' or 'full', found 'ful'"),
        ({"seed": True}, "seed: should be a valid integer, found True"),
        ({"steps": []}, "steps: name at least one"),
        ({"steps": "Train"}, "steps: should be a valid list, found 'Train'"),
        ({"steps": None}, "steps: should be a valid list, found None"),
        ({"steps": ["Trian"]}, "steps[0]: no step 'Trian'; did you mean 'Train'?"),
        ({"steps": ["Distill"]}, "steps[0]: Distill runs while training; write Train: {during: [Distill]}"),
        (
            {"steps": [{"Train": {"during": ["QuantizeStatic"]}}]},
            "steps[0].Train.during[0]: QuantizeStatic is a step of its own; move it out of `during`",
        ),
        ({"steps": [3]}, "steps[0]: a step is one name, or one name with its settings, found 3"),
        ({"steps": [{"Train": {}, "QuantizeStatic": {}}]}, "found Train and QuantizeStatic"),
        ({"steps": [{"Train": 3}]}, "steps[0].Train: should be a mapping, found 3"),
        ({"steps": [{"Train": {"epochs": "4"}}]}, "steps[0].Train.epochs: should be a valid integer, found '4'"),
        ({"steps": [{"Train": {"epochs": 0}}]}, "steps[0].Train.epochs: should be greater than or equal to 1, found 0"),
        (
            {"steps": ["Train", {"QuantizeStatic": {"rangez": "minmax"}}]},
            "steps[1].QuantizeStatic.rangez: unknown key; did you mean 'ranges'?",
        ),
        (
            {"steps": [{"QuantizeStatic": {"ranges": {"kind": "percentil"}}}]},
            "steps[0].QuantizeStatic.ranges: no 'percentil'; did you mean 'percentile'?",
        ),
        (
            {"steps": [{"Train": {"optimizer": {"kind": "sgd", "momentun": 0.9}}}]},
            "steps[0].Train.optimizer.momentun: unknown key; did you mean 'momentum'?",
        ),
        ({"steps": [{"Train": {"optimizer": {"momentum": 0.9}}}]}, "steps[0].Train.optimizer: its 'kind' is missing"),
        (
            {"steps": [{"Train": {"optimizer": {"kind": "sgd", "nesterov": True, "momentum": 0}}}]},
            "steps[0].Train.optimizer: nesterov needs a momentum above 0",
        ),
        (
            {"steps": [{"QuantizeStatic": {"include": [1]}}]},
            "steps[0].QuantizeStatic.include[0]: should be a valid string",
        ),
        ({"seed": {1, 2}}, "not plain data"),
    ],
)
def test_recipe_names_the_entry_when_it_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_json(PLAIN | change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipe_names_every_missing_entry_when_it_is_empty() -> None:
    with pytest.raises(RecipeError, match="model is missing; task is missing; steps is missing"):
        Recipe.from_json({})


def test_recipe_says_what_a_recipe_is_when_the_file_holds_a_list(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml: a recipe is a mapping with model, task and steps, found list"
    ):
        Recipe.read(write(tmp_path, "[1, 2]"))


def test_recipe_is_refused_and_nothing_runs_when_it_holds_a_python_tag(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path, f"model: !!python/object/apply:os.mkdir ['{mark}']\ntask: x\nsteps: [Train]\n")
    with pytest.raises(RecipeError, match="plain data only"):
        Recipe.read(path)
    assert not mark.exists()


def test_recipe_is_refused_when_the_file_is_missing_a_folder_or_no_text(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecipeError, match="no recipe at"):
            Recipe.read(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not text"):
        Recipe.read(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("change", "where", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("budget.max_drop=1e-2", ("budget", "max_drop"), 0.01),
        ("model=other.py:make", ("model",), "other.py:make"),
        ("model.arguments.width=3", ("model",), {"factory": "fashion_cnn", "arguments": {"width": 3}}),
        ("steps.0.Train.lr=0.5", ("steps", 0, "Train", "lr"), 0.5),
        ("steps.1.QuantizeStatic.exclude=[head, 'a=b']", ("steps", 1, "QuantizeStatic", "exclude"), ["head", "a=b"]),
        ("steps.1.QuantizeStatic.ranges=percentile", ("steps", 1, "QuantizeStatic", "ranges", "kind"), "percentile"),
        ("steps.0=QuantizeStatic", ("steps", 0, "QuantizeStatic", "include"), ["*"]),
    ],
)
def test_set_changes_one_entry_when_the_path_exists(
    tmp_path: Path, change: str, where: tuple[str | int, ...], value: Any
) -> None:
    found: Any = Recipe.read(write(tmp_path, json.dumps(PLAIN)), [change]).to_json()
    for part in where:
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "--set seed: write path=value"),
        ("=3", "--set =3: write path=value"),
        ("sede=3", "sede: unknown key; did you mean 'seed'?"),
        ("seed.x=3", "seed: should be a valid integer"),
        ("steps.2.Train.lr=1", "'2' is no index of a list of 2"),
        ("steps.Train.lr=1", "'Train' is no index of a list of 2"),
        ("steps.0.Train.lrs=1", "steps[0].Train.lrs: unknown key; did you mean 'lr'?"),
        ("steps.1.Train.lr=1", "steps[1]: a step is one name"),
        ("steps.0.Train.epochs.x=1", "epochs is 4, which has no parts"),
        ("seed=!!python/name:os.system ''", "is not read"),
    ],
)
def test_set_is_refused_when_the_path_is_wrong(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.read(write(tmp_path, json.dumps(PLAIN)), [change])
    assert message in str(caught.value)


def test_set_reaches_a_technique_when_the_recipe_has_its_name_alone(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(PLAIN | {"steps": [{"Train": {"during": ["Distill"]}}]}))
    found: Any = Recipe.read(path, ["steps.0.Train.during.0.Distill.alpha=0.5"]).steps[0]
    assert found.during[0].alpha == 0.5


@settings
class Shrink:
    """A step that can do a part of what it is to do."""

    ratio: float = pydantic.Field(default=0.5, description="How much.")

    def at(self, fraction: float) -> Shrink:
        return dataclasses.replace(self, ratio=self.ratio * fraction)


REPEATED = PLAIN | {"steps": [{"Repeat": {"times": 2, "steps": [{"Shrink": {"ratio": 0.5}}, "Train"]}}, "Train"]}


@pytest.fixture
def shrinkable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.recipe.STEPS", {**STEPS, "Shrink": f"{__name__}:Shrink"})


@pytest.mark.usefixtures("shrinkable")
def test_repeat_is_kept_as_written_when_a_recipe_is_read_and_written() -> None:
    recipe = Recipe.from_json(REPEATED)
    assert recipe.steps == (Repeat(2, [Shrink(ratio=0.5), Train()]), Train())
    written = recipe.to_json()
    assert [*written["steps"][0]] == ["Repeat"]
    assert written["steps"][0]["Repeat"]["times"] == 2
    assert written["steps"][0]["Repeat"]["steps"][0] == {"Shrink": {"ratio": 0.5}}
    assert Recipe.from_json(json.loads(json.dumps(written))) == recipe


@pytest.mark.usefixtures("shrinkable")
def test_a_setting_inside_repeat_is_reached_by_its_path(tmp_path: Path) -> None:
    changes = ["steps.0.Repeat.times=3", "steps.0.Repeat.steps.0.Shrink.ratio=0.25"]
    changes += ["steps.0.Repeat.steps.1.Train.epochs=1"]
    recipe = Recipe.read(write(tmp_path, json.dumps(REPEATED)), changes)
    assert recipe.steps[0] == Repeat(3, [Shrink(ratio=0.25), Train(epochs=1)])


def test_rounds_are_written_out_with_rising_fractions_when_a_step_has_them() -> None:
    steps = [Train(epochs=4), Repeat(4, [Shrink(ratio=0.5), Train(epochs=1)]), QuantizeStatic()]
    flat = unrolled(steps)
    assert [type(step).__name__ for step in flat] == ["Train", *["Shrink", "Train"] * 4, "QuantizeStatic"]
    assert [step.ratio for step in flat if isinstance(step, Shrink)] == [0.125, 0.25, 0.375, 0.5]
    assert flat[2] == flat[8] == Train(epochs=1)
    assert unrolled([Repeat(1, [Shrink(ratio=0.3)])]) == [Shrink(ratio=0.3)]
    assert unrolled(flat) == flat


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Repeat", "steps[0].Repeat.times is missing"),
        ({"times": 2}, "steps[0].Repeat.steps is missing"),
        ({"times": 0, "steps": ["Train"]}, "steps[0].Repeat.times: should be greater than or equal to 1, found 0"),
        ({"times": "two", "steps": ["Train"]}, "steps[0].Repeat.times: should be a valid integer, found 'two'"),
        ({"times": 2, "steps": []}, "steps[0].Repeat.steps: name at least one"),
        ({"times": 2, "steps": "Train"}, "steps[0].Repeat.steps: should be a valid list, found 'Train'"),
        ({"time": 2, "steps": ["Train"]}, "steps[0].Repeat.time: unknown key; did you mean 'times'?"),
        ({"times": 2, "steps": ["Trian"]}, "steps[0].Repeat.steps[0]: no step 'Trian'; did you mean 'Train'?"),
        (
            {"times": 2, "steps": [{"Train": {"epoch": 1}}]},
            "steps[0].Repeat.steps[0].Train.epoch: unknown key; did you mean 'epochs'?",
        ),
        ({"times": 2, "steps": ["Distill"]}, "steps[0].Repeat.steps[0]: Distill runs while training"),
        (
            {"times": 2, "steps": [{"Repeat": {"times": 2, "steps": ["Train"]}}]},
            "steps[0].Repeat.steps[0]: Repeat holds steps, and stands among the recipe's own",
        ),
    ],
)
def test_repeat_is_refused_with_the_path_when_it_is_wrong(entry: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_json(PLAIN | {"steps": [{"Repeat": entry} if isinstance(entry, dict) else entry]})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("times", "steps", "message"),
    [
        (0, [Train()], "Repeat.times: give how many rounds, 1 or more, found 0"),
        (True, [Train()], "Repeat.times: give how many"),
        (1.5, [Train()], "found 1.5"),
        (2, [], "Repeat.steps: give a list of at least one step"),
        (2, Train(), "Repeat.steps: give a list"),
        (2, [Repeat(2, [Train()])], "a Repeat in a Repeat; write its steps out"),
    ],
)
def test_repeat_is_refused_in_python_when_it_is_wrong(times: Any, steps: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        Repeat(times, steps)


def test_steps_name_their_own_classes() -> None:
    assert all(step_class(name).__name__ == name for name in (*STEPS, *AROUND))
    with pytest.raises(UsageError, match="did you mean 'Train'"):
        step_class("Trains")


def test_schema_in_the_docs_is_current() -> None:
    # After a change of settings: python scripts/write_recipe_schema.py
    assert json.loads(SCHEMA.read_text(encoding="utf8")) == json_schema()


def test_schema_offers_every_setting_with_a_description() -> None:
    schema = json_schema()
    offered = {name for item in schema["properties"]["steps"]["items"]["anyOf"] for name in item.get("properties", {})}
    assert offered == {*STEPS, *AROUND}
    inside = schema["$defs"]["Repeat"]["properties"]["steps"]["items"]["anyOf"]
    assert {name for item in inside for name in item.get("properties", {})} == set(STEPS) == set(inside[0]["enum"])
    assert schema["$defs"]["Repeat"]["additionalProperties"] is False
    for kind in (Recipe, Budget, TimingSettings, Factory, *map(step_class, (*STEPS, *AROUND))):
        properties = schema["properties"] if kind is Recipe else schema["$defs"][kind.__name__]["properties"]
        assert list(properties) == [field.name for field in dataclasses.fields(kind)]
        assert [name for name, node in properties.items() if not node.get("description")] == []


def test_option_table_shows_type_default_and_bounds() -> None:
    @pydantic.dataclasses.dataclass
    class Sample:
        width: int = pydantic.Field(description="How wide.", ge=1, lt=9)
        names: tuple[str, ...] = pydantic.Field(default=("*",), description="Which.")
        rate: float | None = pydantic.Field(default=None, description="How fast.", gt=0)

    rows = [dataclasses.astuple(row) for row in option_table(Sample)]
    assert rows == [
        ("width", "int >= 1 < 9", "", "How wide."),
        ("names", "list of text", '["*"]', "Which."),
        ("rate", "float > 0 | null", "null", "How fast."),
    ]
