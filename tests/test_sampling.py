"""The weighted sampler: one stream for every number of processes, a pure function of (seed, epoch, position)."""

import itertools
import pickle
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from matchai.sampling import DistributedWeightedSampler, Draw, share, slice_weights

LENGTHS = st.sampled_from([160, 157, 1])
WORLDS = st.sampled_from([1, 2, 3, 4, 8])


def weights_of(length: int) -> NDArray[np.float64]:
    return np.where(np.arange(length) % 3 == 0, 3.0, 1.0)


def deal(length: int, batch_size: int, world: int, seed: int, epoch: int = 0) -> list[list[list[int]]]:
    """Every step's lists, one a process."""
    samplers = [
        DistributedWeightedSampler(weights_of(length), batch_size, seed=seed, num_processes=world, process_index=rank)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(step) for step in zip(*samplers, strict=True)]


@settings(deadline=None, max_examples=60)
@given(length=LENGTHS, batch_size=st.integers(1, 200), world=WORLDS, seed=st.integers(0, 2**63 - 1))
def test_the_processes_together_draw_the_global_batches_of_one(
    length: int, batch_size: int, world: int, seed: int
) -> None:
    alone = [step[0] for step in deal(length, batch_size, 1, seed)]
    together = [list(itertools.chain(*step)) for step in deal(length, batch_size, world, seed)]
    assert together == alone


@settings(deadline=None, max_examples=30)
@given(length=LENGTHS, batch_size=st.integers(1, 200), world=WORLDS)
def test_positions_count_every_draw_once(length: int, batch_size: int, world: int) -> None:
    steps = deal(length, batch_size, world, 5, epoch=2)
    draws: list[Any] = [draw for step in steps for part in step for draw in part]
    assert [(draw.epoch, draw.position) for draw in draws] == [(2, position) for position in range(length)]


@settings(deadline=None, max_examples=30)
@given(length=LENGTHS, batch_size=st.integers(1, 200), world=WORLDS)
def test_len_is_the_number_of_steps_on_every_process(length: int, batch_size: int, world: int) -> None:
    sampler = DistributedWeightedSampler(weights_of(length), batch_size, num_processes=world, process_index=world - 1)
    assert len(sampler) == len(list(sampler))


@given(size=st.integers(0, 300), world=st.integers(1, 16))
def test_shares_tile_a_batch_and_differ_by_at_most_1(size: int, world: int) -> None:
    parts = [share(size, world, rank) for rank in range(world)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(size))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


def drawn_over_epochs(weights: NDArray[np.float64], epochs: int) -> NDArray[np.int64]:
    sampler = DistributedWeightedSampler(weights, len(weights), seed=11)
    counted = np.zeros(len(weights), dtype=np.int64)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in sampler:
            counted += np.bincount(batch, minlength=len(weights))
    return counted


@pytest.mark.parametrize("spread", [1, 7])  # within one block of 64, and over several
def test_slices_are_drawn_in_proportion_to_their_weights(spread: int) -> None:
    weights = np.zeros(40 * spread)
    weights[::spread] = np.where(np.arange(40) < 13, 3.0, 1.0)
    weights[5 * spread] = 0
    counted = drawn_over_epochs(weights, 1000 // spread)
    expected = weights / weights.sum() * counted.sum()
    assert stats.chisquare(counted[weights > 0], expected[weights > 0]).pvalue > 1e-3


def test_a_slice_of_weight_0_is_never_drawn() -> None:
    weights = np.ones(200)
    weights[[0, 63, 64, 127, 199]] = 0
    weights[128:192] = 0
    assert drawn_over_epochs(weights, 100)[weights == 0].sum() == 0


def test_neighbouring_draws_are_independent() -> None:
    sampler = DistributedWeightedSampler(np.ones(4), 1, num_samples=8000, seed=3)
    draws = [batch[0] for batch in sampler]
    table = np.zeros((4, 4))
    np.add.at(table, (draws[:-1:2], draws[1::2]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_global_random_states_are_neither_changed_nor_read() -> None:
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 the global state is what is tested
        torch.manual_seed(seed)
        before = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        results.append(deal(157, 6, 2, seed=0))
        after = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        assert before == after
    assert results[0] == results[1]


def test_seed_0_epoch_1_and_seed_1_epoch_0_are_unrelated() -> None:
    weights = np.ones(1000)
    streams = []
    for seed, epoch in ((0, 1), (1, 0)):
        sampler = DistributedWeightedSampler(weights, 1000, seed=seed)
        sampler.set_epoch(epoch)
        streams.append(np.array(next(iter(sampler))))
    same = int((streams[0] == streams[1]).sum())
    assert stats.binomtest(same, 1000, 1 / 1000).pvalue > 1e-3
    assert abs(np.corrcoef(streams)[0, 1]) < 4 / np.sqrt(1000)


@pytest.mark.parametrize("world", [1, 3])
def test_the_state_after_the_kth_list_is_the_draws_dealt_over_all_processes(world: int) -> None:
    sampler = DistributedWeightedSampler(weights_of(157), 10, seed=4, num_processes=world, process_index=world - 1)
    for k, _ in enumerate(sampler, 1):
        assert sampler.state_dict() == {"seed": 4, "epoch": 0, "consumed": min(10 * k, 157)}


@settings(deadline=None, max_examples=50)
@given(legs=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40), st.integers(0, 5)), max_size=6))
def test_going_on_with_other_processes_and_batch_sizes_goes_on_with_the_same_stream(
    legs: list[tuple[int, int, int]],
) -> None:
    weights = weights_of(157)
    whole = next(iter(DistributedWeightedSampler(weights, 157, seed=9)))
    state = DistributedWeightedSampler(weights, 1, seed=9).state_dict()
    drawn: list[int] = []
    for world, batch_size, steps in [*legs, (2, 16, 1000)]:
        samplers = [
            DistributedWeightedSampler(weights, batch_size, num_processes=world, process_index=rank)
            for rank in range(world)
        ]
        for sampler in samplers:
            sampler.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch may be used up before the last leg
            running: list[Iterator[list[int]]] = [iter(sampler) for sampler in samplers]
            for _ in range(steps):
                step = [next(iterator, []) for iterator in running]
                drawn += itertools.chain(*step)
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert drawn == whole


