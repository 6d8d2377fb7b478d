"""`Train(during=[Distill(...)])`: what each way of meeting does to a training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.distill import (
    Attention,
    AverageTeacher,
    BornAgain,
    Contrastive,
    Distill,
    Flow,
    Hint,
    Offline,
    Online,
    Relational,
    SelfDeep,
    Similarity,
)
from pared.distill.callback import Distilling, Taught
from pared.distill.exits import Exits
from pared.distill.peers import Peers
from pared.errors import DataError, PlanError, TrainError, UsageError
from pared.quantize.aware import QuantizeAware
from pared.seeding import seed_all
from pared.step import Context, Plan
from pared.targets.onnxruntime import OnnxRuntime
from pared.task import Batch, as_inputs
from pared.train.callbacks import Callback
from pared.train.optimizers import SGD
from pared.train.step import Train

MakeContext = Callable[..., Context]
ALL = (Hint(), Attention(), Contrastive(queue=16, dimension=4), Flow(), Relational(), Similarity())
KINDS: dict[str, Distill] = {
    "offline": Distill(),
    "cached": Distill(teacher=Offline(name="big", cache=True)),
    "decoupled": Distill(response="decoupled"),
    "knowledge": Distill(teacher=Offline(name="big"), knowledge=ALL),
    "born again": Distill(teacher=BornAgain(), knowledge=[Hint()]),
    "average": Distill(teacher=AverageTeacher(decay=0.5), knowledge=[Similarity()]),
    "online": Distill(teacher=Online(peers=2)),
    "named peers": Distill(teacher=Online(peers=["big"])),
    "exits": Distill(teacher=SelfDeep(hint=0.1)),
}


def apply(step: Train, model: nn.Module, ctx: Context) -> nn.Module:
    return step.apply(model, Plan.from_json(step.plan(model, ctx).to_json()), ctx)


def train(distill: Distill | None, model: nn.Module, ctx: Context, **changes: Any) -> nn.Module:
    during = () if distill is None else (distill,)
    return apply(Train(**({"epochs": 1, "lr": 0.05, "during": during} | changes)), model, ctx)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def everything(model: nn.Module) -> tuple[Any, ...]:
    modules = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    return bits(model), modules, flags


@pytest.fixture
def ready(model: nn.Module, make_context: MakeContext) -> Callable[..., Any]:
    """A callback right before its first batch, and its context."""

    def make(distill: Distill, **changes: Any) -> tuple[Any, nn.Module, Context]:
        ctx = make_context(**changes)
        callback: Any = distill.callback(distill.plan(model, ctx), ctx)
        seed_all(ctx.task, 0, 0)
        trained = callback.on_start(copy.deepcopy(model))
        callback.on_ready(trained)
        trained.train()
        callback.on_epoch_start(trained, 0, 1)
        return callback, trained, ctx

    return make


def first(ctx: Context) -> Batch:
    return next(ctx.task.batches("train"))


@pytest.mark.parametrize("name", KINDS)
def test_training_differs_from_a_plain_one_and_leaves_no_trace(
    name: str, model: nn.Module, make_context: MakeContext
) -> None:
    ctx = make_context()
    ctx.task.teachers["big"].train()
    given = [model, ctx.dense, ctx.task.teachers["big"]]
    before = [everything(item) for item in given]
    trained = train(KINDS[name], model, ctx, epochs=2)
    assert [everything(item) for item in given] == before
    assert bits(trained) != bits(train(None, model, ctx, epochs=2))
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in trained.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(not module._forward_hooks for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())


class Stop(Callback):
    """Ends a training after an epoch, as a kill does."""

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if epoch == 1:
            raise RuntimeError("stopped by the test")


@pytest.mark.parametrize("name", KINDS)
def test_resumed_training_ends_with_the_same_bits_when_cut(
    name: str, model: nn.Module, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(KINDS[name], model, make_context(work=tmp_path / "whole"), epochs=3)
    ctx, end = make_context(work=tmp_path / "cut"), Distilling.on_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(Distilling, "on_epoch_end", lambda *given: (end(*given), Stop().on_epoch_end(*given[1:])))
        with pytest.raises(RuntimeError, match="stopped by the test"):
            train(KINDS[name], model, ctx, epochs=3)
    torch.manual_seed(99)
    assert bits(train(KINDS[name], model, ctx, epochs=3)) == bits(whole)


def test_loss_is_the_mix_of_the_paper_when_a_teacher_is_fixed(ready: Callable[..., Any]) -> None:
    callback, student, ctx = ready(Distill(temperature=3, alpha=0.7, knowledge=[Hint(weight=2.0)]))
    batch = first(ctx)
    out = student(*batch.inputs.args)
    own = F.cross_entropy(out, batch.target)
    teacher = copy.deepcopy(ctx.dense).eval()
    body = teacher[:3](batch.inputs.args[0])  # type: ignore[index]
    soft = F.softmax(teacher(*batch.inputs.args) / 3, 1)
    response = F.kl_div(F.log_softmax(out / 3, 1), soft, reduction="batchmean") * 9
    features = dict(callback.taps.found)
    (term,) = callback.terms
    pairs = [(features["2"], body), (features["5"], teacher[:6](batch.inputs.args[0]))]  # type: ignore[index]
    hints = sum(F.mse_loss(a.project(one), two) for a, (one, two) in zip(term.adapters, pairs, strict=True)) / 2
    found = callback.loss(own, batch, out)
    torch.testing.assert_close(found, 0.3 * own + 0.7 * response + 2 * hints)
    assert callback.taps.found == {} and callback.teacher_taps.found == {}
    found.backward()
    assert all(parameter.grad is not None for parameter in callback.parameters())
    callback.on_epoch_end(student, 0)
    student.eval()
    student(*batch.inputs.args)  # as validation does
    assert callback.taps.found == {}


def test_a_teacher_in_train_mode_teaches_in_eval_mode(ready: Callable[..., Any], make_context: MakeContext) -> None:
    callback, _, ctx = ready(Distill(teacher=Offline(name="big")))
    ctx.task.teachers["big"].train()
    again = Distill(teacher=Offline(name="big")).callback(Plan("Distill", facts=callback.facts), ctx)
    assert isinstance(again, Taught)
    again.on_start(nn.Linear(1, 1))
    batch = first(ctx)
    expected = copy.deepcopy(ctx.task.teachers["big"]).eval()(*batch.inputs.args)
    for item in (callback, again):
        taught, _ = item.teach(batch.inputs)
        assert torch.equal(taught, expected) and not taught.requires_grad
    assert ctx.task.teachers["big"].training


def test_born_again_starts_from_fresh_weights_and_learns_from_the_old_ones(ready: Callable[..., Any]) -> None:
    callback, student, _ = ready(Distill(teacher="born_again"))
    old = callback.teacher
    assert not torch.equal(student[0].weight, old[0].weight)
    assert student[1].running_mean.abs().sum() == 0
    bound = 1 / 3  # of a convolution over 9 inputs, as PyTorch draws it
    assert student[0].weight.abs().max() <= bound
    assert not any(parameter.requires_grad for parameter in old.parameters())


def test_born_again_keeps_layers_that_are_frozen(model: nn.Module, make_context: MakeContext) -> None:
    ctx, student = make_context(), model
    assert isinstance(student, nn.Sequential)
    student[0].requires_grad_(False)
    weights = student[0].weight.clone(), student[3].weight.clone()
    step = Distill(teacher="born_again")
    step.callback(step.plan(student, ctx), ctx).on_start(student)
    assert torch.equal(student[0].weight, weights[0])
    assert not torch.equal(student[3].weight, weights[1])


def test_average_teacher_follows_the_student_when_it_steps(ready: Callable[..., Any]) -> None:
    callback, student, _ = ready(Distill(teacher=AverageTeacher(decay=0.6)))
    average = [parameter.clone() for parameter in callback.teacher.parameters()]
    for keep in (0.5, 0.6, 0.6):  # 1 - 1 / (step + 1), at most the decay
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 1
        student[1].running_mean += 1
        callback.after_step(student)
        average = [keep * a + (1 - keep) * p for a, p in zip(average, student.parameters(), strict=True)]
        for found, expected in zip(callback.teacher.parameters(), average, strict=True):
            torch.testing.assert_close(found, expected)
    assert torch.equal(callback.teacher[1].running_mean, student[1].running_mean)


def test_peers_learn_from_labels_and_from_one_another(ready: Callable[..., Any]) -> None:
    callback, student, ctx = ready(Distill(teacher=Online(peers=2), temperature=1, alpha=0.5))
    assert isinstance(callback, Peers)
    peers, batch = list(callback.own["peers"]), first(ctx)
    for network in (student, *peers):
        network.eval()  # without dropout, so that it can be written out
    outs = [network(*batch.inputs.args) for network in (student, *peers)]
    losses = []
    for i, out in enumerate(outs):
        others = [
            F.kl_div(F.log_softmax(out, 1), F.softmax(other.detach(), 1), reduction="batchmean")
            for j, other in enumerate(outs)
            if j != i
        ]
        losses.append(0.5 * F.cross_entropy(out, batch.target) + 0.25 * sum(others))
    found = callback.loss(F.cross_entropy(outs[0], batch.target), batch, outs[0])
    torch.testing.assert_close(found, losses[0])  # what is shown is the student's own loss
    parameters = [*student.parameters(), *callback.parameters()]
    expected = torch.autograd.grad(torch.stack(losses).sum(), parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), expected)
    assert not torch.equal(peers[0][0].weight, peers[1][0].weight)


def test_exits_learn_from_labels_and_from_the_deepest_layer(ready: Callable[..., Any]) -> None:
    callback, student, ctx = ready(Distill(teacher=SelfDeep(hint=0.5), temperature=2, alpha=0.4))
    assert isinstance(callback, Exits)
    batch = first(ctx)
    callback.own.eval()
    out = student(*batch.inputs.args)
    found = dict(callback.taps.found)
    (leave,) = callback.own["exits"]
    said, features = leave(found["2"])
    own = F.cross_entropy(out, batch.target)
    soft = F.kl_div(F.log_softmax(said / 2, 1), F.softmax(out.detach() / 2, 1), reduction="batchmean") * 4
    hint = F.mse_loss(features, found["5"].mean((2, 3)).detach())
    total = callback.loss(own, batch, out)
    torch.testing.assert_close(total, own + 0.6 * F.cross_entropy(said, batch.target) + 0.4 * soft + 0.5 * hint)
    assert said.shape == out.shape


@pytest.mark.parametrize(
    ("start", "changed"),
    [
        ({}, {"temperature": 2.0}),
        ({}, {"alpha": 0.5}),
        ({}, {"response": "mse"}),
        ({"response": "decoupled"}, {"beta": 1.0}),
        ({}, {"teacher": Offline(name="big")}),
        ({}, {"knowledge": [Hint()]}),
        ({"knowledge": [Hint()]}, {"knowledge": [Hint(weight=2.0)]}),
        ({"knowledge": [Hint()]}, {"knowledge": [Hint(layers=[("2", "2")])]}),
        ({"knowledge": [Contrastive(queue=16, dimension=4)]}, {"knowledge": [Contrastive(queue=8, dimension=4)]}),
        ({"knowledge": [Contrastive(dimension=4)]}, {"knowledge": [Contrastive(dimension=5)]}),
        ({"knowledge": [Contrastive(dimension=4)]}, {"knowledge": [Contrastive(dimension=4, temperature=0.5)]}),
        ({"knowledge": [Relational()]}, {"knowledge": [Relational(distance=1.0)]}),
        ({"knowledge": [Relational()]}, {"knowledge": [Relational(angle=1.0)]}),
        ({"teacher": AverageTeacher(decay=0.9)}, {"teacher": AverageTeacher(decay=0.1)}),
        ({"teacher": Online()}, {"teacher": Online(peers=2)}),
        ({"teacher": SelfDeep()}, {"teacher": SelfDeep(exits=["1"])}),
        ({"teacher": SelfDeep()}, {"teacher": SelfDeep(hint=1.0)}),
    ],
    ids=str,
)
def test_every_setting_changes_the_result_when_another_value_is_given(
    start: dict[str, Any], changed: dict[str, Any], model: nn.Module, make_context: MakeContext
) -> None:
    ctx = make_context()
    one, other = train(Distill(**start), model, ctx), train(Distill(**(start | changed)), model, ctx)
    assert bits(one) != bits(other)


def test_cached_outputs_train_as_live_ones_do_and_the_teacher_runs_once(
    model: nn.Module, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(nn.Module):
        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return self.inner(x)  # type: ignore[no-any-return]

    x = torch.cat([batch for batch, _ in make_context().task.train])
    y = torch.cat([labels for _, labels in make_context().task.train])
    given: dict[str, Any] = {"train": (x, y), "teachers": {"big": Counting(make_context().task.teachers["big"])}}
    live = train(Distill(teacher=Offline(name="big")), model, make_context(work=tmp_path / "a", **given), epochs=3)
    Counting.calls = 0
    ctx = make_context(work=tmp_path / "b", **given)
    cached = train(Distill(teacher=Offline(name="big", cache=True)), model, ctx, epochs=3)
    assert Counting.calls == 1 + 1  # the plan's, and the one batch of the first epoch
    for one, other in zip(live.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(list((tmp_path / "b").glob("teacher-*.rows"))) == 1


class Augmented:
    """Samples that differ at every reading."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return ((x + torch.rand(len(x), 1, 1, 1), y) for x, y in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_cached_outputs_are_refused_when_samples_are_augmented(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context(train=Augmented(make_context().task.train))
    cached = Distill(teacher=Offline(cache=True))
    with pytest.raises(DataError, match="random augmentation makes them, so outputs cannot be kept; set cache=False"):
        train(cached, model, ctx, epochs=2)
    train(Distill(), model, ctx, epochs=2)


