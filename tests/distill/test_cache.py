"""The teacher's outputs on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pared.distill.cache import HEADER, CachedOutputs, OutputCache, keys_of, teacher_id
from pared.errors import ArtifactError, DataError
from pared.task import as_inputs


def samples(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed))


def double(x: Tensor) -> Tensor:
    return 2 * x.flatten(1)[:, :4]


def test_cache_gives_each_sample_its_own_row_when_the_order_changes(tmp_path: Path) -> None:
    cache, x = OutputCache(tmp_path / "a" / "rows", "t", (4,)), samples(6)
    assert cache.find(keys_of(as_inputs(x))) is None
    cache.add(keys_of(as_inputs(x)), double(x))
    order = torch.tensor([4, 0, 5, 5])
    found = cache.find(keys_of(as_inputs(x[order])))
    assert found is not None and torch.equal(found, double(x[order]))
    cache.add(keys_of(as_inputs(x)), double(x))  # known already: nothing grows
    cache.flush()
    assert cache.path.stat().st_size == HEADER + 6 * (16 + 16)
    again = OutputCache(cache.path, "t", (4,)).find(keys_of(as_inputs(x[2:4])))
    assert again is not None and torch.equal(again, double(x[2:4]))


def test_keys_tell_samples_apart_when_values_types_shapes_or_names_differ() -> None:
    x = samples(2)
    forms = [x, x.double(), x.flatten(1), x + 1, {"x": x}, {"y": x}, (x, x), (x, x + 1)]
    keys = [key for form in forms for key in keys_of(as_inputs(form))]
    assert len(set(keys)) == len(keys) == 16
    assert keys_of(as_inputs(x.transpose(0, 1).contiguous().transpose(0, 1))) == keys[:2]  # whatever the strides
    assert keys_of(as_inputs(torch.cat([samples(1, 9), x])))[1:] == keys[:2]  # and the batch


def test_cache_drops_an_unfinished_row_when_a_run_was_killed(tmp_path: Path) -> None:
    path, x = tmp_path / "rows", samples(3)
    cache = OutputCache(path, "t", (4,))
    cache.add(keys_of(as_inputs(x)), double(x))
    cache.flush()
    path.write_bytes(path.read_bytes()[:-5])
    again = OutputCache(path, "t", (4,))
    assert again.find(keys_of(as_inputs(x))) is None
    assert again.missing(keys_of(as_inputs(x))) == 1
    again.add(keys_of(as_inputs(x)), double(x))
    found = again.find(keys_of(as_inputs(x)))
    assert found is not None and torch.equal(found, double(x))


def test_cache_is_refused_when_it_is_of_another_teacher(tmp_path: Path) -> None:
    OutputCache(tmp_path / "rows", "one", (4,))
    with pytest.raises(ArtifactError, match=r"outputs of another teacher \(one, this one is two\); delete it"):
        OutputCache(tmp_path / "rows", "two", (4,))
    with pytest.raises(ArtifactError, match="another teacher"):
        OutputCache(tmp_path / "rows", "one", (5,))
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ArtifactError, match="is no cache of a teacher's outputs; delete it"):
        OutputCache(tmp_path / "other", "one", (4,))


def test_cache_says_so_when_outputs_change_their_shape(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path / "rows", "t", (5,))
    with pytest.raises(DataError, match=r"outputs are \(2, 4\), where \(2, 5\) was expected; set cache=False"):
        cache.add(keys_of(as_inputs(samples(2))), double(samples(2)))


def test_a_teacher_has_another_fingerprint_when_a_weight_differs_and_the_same_in_another_mode() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    one = teacher_id(teacher.train())
    assert teacher.training
    assert teacher_id(teacher.eval()) == one
    with torch.no_grad():
        teacher[0].bias[0] += 1
    assert teacher_id(teacher) != one


def run_epoch(cached: CachedOutputs, x: Tensor, size: int = 4) -> None:
    cached.begin()
    for part in x.split(size):
        keys = keys_of(as_inputs(part))
        if cached.find(keys) is None:
            cached.cache.add(keys, double(part))
    cached.end()


def test_later_epochs_are_refused_when_their_samples_were_never_seen(tmp_path: Path) -> None:
    cached, x = CachedOutputs(OutputCache(tmp_path / "rows", "t", (4,))), samples(40)
    run_epoch(cached, x)
    run_epoch(cached, x.flip(0))
    run_epoch(cached, torch.cat([x[:-4], samples(4, 1)]))  # a last batch that was dropped before may come
    with pytest.raises(DataError, match="random augmentation makes them, so outputs cannot be kept; set cache=False"):
        run_epoch(cached, x + 0.1)
