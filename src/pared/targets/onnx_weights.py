"""ONNX for integer weights beside float activations: MatMulNBits, GatherBlockQuantized, and arithmetic that folds.

Before the export, the program's dequantized weights give way to operators that PyTorch's exporter cannot see into: it
would compute small weights back to float. `table` translates those, `unfold` writes out what has none of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from pared.errors import TargetError
from pared.graph.capture import operator, quiet

DOMAIN = "com.microsoft"
LARGEST_BLOCK = 128  # that a channel's one scale is repeated for; MatMulNBits takes powers of two from 16 on
PLACEHOLDER = "pared.restored"  # the domain of weights that are written out after the export

LIBRARY: Any = torch.library.Library("pared", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "matmul_nbits(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int columns, int bits) "
    "-> Tensor"
)
LIBRARY.define("gather_nbits(Tensor indices, Tensor packed, Tensor scale, Tensor zero_point, int bits) -> Tensor")
LIBRARY.define("restored(Tensor packed, Tensor scale, Tensor zero_point, int bits, int columns, int[] shape) -> Tensor")


def unpacked(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `packed`: the first `length` integers along the last dimension."""
    lanes = [(packed >> (bits * lane)) & (2**bits - 1) for lane in range(8 // bits)]
    return torch.stack(lanes, -1).flatten(-2)[..., :length]


def real(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, columns: int) -> Tensor:
    """A matrix of packed integers in float; zero points are not packed here."""
    rows, blocks = scale.shape
    whole = unpacked(values.reshape(rows, -1), bits, values.numel() * (8 // bits) // rows).reshape(rows, blocks, -1)
    return ((whole.float() - zero_point.float().unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)[:, :columns]


@torch.library.impl(LIBRARY, "matmul_nbits", "CompositeExplicitAutograd")
def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
) -> Tensor:
    """What MatMulNBits computes."""
    blocks = scale.shape[1]
    zeros = torch.full_like(scale, 2 ** (bits - 1)) if zero_point is None else unpacked(zero_point, bits, blocks)
    return nn.functional.linear(x, real(packed, scale, zeros, bits, columns), bias)


@torch.library.impl(LIBRARY, "gather_nbits", "CompositeExplicitAutograd")
def gather_nbits(indices: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """What GatherBlockQuantized computes: rows with what fills up their last block."""
    zeros = unpacked(zero_point, bits, scale.shape[1])
    return nn.functional.embedding(indices, real(packed, scale, zeros, bits, packed.shape[1] * (8 // bits)))


@torch.library.impl(LIBRARY, "restored", "CompositeExplicitAutograd")
def restored(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, columns: int, shape: list[int]) -> Tensor:
    """What the nodes that `unfold` writes compute."""
    return real(packed, scale, zero_point, bits, columns).reshape(shape)


class Weight(NamedTuple):
    """A quantized matrix as ONNX Runtime wants it.

    Attributes:
        values: Unsigned integers, shape (rows, blocks * block).
        scale: Shape (rows, blocks).
        zero_point: Unsigned, shape (rows, blocks).
        centred: True where every zero point is the middle one, which need not be written.
        bits: 2, 4 or 8: the width in the file.
        columns: Of the matrix, without what fills up its last block.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    centred: bool
    bits: int
    columns: int

    @property
    def block(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]


def with_weight_operators(model: nn.Module) -> nn.Module:
    """A copy of a program whose integer weights are read by operators that `table` translates; other models as is."""
    if not isinstance(model, fx.GraphModule) or not any(map(is_grouped, model.graph.nodes)):
        return model
    with quiet():
        program = copy.deepcopy(model)
    for node in list(program.graph.nodes):
        if is_grouped(node):
            weight, last = weight_of(program, node)
            for user in list(last.users):
                rewrite(program, user, last, weight)
    program.graph.eliminate_dead_code()
    program.recompile()
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name in [name for name in (*program._buffers, *program._parameters) if name not in used]:
        delattr(program, name)
    return program


def is_grouped(node: fx.Node) -> bool:
    return operator(node) == "quantized_decomposed.dequantize_per_channel_group"


def weight_of(program: fx.GraphModule, node: fx.Node) -> tuple[Weight, fx.Node]:
    """What a dequantize operator reads, and the last node of its cutting and reshaping."""
    values, scale, zero_point = (None if arg is None else stored(program, arg) for arg in node.args[:3])
    low, high, size = int(str(node.args[3])), int(str(node.args[4])), int(str(node.args[6]))
    if values is None or scale is None:
        raise TargetError(f"onnxruntime: {node.name} reads no stored weight")
    last, columns = node, values.shape[1]
    for name in ("aten.slice", "aten.view"):
        (user,) = last.users if len(last.users) == 1 else (last,)
        if operator(user) == name:
            columns = int(str(user.args[3])) if name == "aten.slice" else columns
            last = user
    bits = next(width for width in (2, 4, 8) if high - low < 2**width)
    middle = 2 ** (bits - 1)
    zeros = torch.zeros(scale.shape, dtype=torch.int32) if zero_point is None else zero_point
    unsigned = Weight(
        (values.int() + middle).to(torch.uint8),
        scale,
        (zeros + middle).to(torch.uint8),
        zero_point is None,
        bits,
        columns,
    )
    return in_blocks(unsigned, size), last


def stored(program: fx.GraphModule, node: Any) -> Tensor:
    """The tensor behind a `get_attr` node."""
    value: Any = program
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()  # type: ignore[no-any-return]


def in_blocks(weight: Weight, size: int) -> Weight:
    """The same weight in blocks of a power of two from 16 on, if its groups are whole numbers of these."""
    groups = weight.scale.shape[1]
    if groups == 1:  # one scale for each row, repeated
        block = min(LARGEST_BLOCK, max(16, 2 ** math.ceil(math.log2(weight.columns))))
        times = -(-weight.columns // block)
    else:
        block = math.gcd(size, LARGEST_BLOCK)
        times = size // block
    if block < 16:
        return weight
    blocks = -(-weight.columns // block)  # a last group may have blocks that no column reaches
    scale, zero_point = (t.repeat_interleave(times, 1)[:, :blocks] for t in (weight.scale, weight.zero_point))
    values = weight.values[:, : blocks * block]
    filling = zero_point[:, -1:].expand(-1, blocks * block - values.shape[1])  # real zeros
    return weight._replace(values=torch.cat([values, filling], 1), scale=scale, zero_point=zero_point)


def packed(values: Tensor, bits: int) -> Tensor:
    """Integers several to a byte along the last dimension, the first in the lowest bits."""
    each = 8 // bits
    lanes = nn.functional.pad(values, (0, -values.shape[-1] % each))
    lanes = lanes.reshape(*values.shape[:-1], -1, each)
    found = torch.zeros(lanes.shape[:-1], dtype=torch.uint8)
    for lane in range(each):
        found |= lanes[..., lane] << (bits * lane)
    return found


def rewrite(program: fx.GraphModule, user: fx.Node, last: fx.Node, weight: Weight) -> None:
    """Let a layer read its weight through an operator of ours."""
    suits = weight.block >= 16 and weight.block & (weight.block - 1) == 0
    with program.graph.inserting_before(user):
        if suits and operator(user) == "aten.linear" and user.args[1] is last:
            new = matmul_node(program, user, weight)
        elif suits and operator(user) == "aten.embedding" and user.args[0] is last:
            new = gather_node(program, user, weight)
        else:
            user.replace_input_with(last, restored_node(program, last, weight))
            return
    user.replace_all_uses_with(new)
    program.graph.erase_node(user)


def matmul_node(program: fx.GraphModule, user: fx.Node, weight: Weight) -> fx.Node:
    rows, bits = weight.values.shape[0], weight.bits
    b = packed(weight.values, bits).reshape(rows, weight.scale.shape[1], -1)
    zeros = None if weight.centred else keep(program, last_name(user, "zero_point"), packed(weight.zero_point, bits))
    inputs = (
        user.args[0],
        keep(program, last_name(user, "packed"), b),
        keep(program, last_name(user, "scale"), weight.scale),
        zeros,
        user.args[2] if len(user.args) > 2 else None,
    )
    return program.graph.call_function(torch.ops.pared.matmul_nbits.default, (*inputs, weight.columns, bits))


def gather_node(program: fx.GraphModule, user: fx.Node, weight: Weight) -> fx.Node:
    inputs = (
        user.args[1],
        keep(program, last_name(user, "packed"), packed(weight.values, weight.bits)),
        keep(program, last_name(user, "scale"), weight.scale),
        keep(program, last_name(user, "zero_point"), packed(weight.zero_point, weight.bits)),
    )
    new = program.graph.call_function(torch.ops.pared.gather_nbits.default, (*inputs, weight.bits))
    if weight.values.shape[1] == weight.columns:
        return new
    return program.graph.call_function(torch.ops.aten.slice.Tensor, (new, -1, 0, weight.columns))


def restored_node(program: fx.GraphModule, last: fx.Node, weight: Weight) -> fx.Node:
    inputs = (
        keep(program, last_name(last, "packed"), packed(weight.values, weight.bits)),
        keep(program, last_name(last, "scale"), weight.scale),
        keep(program, last_name(last, "zero_point"), weight.zero_point),
    )
    shape = list(last.args[1]) if operator(last) == "aten.view" else [weight.values.shape[0], weight.columns]  # type: ignore[arg-type]
    return program.graph.call_function(torch.ops.pared.restored.default, (*inputs, weight.bits, weight.columns, shape))


def last_name(node: fx.Node, what: str) -> str:
    return f"{node.name}_nbits_{what}"


def keep(program: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """A stored tensor and the node that reads it, at the graph's insertion point."""
    program.register_buffer(name, value.contiguous())
    return program.graph.get_attr(name)


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of our operators, for `torch.onnx.export(custom_translation_table=...)`."""
    product = foreign(
        *(DOMAIN, "MatMulNBits", {"A": "float", "B": "uint8", "scales": "float"}),
        *({"zero_points": "uint8", "g_idx": "int32", "bias": "float"}, ["K", "N", "bits", "block_size"]),
    )
    rows_of = foreign(
        *(DOMAIN, "GatherBlockQuantized", {"data": "uint8", "indices": "int64", "scales": "float"}),
        *({"zero_points": "uint8"}, ["bits", "block_size", "gather_axis", "quantize_axis"]),
    )
    later = foreign(
        *(PLACEHOLDER, "Restored", {"b": "uint8", "scale": "float", "zero_point": "uint8"}),
        *({}, ["bits", "columns", "shape"]),
    )

    def matmul(x: Any, b: Any, scale: Any, zero_point: Any, bias: Any, columns: int, bits: int) -> Any:
        inputs = [x, b, scale, zero_point, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return product(*inputs, K=columns, N=b.shape[0], bits=bits, block_size=b.shape[2] * (8 // bits))

    def gather(indices: Any, b: Any, scale: Any, zero_point: Any, bits: int) -> Any:
        block = b.shape[1] * (8 // bits) // scale.shape[1]
        return rows_of(b, indices, scale, zero_point, bits=bits, block_size=block, gather_axis=0, quantize_axis=1)

    def restore(b: Any, scale: Any, zero_point: Any, bits: int, columns: int, shape: list[int]) -> Any:
        return later(b, scale, zero_point, bits=bits, columns=columns, shape=shape)

    ours = torch.ops.pared
    return {ours.matmul_nbits.default: matmul, ours.gather_nbits.default: gather, ours.restored.default: restore}


def foreign(
    domain: str, name: str, inputs: Mapping[str, str], optional: Mapping[str, str], attributes: Sequence[str]
) -> Any:
    """An operator that is not ONNX's own, for translations to call.

    Args:
        domain: Its domain.
        name: Its name.
        inputs: {name: type of its elements}.
        optional: The same, of inputs that may be left out.
        attributes: Names of its integers; "shape" is a list of them.
    """
    import onnx.defs
    from onnxscript.values import Op, Opset

    schemas = onnx.defs.OpSchema
    may_miss = schemas.FormalParameterOption.Optional
    schema = schemas(
        name,
        domain,
        1,
        inputs=[
            *(schemas.FormalParameter(key, f"tensor({kind})") for key, kind in inputs.items()),
            *(schemas.FormalParameter(k, f"tensor({kind})", param_option=may_miss) for k, kind in optional.items()),
        ],
        outputs=[schemas.FormalParameter("y", "tensor(float)")],
        attributes=[
            schemas.Attribute(key, schemas.AttrType.INTS if key == "shape" else schemas.AttrType.INT)
            for key in attributes
        ],
    )
    return Op(Opset(domain, 1), name, schema)


def unfold(proto: Any) -> None:
    """Write weights without an operator of their own as arithmetic that ONNX Runtime does once, when it loads the file.

    It never does a DequantizeLinear beforehand: a cast, a difference and a product it does.
    """
    graph = proto.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for index, node in enumerate([node for node in graph.node if node.domain == PLACEHOLDER]):
        written = Arithmetic(graph, f"restored_{index}")
        written.restore(node, *shapes[node.input[1]])
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, new in enumerate(written.nodes):
            graph.node.insert(at + offset, new)
    kept = [item for item in proto.opset_import if item.domain != PLACEHOLDER]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


class Arithmetic:
    """Nodes of ONNX that compute one value from stored tensors."""

    def __init__(self, graph: Any, name: str) -> None:
        self.graph = graph
        self.name = name
        self.nodes: list[Any] = []

    def add(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """A node on names and arrays; the name of its output."""
        from onnx import helper, numpy_helper

        names = []
        for value in inputs:
            if isinstance(value, str):
                names.append(value)
                continue
            names.append(f"{self.name}_constant_{len(self.graph.initializer)}")
            self.graph.initializer.append(numpy_helper.from_array(value, names[-1]))
        self.nodes.append(helper.make_node(kind, names, [f"{self.name}_{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])

    def restore(self, node: Any, rows: int, groups: int) -> None:
        """What a placeholder stands for, under the name of its output."""
        import numpy as np
        from onnx import TensorProto, helper

        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        bits, values = given["bits"], str(node.input[0])
        if bits < 8:
            mask, last = np.array(2**bits - 1, np.uint8), np.array([-1])
            shifts = [np.array(bits * lane, np.uint8) for lane in range(8 // bits)]
            shifted = [self.add("BitShift", values, by, direction="RIGHT") if by else values for by in shifts]
            lanes = [self.add("Unsqueeze", self.add("BitwiseAnd", lane, mask), last) for lane in shifted]
            values = self.add("Concat", *lanes, axis=-1)
        grouped = self.add("Reshape", values, np.array([rows, groups, -1]))
        zeros, scale = (self.add("Unsqueeze", str(name), np.array([-1])) for name in (node.input[2], node.input[1]))
        floats = [self.add("Cast", name, to=TensorProto.FLOAT) for name in (grouped, zeros)]
        real = self.add("Reshape", self.add("Mul", self.add("Sub", *floats), scale), np.array([rows, -1]))
        cut = self.add("Slice", real, np.array([0]), np.array([given["columns"]]), np.array([1]))
        self.add("Reshape", cut, np.array(given["shape"]))
        self.nodes[-1].output[0] = node.output[0]