def test_decoupled_says_so_when_targets_are_no_labels(ready: Callable[..., Any]) -> None:
    callback, student, _ = ready(Distill(response="decoupled"))
    x = torch.zeros(2, 1, 8, 8)
    for target in (None, torch.rand(2, 4)):
        with pytest.raises(DataError, match="decoupled distillation needs class indices as labels"):
            callback.loss(torch.zeros(()), Batch(as_inputs(x), target), student(x))


def test_training_stops_when_the_teacher_gives_nan(model: nn.Module, make_context: MakeContext) -> None:
    class Failing(nn.Module):
        """Right for the example inputs, which are zeros."""

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :4] * 1e30) ** 3 * 0

    ctx = make_context(teachers={"bad": Failing()})
    with pytest.raises(TrainError, match="the teacher's outputs are NaN or infinite"):
        train(Distill(teacher=Offline(name="bad")), model, ctx)


def test_responses_train_when_outputs_are_positions_values_or_labels(make_context: MakeContext) -> None:
    torch.manual_seed(0)
    x, generator = torch.randn(8, 5, 3), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4, (8, 5), generator=generator)
    tokens[:, 0] = -100
    cases: list[tuple[nn.Module, Tensor, Any]] = [
        (nn.Linear(3, 4), tokens, lambda out, target: F.cross_entropy(out.transpose(1, 2), target)),
        (nn.Linear(3, 2), torch.rand(8, 5, 2), nn.MSELoss()),
        (nn.Linear(3, 2), (torch.rand(8, 5, 2) > 0.5).float(), nn.BCEWithLogitsLoss()),
    ]
    for i, (model, target, loss) in enumerate(cases):
        ctx = make_context(
            example_inputs=x[:2], train=[(x, target)], loss=loss, dense=copy.deepcopy(model), seed=i, teachers={}
        )
        ctx.dense.bias.detach().copy_(torch.arange(len(ctx.dense.bias)))  # type: ignore[arg-type,operator,union-attr]
        trained = train(Distill(alpha=1.0), model, ctx, epochs=20, lr=0.5, schedule="constant")
        # With nothing but the teacher to follow, the student says what it says.
        with torch.no_grad():
            said = [item(x).softmax(-1) if i == 0 else item(x) for item in (trained, model, ctx.dense)]
        assert (said[0] - said[2]).abs().mean() < 0.3 * (said[1] - said[2]).abs().mean()


