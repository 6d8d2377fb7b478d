"""The only code that changes the structure of a module: it replays a closed set of edits, given as plain data.

Replaying is also how an artifact is reloaded: fresh model, the same edits, then its tensors. So after `apply_edits` the
names, shapes and dtypes of the state dict follow from the edits alone. Deciding what to edit is the techniques' work.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase

from pared.errors import ModelError, PlanError, nearest
from pared.step import Edit

Factory = Callable[..., nn.Module]
DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def apply_edits(model: nn.Module, edits: Iterable[Edit], factories: Mapping[str, Factory]) -> nn.Module:
    """A changed deep copy of a model; the model itself stays as it is.

    What each kind of edit does to the module that it names, and its detail:

    - slice `{"tensor", "dim", "keep"}`: a parameter or buffer keeps these indices of one dimension. Attributes that
      only repeat its shape (`in_channels`, `hidden_size`, ...) follow, as do the groups of a depthwise convolution.
    - replace `{"factory", "arguments"}`: the module becomes `factories[factory](module, **arguments)`.
    - set_attribute `{"name", "value"}`: an integer that the module's forward reads, or a list or tuple of integers,
      gets another value: as many of them as before.
    - cast `{"dtype"}`: its floating-point tensors, and those of its submodules, change dtype.
    - mask `{"tensor"}`: the zeros of a tensor are to stay zero from here on. Nothing changes here.

    A tensor or module that was shared before is shared after, wherever an edit reached it from. A new tensor takes its
    `requires_grad` from the old one; a new module its mode, and it is frozen where the old one was.

    Args:
        model: Any module that can be deep-copied.
        edits: In order. An edit names modules as the model has them by then.
        factories: Makers of replacement modules, by the name that edits use.

    Raises:
        ModelError: An edit does not fit this model, or the model cannot be copied.
        PlanError: An edit is malformed, or of a kind that is not surgery.

    Example:
        >>> edit = Edit("slice", "0", {"tensor": "weight", "dim": 0, "keep": [0, 2]})
        >>> apply_edits(nn.Sequential(nn.Linear(4, 3, bias=False)), [edit], {})
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=False)
        )
    """
    root = duplicate(model)
    # A factory may draw initial values; the caller's random numbers are not ours to use up.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for kind, run in itertools.groupby(edits, key=lambda edit: edit.kind):
            if kind == "slice":
                slice_tensors(root, run)
                continue
            for edit in run:
                root = one_edit(root, edit, factories)
    return root


def one_edit(root: nn.Module, edit: Edit, factories: Mapping[str, Factory]) -> nn.Module:
    """The root after an edit that is not a slice; another root where an edit replaces it."""
    if edit.kind == "replace":
        return replace(root, edit, factories)
    if edit.kind in KINDS:
        KINDS[edit.kind](root, edit)
        return root
    if edit.kind == "quantize":
        raise PlanError(unfit(edit, "quantizing makes an exported program; its own step applies it, last"))
    raise PlanError(unfit(edit, f"no such kind of edit; {nearest(edit.kind, [*KINDS, 'replace', 'slice'])}"))


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy of a model. Raises: ModelError where something in it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}); "
            "give it only leaf tensors and plain values as its attributes"
        ) from error


def slice_tensors(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Keep some indices of some dimensions of tensors, everywhere they are held."""
    new: dict[int, Tensor] = {}
    fewer: dict[int, Tensor] = {}  # those of which a part of dimension 0 goes, as they were
    for edit in edits:
        name, dim, keep = details(edit, tensor=str, dim=int, keep=(list, tuple))
        old = tensor(root, edit, name)
        new[id(old)] = kept_part(new.get(id(old), old), edit, name, dim, keep)
        if dim == 0:
            fewer[id(old)] = old
    # Depthwise is told by the old weight; and all modules are walked once, not once an edit.
    depthwises = [
        module
        for module in root.modules()
        if isinstance(module, _ConvNd) and id(module.weight) in fewer and depthwise(module, module.weight)
    ]
    holders = swap(root, new)
    for convolution in depthwises:
        convolution.groups = convolution.weight.shape[0]
    for module in holders:
        settle(module)