def test_set_epoch_goes_to_the_start_of_another_epoch() -> None:
    sampler = DistributedWeightedSampler(weights_of(40), 8, seed=1)
    next(iter(sampler))
    sampler.set_epoch(3)
    assert sampler.state_dict() == {"seed": 1, "epoch": 3, "consumed": 0}


def test_set_epoch_with_the_current_epoch_keeps_a_loaded_position() -> None:
    sampler = DistributedWeightedSampler(weights_of(40), 8)
    sampler.load_state_dict({"seed": 1, "epoch": 3, "consumed": 16})
    sampler.set_epoch(3)
    assert sampler.state_dict() == {"seed": 1, "epoch": 3, "consumed": 16}


def test_epochs_differ() -> None:
    assert deal(160, 160, 1, seed=0, epoch=0) != deal(160, 160, 1, seed=0, epoch=1)


def test_a_used_up_epoch_yields_nothing_and_warns() -> None:
    sampler = DistributedWeightedSampler(weights_of(40), 8)
    assert len(list(sampler)) == 5
    with pytest.warns(UserWarning, match="set_epoch"):
        assert list(sampler) == []


@pytest.mark.parametrize(
    "weights",
    [[1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], [0.0, 0.0], [], [[1.0, 2.0]], ["a"], 3.0, [1j]],
    ids=str,
)
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        DistributedWeightedSampler(weights, 2)


@pytest.mark.parametrize("place", [0, 70, 2**20 + 3])
def test_the_error_names_the_first_bad_weight(place: int) -> None:
    weights = np.ones(2**20 + 10, dtype=np.float32)
    weights[place:] = -2
    with pytest.raises(ValueError, match=rf"weight {place} is -2"):
        DistributedWeightedSampler(weights, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("num_samples", 0), ("seed", -1), ("process_index", 2), ("process_index", -1)],
)
def test_a_number_out_of_range_is_refused_by_name(name: str, value: int) -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "num_processes": 2, "process_index": 0, name: value}
    with pytest.raises(ValueError, match=name):
        DistributedWeightedSampler([1.0, 2.0], **arguments)


@pytest.mark.parametrize("consumed", [-1, 41])
def test_a_position_outside_the_epoch_is_refused(consumed: int) -> None:
    sampler = DistributedWeightedSampler(weights_of(40), 8)
    with pytest.raises(ValueError, match="consumed"):
        sampler.load_state_dict({"seed": 0, "epoch": 0, "consumed": consumed})


def test_a_float32_memmap_draws_as_the_float64_array_of_its_values(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(500).astype(np.float32)
    np.save(tmp_path / "weights.npy", values)
    mapped = np.load(tmp_path / "weights.npy", mmap_mode="r")
    draws = [list(DistributedWeightedSampler(w, 50, seed=2)) for w in (mapped, values.astype(np.float64))]
    assert draws[0] == draws[1]


def test_a_draw_survives_pickling() -> None:
    draw = pickle.loads(pickle.dumps(Draw(5, epoch=2, position=9)))
    assert type(draw) is Draw
    assert (int(draw), draw.epoch, draw.position) == (5, 2, 9)


def test_slice_weights_raise_slices_that_show_a_target_class() -> None:
    presence = np.array([[True, False, True], [False, True, True], [False, False, False]])
    assert slice_weights(presence, [1], 3.0).tolist() == [1.0, 3.0, 1.0]
    assert slice_weights(presence, [0, 1], 2.5).tolist() == [2.5, 2.5, 1.0]
