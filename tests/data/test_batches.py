"""Order, cutting and types of batches. Oracles: plain numpy indexing, PyTorch's DataLoader."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pared.data.batches import Arrays, Batches, Items
from pared.data.images import mixed
from pared.errors import DataError


def numbers(length: int, **options: object) -> Batches:
    return Batches(Arrays(np.arange(length, dtype=np.float32), None), **options)  # type: ignore[arg-type]


def read(batches: Batches) -> list[float]:
    return [value for inputs, _ in batches for value in inputs.tolist()]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_order_is_a_function_of_seed_and_epoch_when_read_at_any_time(length, size, seed, epoch):
    first, second = (numbers(length, batch_size=size, shuffle=True, seed=seed) for _ in range(2))
    first.set_epoch(epoch + 1)
    list(first)  # neither earlier epochs nor earlier readings leave a trace
    for batches in (first, second):
        batches.set_epoch(epoch)
    torch.rand(3)
    assert read(first) == read(first) == read(second)
    assert sorted(read(first)) == list(range(length))
    assert [len(inputs) for inputs, _ in first] == [size] * (length // size) + [length % size] * (length % size > 0)
    assert len(first) == len(list(first))


def test_order_differs_when_epoch_or_seed_does():
    batches = numbers(100, shuffle=True)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs.append(tuple(read(batches)))
    assert len({*epochs, tuple(read(numbers(100, shuffle=True, seed=1))), tuple(range(100))}) == 5


def test_order_follows_the_generator_when_it_is_seeded_and_restored():
    batches = numbers(50, shuffle=True, seed=3)
    before, state = read(batches), batches.generator.get_state()
    batches.generator.manual_seed(4)
    assert read(batches) == read(numbers(50, shuffle=True, seed=4)) != before
    batches.generator.set_state(state)
    assert read(batches) == before


def test_reading_leaves_random_states_alone_when_shuffled():
    batches = numbers(50, shuffle=True)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), batches.generator.get_state()
    list(batches)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert torch.equal(states[2], batches.generator.get_state())


def test_two_readings_do_not_disturb_each_other_when_interleaved():
    batches = numbers(10, batch_size=3, shuffle=True)
    pairs = [(a[0].tolist(), b[0].tolist()) for a, b in zip(batches, batches, strict=True)]
    assert all(a == b for a, b in pairs)


@pytest.mark.parametrize("inputs", ["one", "tuple", "dict"])
def test_arrays_keep_samples_together_when_shuffled(inputs):
    x = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
    y = np.arange(23, dtype=np.uint8)
    given_inputs = {"one": x, "tuple": (x, torch.from_numpy(x * 2)), "dict": {"a": x, "b": x * 2}}[inputs]
    for found, labels in Batches(Arrays(given_inputs, y), batch_size=5, shuffle=True):
        first, second = {
            "one": lambda f=found: (f, f * 2),
            "tuple": lambda f=found: f,
            "dict": lambda f=found: (f["a"], f["b"]),
        }[inputs]()
        assert labels.dtype == torch.int64
        assert torch.equal(first, torch.from_numpy(x[labels.numpy()]))
        assert torch.equal(second, first * 2)


def test_batches_do_not_share_memory_when_arrays_are_read_only(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "x.npy", x)
    for array in (np.load(tmp_path / "x.npy", mmap_mode="r"), np.frombuffer(x.tobytes(), np.float32).reshape(6, 2), x):
        for inputs, _ in Batches(Arrays(array, None), batch_size=4):
            inputs.zero_()
        assert array.sum() == 66


def test_targets_keep_their_type_when_they_are_no_integers():
    for dtype in (np.float32, np.bool_):
        (_, target), *_ = Batches(Arrays(np.zeros((2, 1)), np.ones(2, dtype)))
        assert target.numpy().dtype == dtype


def test_items_equal_a_dataloader_when_unshuffled():
    samples = TensorDataset(torch.arange(14.0).reshape(7, 2), torch.arange(7))
    ours, theirs = Batches(Items(samples), batch_size=3), DataLoader(samples, batch_size=3)
    assert len(ours) == len(theirs)
    for (x, y), (want_x, want_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, want_x)
        assert torch.equal(y, want_y)


class Uneven(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(index)


def test_items_say_which_samples_when_shapes_differ():
    with pytest.raises(DataError, match=r"samples \[0, 1, 2\] of Uneven do not make a batch.*collate_fn"):
        list(Batches(Items(Uneven())))


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (np.zeros((3, 2)), np.zeros(4), "target has 4, input 0 has 3"),
        ((np.zeros(3), np.zeros(2)), None, "input 1 has 2"),
        ({"a": np.zeros(3)}, torch.zeros(2), "input a has 3"),
        (np.array(1.0), None, "input 0 is a single number"),
        (np.array(["a", "b"]), None, "input 0 is an array of <U1"),
        (np.zeros(2), np.array([None, 1]), "target is an array of object"),
        (np.zeros(2, ">f4"), None, "native byte order"),
    ],
)
def test_arrays_refuse_when_they_are_no_data_set(inputs, target, message):
    with pytest.raises(DataError, match=message):
        Arrays(inputs, target)


def test_batches_refuse_when_empty_or_cut_to_nothing():
    with pytest.raises(DataError, match="no sample"):
        numbers(0)
    with pytest.raises(DataError, match="batch_size must be at least 1, found 0"):
        numbers(3, batch_size=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 60))
def test_mixed_holds_a_window_and_loses_nothing_when_streaming(length, window):
    taken = 0

    def rows():
        nonlocal taken
        for number in range(length):
            taken = number + 1
            yield number

    given_out = []
    for number in mixed(rows(), np.random.default_rng(0), window):
        assert taken - len(given_out) <= window + 1
        given_out.append(number)
    assert sorted(given_out) == list(range(length))
