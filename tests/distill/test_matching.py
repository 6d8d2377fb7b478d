"""Layers found by name or from shapes, and the adapters between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pared.distill.knowledge import Attention, Contrastive, Flow, Hint, Relational, Similarity
from pared.distill.matching import Pair, anatomy, match, named
from pared.distill.terms import ContrastiveTerm, make_term
from pared.errors import ModelError, PlanError
from pared.task import Task

IMAGES = Task(example_inputs=torch.zeros(2, 1, 8, 8))


def conv_net(channels: int, *, sizes: int = 2) -> nn.Sequential:
    """Halves the size `sizes` times; layers 1, 3, ... end a size."""
    layers: list[nn.Module] = []
    width = 1
    for i in range(sizes):
        layers += [nn.Conv2d(width, channels << i, 3, padding=1, stride=2), nn.ReLU()]
        width = channels << i
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(width, 3))


def names(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.student, pair.teacher) for pair in pairs]


class Wrapped(nn.Module):
    """The network in containers, its pooling in code, its mode on train."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()), nn.MaxPool2d(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3))) * 2


def test_anatomy_lists_layers_in_order_when_run_and_changes_nothing() -> None:
    model = Wrapped().train()
    found = anatomy(model, IMAGES)
    assert found.output.shape == (2, 3)
    assert dict(found.layers)["features.0.0"] == (2, 8, 8)
    assert list(found.layers) == ["features.0.0", "features.0.1", "features.0", "features.1", "features", "head"]
    assert found.inner == ("features.0.0", "features.0.1", "features.0", "features.1", "features")
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert names(match(found, found)) == [("features.0", "features.0"), ("features", "features")]


def test_layers_pair_by_size_when_both_have_it() -> None:
    student, teacher = anatomy(conv_net(2), IMAGES), anatomy(conv_net(4, sizes=3), IMAGES)
    pairs = match(student, teacher)
    assert names(pairs) == [("1", "1"), ("3", "3")]  # 4x4 and 2x2; the teacher's 1x1 has no partner
    assert (pairs[1].student_shape, pairs[1].teacher_shape) == ((4, 2, 2), (8, 2, 2))
    assert names(match(student, teacher, deepest=True)) == [("5", "7")]  # before the dropout
    assert Pair.from_json(pairs[0].to_json()) == pairs[0]


def test_layers_pair_by_depth_when_there_are_no_sizes() -> None:
    task = Task(example_inputs=torch.zeros(2, 5))

    def mlp(depth: int) -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(5, 5) for _ in range(depth)], nn.Linear(5, 3))

    pairs = match(anatomy(mlp(3), task), anatomy(mlp(6), task))
    assert names(pairs) == [("0", "1"), ("1", "3"), ("2", "5")]
    assert names(match(anatomy(mlp(1), task), anatomy(mlp(6), task))) == [("0", "5")]
    with pytest.raises(PlanError, match="the student has no layer before its output"):
        match(anatomy(nn.Linear(5, 3), task), anatomy(mlp(2), task))


def test_layers_pair_by_name_when_globs_are_given() -> None:
    student, teacher = anatomy(conv_net(2), IMAGES), anatomy(conv_net(4), IMAGES)
    assert names(named(student, teacher, [("3", "1")])) == [("3", "1")]
    assert names(named(student, teacher, [("[13]", "[02]")])) == [("1", "0"), ("3", "2")]
    wrapped = anatomy(Wrapped(), IMAGES)
    with pytest.raises(PlanError, match=r"no layer 'featurs\.0' in the student; did you mean 'features\.0'"):
        named(wrapped, teacher, [("featurs.0", "1")])
    with pytest.raises(PlanError, match="no layer '9' in the teacher"):
        named(student, teacher, [("1", "9")])
    with pytest.raises(PlanError, match=r"2 of the student's match \(1, 3\) and 1 of the teacher's \(1\)"):
        named(student, teacher, [("[13]", "1")])


def test_a_model_that_does_not_run_is_explained() -> None:
    with pytest.raises(ModelError, match="Linear does not run on the example inputs: mat1 and mat2"):
        anatomy(nn.Linear(3, 3), IMAGES)


