"""Live objects from what a recipe names: callables, models, tasks and weights. Reads no code from weight files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import pickle
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pared.errors import ArtifactError, ModelError, RecipeError, nearest
from pared.recipe import Factory
from pared.task import Task

SAFE_WAY = 'save the weights with safetensors.torch.save_file(model.state_dict(), "weights.safetensors")'
# Where checkpoints keep the tensors, and what wrappers put before every name.
ENTRIES = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 5
# What torch's reader raises for files with wrong bytes in them, found by trying thousands.
DAMAGED = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)


def load_callable(spec: str, folder: Path | None = None) -> Any:
    """What `package.module:name` or `file.py:name` names.

    The folder of the recipe, and that of the file, are on `sys.path` while the module is imported, and no longer.

    Args:
        spec: The name.
        folder: Where relative files are, and modules beside the recipe; the current folder by default.

    Raises:
        RecipeError: The name is of another form, or its file, module or attribute does not exist.
    """
    folder = Path.cwd() if folder is None else folder.resolve()
    source, colon, attribute = spec.rpartition(":")
    if not colon or not source or not attribute:
        raise RecipeError(f"{spec!r} names no callable; write package.module:callable or file.py:callable")
    if source.endswith(".py"):
        module = import_file(folder / source)
    else:
        with importing_from(folder):
            module = import_module(source, folder)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            valid = [name for name in vars(found) if not name.startswith("_")]
            raise RecipeError(f"{source} has no {attribute!r}; {nearest(part, valid)}")
        found = getattr(found, part)
    return found


def import_module(name: str, folder: Path) -> ModuleType:
    """A module by its dotted name. Raises: RecipeError where there is none; what the module itself raises goes on."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that exists and misses one of its own imports is the caller's error, with its own message.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise RecipeError(f"no module {name!r}; looked in {folder} and among the installed packages") from None
    except (ValueError, TypeError):
        raise RecipeError(f"{name!r} is no module name; write package.module:callable or file.py:callable") from None


