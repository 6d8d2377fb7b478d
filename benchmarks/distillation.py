"""Every kind of distillation on Fashion-MNIST, and a MobileNetV2 taught on CIFAR-10: accuracy on test.

    python benchmarks/distillation.py --set fashion --data FOLDER [--jobs 11] [--seeds 5]
    python benchmarks/distillation.py --set cifar --data FOLDER [--jobs 4] [--seeds 4]

Both may run at once. Fashion-MNIST's FOLDER holds the four official idx .gz files, as Debian's `dataset-fashion-mnist`
installs them in /usr/share/datasets/fashion-mnist; CIFAR-10's holds train.parquet and test.parquet (Hugging Face
layout, read with PIL and pyarrow), or cifar10.npz, which `--phase prepare` makes of them. Phases, each resumable, rows
are kept:

    teacher   trains the teacher, into --teachers (kept out of git)
    tune      the student's learning rate and weight decay, then each kind's grid, judged on validation
    final     each kind with its best settings, --seeds seeds, judged on test
    claims    what the rows say of the issue's lines; no training
    all       these four

Validation is split off the official training data: 5,000 images of each set. `--device cpu` hides the GPU; jobs share
one. Teachers see moved and mirrored images, and so do students unless `--shift 0`. `--phase tune --only soft`
says in a minute what a teacher gives on validation; other values of --width, --shift or --batch want a folder of their
own (--out). `--samples 1000 --epochs 1 --quick` is a trial of the whole script on a CPU in minutes; its rows go to a
folder of their own. All trainings are `pared.Train`; the same epochs, augmentation and schedule with and without a
teacher.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import RESULTS, Results
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pared
from pared.distill import (
    Attention,
    AverageTeacher,
    BornAgain,
    Contrastive,
    Distill,
    Flow,
    Hint,
    Online,
    Relational,
    SelfDeep,
    Similarity,
)
from pared.step import Context, settings_of
from pared.train.hardware import Hardware
from pared.train.optimizers import SGD
from pared.train.processes import end_with_parent
from pared.train.schedules import Cosine

ISSUE = 4
FOLDER = Path("/usr/share/datasets/fashion-mnist")
VALIDATION = 5000
TUNING_SEEDS = (100, 101)
ALONE, RESPONSE, BESIDE = "student alone", "response: soft targets", "soft targets and"
BATCH = 256  # of teachers too
SETS: dict[str, dict[str, Any]] = {
    "fashion": {
        "epochs": 4,
        "teacher_epochs": 12,
        "teacher_width": 32,
        "shift": 2,
        "size": 28,
        "channels": 1,
        "batch": 128,
    },
    "cifar": {
        "epochs": 12,
        "teacher_epochs": 28,
        "teacher_width": 64,
        "shift": 4,
        "hole": 11,
        "views": True,
        "teacher_precision": "bf16",
        "size": 32,
        "channels": 3,
        "batch": BATCH,
    },
}
# What the student alone tries: a teacher must not seem to help by mending a rate or a decay that was badly chosen.
RATES = {"fashion": (0.025, 0.05, 0.1, 0.2), "cifar": (0.1, 0.2, 0.4)}
DECAYS = {"fashion": (0.0, 5e-4), "cifar": (5e-4,)}
TEACHER_LR, DECAY = 0.2, 5e-4
FILES = {"fashion": "distillation", "cifar": "distillation_cifar"}


def features_only(item: Any) -> Distill:
    """One kind of knowledge beside the labels, and no response: what it gives by itself."""
    return Distill(response="none", knowledge=(item,))


def at_rates(*choices: Any) -> list[Any]:
    """Each choice at the student's own learning rate, and at twice that."""
    return [made for choice in choices for made in (choice, (choice, 2.0))]


