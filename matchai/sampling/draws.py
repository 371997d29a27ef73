"""Three kinds of weighted draws: which item is draw t of an epoch, each a pure function of (seed, epoch, t).

The random words come from the counter-based generator Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3") with a key made of (seed, epoch), so a draw needs no other draw, and no generator has a state.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.system import seed_sequence

BLOCK = 64  # weights a block: the table of N = 10^8 then takes 12.5 MB, and a draw reads one cache line or four
PIECE = 1 << 20  # weights read at a time, 8 MB in double precision
ROUNDS = 8  # of the Feistel network (Luby and Rackoff 1988); 2 bits a half show in 20,000 keys, 4 do not in 400,000
CHUNK = 4096  # balanced draws made at a time, as one of them costs nearly what a thousand do
SMALL = 64  # items that are permuted by sorting
_STREAM = 0x5A3B  # keeps the sampler's random words apart from those of augmentation and drop path


class IndependentDraws:
    """With replacement: every draw takes item i with probability w_i / Σw, whatever the other draws took.

    Args:
        weights: (N,) as of `check_shape`; finite, not negative, not all 0; a memory-mapped array stays on disk.

    Raises:
        ValueError: If the weights are no weights.

    >>> draws = IndependentDraws(np.array([1.0, 3.0, 0.0]))
    >>> draws.items(seed=7, epoch=0, first=0, count=8), draws.items(seed=7, epoch=0, first=6, count=2)
    (array([1, 1, 0, 1, 1, 1, 1, 0]), array([1, 0]))
    """

    def __init__(self, weights: NDArray[Any]) -> None:
        self.weights = weights
        sums = np.zeros(-(-len(weights) // BLOCK))
        for start, piece in _pieces(weights):
            padded = np.pad(piece, (0, -len(piece) % BLOCK)).reshape(-1, BLOCK)
            padded.sum(axis=1, out=sums[start // BLOCK :][: len(padded)])
        self.block_ends = np.cumsum(sums, out=sums)
        _check_sum(float(self.block_ends[-1]))

    def items(self, seed: int, epoch: int, first: int, count: int) -> NDArray[np.int64]:
        """The items of draws `first` to `first + count`, (count,): a block by its sum, then an item within the block.

        Costs O(count), whatever N and `first` are.
        """
        words = _words(seed, epoch, first, 4 * count).reshape(count, 4)
        # 53 bits make a uniform double in [0, 1), so uniform * sum < sum: an item past the last is never met
        uniform = _uniform(words[:, :2])
        block = np.searchsorted(self.block_ends, uniform[:, 0] * self.block_ends[-1], side="right")
        places = block[:, None] * BLOCK + np.arange(BLOCK)
        inside = places < len(self.weights)
        weights = np.where(inside, self.weights[np.where(inside, places, 0)], 0).astype(np.float64)
        ends = np.cumsum(weights, axis=1)
        within = (ends <= (uniform[:, 1] * ends[:, -1])[:, None]).sum(axis=1)
        return np.asarray(block * BLOCK + within, dtype=np.int64)


class DistinctDraws:
    """Without replacement: every draw takes one of the items left, each with probability in proportion to its weight.

    Item i gets an exponential variate of rate w_i; the items in the order of their variates are such draws (Efraimidis
    and Spirakis 2006, "Weighted random sampling with a reservoir"). An epoch's order takes O(N) time and memory.

    Args:
        weights: (N,) as of `check_shape`; finite, not negative, not all 0.

    Attributes:
        num_items: Items of a weight above 0, the most draws of an epoch.

    Raises:
        ValueError: If the weights are no weights.

    >>> draws = DistinctDraws(np.array([1.0, 3.0, 0.0]))
    >>> draws.num_items, draws.items(seed=7, epoch=0, first=0, count=2)
    (2, array([1, 0]))
    """

    def __init__(self, weights: NDArray[Any]) -> None:
        self.weights = weights
        self.num_items = sum(int(np.count_nonzero(piece)) for _, piece in _pieces(weights))
        _check_sum(float(self.num_items))
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def items(self, seed: int, epoch: int, first: int, count: int) -> NDArray[np.int64]:
        """The items of draws `first` to `first + count`, (count,)."""
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), self._drawn_order(seed, epoch)
        return self._order[1][first : first + count]

    def _drawn_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        keys = np.empty(len(self.weights))
        for start, piece in _pieces(self.weights):
            # half a step above 0 keeps both logarithms finite; logarithms, as a variate over a tiny weight overflows
            uniform = np.minimum(_uniform(_words(seed, epoch, start // 4, len(piece))) + 2.0**-54, 1 - 2.0**-53)
            with np.errstate(divide="ignore"):
                keys[start : start + len(piece)] = np.log(-np.log1p(-uniform)) - np.log(piece)
        order: NDArray[np.int64] = np.argsort(keys, kind="stable")
        return order[: self.num_items]


class BalancedDraws:
    """With replacement, but with counts as near to their expectation as whole numbers allow.

    Items of equal weight form a class. An epoch of D draws holds of a class with N_k items and the weight w_k one of
    the two whole numbers beside D N_k w_k / Σw, the expectation on average over epochs; of each of its items equally
    many, or one more. So an item with D w_i / Σw ≥ 1 is in every epoch. The order of all draws, and which items of a
    class get one more, are permutations keyed by (seed, epoch): nothing is tied to the order of the data, where a plain
    systematic draw would resonate with a period in it.

    Made in O(N log N) time and O(N) memory; an epoch begins in O(K log K) for K different weights, a draw costs O(1).

    Args:
        weights: (N,) as of `check_shape`; finite, not negative, not all 0.
        num_draws: Draws of an epoch, D.

    Raises:
        ValueError: If the weights are no weights.

    >>> draws = BalancedDraws(np.array([1.0, 3.0, 0.0]), num_draws=8)
    >>> np.bincount(draws.items(seed=7, epoch=0, first=0, count=8))
    array([2, 6])
    """

    def __init__(self, weights: NDArray[Any], num_draws: int) -> None:
        values = np.concatenate([piece for _, piece in _pieces(weights)])
        self.order = np.argsort(values, kind="stable")
        ranked = values[self.order]
        begins = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        if ranked[0] == 0:
            begins = begins[1:]
        self.begins = begins
        self.sizes = np.diff(np.r_[begins, len(values)])
        sums = self.sizes * ranked[begins]
        _check_sum(float(sums.sum()))
        self.num_draws = num_draws
        expected = sums / sums.sum() * num_draws
        # rounding must not make 80 slices of expectation 1 into 79.99999
        near = np.rint(expected)
        self.expected = np.where(np.abs(expected - near) <= 1e-12 * np.maximum(expected, 1), near, expected)
        self._epoch: tuple[tuple[int, int], NDArray[np.int64], NDArray[np.uint64]] | None = None
        self._last: tuple[tuple[int, int, int], NDArray[np.int64]] | None = None

    def items(self, seed: int, epoch: int, first: int, count: int) -> NDArray[np.int64]:
        """The items of draws `first` to `first + count`, (count,)."""
        chunks = range(first // CHUNK, -(-(first + count) // CHUNK))
        drawn = [self._chunk(seed, epoch, number) for number in chunks] or [np.zeros(0, dtype=np.int64)]
        start = first - chunks.start * CHUNK
        return np.concatenate(drawn)[start : start + count]

    def _chunk(self, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
        """Draws number · CHUNK up to the next chunk; the last one is kept, as consecutive steps lie in it."""
        if self._last is None or self._last[0] != (seed, epoch, number):
            stop = min((number + 1) * CHUNK, self.num_draws)
            self._last = (seed, epoch, number), self._drawn(seed, epoch, number * CHUNK, stop)
        return self._last[1]

    def _drawn(self, seed: int, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            keys = _words(seed, epoch, 0, 2)
            self._epoch = (seed, epoch), np.cumsum(self._totals(seed, epoch)), keys
        _, ends, keys = self._epoch
        draws = np.arange(start, stop, dtype=np.uint64)
        slots = permute(draws, np.uint64(self.num_draws), keys[0]).astype(np.int64)
        group = np.searchsorted(ends, slots, side="right")
        within = slots - np.where(group, ends[group - 1], 0)
        cycle, place = np.divmod(within, self.sizes[group])
        key = _mix(_mix(keys[1] + group.astype(np.uint64)) + cycle.astype(np.uint64))
        place = permute(place.astype(np.uint64), self.sizes[group].astype(np.uint64), key).astype(np.int64)
        return np.asarray(self.order[self.begins[group] + place], dtype=np.int64)

    def _totals(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Draws of each class, (K,), adding up to D: a systematic draw of the fractions, classes in a fresh order."""
        whole = np.floor(self.expected)
        fractions = self.expected - whole
        rest = self.num_draws - int(whole.sum())
        totals = whole.astype(np.int64)
        if rest:
            words = _words(seed, epoch, 1, len(totals) + 1)
            order = np.argsort(words[1:], kind="stable")
            ends = np.cumsum(fractions[order])
            ends = np.floor(ends * (rest / ends[-1]) + _uniform(words[:1]))
            ends[-1] = rest
            totals[order] += np.diff(ends, prepend=0).astype(np.int64)
        return np.asarray(totals)


