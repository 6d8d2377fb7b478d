"""What a live object is, as text for a fingerprint: the source of callables and classes, and the values they hold.

Two objects with the same text behave alike, as far as can be told without running them. Data sets are
fingerprinted by their content, in `Task.id`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Their versions stand in every key already, and their sources are long.
VERSIONED = ("torch", "pared", "numpy", "builtins", "torchmetrics")
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# How far to follow references: submodules nest deeply, but a few objects on from a callable lies all of the program.
REACH = 100
OBJECT, FUNCTION = 25, 10


def identity(item: Any) -> str:
    """A digest of what an object is.

    Functions and classes count by their source, with the functions, classes and constants of the same module that they
    name; closures, defaults, bound arguments, attributes and tensors count by value.

    Example:
        >>> identity(torch.ones(2)) == identity(torch.ones(2)) != identity(torch.zeros(2))
        True
        >>> identity(functools.partial(max, 1)) == identity(functools.partial(max, 2))
        False
    """
    digest = hashlib.sha256()
    for part in parts(item, {}, REACH):
        digest.update(part.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def parts(item: Any, seen: dict[int, Any], reach: int) -> Iterator[str]:
    """The pieces of text that make up an object."""
    if isinstance(item, PLAIN):
        yield repr(item)
        return
    if id(item) in seen or reach < 0:
        return
    seen[id(item)] = item  # kept alive, so that no later object gets its id
    inner: list[Any] = []
    cost = 1
    if isinstance(item, (Tensor, np.ndarray)):
        yield content(item)
    elif isinstance(item, Mapping):
        yield "mapping"
        inner = [part for pair in item.items() for part in pair]
    elif isinstance(item, (list, tuple)):
        yield "sequence"
        inner = list(item)
    elif isinstance(item, (set, frozenset)):
        yield repr(sorted(map(repr, item)))
    elif isinstance(item, functools.partial):
        inner = [item.func, item.args, item.keywords]
    elif isinstance(item, types.MethodType):
        inner = [item.__func__, item.__self__]
    elif inspect.isfunction(item):
        yield source(item)
        inner, cost = [*held(item), *named(item)], FUNCTION
    elif inspect.isclass(item):
        yield source(item)
        methods = [value for value in vars(item).values() if inspect.isfunction(value)]
        inner, cost = [part for method in methods for part in named(method)], FUNCTION
    elif isinstance(item, (types.ModuleType, types.BuiltinFunctionType)):
        yield item.__name__
    else:
        inner, cost = [type(item), values_of(item)], 1 if isinstance(item, nn.Module) else OBJECT
    for part in inner:
        yield from parts(part, seen, reach - cost)


def values_of(item: Any) -> dict[str, Any]:
    """The attributes of an instance; of a module also its tensors and submodules, but not what PyTorch adds to it."""
    own = getattr(item, "__dict__", {})
    if not isinstance(item, nn.Module):
        return dict(own)
    known = vars(nn.Module()).keys() - {"training"}
    return {
        **{name: value for name, value in own.items() if name not in known},
        **dict(item.named_parameters(recurse=False)),
        **dict(item.named_buffers(recurse=False)),
        **dict(item.named_children()),
    }


def held(function: types.FunctionType) -> list[Any]:
    """Values in a function's closure and defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if filled(cell)]
    return [*cells, function.__defaults__, function.__kwdefaults__]


def filled(cell: types.CellType) -> bool:
    """False for a variable that has no value yet, such as a function that is still being defined."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def named(function: types.FunctionType) -> list[Any]:
    """Functions, classes and constants of the function's own module that its code names."""
    if versioned(function):
        return []
    values = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [
        value
        for value in values
        if isinstance(value, PLAIN) or getattr(value, "__module__", None) == function.__module__
    ]


def versioned(kind: Any) -> bool:
    """True for what comes from a package whose version is part of every key."""
    return str(kind.__module__).partition(".")[0] in VERSIONED


def source(kind: Any) -> str:
    """The source of a function or class; where there is none to read, its name and compiled code."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if versioned(kind):
        return name
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        functions = [kind] if inspect.isfunction(kind) else [f for f in vars(kind).values() if inspect.isfunction(f)]
        return name + "".join(compiled(function.__code__) for function in functions)


def compiled(code: types.CodeType) -> str:
    """The instructions, names and constants of compiled code."""
    constants = [compiled(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts]
    return f"{code.co_code.hex()}{code.co_names}{constants}"


def content(array: Tensor | np.ndarray) -> str:
    """Type, shape and a digest of the values."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) and array.dtype.kind in "biufc" else array
    if isinstance(tensor, np.ndarray):
        return f"{tensor.dtype}{tensor.shape}{hashlib.sha256(repr(tensor.tolist()).encode()).hexdigest()}"
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha256(flat.data).hexdigest()}"