# Each kind's grid; a quick trial takes the first entry alone. The student alone tunes its learning rate and weight
# decay, and the kinds train with those that are best for it, or, where a number stands beside the settings, that part
# of the rate: what a teacher says is less noisy than labels, and bears a higher one.
GRIDS: dict[str, list[Any]] = {
    RESPONSE: [
        *at_rates(Distill(temperature=2, alpha=0.9)),
        *(Distill(temperature=t, alpha=a) for t, a in ((2, 0.5), (4, 0.9))),
        (Distill(temperature=4, alpha=0.9), 0.5),
    ],
    "response: decoupled": [
        *at_rates(*(Distill(response="decoupled", temperature=2, alpha=a, beta=b) for a, b in ((0.9, 1), (0.5, 2)))),
        Distill(response="decoupled", temperature=2, alpha=0.9, beta=2),
    ],
    "features: hints": [
        *at_rates(features_only(Hint(weight=0.1))),
        *(features_only(Hint(weight=w)) for w in (0.02, 1.0)),
    ],
    "features: attention transfer": [
        features_only(Attention(weight=0.1)),
        (features_only(Attention(weight=1.0)), 2.0),
    ],
    "features: contrastive": at_rates(features_only(Contrastive(weight=0.1, temperature=0.5))),
    "relations: flow": at_rates(features_only(Flow(weight=0.1))),
    "relations: distances and angles": [(features_only(Relational(weight=0.1, distance=25, angle=50)), 2.0)],
    "relations: similarities": [(features_only(Similarity(weight=w)), 2.0) for w in (300.0, 3000.0)],
    "online: two peers": [
        *at_rates(Distill(teacher=Online(peers=1), temperature=1, alpha=0.2)),
        (Distill(teacher=Online(peers=1), temperature=1, alpha=0.5), 2.0),
    ],
    "self: exits": at_rates(Distill(teacher=SelfDeep(), temperature=3, alpha=0.3)),
    "self: born again": at_rates(Distill(teacher=BornAgain(), temperature=1, alpha=0.5)),
    "self: average": at_rates(Distill(teacher=AverageTeacher(decay=0.99), temperature=1, alpha=0.2)),
    # What papers show: knowledge of layers beside soft targets. To be held against soft targets, not the student alone.
    **{
        f"{BESIDE} {name}": [Distill(temperature=2, knowledge=(item,)) for item in items]
        for name, items in {
            "hints": [Hint(weight=0.1), Hint(weight=1.0)],
            "attention transfer": [Attention(weight=0.1), Attention(weight=1.0)],
            "contrastive": [Contrastive(weight=0.1, temperature=0.5), Contrastive(weight=0.1)],
            "flow": [Flow(weight=0.1), Flow(weight=1.0)],
            "distances and angles": [Relational(weight=w, distance=25, angle=50) for w in (0.02, 0.1)],
            "similarities": [Similarity(weight=30.0), Similarity(weight=3.0)],
        }.items()
    },
}
CIFAR: dict[str, list[Any]] = {RESPONSE: [Distill(temperature=t, alpha=a) for t, a in ((4, 0.9), (2, 0.9))]}


# --- data, whole on the device -----------------------------------------------------------------------------------


