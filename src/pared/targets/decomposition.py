"""Sparing PyTorch's ONNX exporter a second tracing of programs that hold nothing it would have to decompose.

The exporter traces every program anew to decompose its operators, which takes half of its time. Quantized convolutional
networks hold one operator that it does not write as it is: the global average pool.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

# What the exporter writes as it is, with the same result as after tracing anew. Others go its own way.
WRITTEN_AS_THEY_ARE = frozenset(
    {
        "aten.add.Tensor",
        "aten.avg_pool2d.default",
        "aten.cat.default",
        "aten.clamp.default",
        "aten.conv1d.default",
        "aten.conv2d.default",
        "aten.conv3d.default",
        "aten.dropout.default",
        "aten.flatten.using_ints",
        "aten.hardsigmoid.default",
        "aten.hardswish.default",
        "aten.hardtanh.default",
        "aten.linear.default",
        "aten.max_pool2d.default",
        "aten.mean.dim",
        "aten.mul.Tensor",
        "aten.pad.default",
        "aten.permute.default",
        "aten.relu.default",
        "aten.relu6.default",
        "aten.sigmoid.default",
        "aten.silu.default",
        "aten.sym_size.int",
        "aten.transpose.int",
        "aten.view.default",
        "quantized_decomposed.dequantize_per_channel.default",
        "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.quantize_per_tensor.default",
    }
)


def decompose_sparingly(program: ExportedProgram) -> ExportedProgram:
    """The same program, changed in place so that the exporter decomposes it only where it has to."""
    average_globally(program.graph_module)
    program.run_decompositions = functools.partial(decomposed_where_needed, program)
    return program


def average_globally(graph: fx.GraphModule) -> None:
    """Write each average pool with one output as the mean that it is, in place."""
    pool, mean = torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten.mean.dim
    for node in graph.graph.nodes:
        if node.target is pool and all(size == 1 for size in node.args[1]):
            node.target, node.args = mean, (node.args[0], [-1, -2], True)
    graph.recompile()


def decomposed_where_needed(program: ExportedProgram, table: Any = None) -> ExportedProgram:
    """The program itself where all its operators are written as they are."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    if table is not None and targets.isdisjoint(table) and WRITTEN_AS_THEY_ARE.issuperset(map(str, targets)):
        return program
    for graph in graphs:
        copy_before_views(graph)
    decomposed: ExportedProgram = ExportedProgram.run_decompositions(program, table)
    return decomposed


def copy_before_views(graph: fx.GraphModule) -> None:
    """Copy what a view takes of transposed values, in place; the exporter drops the copies again.

    Attention may lay out what it makes so that its transpose has a view as another shape. Taken apart it does not.
    """
    moved = (torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
    shaped = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
    for node in graph.graph.nodes:
        if node.target in shaped and node.args[0].target in moved:
            with graph.graph.inserting_before(node):
                copied = graph.graph.call_function(
                    torch.ops.aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
                )
            copied.meta = dict(node.args[0].meta)
            node.replace_input_with(node.args[0], copied)
    graph.recompile()
