"""Half of the channels of one architecture from each of timm's modules: pared beside Torch-Pruning.

    python benchmarks/prune_timm.py [--tool pared] [--only resnet18 vgg11] [--quick]

Of each module of `timm.models` the variant with the fewest parameters is taken; the first rows say which. All else is
as in `prune_classifiers.py`, but for the limit: 600 seconds. A failure of ours must be a sentence of ours.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from harness import Results
from prune_classifiers import ISSUE, OWN, RIVAL, arguments, counts, fill, open_rows, size, start

from pared.measure.environment import version_of

SHARE, LEAST = 0.7, 85
QUICK = ("test_resnet", "test_vit", "test_efficientnet")


def smallest(module: str) -> tuple[str, int]:
    """The architecture of a module of timm with the fewest parameters, and how many."""
    import timm

    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes[name] = size(timm.create_model(name))
    return min(sizes.items(), key=lambda item: (item[1], item[0]))


def choose(results: Results) -> list[str]:
    """A row for each module, and the architectures, the smallest first."""
    import timm

    for module in timm.list_modules():
        if results.done(module=module) is None:
            name, params = smallest(module)
            results.add({"module": module, "model": name, "params": params})
    rows = [row for row in results.rows if "module" in row]
    return [row["model"] for row in sorted(rows, key=lambda row: (row["params"], row["model"]))]


def claim(results: Results, names: list[str]) -> None:
    """The line of issue 5, over all architectures; one without a row of ours counts as failed."""
    results.claims = []
    own, rival = (counts(results, tool, SHARE) for tool in (OWN, RIVAL))
    what = f"timm architectures of {len(names)} that run, export and have at most 70 % of their parameters left"
    results.claim(ISSUE, what, own["succeeded"], ">=", LEAST)
    results.claim(ISSUE, "failures of ours that are no error of pared's own", own["unnamed"], "<=", 0)
    if rival["ran"]:
        what = f"architectures that run, export and have at most 70 % left; Torch-Pruning {rival['succeeded']}"
        results.claim(ISSUE, what, own["succeeded"], ">=", rival["succeeded"])


def run(options: argparse.Namespace) -> None:
    from torchvision_models import schemas

    schemas()
    with tempfile.TemporaryDirectory() as scratch:
        results = open_rows("prune_timm", options, scratch)
        results.environment["rivals"]["timm"] = version_of("timm")
        names = list(QUICK) if options.quick else choose(results)
        fill(results, "timm", names, options)
        claim(results, names)


def main() -> None:
    start(arguments(__doc__), run)


if __name__ == "__main__":
    main()
