"""A verdict before the work: what a placement can gain, and a sentence for each reason to expect no speed-up.

Nothing is run: the work of a layer and the numbers that change between float and integers are read off the shapes.
"""

from __future__ import annotations

import dataclasses
import math

from torch import fx

from pared.graph.capture import operator
from pared.graph.macs import macs_of, shape_of
from pared.quantize.norms import WAS_NORM
from pared.quantize.placement import TRANSPARENT, Placement
from pared.step import Scheme

LEAST_SHARE = 0.5  # of the multiply-accumulates: integers cannot gain much on less
# A float convolution of ONNX Runtime took as long for 10 to 17 multiply-accumulates as one number took to be quantized
# or dequantized, on one AVX2 core. Integers save half of the former at the least where they gain at all.
MACS_OF_A_CONVERSION = 15
LEAST_SAVED = 0.5
# Below this, a layer takes a few microseconds in float: as long as the runtime takes to call an operator.
SMALL_LAYER_MACS = 50_000


@dataclasses.dataclass(frozen=True)
class Work:
    """What one sample costs, as planned.

    Attributes:
        macs: Multiply-accumulates of all operators.
        integer_macs: Of those, the ones of layers that become integers.
        layers: How many layers become integers.
        conversions: How many tensors change from float to integers or back.
        converted: How many numbers these hold.
        middle: Multiply-accumulates of the integer layer in the middle, by size.
    """

    macs: int
    integer_macs: int
    layers: int
    conversions: int
    converted: int
    middle: int

    @property
    def share(self) -> float:
        """Fraction of the multiply-accumulates that run in integers."""
        return self.integer_macs / self.macs if self.macs else 0.0


def work_of(graph: fx.GraphModule, placement: Placement, scheme: Scheme) -> Work:
    """What a placed graph will do, for one sample of its example batch."""
    nodes = {node.name: node for node in graph.graph.nodes}
    batch = next((shape[0] for node in nodes.values() if node.op == "placeholder" and (shape := shape_of(node))), 1)
    anchors = {anchor.node for anchor in placement.anchors}
    own = sorted(macs_of(nodes[name]) // batch for name in anchors if WAS_NORM not in nodes[name].meta)
    sizes = [
        math.prod(shape_of(node)) // batch
        for node in map(nodes.__getitem__, placement.tensors)
        for _ in range(changes(node, anchors, placement, scheme))
    ]
    return Work(
        macs=sum(macs_of(node) for node in nodes.values() if WAS_NORM not in node.meta) // batch,
        integer_macs=sum(own),
        layers=len(own),
        conversions=len(sizes),
        converted=sum(sizes),
        middle=own[len(own) // 2] if own else 0,
    )


def changes(node: fx.Node, anchors: set[str], placement: Placement, scheme: Scheme) -> int:
    """How often a quantized tensor changes its form: once where it comes from float, once where it goes into float."""
    integer = anchors | set(placement.joins)
    moving = scheme.following | scheme.absorbed | TRANSPARENT

    def comes_from_integers(made: fx.Node) -> bool:
        while made.name not in integer and operator(made) in moving and isinstance(made.args[0], fx.Node):
            made = made.args[0]
            if made.name in placement.tensors:
                return True  # its own change is counted there
        return made.name in integer

    def stays(user: fx.Node) -> bool:
        return user.name in integer or operator(user) in moving

    return (not comes_from_integers(node)) + (not all(stays(user) for user in node.users))


def warnings_of(work: Work) -> list[str]:
    """A sentence for each reason to expect no speed-up; none where integers should pay.

    Example:
        >>> warnings_of(Work(macs=100, integer_macs=40, layers=1, conversions=2, converted=1, middle=10**6))
        ['no speed-up is to be expected: only 40 % of the multiply-accumulates would run in integers (1 layer)']
    """
    reasons = []
    layers = f"{work.layers} layer{'' if work.layers == 1 else 's'}"
    if work.share < LEAST_SHARE:
        share = f"{100 * work.share:.0f} %"
        reasons.append(f"only {share} of the multiply-accumulates would run in integers ({layers})")
    if work.integer_macs * LEAST_SAVED < work.converted * MACS_OF_A_CONVERSION:
        reasons.append(
            f"{work.conversions} conversions between float and integers ({work.converted:,} numbers a sample) would "
            f"cost more than {layers} with {work.integer_macs:,} multiply-accumulates can save"
        )
    if work.middle < SMALL_LAYER_MACS:
        reasons.append(
            f"half of the integer layers have {work.middle:,} multiply-accumulates or fewer, which float does in the "
            "time that calling an operator takes"
        )
    return [f"no speed-up is to be expected: {reason}" for reason in reasons]