def kept_part(old: Tensor, edit: Edit, name: str, dim: int, keep: Sequence[int]) -> Tensor:
    """Some indices of one dimension of a tensor. Raises: PlanError, ModelError."""
    if not 0 <= dim < old.ndim:
        raise ModelError(unfit(edit, f"{name} has shape {tuple(old.shape)}, so no dimension {dim}"))
    width = old.shape[dim]
    whole = set(map(type, keep)) == {int}
    if not (whole and keep[0] >= 0 and all(map(operator.lt, keep, keep[1:]))):
        raise PlanError(unfit(edit, f"{name} must keep one index or more, rising, none twice; found {list(keep)[:8]}"))
    if keep[-1] >= width:
        raise ModelError(
            unfit(edit, f"{name} has {width} indices along dimension {dim}, the edit keeps {keep[-1]}; {OTHER_MODEL}")
        )
    return like(old, old.index_select(dim, torch.tensor(keep, device=old.device)))


def set_attribute(root: nn.Module, edit: Edit) -> None:
    """Give an integer of a module, or a list or tuple of them, another value."""
    name, value = details(edit, name=str, value=(int, list, tuple))
    module = submodule(root, edit)
    found = inspect.getattr_static(module, name, None)
    if not is_integers(found):
        known = [key for key, item in vars(module).items() if is_integers(item)]
        kind = f"it is a {type(found).__name__}, only integers can be set" if found is not None else "no such attribute"
        raise ModelError(unfit(edit, f"{type(module).__name__}.{name}: {kind}; {nearest(name, known)}"))
    if not is_integers(value):
        raise PlanError(unfit(edit, f"{name} takes integers, found {value!r}"))
    if np.shape(found) != np.shape(value):
        raise ModelError(unfit(edit, f"{name} is {found!r}, which cannot become {value!r}; {OTHER_MODEL}"))
    # JSON has lists alone; the attribute stays what it was.
    value = value if isinstance(found, int) else type(found)(value)
    if followers(module).get(name, value) != value:
        raise PlanError(unfit(edit, f"{name} follows the shape of the weight; slice that instead"))
    setattr(module, name, value)
    settle(module)


def is_integers(value: Any) -> bool:
    """True for an integer, and for a list or tuple of integers."""
    if type(value) in (list, tuple, torch.Size):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int


def cast(root: nn.Module, edit: Edit) -> None:
    """Change the dtype of a module's floating-point tensors, everywhere they are held."""
    (name,) = details(edit, dtype=str)
    if name not in DTYPES:
        raise PlanError(unfit(edit, f"no dtype {name!r} to cast to; {nearest(name, DTYPES)}"))
    held = [value for module in submodule(root, edit).modules() for value in tensors(module).values()]
    swap(root, {id(old): like(old, old.to(DTYPES[name])) for old in held if old.is_floating_point()})


def mask(root: nn.Module, edit: Edit) -> None:
    """Check that the masked tensor is there; its own zeros are the mask."""
    (name,) = details(edit, tensor=str)
    tensor(root, edit, name)


KINDS: Mapping[str, Callable[[nn.Module, Edit], None]] = {
    "set_attribute": set_attribute,
    "cast": cast,
    "mask": mask,
}


def replace(root: nn.Module, edit: Edit, factories: Mapping[str, Factory]) -> nn.Module:
    """The root with a module replaced under all its names; another root where that is the module."""
    name, arguments = details(edit, factory=str, arguments=Mapping)
    old = submodule(root, edit)
    if name not in factories:
        raise PlanError(unfit(edit, f"no factory {name!r}; {nearest(name, factories)}"))
    try:
        inspect.signature(factories[name]).bind(old, **arguments)
    except TypeError as error:
        raise PlanError(unfit(edit, f"factory {name!r} does not take these arguments: {error}")) from None
    new = factories[name](old, **arguments)
    if not isinstance(new, nn.Module):
        raise PlanError(unfit(edit, f"factory {name!r} made a {type(new).__name__}, not a module"))
    before = set(old.modules())
    for part in new.modules():
        if part not in before:
            part.training = old.training
    if any(True for _ in old.parameters()) and not any(p.requires_grad for p in old.parameters()):
        new.requires_grad_(False)
    aliases = [alias for alias, module in root.named_modules(remove_duplicate=False) if module is old]
    for alias in aliases:
        if alias:
            root.set_submodule(alias, new)
    return new if old is root else root