class OnDevice:
    """Images as uint8 on the device that trains, in an order, and augmented, by (seed, epoch) alone.

    Args:
        images: uint8, shape (N, channels, size, size).
        labels: int64, shape (N,).
        statistics: Mean and deviation of a channel's pixels, each of shape (1, channels, 1, 1), of values 0 to 1.
        shift: Pixels that an image moves by at most, with mirroring; 0 takes images as they are.
        hole: Side of a square that is blotted out, odd, anywhere, parts of it beyond the edge; 0 for none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        statistics: tuple[Tensor, Tensor],
        *,
        batch: int,
        shift: int,
        hole: int = 0,
    ) -> None:
        self.images, self.labels, self.statistics = images, labels, statistics
        self.batch, self.shift, self.hole = batch, shift, hole
        self.generator = torch.Generator()
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn whole on the CPU, so that every device sees the same; reading leaves the generator as it was.
        draw = torch.Generator().manual_seed(self.generator.initial_seed())
        order = torch.randperm(len(self.images), generator=draw)
        moves = torch.randint(0, 2 * self.shift + 1, (3, len(order)), generator=draw)
        holes = torch.randint(0, self.images.shape[-1], (2, len(order)), generator=draw)
        device = self.images.device
        order, moves, holes = order.to(device), moves.to(device), holes.to(device)
        mean, deviation = self.statistics
        for start in range(0, len(order), self.batch):
            index, move = order[start : start + self.batch], moves[:, start : start + self.batch]
            x = self.images[index]
            x = shifted(x, move, self.shift) if self.shift else x
            x = (x.float() / 255 - mean) / deviation
            x = x * outside(holes[:, start : start + self.batch], self.hole, x.shape[-1]) if self.hole else x
            yield x, self.labels[index]


def shifted(x: Tensor, moves: Tensor, most: int) -> Tensor:
    """Images moved by `moves[:2]` - `most` pixels, zeros coming in, and mirrored where `moves[2]` is odd."""
    n, channels, height, width = x.shape
    padded = F.pad(x, (most, most, most, most))
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where((moves[2] % 2 == 1)[:, None], width - 1 - columns, columns) + moves[1][:, None]
    rows = torch.arange(height, device=x.device) + moves[0][:, None]
    which = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def outside(centres: Tensor, side: int, size: int) -> Tensor:
    """False in a square of each image, shape (N, 1, size, size). Source: DeVries and Taylor 2017, arXiv:1708.04552."""
    at = torch.arange(size, device=centres.device)
    rows, columns = ((at - centre[:, None]).abs() > side // 2 for centre in centres)
    return (rows[:, :, None] | columns[:, None, :])[:, None]


def fashion_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The official train and test images, uint8, and their labels."""
    found = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        found[f"{name}_x"] = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        found[f"{name}_y"] = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return found


def cifar_arrays(folder: Path, decoded: Path | None = None) -> dict[str, np.ndarray]:
    """The train and test images, uint8, and their labels, from cifar10.npz or the parquet files.

    Args:
        decoded: Folder where cifar10.npz is left for the processes that come later.
    """
    for place in (folder, decoded):
        if place is not None and (place / "cifar10.npz").exists():
            with np.load(place / "cifar10.npz") as stored:
                return dict(stored)
    import pyarrow.parquet
    from PIL import Image

    found = {}
    for name in ("train", "test"):
        table = pyarrow.parquet.read_table(folder / f"{name}.parquet")
        encoded = [item["bytes"] for item in table["image"].to_pylist()]
        images = np.stack([np.asarray(Image.open(io.BytesIO(item)).convert("RGB")) for item in encoded])
        found[f"{name}_x"] = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        found[f"{name}_y"] = table["label"].to_numpy().astype(np.int64)
    if decoded is not None:
        decoded.mkdir(parents=True, exist_ok=True)
        part = decoded / f"cifar10-{os.getpid()}.npz"
        np.savez(part, **found)
        part.replace(decoded / "cifar10.npz")
    return found


