"""The weighted sampler: one stream for every number of processes, a pure function of (seed, epoch, position)."""

import itertools
import json
import pickle
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped, unused-ignore]
from torch.utils.data import DataLoader, Dataset

from matchai.sampling.draws import permute
from matchai.sampling.sampler import DistributedWeightedSampler, Draw, collate, micro_shares, share, slice_weights
from tests.conftest import assert_global_randomness_is_untouched

LENGTHS = st.sampled_from([160, 157, 1])
WORLDS = st.sampled_from([1, 2, 3, 4, 8])
KINDS: dict[str, dict[str, Any]] = {
    "independent": {},
    "distinct": {"replacement": False},
    "balanced": {"balanced": True},
}
EVERY_KIND = st.sampled_from(list(KINDS))


def weights_of(length: int) -> NDArray[np.float64]:
    return np.where(np.arange(length) % 3 == 0, 3.0, 1.0)


def deal(
    length: int, batch_size: int, world: int, seed: int, epoch: int = 0, **arguments: Any
) -> list[list[list[int]]]:
    """Every step's lists, one a process."""
    samplers = [
        DistributedWeightedSampler(
            weights_of(length), batch_size, seed=seed, num_processes=world, process_index=rank, **arguments
        )
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(step) for step in zip(*samplers, strict=True)]


@settings(deadline=None, max_examples=100)
@given(length=LENGTHS, batch_size=st.integers(1, 200), world=WORLDS, seed=st.integers(0, 2**63 - 1), kind=EVERY_KIND)
def test_the_processes_together_draw_the_global_batches_of_one(
    length: int, batch_size: int, world: int, seed: int, kind: str
) -> None:
    alone = [step[0] for step in deal(length, batch_size, 1, seed, **KINDS[kind])]
    together = [list(itertools.chain(*step)) for step in deal(length, batch_size, world, seed, **KINDS[kind])]
    assert together == alone
    assert sum(map(len, together)) == length


@settings(deadline=None, max_examples=60)
@given(batch_size=st.integers(1, 40), world=WORLDS, accumulate=st.integers(1, 8))
def test_a_micro_batch_consists_of_the_same_draws_on_any_number_of_processes(
    batch_size: int, world: int, accumulate: int
) -> None:
    steps = deal(157, batch_size, world, seed=3, accumulate=accumulate)
    for step, (whole,) in zip(steps, deal(157, batch_size, 1, seed=3), strict=True):
        num_parts = min(accumulate, len(whole))
        dealt: list[list[int]] = [[] for _ in range(num_parts)]
        for rank, part in enumerate(step):
            sizes = [stop - start for start, stop in micro_shares(len(whole), accumulate, world, rank)]
            ends = [0, *itertools.accumulate(sizes)]
            assert ends[-1] == len(part)
            for number in range(num_parts):
                dealt[number] += part[ends[number] : ends[number + 1]]
        assert list(itertools.chain(*dealt)) == whole
        lengths = [len(one) for one in dealt]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 1


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


def drawn_over_epochs(weights: NDArray[np.float64], epochs: int, **arguments: Any) -> NDArray[np.int64]:
    sampler = DistributedWeightedSampler(weights, len(weights), seed=11, **arguments)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_weight_0_is_never_drawn(kind: str) -> None:
    weights = np.ones(200)
    weights[[0, 63, 64, 127, 199]] = 0
    weights[128:192] = 0
    assert drawn_over_epochs(weights, 100, **KINDS[kind])[weights == 0].sum() == 0


def test_without_replacement_an_epoch_holds_every_item_once() -> None:
    sampler = DistributedWeightedSampler(weights_of(157), 10, replacement=False, seed=5)
    assert sorted(itertools.chain(*sampler)) == list(range(157))


def test_without_replacement_the_draws_follow_the_law_of_what_is_left() -> None:
    weights = np.array([4.0, 3.0, 2.0, 1.0])
    pairs = np.zeros((4, 4))
    for epoch in range(6000):
        sampler = DistributedWeightedSampler(weights, 2, 2, replacement=False, seed=8)
        sampler.set_epoch(epoch)
        pairs[tuple(next(iter(sampler)))] += 1
    first = weights / weights.sum()
    expected = np.array([[first[i] * weights[j] / (10 - weights[i]) for j in range(4)] for i in range(4)])
    apart = ~np.eye(4, dtype=bool)
    assert pairs[~apart].sum() == 0
    assert stats.chisquare(pairs[apart], 6000 * expected[apart]).pvalue > 1e-3