def import_file(path: Path) -> ModuleType:
    """A module from a file, under a name made of its path and content. Raises: RecipeError where there is none.

    The same content is imported once, so that a model and a task out of one file share their classes.
    """
    path = path.resolve()
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"no file {path}; relative paths start at the recipe's folder") from None
    name = f"_pared_{path.stem}_{hashlib.sha256(str(path).encode() + content).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    done = False
    try:
        with importing_from(path.parent):
            spec.loader.exec_module(module)
        done = True
    finally:
        if not done:
            del sys.modules[name]
    return module


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Put a folder first on `sys.path`, as Python does for a script, for a while."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def load_model(
    spec: str | Factory,
    *,
    weights: str | Path | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model that a zoo name or a callable makes, with its weights.

    Args:
        spec: A name, or a name with arguments. An attribute that is a module already is taken as it is.
        weights: File of weights, relative to `folder`; None leaves what the callable made.
        folder: The recipe's folder; the current one by default.
        seed: Seeds the initial weights; the caller's random state is left as it was.

    Raises:
        RecipeError: The name, or an argument, does not exist.
        ModelError: The callable returned no module, or the weights do not fit it.
    """
    from pared.zoo import MODELS

    named = spec if isinstance(spec, Factory) else Factory(factory=spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = resolve(named, MODELS, "model", folder)  # a file may make its model while it is imported,
        torch.manual_seed(seed)  # and what importing drew must not move the weights of one that does not
        model = found if isinstance(found, nn.Module) else call(found, named, "model", folder)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {named.factory} gave a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        load_weights(model, (folder or Path()) / weights)
    return model


def load_task(spec: str | Factory, *, full: bool = False, folder: Path | None = None) -> Task:
    """The task that an embedded name or a callable makes.

    Args:
        spec: A name, or a name with arguments. An attribute that is a Task already is taken as it is.
        full: The full data of an embedded task.
        folder: The recipe's folder; the current one by default.

    Raises:
        RecipeError: The name, or an argument, does not exist; or `full` with a task that is not embedded.
    """
    from pared.data.tasks import TASKS

    named = spec if isinstance(spec, Factory) else Factory(factory=spec)
    if full and named.factory not in TASKS:
        raise RecipeError(f"data: full data belongs to embedded tasks ({', '.join(TASKS)}), not to {named.factory}")
    if full:
        named = Factory(factory=named.factory, arguments={**named.arguments, "full": True})
    found = resolve(named, TASKS, "task", folder)
    task = found if isinstance(found, Task) else call(found, named, "task", folder)
    if not isinstance(task, Task):
        raise RecipeError(f"task: {named.factory} gave a {type(task).__name__}, not a pared.Task")
    return task


def resolve(named: Factory, table: Mapping[str, Any], entry: str, folder: Path | None) -> Any:
    """What a name stands for: a row of the table, or else a callable by its name."""
    if named.factory in table:
        return table[named.factory]
    if ":" not in named.factory:
        known = nearest(named.factory, table)
        raise RecipeError(
            f"{entry}: no {entry} {named.factory!r}; {known}; or write module:callable or file.py:callable"
        )
    return load_callable(named.factory, folder)


def call(function: Callable[..., Any], named: Factory, entry: str, folder: Path | None) -> Any:
    """Call with the recipe's arguments. Raises: RecipeError where the function does not take them."""
    if not callable(function):
        raise RecipeError(f"{entry}: {named.factory} is a {type(function).__name__}, which cannot be called")
    with contextlib.suppress(ValueError):  # some built-in callables have no signature to check against
        signature = inspect.signature(function)
        try:
            signature.bind(**named.arguments)
        except TypeError as error:
            raise RecipeError(f"{entry}.arguments: {named.factory}{signature}: {error}") from None
    with importing_from(Path.cwd() if folder is None else folder.resolve()):  # for imports inside the function
        return function(**named.arguments)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in a file into a model; on any error the model is as it was.

    Args:
        model: Changed in place.
        path: A safetensors file, or a checkpoint that loads with `weights_only=True`: a state dict, or a dict with
            one under "state_dict", "model_state_dict" or "model". Prefixes of wrappers ("module.") are taken off.

    Raises:
        ArtifactError: The file is missing, damaged or carries code.
        ModelError: Names or shapes differ from the model's, or a tensor holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"no weights at {path}; give a safetensors file or a checkpoint")
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    check_fit(model, state, path)
    check_finite(state, str(path))
    model.load_state_dict(state, strict=False)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises: ArtifactError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file ({error}); {SAFE_WAY}") from None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint. Raises: ArtifactError where it carries code, is damaged or holds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols; what cannot be read raises
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"{path} carries code or is no checkpoint, and is not loaded; where you trust it, {SAFE_WAY}"
        ) from None
    except DAMAGED as error:
        raise ArtifactError(f"{path} is damaged or no checkpoint ({first_line(error)}); {SAFE_WAY}") from None
    for entry in ENTRIES:
        if isinstance(data, Mapping) and isinstance(data.get(entry), Mapping):
            data = data[entry]
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        raise ArtifactError(f"{path} holds no state dict (names and tensors); {SAFE_WAY}")
    return dict(data)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `ModelError` unless the tensors have the model's names, shapes and kinds."""
    own = model.state_dict(keep_vars=True)
    # Files of tied weights hold one of the names only; batch norms of old checkpoints do not count their batches.
    given = {id(own[name]) for name in state if name in own}
    optional = {name for name in own if id(own[name]) in given or name.endswith("num_batches_tracked")}
    lines = {
        "missing": [name for name in own if name not in state and name not in optional],
        "unexpected": [name for name in state if name not in own],
        "of another shape or kind": [
            f"{name} {described(state[name])} where the model has {described(own[name])}"
            for name in own
            if name in state and described(state[name]) != described(own[name])
        ],
    }
    wrong = [f"{what}: {some(names)}" for what, names in lines.items() if names]
    if wrong:
        raise ModelError(f"{path} does not fit the model; {'; '.join(wrong)}")


def described(tensor: Tensor) -> str:
    """A tensor's shape and whether it holds real numbers or integers."""
    return f"{'float' if tensor.is_floating_point() else 'integer'}{list(tensor.shape)}"


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise `ModelError` naming the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{where}: {name} holds NaN or infinity; use a checkpoint from before training diverged")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