def test_several_techniques_share_a_training(model: nn.Module, make_context: MakeContext) -> None:
    ctx = make_context()
    both = apply(Train(epochs=1, lr=0.05, during=[Distill(), Distill(teacher="deep")]), model, ctx)
    assert bits(both) not in (bits(train(Distill(), model, ctx)), bits(train(Distill(teacher="deep"), model, ctx)))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_graph_of_operators_learns_from_layers_and_refuses_what_needs_modules(
    model: nn.Module, make_context: MakeContext
) -> None:
    graph = torch.export.export(model, (torch.zeros(2, 1, 8, 8),)).module()
    ctx = make_context(train=[(x[:2], y[:2]) for x, y in make_context().task.train])
    learning = Distill(knowledge=[Hint()])
    callback: Any = learning.callback(learning.plan(model, ctx), ctx)
    callback.on_start(graph)
    callback.on_ready(graph)
    callback.on_epoch_start(graph, 0, 1)
    batch = first(ctx)
    out = graph(*batch.inputs.args)
    assert callback.loss(F.cross_entropy(out, batch.target), batch, out).requires_grad
    callback.on_end(graph)
    assert not [node for node in graph.graph.nodes if "tap_" in str(node.target)]
    for name, words in (("average", "cannot follow a quantized student"), ("online", "put it before QuantizeAware")):
        asked = Distill(teacher=name)
        refused: Any = asked.callback(asked.plan(model, ctx), ctx)
        with pytest.raises(PlanError, match=words):
            refused.on_start(graph)
            refused.on_ready(graph)