class Data:
    """One data set on the device: train and validation split off the official train data, and test."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        fashion = name == "fashion"
        arrays = fashion_arrays(options.data) if fashion else cifar_arrays(options.data, options.teachers)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        order = np.random.default_rng(0).permutation(len(arrays["train_y"]))
        validation = order[: options.samples or VALIDATION]
        train = order[VALIDATION:][: options.samples or None]
        images = arrays["train_x"][train]
        values = torch.from_numpy(images).to(device).float() / 255
        deviation, mean = torch.std_mean(values, (0, 2, 3), keepdim=True)
        self.statistics = mean, deviation

        def part(role: str, index: Any) -> tuple[Tensor, Tensor]:
            pair = arrays[f"{role}_x"][index], arrays[f"{role}_y"][index]
            x, y = (torch.from_numpy(item.copy()).to(device) for item in pair)
            return x, y

        self.train, self.validation = part("train", train), part("train", validation)
        self.test = part("test", slice(options.samples or None))
        self.form = SETS[name]

    def task(self, shift: int, batch: int = 0, hole: int = 0) -> pared.Task:
        source = OnDevice(*self.train, self.statistics, batch=batch or OPTIONS.batch, shift=shift, hole=hole)
        example = torch.zeros(2, self.form["channels"], self.form["size"], self.form["size"])
        return pared.Task(example_inputs=example, train=source, loss=nn.CrossEntropyLoss())

    @torch.no_grad()
    def accuracy(self, model: nn.Module, role: str) -> float:
        """Percent of right answers on validation or test."""
        images, labels = getattr(self, role)
        mean, deviation = self.statistics
        made = model.to(images.device).eval()
        hits = [
            (made((x.float() / 255 - mean) / deviation).argmax(1) == y).sum()
            for x, y in zip(images.split(1000), labels.split(1000), strict=True)
        ]
        model.to("cpu")
        return 100 * float(torch.stack(hits).sum()) / len(labels)


# --- networks ----------------------------------------------------------------------------------------------------


def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def fashion_student() -> nn.Module:
    """Two convolutions and two linear layers, 106 thousand parameters where `--width` is 16."""
    width: int = OPTIONS.width
    return nn.Sequential(
        *block(1, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, 10),
    )


def fashion_teacher() -> nn.Module:
    """Six convolutions, 288 thousand parameters where `--teacher-width` is 32."""
    width: int = OPTIONS.teacher_width or SETS["fashion"]["teacher_width"]
    return nn.Sequential(
        *block(1, width),
        *block(width, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        *block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        *block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * width, 10),
    )


class Residual(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-20."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*block(inputs, outputs, stride), *block(outputs, outputs)[:2])
        short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.short = nn.Identity() if inputs == outputs else short

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def cifar_teacher() -> nn.Module:
    """A residual network that halves the image early, 2.5 million parameters where `--teacher-width` is 64.

    ResNet-20 stays below 88 % on these JPEG images. This one has four times its work, in layers that bf16 units like.
    """
    width: int = OPTIONS.teacher_width or SETS["cifar"]["teacher_width"]
    stages = [*pooled(width // 2, width), *pooled(width, 3 * width), *pooled(3 * width, 4 * width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*block(3, width // 2), *stages, *head)


def pooled(inputs: int, outputs: int) -> list[nn.Module]:
    """A convolution that widens and halves the image, and two with a shortcut."""
    convolution, *rest = block(inputs, outputs)
    return [convolution, nn.MaxPool2d(2), *rest, Residual(outputs, outputs, 1)]


class Views(nn.Module):
    """A teacher's mean answer to an image and to its mirror, in bf16, which is enough where nothing is trained.

    Shapes: (N, 3, size, size) to (N, classes), float32.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            both = self.net(torch.cat([x, x.flip(-1)])).float()
        return both.view(2, len(x), -1).mean(0)


