"""How far pruned models are from their masked originals, in float64: the zoo of the tests, and torchvision's kinds.

    python benchmarks/prune_exact.py [--only resnet18 mlp] [--ratio 0.5]

Half of the channels of every layer go, chosen at random and by L2. The masked original is the captured graph of the
model with the removed units at zero wherever something sums over them; norms over channels take their statistics over
the kept ones. Compared on random inputs that the step itself has not seen, at the size that torchvision's weights are
evaluated on. Batch norms have random statistics and scales, so that no channel is trivial.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from typing import Any

import torch
from harness import Results
from prune_classifiers import FOLDERS, ISSUE
from torch import nn

import pared
from pared.errors import ParedError, PlanError
from pared.graph.capture import capture
from pared.graph.labels import find_channels
from pared.prune.budgets import choose
from pared.prune.edits import edits_of
from pared.prune.evidence import Evidence
from pared.prune.exact import difference
from pared.prune.saliency import score
from pared.surgery import apply_edits

sys.path[:0] = FOLDERS
BOUND = 1e-9
# Those that issue 5 names; True where layer norms see fewer channels.
NETWORKS = {
    "resnet18": False,
    "resnet50": False,
    "mobilenet_v2": False,
    "mobilenet_v3_small": False,
    "mobilenet_v3_large": False,
    "densenet121": False,
    "shufflenet_v2_x1_0": False,
    "swin_t": True,
    "vit_b_16": True,
}
ATTEMPTS = 12


def lively(model: nn.Module) -> nn.Module:
    """Random statistics, scales and shifts of batch norms, and no layer of zeros."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def measure(model: nn.Module, task: pared.Task, saliency: str, ratio: float) -> dict[str, Any]:
    """One prune, and how far it is from the masked original."""
    program, pins = capture(model, task), {}
    for _ in range(ATTEMPTS):
        channels = find_channels(program, model, pinned=pins)
        if not channels.groups:
            return {"groups": 0, "reasons": sorted({skip.reason for skip in channels.skips})[:3]}
        evidence = Evidence(channels=channels, model=model, task=task, seed=0)
        keep = choose(channels, score(evidence, saliency, channels.groups)[0], ratio).keep
        fitted = edits_of(model, channels, keep, task)
        if not fitted.pins:
            break
        pins |= fitted.pins
    else:
        raise PlanError(f"does not run without channels after {ATTEMPTS} attempts: {list(pins.values())[-1]}")
    pruned = apply_edits(model, fitted.edits, {})
    found = difference(model, pruned, channels, keep, task, seed=1)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, pruned))
    return {
        "groups": len(channels.groups),
        "removed": int((~keep).sum()),
        "units": channels.units,
        "share": after / before,
        "difference": found.relative,
        "dtype": found.dtype,
        "pinned": len(pins),
        "approximate": len(channels.approximate),
    }


def subjects() -> dict[str, tuple[Any, bool]]:
    """Makers of (model, task), and whether norms run over channels that go."""
    from classifiers import input_size

    from torchvision_models import torchvision_model
    from zoo_models import ZOO

    def zoo(name: str) -> tuple[nn.Module, pared.Task]:
        model, inputs = ZOO[name]()
        return model, pared.Task(example_inputs=inputs.args or inputs.kwargs)

    def torchvision(name: str) -> tuple[nn.Module, pared.Task]:
        model, side = lively(torchvision_model(name)), input_size(name)
        return model, pared.Task(example_inputs=torch.randn(1, 3, side, side))

    found: dict[str, tuple[Any, bool]] = {f"zoo: {name}": (lambda name=name: zoo(name), False) for name in ZOO}
    return found | {name: (lambda name=name: torchvision(name), approximate) for name, approximate in NETWORKS.items()}


def claim(results: Results) -> None:
    """The line of issue 5: one claim a network, one for the whole zoo."""
    results.claims = []
    worst: dict[str, float] = {}
    for row in results.rows:
        if row.get("groups") == 0:
            continue  # nothing can be removed of it, which is said, and so there is nothing to compare
        subject = "every model of the zoo" if row["subject"].startswith("zoo: ") else row["subject"]
        worst[subject] = max(worst.get(subject, 0.0), row.get("difference", float("inf")))
    for subject, value in worst.items():
        ending = ", statistics of its layer norms over the kept channels" if NETWORKS.get(subject) else ""
        results.claim(ISSUE, f"{subject}: relative difference from the masked original{ending}", value, "<=", BOUND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SUBJECT", help="names, or parts of names; no claims")
    parser.add_argument("--ratio", type=float, default=0.5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = Results("prune_exact")
    for name, (make, _) in subjects().items():
        if options.only and not any(part in name for part in options.only):
            continue
        for saliency in ("random", "l2"):
            if results.done(subject=name, saliency=saliency, ratio=options.ratio):
                continue
            start, row = time.perf_counter(), {"subject": name, "saliency": saliency, "ratio": options.ratio}
            try:
                row |= measure(*make(), saliency, options.ratio)
            except ParedError as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            results.add(row | {"seconds": round(time.perf_counter() - start, 2)})
    if not options.only:
        claim(results)


if __name__ == "__main__":
    main()