def test_more_draws_than_items_without_replacement_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples is 4, but without replacement there are 3 draws at most"):
        DistributedWeightedSampler([1.0, 0.0, 2.0, 1.0], 2, 4, replacement=False)


def test_balanced_draws_without_replacement_are_refused() -> None:
    with pytest.raises(ValueError, match="replacement=True"):
        DistributedWeightedSampler([1.0, 2.0], 2, replacement=False, balanced=True)


@settings(deadline=None, max_examples=150)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 3.0, 1e-7, 19.0]), min_size=1, max_size=80).filter(any),
    num_samples=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_balanced_counts_are_those_expected_to_the_nearest_whole_numbers(
    weights: list[float], num_samples: int, seed: int
) -> None:
    sampler = DistributedWeightedSampler(weights, 7, num_samples, balanced=True, seed=seed)
    counts = np.bincount(list(itertools.chain(*sampler)), minlength=len(weights))
    assert counts.sum() == num_samples
    total = sum(map(Fraction, weights))
    for value in set(weights):
        of_class = counts[np.array(weights) == value]
        expected = num_samples * len(of_class) * Fraction(value) / total
        assert abs(int(of_class.sum()) - expected) < 1 + 1e-9
        assert of_class.max() - of_class.min() <= 1
        if num_samples * Fraction(value) >= total:
            assert of_class.min() >= 1


def test_balanced_draws_take_every_slice_as_often_as_its_weight_says_over_epochs() -> None:
    weights = np.random.default_rng(1).uniform(0.2, 3, 50)  # all different: fractions decide
    epochs = 2000
    counted = drawn_over_epochs(weights, epochs, balanced=True)
    probability = 50 * weights / weights.sum() % 1
    allowed = 4.5 * np.sqrt(epochs * probability * (1 - probability))
    assert (np.abs(counted - epochs * 50 * weights / weights.sum()) <= allowed).all()


def test_balanced_draws_of_equal_weights_are_a_permutation() -> None:
    sampler = DistributedWeightedSampler(np.full(157, 0.3), 10, balanced=True)
    assert sorted(itertools.chain(*sampler)) == list(range(157))


@pytest.mark.parametrize("jitter", [0.0, 0.01])  # classes of equal weight, or all weights different
@pytest.mark.parametrize("period", [2, 4])
def test_balanced_draws_do_not_resonate_with_a_period_in_the_data(period: int, jitter: float) -> None:
    place = np.arange(80)
    weights = np.where(place % 2 == 0, 3.0, 1.0) * (1 + jitter * place / 80)
    marked = place % period == 1  # slices of weight 1, so those drawn once or not at all
    shares = []
    for epoch in range(300):
        sampler = DistributedWeightedSampler(weights, 80, balanced=True, seed=2)
        sampler.set_epoch(epoch)
        shares.append(marked[next(iter(sampler))].mean())
    # half of them are drawn in an epoch, by chance which: not more spread than independent choices
    assert np.std(shares) <= np.sqrt(marked.sum() / 4) / 80 * 1.15
    assert np.mean(shares) == pytest.approx(weights[marked].sum() / weights.sum(), abs=0.005)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_a_keyed_permutation_takes_every_value_once(size: int) -> None:
    values = np.arange(size, dtype=np.uint64)
    permuted = permute(values, np.uint64(size), np.uint64(size * 7))
    assert sorted(permuted.tolist()) == values.tolist()


@pytest.mark.parametrize("size", [3, 10, 70])
def test_keyed_permutations_spread_pairs_evenly(size: int) -> None:
    keys = np.arange(200_000, dtype=np.uint64)
    first, second = (permute(np.full(len(keys), v, np.uint64), np.uint64(size), keys).astype(int) for v in (0, 1))
    pairs = np.zeros((size, size))
    np.add.at(pairs, (first, second), 1)
    apart = ~np.eye(size, dtype=bool)
    assert stats.chisquare(pairs[apart]).pvalue > 1e-3