def test_cache_is_refused_when_several_processes_train(
    model: nn.Module, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ctx, step = make_context(), Distill(teacher=Offline(cache=True))
    with pytest.raises(UsageError, match="several processes cannot fill one cache"):
        step.callback(step.plan(model, ctx), ctx).on_start(model)


def test_students_learn_when_only_the_teacher_knows(model: nn.Module, make_context: MakeContext) -> None:
    # Labels at random; the teacher tells the class by the mean, which the images carry.
    class Knowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -4 * (x.mean((1, 2, 3))[:, None] - torch.arange(4.0)) ** 2

    data = make_context().task.train
    noise = [(x, torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(5))) for x, _ in data]
    ctx = make_context(train=noise, teachers={"knowing": Knowing()})
    rest: dict[str, Any] = {"epochs": 15, "lr": 0.05, "optimizer": SGD()}
    found = []
    for distill in (None, Distill(alpha=1.0, teacher=Offline(name="knowing"))):
        trained = train(distill, model, ctx, **rest).eval()
        found.append(sum(int((trained(x).argmax(1) == y).sum()) for x, y in data) / 24)
    assert found[1] > max(0.7, found[0] + 0.2)


def in_pairs(output: Tensor) -> Tensor:
    return output


@pytest.mark.parametrize("name", KINDS)
def test_a_callback_can_be_sent_to_another_process(name: str, model: nn.Module, make_context: MakeContext) -> None:
    # Data, metrics and progress of the run, which need not be sendable, stay where they are.
    ctx = make_context(output=in_pairs, metrics=lambda output, target: 0.0, progress=lambda *given: None)
    callback = KINDS[name].callback(KINDS[name].plan(model, ctx), ctx)
    again: Any = pickle.loads(pickle.dumps(callback))  # noqa: S301 - our own bytes
    trained = again.on_start(copy.deepcopy(model))
    again.on_ready(trained)
    again.on_epoch_start(trained, 0, 1)
    batch = first(ctx)
    out = trained(*batch.inputs.args)
    assert torch.isfinite(again.loss(F.cross_entropy(out, batch.target), batch, out))


