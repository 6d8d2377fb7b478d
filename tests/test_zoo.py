from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from pared.graph.counts import count, totals
from pared.task import Inputs, as_inputs, call
from pared.zoo import MODELS
from zoo_models import OUTPUT, ZOO


def test_names_are_listed_without_torch_when_the_zoo_is_imported() -> None:
    code = "import sys; from pared.zoo import MODELS; print(sorted(MODELS), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sorted(MODELS)} False"


@pytest.mark.parametrize("name", MODELS)
def test_maker_says_what_it_makes_when_listed(name: str) -> None:
    made = MODELS[name]()
    assert isinstance(made, nn.Module)
    assert MODELS[name].__name__ == name
    about = MODELS[name].__doc__
    assert about is not None
    assert about.endswith(".")


def test_maker_refuses_when_a_setting_is_misspelt() -> None:
    with pytest.raises(TypeError, match="clases"):
        MODELS["fashion_cnn"](clases=3)


def test_fashion_cnn_has_the_size_that_the_demo_needs_when_made() -> None:
    model = MODELS["fashion_cnn"]()
    found = totals(count(model, as_inputs(torch.zeros(1, 1, 28, 28))))
    # Large enough that int8 saves time and that weights fill the file, small enough to train in a minute.
    assert 500_000 <= found.params <= 800_000
    assert 15_000_000 <= found.macs <= 40_000_000
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(width % 16 == 0 for width in widths)


def test_fashion_cnn_gives_as_many_scores_as_classes_when_asked() -> None:
    model = MODELS["fashion_cnn"](classes=3).eval()
    images = torch.randn(3, 1, 28, 28)
    scores = model(images)
    assert scores.shape == (3, 3)
    torch.testing.assert_close(model(images[:1]), scores[:1], rtol=1e-4, atol=1e-5)


def answer(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    output = call(model, inputs)
    return output[OUTPUT[name]] if name in OUTPUT else output


@pytest.mark.parametrize("name", ZOO)
def test_pattern_is_the_same_at_every_call_and_runs_any_batch_when_made(name: str) -> None:
    state = torch.get_rng_state()
    (model, inputs), (again, same) = ZOO[name](), ZOO[name]()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        outputs = answer(name, model, inputs)
        assert torch.equal(answer(name, again, same), outputs)
        one = Inputs(tuple(x[:1] for x in inputs.args), {key: x[:1] for key, x in inputs.kwargs.items()})
        three = Inputs(
            tuple(torch.cat([x, x[:1]]) for x in inputs.args),
            {key: torch.cat([x, x[:1]]) for key, x in inputs.kwargs.items()},
        )
        for part, expected in ((one, outputs[:1]), (three, torch.cat([outputs, outputs[:1]]))):
            torch.testing.assert_close(answer(name, model, part), expected, rtol=1e-4, atol=1e-5)
    assert outputs.shape == (2, 5)
    # Samples differ, so no pattern hides its inputs.
    assert not torch.equal(outputs[0], outputs[1])