def test_neighbouring_draws_are_independent() -> None:
    sampler = DistributedWeightedSampler(np.ones(4), 1, num_samples=8000, seed=3)
    draws = [batch[0] for batch in sampler]
    table = np.zeros((4, 4))
    np.add.at(table, (draws[:-1:2], draws[1::2]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_global_random_states_are_neither_changed_nor_read() -> None:
    assert_global_randomness_is_untouched(
        lambda: [deal(157, 6, 2, seed=0, **arguments) for arguments in KINDS.values()]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_seed_0_epoch_1_and_seed_1_epoch_0_are_unrelated(kind: str) -> None:
    weights = np.ones(1000)
    streams = []
    for seed, epoch in ((0, 1), (1, 0)):
        sampler = DistributedWeightedSampler(weights, 1000, seed=seed, **KINDS[kind])
        sampler.set_epoch(epoch)
        streams.append(np.array(next(iter(sampler))))
    same = int((streams[0] == streams[1]).sum())
    assert stats.binomtest(same, 1000, 1 / 1000).pvalue > 1e-3
    assert abs(np.corrcoef(streams)[0, 1]) < 4 / np.sqrt(1000)


@pytest.mark.parametrize("kind", KINDS)
def test_large_seeds_share_no_stream_with_another_epoch_of_a_small_one(kind: str) -> None:
    # 2^32 and 0 are the 32-bit words of seed 0, epoch 1, strung together
    assert deal(157, 157, 1, seed=2**32, epoch=0, **KINDS[kind]) != deal(157, 157, 1, seed=0, epoch=1, **KINDS[kind])


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int16, torch.tensor])
def test_whole_numbers_of_any_type_are_taken_and_kept_as_plain_ones(kind: Any) -> None:
    sampler = DistributedWeightedSampler(weights_of(157), kind(100), seed=kind(3))
    sampler.set_epoch(kind(2))
    assert [len(batch) for batch in sampler] == [100, 57]
    assert json.loads(json.dumps(sampler.state_dict())) == {"seed": 3, "epoch": 2, "consumed": 157}


@pytest.mark.parametrize("name", ["batch_size", "num_samples", "seed", "process_index", "num_processes"])
def test_a_number_that_is_not_whole_is_refused_by_name(name: str) -> None:
    arguments: dict[str, Any] = {"batch_size": 2, name: 0.5}
    with pytest.raises(TypeError, match=f"{name} is 0.5, but must be a whole number"):
        DistributedWeightedSampler([1.0, 2.0], **arguments)


@pytest.mark.parametrize("state", [{"seed": 0, "epoch": 1}, {"seed": -1, "epoch": 0, "consumed": 0}])
def test_a_state_that_is_none_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"consumed|at least 0"):
        DistributedWeightedSampler([1.0, 2.0], 2).load_state_dict(state)


def test_torch_weights_of_any_kind_are_taken() -> None:
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0])
    expected = list(DistributedWeightedSampler(weights.numpy(), 2))
    for kind in (weights.clone().requires_grad_(), weights.bfloat16(), weights.int()):
        assert list(DistributedWeightedSampler(kind, 2)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 3])
def test_the_state_after_the_kth_list_is_the_draws_dealt_over_all_processes(world: int, kind: str) -> None:
    sampler = DistributedWeightedSampler(
        weights_of(157), 10, seed=4, num_processes=world, process_index=world - 1, **KINDS[kind]
    )
    for k, _ in enumerate(sampler, 1):
        assert sampler.state_dict() == {"seed": 4, "epoch": 0, "consumed": min(10 * k, 157)}