@pytest.mark.parametrize(
    ("ours", "theirs", "weights"),
    [
        ((2, 4, 4), (2, 4, 4), 0),
        ((2, 4, 4), (3, 4, 4), 2 * 3 + 3),
        ((2, 4, 4), (3, 2, 2), 2 * 3 + 3),
        ((2, 2, 2), (2, 4, 4), 0),
        ((5,), (3,), 5 * 3 + 3),
        ((2, 4, 4), (3,), 2 * 3 + 3),
        ((5,), (2, 4, 4), 5 * 2 + 2),
        ((6, 2), (6, 3), 2 * 3 + 3),
        ((6, 2), (4, 2), 0),
    ],
)
def test_adapters_make_shapes_agree_when_they_differ(
    ours: tuple[int, ...], theirs: tuple[int, ...], weights: int
) -> None:
    term = make_term(Hint(weight=2.0), [Pair("s", "t", ours, theirs)])
    assert sum(parameter.numel() for parameter in term.parameters()) == weights
    student, teacher = torch.randn(3, *ours, requires_grad=True), torch.randn(3, *theirs)
    loss = term({"s": student}, {"t": teacher}, None)
    assert loss.shape == ()
    loss.backward()
    assert student.grad is not None and bool(student.grad.any())
    if ours == theirs:
        assert loss == 2 * Hint()(student, teacher)


def test_terms_average_their_pairs_when_there_are_several() -> None:
    pairs = [Pair("a", "a", (2, 4, 4), (3, 4, 4)), Pair("b", "b", (4, 2, 2), (4, 1, 1))]
    student = {"a": torch.randn(3, 2, 4, 4), "b": torch.randn(3, 4, 2, 2)}
    teacher = {"a": torch.randn(3, 3, 4, 4), "b": torch.randn(3, 4, 1, 1)}
    attention = make_term(Attention(weight=3.0), pairs)
    assert not list(attention.parameters())
    one = Attention()(student["a"], teacher["a"])
    other = Attention()(student["b"].mean((2, 3), keepdim=True), teacher["b"])
    assert attention(student, teacher, None).item() == pytest.approx(1.5 * (one + other).item(), rel=1e-6)
    flow = make_term(Flow(), pairs)
    assert flow(student, teacher, None) > 0
    similar = make_term(Similarity(weight=2.0), pairs[:1])
    assert similar(student, teacher, None) == 2 * Similarity()(student["a"], teacher["a"])
    related = make_term(Relational(weight=2.0), pairs[:1])
    pooled = [features["a"].mean((2, 3)) for features in (student, teacher)]
    assert related(student, teacher, None).item() == pytest.approx(2 * Relational()(*pooled).item(), rel=1e-6)


def test_contrastive_term_remembers_the_teachers_embeddings_when_it_goes_on() -> None:
    torch.manual_seed(0)
    settings = Contrastive(queue=5, dimension=4, weight=1.0)
    term = make_term(settings, [Pair("s", "t", (3,), (2,))])
    assert isinstance(term, ContrastiveTerm)
    student, teacher = {"s": torch.randn(3, 3)}, {"t": torch.randn(3, 2)}
    labels = torch.tensor([0, 1, 0])
    first = term(student, teacher, labels)
    ours, theirs = (head(x) for head, x in zip(term.heads[0], (student["s"], teacher["t"]), strict=True))
    apart = labels[:, None] != labels[None]
    torch.testing.assert_close(first, settings(ours, theirs, allowed=apart))  # what the queue lacks does not count
    assert torch.equal(term.queue[0, :3], theirs.detach())
    assert term.labels.tolist() == [0, 1, 0, -2, -2]
    others = term.queue[0].clone()
    second = term(student, teacher, labels)
    allowed = torch.cat([apart, apart, torch.zeros(3, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(second, settings(ours, theirs, others, allowed))
    assert term.labels.tolist() == [0, 1, 0, 0, 1]
    unlabelled = make_term(settings, [Pair("s", "t", (3,), (2,))])
    assert unlabelled(student, teacher, torch.rand(3)).isfinite()
    assert unlabelled(student, teacher, None).isfinite()


def test_terms_say_so_when_layers_do_not_suit_them() -> None:
    vectors, images = Pair("a", "b", (3,), (3,)), Pair("c", "d", (2, 4, 4), (2, 4, 4))
    with pytest.raises(PlanError, match="layers 'a' and 'b' give vectors, which have no places to look at"):
        make_term(Attention(), [vectors])
    with pytest.raises(PlanError, match="attention maps need places in both"):
        make_term(Attention(), [Pair("a", "b", (2, 4, 4), (4, 2))])
    with pytest.raises(PlanError, match=r"flow needs at least two layers to flow between, found \('c', 'd'\)"):
        make_term(Flow(), [images])
    with pytest.raises(PlanError, match="flow needs images or vectors in all its layers"):
        make_term(Flow(), [images, vectors])
    with pytest.raises(PlanError, match="more than three dimensions"):
        make_term(Hint(), [Pair("a", "b", (2, 4, 4, 4), (2, 4, 4, 4))])