def permute(
    values: NDArray[np.uint64], size: NDArray[np.uint64] | np.uint64, key: NDArray[np.uint64] | np.uint64
) -> NDArray[np.uint64]:
    """A keyed permutation of 0 to size - 1, applied to single values.

    Up to `SMALL` it is the rank of each value's random word; above, a Feistel network with cycle walking, whose bias
    a small range would show.

    Args:
        values: (n,) uint64, each below its size.
        size: One, or (n,), above 0.
        key: One, or (n,); each key makes another permutation.

    Returns:
        (n,) uint64.
    """
    size, key = np.broadcast_to(size, values.shape), np.broadcast_to(key, values.shape)
    out = values.copy()
    small = size <= SMALL
    numbers = np.arange(SMALL, dtype=np.uint64)
    words = _mix(_mix(key[small, None]) + numbers)
    own = np.take_along_axis(words, values[small, None].astype(np.int64), axis=1)
    out[small] = ((words < own) & (numbers < size[small, None])).sum(axis=1)
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]  # exact below 2^53
    half = ((bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    walking = np.flatnonzero(~small)  # a value that falls past the size walks on along its cycle
    while len(walking):
        left, right = out[walking] >> half[walking], out[walking] & mask[walking]
        for number in range(ROUNDS):
            word = _mix(_mix(key[walking] + np.uint64(number)) ^ right)
            left, right = right, left ^ (word & mask[walking])
        out[walking] = (left << half[walking]) | right
        walking = walking[out[walking] >= size[walking]]
    return out


def _mix(words: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of a word depends on all of them."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def _words(seed: int, epoch: int, counter: int, count: int) -> NDArray[np.uint64]:
    """Random words of (seed, epoch) from a counter on, four a count."""
    key = seed_sequence(_STREAM, seed, epoch).generate_state(2, np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count), dtype=np.uint64)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    return np.asarray((words >> np.uint64(11)) * 2.0**-53)


def _pieces(weights: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Checked weights as (start, piece), `PIECE` at a time.

    Raises:
        ValueError: If they are no weights.
    """
    for start in range(0, len(weights), PIECE):
        piece = weights[start : start + PIECE].astype(np.float64)
        if not (np.isfinite(piece).all() and (piece >= 0).all()):
            bad = int(np.flatnonzero(~(np.isfinite(piece) & (piece >= 0)))[0])
            raise ValueError(f"weight {start + bad} is {piece[bad]}, but weights must be finite and not negative.")
        yield start, piece


def check_shape(weights: NDArray[Any]) -> NDArray[Any]:
    """The weights, if they are numbers of shape (N,); ValueError otherwise."""
    if weights.ndim != 1 or len(weights) == 0 or weights.dtype.kind not in "fiub":
        raise ValueError(f"weights are {weights.dtype} of shape {weights.shape}, but must be numbers of shape (N,).")
    return weights


def _check_sum(total: float) -> None:
    if not np.isfinite(total):
        raise ValueError("the weights add up to infinity; scale them down.")
    if 0 < total < np.finfo(np.float64).tiny:
        raise ValueError("the weights add up to less than a double can divide; scale them up.")
    if not total:
        raise ValueError("all weights are 0, so there is nothing to draw.")