def resnet20(widths: Sequence[int]) -> nn.Module:
    """20 layers for images of 32 x 32, with projections where the width changes.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2. Deviation: projections (their option B), not zeros.
    """
    a, b, c = widths
    forms = [(a, a, 1)] * 3 + [(a, b, 2), (b, b, 1), (b, b, 1)] + [(b, c, 2), (c, c, 1), (c, c, 1)]
    stages = [Residual(*form) for form in forms]
    return nn.Sequential(*block(3, a), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


class Inverted(nn.Module):
    """Expand, filter each channel, project: MobileNetV2's block."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        first = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()] if expand > 1 else []
        depth = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        last = [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*first, depth, nn.BatchNorm2d(wide), nn.ReLU6(), *last)
        self.short = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.short else self.body(x)


def cifar_student(width: float = 0.35) -> nn.Module:
    """MobileNetV2 of width 0.35 for images of 32 x 32: the second stride is 1.

    Source: Sandler et al. 2018, arXiv:1801.04381, table 2.
    """

    def scaled(channels: int) -> int:
        return max(8, int(channels * width + 4) // 8 * 8)

    table = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    at = scaled(32)
    layers = [nn.Conv2d(3, at, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(at), nn.ReLU6()]
    for expand, channels, repeats, stride in table:
        for i in range(repeats):
            layers.append(Inverted(at, scaled(channels), stride if i == 0 else 1, expand))
            at = scaled(channels)
    layers += [nn.Conv2d(at, 512, 1, bias=False), nn.BatchNorm2d(512), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETWORKS = {"fashion": (fashion_student, fashion_teacher), "cifar": (cifar_student, cifar_teacher)}


# --- trainings, each a job of a worker process -------------------------------------------------------------------

OPTIONS: argparse.Namespace
LOADED: dict[str, Data] = {}
POOL: list[concurrent.futures.ProcessPoolExecutor] = []
KEYS = ("phase", "set", "kind", "setting", "seed")


def set_up(options: argparse.Namespace) -> None:
    """What a worker process does once."""
    global OPTIONS
    OPTIONS = options
    torch.set_num_threads(options.threads)


def data_of(name: str) -> Data:
    if name not in LOADED:
        LOADED[name] = Data(name, OPTIONS)
    return LOADED[name]


def trained(
    model: nn.Module,
    task: pared.Task,
    epochs: int,
    lr: float,
    seed: int,
    distill: Any,
    dense: nn.Module,
    decay: float = DECAY,
    precision: str = "",
) -> nn.Module:
    """The model after `pared.Train`, with or without `pared.Distill`."""
    during = () if distill is None else (distill,)
    optimizer = SGD(momentum=0.9, nesterov=True, weight_decay=decay)
    step = pared.Train(
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        schedule=Cosine(warmup_epochs=0.5),
        hardware=Hardware(precision=precision or OPTIONS.precision),
        during=during,
    )
    if not torch.cuda.is_available():  # a CPU computes faster in this layout
        model, dense = (net.to(memory_format=torch.channels_last) for net in (model, dense))
    with tempfile.TemporaryDirectory() as work:
        ctx = Context(task=task, target=None, work=Path(work), dense=dense, seed=seed)  # type: ignore[arg-type]
        made = step.apply(model, step.plan(model, ctx), ctx)
    return made.to(memory_format=torch.contiguous_format)  # as files hold it


def fresh_of(build: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def teacher_file(name: str) -> Path:
    return OPTIONS.teachers / f"distillation-{name}.safetensors"


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """One job: train a network and judge it. Returns the row."""
    start = time.perf_counter()
    name, seed, kind = job["set"], job["seed"], job["kind"]
    data, (student, teacher) = data_of(name), NETWORKS[name]
    form = data.form
    if kind == "teacher":
        epochs = OPTIONS.epochs or form["teacher_epochs"]
        task = data.task(form["shift"], BATCH, form.get("hole", 0))
        model = fresh_of(teacher, seed)
        if OPTIONS.teacher_from:
            epochs = None
            model.load_state_dict(load_file(OPTIONS.teacher_from))
        else:
            precision = form.get("teacher_precision", "")
            model = trained(model, task, epochs, job["lr"], seed, None, nn.Identity(), precision=precision)
        OPTIONS.teachers.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), teacher_file(name))
        model = Views(model) if form.get("views") else model
    else:
        if not teacher_file(name).exists():
            raise FileNotFoundError(f"no teacher at {teacher_file(name)}; run --phase teacher first")
        dense = teacher()
        dense.load_state_dict(load_file(teacher_file(name)))
        dense = Views(dense) if form.get("views") else dense
        epochs = OPTIONS.epochs or form["epochs"]
        model, task = fresh_of(student, seed), data.task(OPTIONS.shift if name == "fashion" else form["shift"])
        distill = job["distill"]
        if distill is not None and isinstance(distill.teacher, BornAgain):
            model = trained(model, task, epochs, job["lr"], seed, None, dense, job["decay"])
        model = trained(model, task, epochs, job["lr"], seed, distill, dense, job["decay"])
    row = {key: job[key] for key in ("phase", "set", "kind", "setting", "seed", "lr", "decay")}
    counted = sum(parameter.numel() for parameter in model.parameters())
    row |= {"accuracy": data.accuracy(model, job["role"]), "role": job["role"], "params": counted}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return row | {"epochs": epochs, "seconds": round(time.perf_counter() - start, 1), "device": device}


def begin(start: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """The first thing a worker process does: watch its parent, so that it does not outlive one that is killed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    start(options)


def work_through(
    jobs: list[dict[str, Any]],
    results: Results,
    options: argparse.Namespace,
    *,
    do: Callable[[Mapping[str, Any]], dict[str, Any]] = run,
    start: Callable[[argparse.Namespace], None] = set_up,
    keys: Sequence[str] = KEYS,
) -> None:
    """Run the jobs that no row answers yet, several processes at once.

    Args:
        do: Makes the row of a job.
        start: What a process does once.
        keys: What a job and its row are known by.
    """
    left = [job for job in jobs if results.done(**{key: job[key] for key in keys}) is None]
    if not left:
        return
    if options.jobs == 1:
        start(options)
        for job in left:
            results.add(do(job))
        return
    if not POOL:  # its processes keep the data on the device from phase to phase
        rest: dict[str, Any] = {"mp_context": multiprocessing.get_context("spawn"), "initializer": begin}
        POOL.append(concurrent.futures.ProcessPoolExecutor(options.jobs, initargs=(start, options), **rest))
    for done in concurrent.futures.as_completed([POOL[0].submit(do, job) for job in left]):
        results.add(done.result())


# --- phases ------------------------------------------------------------------------------------------------------


def job_of(
    phase: str, data: str, kind: str, choice: Any, seed: int, rate: tuple[float, float], role: str
) -> dict[str, Any]:
    """One training; `rate` is the learning rate and the weight decay of the student alone."""
    (lr, decay), (distill, part) = rate, choice if isinstance(choice, tuple) else (choice, 1.0)
    setting = rate_name(rate) if kind == ALONE else short(choice)
    rest = {"setting": setting, "seed": seed, "lr": lr * part, "decay": decay, "role": role, "distill": distill}
    return {"phase": phase, "set": data, "kind": kind, **rest}


def rate_name(rate: tuple[float, float]) -> str:
    lr, decay = rate
    return f"lr {lr}, weight decay {decay}"


def rates_of(data: str, *, quick: bool = False) -> list[tuple[float, float]]:
    """What the student alone tries."""
    found = [(lr, decay) for decay in DECAYS[data] for lr in RATES[data]]
    return found[1:2] if quick else found


def short(choice: Any) -> str:
    """The settings that differ from the defaults, as one line, and the part of the learning rate."""
    if choice is None:
        return ""
    if isinstance(choice, tuple):
        return f"{short(choice[0])}, {choice[1]} of the rate"
    distill, default = choice, settings_of(Distill())
    return json.dumps(
        {name: value for name, value in settings_of(distill).items() if value != default[name]} or "default"
    )


def tuning_jobs(
    data: str, grids: Mapping[str, list[Any]], rate: tuple[float, float], seeds: Any
) -> list[dict[str, Any]]:
    return [
        job_of("tune", data, kind, distill, seed, rate, "validation")
        for seed in seeds
        for kind, grid in grids.items()
        for distill in grid
    ]


def best_rate(results: Results, data: str) -> tuple[float, float]:
    """The learning rate and weight decay at which the student alone is best on validation."""
    means = by_setting(results, data, ALONE)
    return max(rates_of(data), key=lambda rate: means.get(rate_name(rate), 0.0))


def by_setting(results: Results, data: str, kind: str) -> dict[str, float]:
    """Mean accuracy on validation of each setting that was tried."""
    found: dict[str, list[float]] = {}
    for row in results.rows:
        if (row["phase"], row["set"], row["kind"]) == ("tune", data, kind):
            found.setdefault(row["setting"], []).append(row["accuracy"])
    return {setting: statistics.fmean(values) for setting, values in found.items()}


def best_of(results: Results, data: str, kind: str, grid: list[Any]) -> Any:
    """The setting of a grid that is best on validation."""
    means = by_setting(results, data, kind)
    return max(grid, key=lambda distill: means.get(short(distill), 0.0))


def tune(results: Results, data: str, grids: Mapping[str, list[Any]], options: argparse.Namespace) -> None:
    seeds = TUNING_SEEDS[: 1 if options.quick or data == "cifar" else options.tuning_seeds]
    rates = rates_of(data, quick=options.quick)
    all_seeds = seeds if options.quick or data == "cifar" else TUNING_SEEDS  # all others hang on what is chosen here
    alone = [job_of("tune", data, ALONE, None, seed, rate, "validation") for rate in rates for seed in all_seeds]
    work_through(alone, results, options)
    work_through(tuning_jobs(data, grids, best_rate(results, data), seeds), results, options)


def final(results: Results, data: str, grids: Mapping[str, list[Any]], options: argparse.Namespace) -> None:
    rate = best_rate(results, data)
    chosen = {ALONE: None}
    chosen |= {kind: best_of(results, data, kind, grid) for kind, grid in grids.items()}
    jobs = [
        job_of("final", data, kind, distill, seed, rate, "test")
        for seed in range(options.seeds)
        for kind, distill in chosen.items()
    ]
    work_through(jobs, results, options)


def figures(results: Results, data: str) -> dict[str, list[float]]:
    """Test accuracies of each kind, by seed."""
    found: dict[str, dict[int, float]] = {}
    for row in results.rows:
        if (row["phase"], row["set"]) == ("final", data):
            found.setdefault(row["kind"], {})[row["seed"]] = row["accuracy"]
    return {kind: [values[seed] for seed in sorted(values)] for kind, values in found.items()}


def gain(values: list[float], alone: list[float]) -> tuple[float, float]:
    """Difference of the means, and its standard error (Welch)."""
    spread = sum(statistics.variance(part) / len(part) for part in (values, alone))
    return statistics.fmean(values) - statistics.fmean(alone), math.sqrt(spread)


def claims(results: Results, data: str) -> None:
    """What the rows say of the issue's lines."""
    results.claims = []
    row = results.done(phase="teacher", set=data)
    if row:
        bound = 92.5 if data == "fashion" else 90.0
        results.claim(ISSUE, f"accuracy of the teacher on {data}, test, %", row["accuracy"], ">=", bound)
    found = figures(results, data)
    if ALONE not in found or RESPONSE not in found:
        return
    alone = found[ALONE]
    mean, deviation = statistics.fmean(alone), statistics.stdev(alone)
    points, error = gain(found[RESPONSE], alone)
    student = "a small CNN on Fashion-MNIST" if data == "fashion" else "MobileNetV2 0.35 on CIFAR-10"
    what = f"response distillation, {student}: gain in points over {mean:.2f} +- {deviation:.2f} % alone"
    what += f" (standard error {error:.2f})" if data == "cifar" else ""
    results.claim(ISSUE, what, points, ">=", 0.5 if data == "fashion" else 1.0)
    if data == "cifar":
        for kind, values in found.items():
            if kind in (ALONE, RESPONSE):
                continue
            points, error = gain(values, alone)  # of another teacher
            results.claim(ISSUE, f"{kind}: gain in points (standard error {error:.2f})", points, ">=", 1.0)
        return
    results.claim(ISSUE, "the same, in standard errors", points / error, ">=", 2.0)
    # What stands beside soft targets has their gain too, so it is no evidence of its own.
    own = {kind: values for kind, values in found.items() if kind not in (ALONE, RESPONSE) and BESIDE not in kind}
    others = {kind: gain(values, alone) for kind, values in own.items()}
    above = sum(points >= 2 * error for points, error in others.values())
    results.claim(ISSUE, "further kinds above the student alone by 2 standard errors", above, ">=", 3)
    for kind, (points, error) in others.items():
        reached = f"{statistics.fmean(found[kind]):.2f} +- {statistics.stdev(found[kind]):.2f} %"
        what = f"{kind}, {reached}: gain in points (standard error {error:.2f})"
        results.claim(ISSUE, what, points, ">=", -deviation)


def summarise(results: Results, data: str) -> None:
    """Print a line for each kind."""
    for kind, values in figures(results, data).items():
        alone = figures(results, data).get(ALONE, [])
        if len(values) > 1 and len(alone) > 1:
            points, error = gain(values, alone)
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            text = f"{kind:34} {mean:6.2f} +- {deviation:.2f}   {points:+.2f} ({error:.2f}) n={len(values)}"
            sys.stdout.write(text + "\n")
    if not figures(results, data):
        kinds = dict.fromkeys(row["kind"] for row in results.rows if row["phase"] == "tune")
        for kind in kinds:
            for setting, mean in by_setting(results, data, kind).items():
                sys.stdout.write(f"{mean:6.2f}  {kind}  {setting}\n")


def read(options: argparse.Namespace) -> Results:
    """The rows so far, whatever machine they came from: a row says its device, and claims are made of rows."""
    folder = options.out / "trial" if options.quick else options.out
    results = Results(FILES[options.set], fresh=options.fresh, folder=folder)
    if results.path.exists() and not options.fresh:
        stored = json.loads(results.path.read_text(encoding="utf8"))
        results.rows, results.environment = stored["rows"], stored["environment"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=tuple(SETS), default="fashion")
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--phase", choices=("all", "prepare", "teacher", "tune", "final", "claims"), default="all")
    parser.add_argument("--teachers", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--tuning-seeds", type=int, default=len(TUNING_SEEDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer of Fashion-MNIST's student")
    parser.add_argument("--teacher-width", type=int, default=0, help="the same of the teacher, 0 the usual one")
    parser.add_argument("--teacher-from", type=Path, help="weights of a teacher that was trained elsewhere")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--shift", type=int, default=2, help="pixels that Fashion-MNIST's students see images moved by")
    parser.add_argument("--batch", type=int, default=0, help="instead of the usual one")
    parser.add_argument("--samples", type=int, default=0, help="only so many of each part")
    parser.add_argument("--epochs", type=int, default=0, help="instead of the usual ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one setting a kind, one seed to tune; rows go to trial/")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--only", nargs="*", help="kinds that contain one of these words")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.phase == "prepare":
        cifar_arrays(options.data, options.data)
        return
    options.batch = options.batch or SETS[options.set]["batch"]
    results, data = read(options), options.set
    grids = GRIDS if data == "fashion" else CIFAR
    grids = {k: g for k, g in grids.items() if not options.only or any(word in k for word in options.only)}
    grids = {kind: grid[:1] if options.quick else grid for kind, grid in grids.items()}
    if options.phase in ("all", "teacher"):
        work_through([job_of("teacher", data, "teacher", None, 0, (TEACHER_LR, DECAY), "test")], results, options)
    if options.phase in ("all", "tune"):
        tune(results, data, grids, options)
    if options.phase in ("all", "final"):
        final(results, data, grids, options)
    if options.phase in ("all", "claims"):
        claims(results, data)
    summarise(results, data)
    for pool in POOL:
        pool.shutdown()


if __name__ == "__main__":
    main()
