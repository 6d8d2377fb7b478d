"""What a stage did, layer by layer, for the report: read off its plan and off the network before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pared.graph.counts import LayerCount
from pared.report.data import Layer, LayerCost, Pruned, PrunedGroup, Skipped
from pared.step import Plan

# Integers by which layers say how many channels they make, and how many they read; and what to call these.
MAKES: Mapping[str, str] = {
    "out_channels": "channels",
    "out_features": "features",
    "num_features": "channels",
    "num_channels": "channels",
    "num_parameters": "channels",
    "embedding_dim": "features",
    "hidden_size": "hidden units",
    "num_heads": "heads",
}
READS: Mapping[str, str] = {"in_channels": "channels", "in_features": "features", "input_size": "features"}


def layer_table(
    counts: Sequence[LayerCount], plans: Sequence[Plan], before: nn.Module, after: nn.Module
) -> tuple[Layer, ...]:
    """What each layer became by the plans kept so far.

    Args:
        counts: Of the network as it is.
        plans: What was done, oldest first.
        before: The network as it came in.
        after: The network as it is.
    """
    became: dict[str, str] = {}
    for plan in plans:
        became |= dict.fromkeys(plan.facts.get("folded", ()), "folded")
        for edit in plan.edits:
            quantized = edit.detail.get("dtype") or f"int{edit.detail.get('bits')}"
            if edit.kind not in ("slice", "set_attribute"):
                became[edit.module] = quantized if edit.kind in ("quantize", "cast") else edit.kind
    cut = {edit.module for plan in plans for edit in plan.edits if edit.kind in ("slice", "set_attribute")}
    rows = []
    for row in counts:
        parts = [became[row.module]] if row.module in became else []
        parts += [smaller(before, after, row.module)] if row.module in cut else []
        shown = ", ".join(filter(None, parts)) or "float32"
        rows.append(Layer(module=row.module, kind=row.kind, params=row.params, macs=row.macs, became=shown))
    return tuple(rows)


def smaller(before: nn.Module, after: nn.Module, name: str) -> str:
    """How much of a layer is left, in words; "" where that cannot be told.

    Example:
        >>> smaller(nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(4, 3)), "0")
        '3 of 6 features'
    """
    modules = [dict(network.named_modules(remove_duplicate=False)).get(name) for network in (before, after)]
    if None in modules or type(modules[0]) is not type(modules[1]):
        return ""
    old, new = (vars(module) for module in modules)
    for names, how in ((MAKES, ""), (READS, "reads ")):
        for attribute, noun in names.items():
            a, b = old.get(attribute), new.get(attribute)
            if type(a) is int and type(b) is int and a != b:
                return f"{how}{b} of {a} {noun}"
    return "; ".join(cut_tensors(*modules))


def cut_tensors(old: nn.Module | None, new: nn.Module | None) -> Iterator[str]:
    """The tensors that a module holds itself and that became smaller: '64 of 128 along dimension 2 of pos_embed'."""
    if old is None or new is None:
        return
    sizes = {key: value.shape for key, value in old.state_dict().items() if "." not in key}
    for key, value in new.state_dict().items():
        for dim, (size, whole) in enumerate(zip(value.shape, sizes.get(key, ()), strict=False)):
            if size != whole:
                yield f"{size} of {whole} along dimension {dim} of {key}"


def layer_costs(plan: Plan | None) -> tuple[LayerCost, ...]:
    """What a plan says of the cost of each layer alone."""
    found = plan.facts.get("sensitivity") if plan else None
    return tuple(LayerCost(**row) for row in found["layers"]) if found else ()


def pruned(plan: Plan | None, network: nn.Module) -> Pruned | None:
    """What a plan says of the channels that it removes; None where it is of another step.

    Args:
        plan: Of the stage.
        network: Tells convolutions and fully connected layers apart.
    """
    if plan is None or plan.step != "PruneChannels":
        return None
    facts = plan.facts
    modules = dict(network.named_modules(remove_duplicate=False))
    groups = [
        PrunedGroup(
            name=name,
            # A second group of the same module has a number behind the name.
            kind=kind_of(modules.get(name.partition(":")[0])),
            kept=kept,
            before=before,
            approximate=facts["approximate"].get(name, ""),
            curve=tuple((ratio, drop) for ratio, drop in facts["curves"].get(name, ())),
        )
        for name, (kept, before) in facts["widths"].items()
    ]
    return Pruned(
        params=facts["params"],
        macs=facts["macs"],
        difference=facts["difference"],
        taken_in=facts["taken_in"],
        groups=tuple(groups),
        left=tuple(Skipped(module=module, reason=why) for module, why in facts["constants"].items()),
    )


def kind_of(module: nn.Module | None) -> Literal["convolution", "fully connected", ""]:
    """Whether a layer is a convolution, or multiplies by a matrix."""
    if isinstance(module, _ConvNd):
        return "convolution"
    if module is None or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return ""
    return "fully connected" if any(weight.ndim == 2 for weight in module.parameters(recurse=False)) else ""