def test_losses_keep_their_digits_when_precision_is_mixed(model: nn.Module, make_context: MakeContext) -> None:
    rest: dict[str, Any] = {"hardware": {"precision": "bf16"}}
    for name in ("knowledge", "exits", "online"):
        trained = train(KINDS[name], model, make_context(work=make_context().work / name), **rest)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in trained.parameters())


def test_a_quantized_student_learns_from_a_float_teacher_when_both_are_in_one_training(
    model: nn.Module, make_context: MakeContext
) -> None:
    data = make_context().task.train
    ctx = make_context(target=OnnxRuntime(), calibration=data)
    found = []
    for extra in ([], [Distill(teacher=Offline(name="big"), knowledge=[Hint(), Similarity()])]):
        trained = apply(Train(epochs=1, lr=0.01, during=[*extra, QuantizeAware()]), model, ctx)
        assert isinstance(trained, fx.GraphModule)
        assert not [node for node in trained.graph.nodes if "tap_" in str(node.target)]
        found.append(trained(data[0][0]))
    assert not torch.equal(*found)
    inside = Distill(teacher=Offline(name="big"), knowledge=[Hint(layers=[("0", "0")])])  # its norm is folded into it
    with pytest.raises(PlanError, match=r"no layer '0' in the graph that trains; .*goes by the norm's name"):
        apply(Train(epochs=1, during=[inside, QuantizeAware()]), model, ctx)
