"""Tiny seeded models, one graph pattern each, with example inputs. Import it as `from zoo_models import ZOO, make`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.task import Inputs, as_inputs

Made = tuple[nn.Module, Inputs]
Maker = Callable[[], tuple[nn.Module, Any]]
MAKERS: dict[str, Maker] = {}


def pattern(maker: Maker) -> Maker:
    """Put a maker of (model, example inputs) into the zoo under its own name."""
    MAKERS[maker.__name__] = maker
    return maker


def make(name: str) -> Made:
    """A fresh model in eval mode and its example inputs (a batch of 2): the same values at every call.

    Weights and batch-norm statistics are random, so that no channel, scale or shift is trivial.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model, example = MAKERS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model.eval(), as_inputs(example)


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


def conv_norm(inside: int, outside: int, kernel: int = 3, **settings: Any) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False, **settings)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@pattern
def mlp() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)), torch.randn(2, 12)


@pattern
def conv_bn_relu() -> tuple[nn.Module, Any]:
    return nn.Sequential(conv_norm(3, 8), conv_norm(8, 8, stride=2), head(8)), image()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.body = nn.Sequential(conv_norm(8, 8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.next = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12))
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.body(x))
        return self.head(F.relu(self.down(x) + self.next(x)))


@pattern
def residual_add() -> tuple[nn.Module, Any]:
    return Residual(), image()


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.mix = conv_norm(3, 4), conv_norm(3, 6, kernel=1), conv_norm(10, 8)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([self.left(x), self.right(x)], dim=1)))


@pattern
def concat() -> tuple[nn.Module, Any]:
    return Concat(), image()


class Shuffle(nn.Module):
    """The unit of ShuffleNet v2 (arXiv:1807.11164): half the channels pass by, then the halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.after, self.head = conv_norm(3, 8), conv_norm(4, 4), conv_norm(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = self.stem(x).chunk(2, dim=1)
        x = torch.cat([passed, self.branch(worked)], dim=1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.after(x))


@pattern
def chunk_shuffle_concat() -> tuple[nn.Module, Any]:
    return Shuffle(), image()


@pattern
def depthwise() -> tuple[nn.Module, Any]:
    inverted = [conv_norm(3, 8), conv_norm(8, 16, kernel=1), conv_norm(16, 16, groups=16), conv_norm(16, 8, kernel=1)]
    return nn.Sequential(*inverted, head(8)), image()


@pattern
def grouped() -> tuple[nn.Module, Any]:
    return nn.Sequential(conv_norm(3, 8), conv_norm(8, 12, groups=4), conv_norm(12, 8, kernel=1), head(8)), image()


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        )
        self.after, self.head = conv_norm(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.after(x * self.gate(x)))


@pattern
def squeeze_excite() -> tuple[nn.Module, Any]:
    return SqueezeExcite(), image()


@pattern
def transposed_conv() -> tuple[nn.Module, Any]:
    up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False)
    grouped = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
    return nn.Sequential(conv_norm(3, 8, stride=2), up, nn.BatchNorm2d(6), nn.ReLU(), grouped, head(4)), image()


class FusedAttention(nn.Module):
    """A pre-norm transformer block with one projection for queries, keys and values, as timm writes it."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.embed = nn.Linear(6, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 5)

    def attend(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, self.heads * self.head_width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(dim=1))


@pattern
def attention_fused_qkv() -> tuple[nn.Module, Any]:
    return FusedAttention(), torch.randn(2, 7, 6)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + mixed).mean(dim=1))


@pattern
def multihead_attention() -> tuple[nn.Module, Any]:
    return MultiHead(), torch.randn(2, 7, 16)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, num_layers=2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.head(states[:, -1])


@pattern
def lstm() -> tuple[nn.Module, Any]:
    return Recurrent(), torch.randn(2, 7, 6)


class TwoNames(nn.Module):
    """One module under two names, run once under each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = conv_norm(3, 8), conv_norm(8, 8)
        self.second = self.first
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))))


@pattern
def module_with_two_names() -> tuple[nn.Module, Any]:
    return TwoNames(), image()


class Tied(nn.Module):
    """Two layers that share one weight, and have a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(F.relu(self.into(x)))))))


@pattern
def tied_weights() -> tuple[nn.Module, Any]:
    return Tied(), torch.randn(2, 6)


@pattern
def frozen_parameters() -> tuple[nn.Module, Any]:
    model = nn.Sequential(conv_norm(3, 8), conv_norm(8, 8), head(8))
    return model.requires_grad_(False), image()


class Unused(nn.Module):
    """A layer and a bare parameter that no forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.head, self.unused = conv_norm(3, 8), head(8), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x))


@pattern
def unused_parameter() -> tuple[nn.Module, Any]:
    return Unused(), image()


class Branching(nn.Module):
    """Python that looks at a shape, and takes another layer for another size."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.head = conv_norm(3, 8), conv_norm(3, 8, kernel=5), head(8)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.large if x.shape[-1] > 16 else self.small
        return self.head(layer(x))


@pattern
def branch_on_shape() -> tuple[nn.Module, Any]:
    return Branching(), image()


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_norm(3, 8), head(8)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.body(pixels)
        return {"logits": self.head(features), "features": features}


@pattern
def dict_output() -> tuple[nn.Module, Any]:
    return DictOutput(), {"pixels": image()}


def maker_of(name: str) -> Callable[[], Made]:
    return lambda: make(name)


ZOO: dict[str, Callable[[], Made]] = {name: maker_of(name) for name in MAKERS}
# Which part of a rich output is the model's answer, as `Task(output=...)` takes it.
OUTPUT: dict[str, str] = {"dict_output": "logits"}