@settings(deadline=None, max_examples=100)
@given(legs=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40), st.integers(0, 5)), max_size=6), kind=EVERY_KIND)
def test_going_on_with_other_processes_and_batch_sizes_goes_on_with_the_same_stream(
    legs: list[tuple[int, int, int]], kind: str
) -> None:
    weights = weights_of(157)
    whole = next(iter(DistributedWeightedSampler(weights, 157, seed=9, **KINDS[kind])))
    state = DistributedWeightedSampler(weights, 1, seed=9).state_dict()
    drawn: list[int] = []
    for world, batch_size, steps in [*legs, (2, 16, 1000)]:
        samplers = [
            DistributedWeightedSampler(weights, batch_size, num_processes=world, process_index=rank, **KINDS[kind])
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
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_none_are_refused(weights: Any, kind: str) -> None:
    with pytest.raises(ValueError, match="weight"):
        DistributedWeightedSampler(weights, 2, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_need_not_be_normalised(kind: str) -> None:
    drawn = [
        list(DistributedWeightedSampler(scale * weights_of(160), 16, seed=1, **KINDS[kind])) for scale in (1, 2.0**-40)
    ]
    assert drawn[0] == drawn[1]


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


def memory_above(work: str) -> float:
    """MB of anonymous memory that a fresh process takes at most for `work`, above that of its imports."""
    program = f"""
import re, threading, time
import numpy as np
from matchai.sampling.sampler import DistributedWeightedSampler
def anonymous():
    return int(re.search(r"Anonymous: +([0-9]+)", open("/proc/self/smaps_rollup").read())[1]) / 1024
before, peak, done = anonymous(), [0.0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
{work}
done.append(True)
watcher.join()
print(max(peak[0], anonymous()) - before)
"""
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's count of anonymous memory")
def test_a_hundred_million_mapped_weights_take_under_100_mb_of_anonymous_memory(tmp_path: Path) -> None:
    weights = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype=np.float32, shape=(10**8,))
    weights[:] = 1
    weights[::1000] = 3
    del weights
    work = f"""
sampler = DistributedWeightedSampler(
    np.load({str(tmp_path / "w.npy")!r}, mmap_mode="r"), 64, num_processes=8, process_index=5
)
steps = iter(sampler)
assert all(0 <= draw < 10**8 for _ in range(10) for draw in next(steps))
"""
    assert memory_above(work) < 100


def test_a_process_draws_its_own_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = DistributedWeightedSampler(np.ones(1000), 100, num_processes=10, process_index=3)
    asked: list[tuple[int, ...]] = []
    items = sampler.draws.items

    def remember(*place: int) -> NDArray[np.int64]:
        asked.append(place)
        return items(*place)

    monkeypatch.setattr(sampler.draws, "items", remember)
    next(iter(sampler))
    assert asked == [(0, 0, 30, 10)]


Pair = namedtuple("Pair", ["image", "label"])


@pytest.mark.parametrize(
    "item",
    [
        (torch.ones(1, 4, 4), 3),
        {"image": np.ones((2, 2), np.float32), "name": "slice"},
        Pair(torch.ones(2), torch.tensor(1)),
        torch.zeros(3),
    ],
    ids=["tuple", "dict", "named tuple", "tensor"],
)
def test_an_empty_share_collates_to_the_structure_of_a_full_one_with_no_items(item: Any) -> None:
    full, empty = collate([item, item]), collate([], like=item)
    full_leaves, empty_leaves = torch.utils._pytree.tree_leaves(full), torch.utils._pytree.tree_leaves(empty)
    tensors = [(a, b) for a, b in zip(full_leaves, empty_leaves, strict=False) if isinstance(a, torch.Tensor)]
    assert type(full) is type(empty)
    assert tensors
    assert all(b.shape == (0, *a.shape[1:]) and a.dtype == b.dtype for a, b in tensors)


class Squares(Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), float(index)), int(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_makes_tensors_of_no_items_of_an_empty_share(num_workers: int) -> None:
    sampler = DistributedWeightedSampler(np.ones(13), 4, num_processes=2, process_index=1)
    loader = DataLoader(Squares(), batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
    shapes = [tuple(images.shape) for images, _ in loader]
    assert shapes == [(2, 1, 2, 2)] * 3 + [(0, 1, 2, 2)]


def test_an_empty_share_that_comes_first_asks_for_an_item() -> None:
    with pytest.raises(ValueError, match="like=dataset"):
        type(collate)()([])