def swap(root: nn.Module, new: Mapping[int, Tensor]) -> list[nn.Module]:
    """Put new tensors in the place of old ones, found by `id`, in every module. Returns: the modules that held one."""
    holders = []
    for module in root.modules():
        held = {**module._parameters, **module._buffers}
        found = {name: new[id(value)] for name, value in held.items() if id(value) in new}
        for name, value in found.items():
            # Through setattr, since recurrent modules keep a list of their weights in step there.
            setattr(module, name, value)
        holders += [module] if found else []
    return holders


def like(old: Tensor, new: Tensor) -> Tensor:
    """A new value as what the old tensor was: a parameter, trainable or frozen, or a buffer."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def depthwise(module: _ConvNd, weight: Tensor) -> bool:
    """True where each index of the first dimension is a group of its own, which goes when it goes.

    That is a filter that reads one channel alone, or an input of a transposed convolution that alone makes its outputs.
    """
    return module.groups == weight.shape[0] and (module.transposed or weight.shape[1] == 1)


def settle(module: nn.Module) -> None:
    """Let the attributes that repeat the shapes of a module's tensors follow them."""
    for name, value in followers(module).items():
        setattr(module, name, value)


def followers(module: nn.Module) -> dict[str, Any]:
    """What the attributes that only repeat shapes must be, by name."""
    if isinstance(module, RNNBase):
        return recurrent_sizes(module)
    if isinstance(module, _NormBase):
        sized = module.weight if module.weight is not None else module.running_mean
        return {} if sized is None else {"num_features": sized.shape[0]}
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    shape = tuple(weight.shape)
    if isinstance(module, _ConvTransposeNd):
        return {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
    if isinstance(module, _ConvNd):
        return {"in_channels": shape[1] * module.groups, "out_channels": shape[0]}
    if isinstance(module, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": shape[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return norm_sizes(module, shape)


def norm_sizes(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """The sizes that a norm repeats: torch's own, and any other that has its names for them."""
    sizes = vars(module).get("normalized_shape")
    if isinstance(sizes, (list, tuple)) and len(sizes) == len(shape):
        return {"normalized_shape": type(sizes)(shape)}
    # Of one dimension: a model may call something else so, and have a weight besides.
    return {"num_features": shape[0]} if type(vars(module).get("num_features")) is int and len(shape) == 1 else {}


def recurrent_sizes(module: RNNBase) -> dict[str, int]:
    """The sizes of a recurrent layer. All its layers have the same, so the first says them."""
    shapes = {name.removesuffix("_l0"): value.shape for name, value in tensors(module).items()}
    sizes = {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}
    if module.proj_size:
        sizes |= {"proj_size": shapes["weight_hr"][0], "hidden_size": shapes["weight_hr"][1]}
    return sizes


OTHER_MODEL = "is this the model that the plan was made for?"


def unfit(edit: Edit, text: str) -> str:
    """A message about one edit."""
    return f"edit {edit.kind} of {edit.module or 'the model itself'}: {text}"


def details(edit: Edit, **expected: type | tuple[type, ...]) -> list[Any]:
    """The values of an edit's detail. Raises: PlanError unless it has exactly these names, of these types."""
    if edit.detail.keys() != expected.keys():
        raise PlanError(
            unfit(edit, f"its detail must have {', '.join(expected)}; found {', '.join(edit.detail) or 'none'}")
        )
    for name, kind in expected.items():
        value = edit.detail[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise PlanError(unfit(edit, f"its {name} is the {type(value).__name__} {value!r}, which cannot be"))
    return [edit.detail[name] for name in expected]


def submodule(root: nn.Module, edit: Edit) -> nn.Module:
    """The module that an edit names. Raises: ModelError."""
    try:
        return root.get_submodule(edit.module)
    except AttributeError:
        names = [name for name, _ in root.named_modules(remove_duplicate=False)]
        raise ModelError(
            unfit(edit, f"the model has no such module ({OTHER_MODEL}); {nearest(edit.module, names)}")
        ) from None


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module holds itself, under every name."""
    return {
        **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }


def tensor(root: nn.Module, edit: Edit, name: str) -> Tensor:
    """The tensor that an edit names. Raises: ModelError."""
    held = tensors(submodule(root, edit))
    if name not in held:
        raise ModelError(
            unfit(edit, f"the module has no parameter or buffer {name!r} of its own; {nearest(name, held)}")
        )
    return held[name]
