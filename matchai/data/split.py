"""Which slices belong together, found in the images alone, and whole groups dealt to the sides of a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, plural

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]

# Blurs (fine, coarse) whose difference is compared, in pixels of a thumbnail of 64. Outlines and vessels tell one cut
# from another; softer images tell whether two thick neighbours may still be of one patient.
_DUPLICATE_BLURS = (1.0, 4.0)
_BREAK_BLURS = (2.0, 8.0)

# Similarity of two thumbnails, -1 to 1. Of the 1225 pairs of 50 real MedSeg slices half are below 0.12, 95 % below
# 0.45, 99 % below 0.61. Three are above 0.81: 0.93 and 0.85 (neighbours of one patient) and 0.90 (one cut annotated
# twice, its crop shifted). The next are 0.77, 0.77 and 0.77: two pairs of one patient by eye, one of strangers. A shift
# by 4 of 512 pixels leaves at least 0.90, by 8 pixels 0.81; noise of 50 HU leaves 0.99.
_DUPLICATE = 0.81
# The chance that strangers are so alike falls tenfold for each 0.32 of atanh(similarity) (from 90 % to 99 % of those
# pairs), so it is near 1 in 2,000 at that bound. From 1000 slices in no order on the bound rises by as much: false
# pairs stay below one for every four slices and cannot chain everything together.
_CHANCE_DECADE = 0.32
# Joining volumes costs far more freedom than joining slices. Two volumes made of the same real slices, warped apart,
# reach 0.87, two phantoms 0.89, two plain drawings once 0.96; of a volume exported again some slices have 0.99.
_VOLUME_DUPLICATE = 0.95

# Stacks made to the lengths of Radiopaedia (15 of warped real slices, drawn thoraces and both; 10 rougher ones): of 200
# breaks 182 found, none false. With factor 4: 177; with factor 2, share 0.3 and no floor: 191 found, 5 false. Of 240
# breaks between phantoms of 8 slices all are found, none false. Slices 30 mm apart no longer count as a stack.
_BREAK_FACTOR = 2.5  # a break is so many times as unlike as neighbours usually are on either side of it,
_BREAK_SHARE = 0.5  # and unlike by this share of what two random slices of the array are
_BREAK_FLOOR = 0.2  # and by this: in an array of few volumes most random pairs are of one volume and alike
_BREAK_REACH = 7  # neighbours a side that say what is usual: fewer than the slices of the shortest volume expected
_BREAK_APART = 2  # breaks lie further apart than this, and from the array's ends: no volume has only 1 or 2 slices
_ORDER_REACH = 10  # neighbours a side that say whether a place is stacked: their median unlikeness is below half
_ORDER_SHARE = 0.5  # of random pairs' (stacks: 0.41 at most; MedSeg: 0.87)

_BLOCK = 512  # rows at a time: at 20,000 slices a block of similarities takes 41 MB


@dataclass(frozen=True)
class FoundGroups:
    """Groups of slices found in the images alone.

    Attributes:
        groups: (N,) int64, from 0, numbered by first appearance; slices with one number must stay on one side.
        volumes: (N,) int64, from 0, rising; a slice in no order is a volume of its own.
        num_groups: How many numbers there are.
        num_volumes: Runs of alike neighbours found in stacked arrays, before near-duplicates were joined.
        num_alone: Slices in no such run.
        num_duplicate_pairs: Pairs of near-duplicates, not counting those inside one volume.
        description: One or two sentences for the user.
    """

    groups: _Ints
    volumes: _Ints
    num_groups: int
    num_volumes: int
    num_alone: int
    num_duplicate_pairs: int
    description: str


def find_groups(thumbnails: _Floats, sets: _Ints) -> FoundGroups:
    """Finds slices that must stay together: volumes by the breaks between neighbours, and near-duplicates anywhere.

    Doubtful neighbours are kept together: two volumes in one group cost a little freedom, one volume in two groups
    leaks. Two volumes of one patient stay apart unless they look the same. Same answer for same images, always.

    Args:
        thumbnails: (N, h, w) float32, h and w at least 16 (64 is what the bounds were measured at), each slice
            windowed to 0..1 and resized by area; finite.
        sets: (N,) int64, the number of the array file of each slice, slices of one file in its order.

    Returns:
        The groups with what was found. Takes 0.2 s for 1,000 slices and 6 to 10 s for 20,000 on two cores.
    """
    assert len(thumbnails) == len(sets) > 0, (thumbnails.shape, sets.shape)
    is_ordered, is_break = _compare_neighbours(thumbnails, sets)
    volumes = np.cumsum(is_break | ~is_ordered) - 1  # a slice in no order is a volume of its own
    sizes = np.bincount(volumes)
    is_alone = sizes[volumes] == 1
    groups, num_pairs = _join_duplicates(_describe(thumbnails, *_DUPLICATE_BLURS), volumes, is_alone)
    num_groups, num_volumes, num_alone = int(groups.max()) + 1, int((sizes > 1).sum()), int(is_alone.sum())
    stacked, volumes_found = plural(len(sets) - num_alone, "slice"), plural(num_volumes, "volume")
    by_breaks = f"{stacked} in {volumes_found} found by breaks between neighbours; " if num_volumes else ""
    alone = f"{plural(num_alone, 'slice')} in no order; " if num_alone else ""
    description = (
        f"{by_breaks}{alone}{plural(num_pairs, 'near-duplicate pair')} joined: {plural(num_groups, 'group')}. "
        "Patients cannot be told from images: where they are known, give a groups file."
    )
    return FoundGroups(groups, volumes, num_groups, num_volumes, num_alone, num_pairs, description)


def volume_numbers(sets: _Ints, groups: NDArray[Any], thumbnails: _Floats | None = None) -> _Ints:
    """Numbers the volumes: runs of consecutive slices of one set and one group, which may be a patient of several.

    Args:
        sets: (N,) the number of the file of each slice.
        groups: (N,) integers or strings, the group of each slice.
        thumbnails: As for `find_groups`; where given, a run also ends at a break that is seen in the images.

    Returns:
        (N,) int64, from 0, rising.
    """
    is_border = (sets[1:] != sets[:-1]) | (groups[1:] != groups[:-1])
    if thumbnails is not None:
        is_border |= _compare_neighbours(thumbnails, sets)[1][1:]
    return np.concatenate([[0], np.cumsum(is_border)]).astype(np.int64)


def _compare_neighbours(thumbnails: _Floats, sets: _Ints) -> tuple[_Bools, _Bools]:
    """Tells of each slice (N,) whether it is stacked on the one before, and whether a volume begins with it."""
    features = _describe(thumbnails, *_BREAK_BLURS)
    is_ordered, is_break = np.zeros(len(sets), bool), np.ones(len(sets), bool)
    for number in np.unique(sets):
        members = np.flatnonzero(sets == number)
        if len(members) > 1:
            is_ordered[members[1:]], is_break[members[1:]] = _find_breaks(features[members])
    return is_ordered, is_break


def _find_breaks(features: _Floats) -> tuple[_Bools, _Bools]:
    """Tells of each pair of neighbours of one array, (n - 1,) bool, whether it is in an order, and whether it breaks.

    An order are neighbours more alike than strangers.
    """
    first, second = np.random.default_rng(0).integers(0, len(features), (2, 4096))
    is_pair = first != second
    random_unlike = float(np.median(_unlike(features[first[is_pair]], features[second[is_pair]])))
    unlike = _unlike(features[:-1], features[1:])
    # A spoilt slice is unlike both its neighbours, but these are alike: at a break no pair across it is.
    across, second_next = unlike.copy(), _unlike(features[:-2], features[2:])
    across[1:] = np.minimum(across[1:], second_next)
    across[:-1] = np.minimum(across[:-1], second_next)
    across[1:-1] = np.minimum(across[1:-1], _unlike(features[:-3], features[3:]))
    before = _running_median(unlike, -_BREAK_REACH, -1)
    after = _running_median(unlike, 1, _BREAK_REACH)
    bound = np.fmax(_BREAK_FACTOR * np.fmax(before, after), max(_BREAK_SHARE * random_unlike, _BREAK_FLOOR))
    is_break = across > bound
    padded = np.pad(across, _BREAK_APART, constant_values=np.inf)
    is_break &= across >= np.lib.stride_tricks.sliding_window_view(padded, 2 * _BREAK_APART + 1).max(1)
    is_ordered = _running_median(unlike, -_ORDER_REACH, _ORDER_REACH) < _ORDER_SHARE * random_unlike
    return is_ordered, is_break


def _unlike(first: _Floats, second: _Floats) -> _Floats:
    return np.asarray(1 - np.einsum("nd,nd->n", first, second), np.float32)


def _running_median(values: _Floats, start: int, last: int) -> _Floats:
    """Takes the median of values[i + start] to values[i + last] for each i, leaving out what lies beyond the ends."""
    reach = max(-start, last)
    padded = np.pad(values, reach, constant_values=np.nan)[reach + start :]
    windows = np.lib.stride_tricks.sliding_window_view(padded, last - start + 1)[: len(values)].copy()
    windows[np.isnan(windows).all(axis=1)] = 0
    return np.asarray(np.nanmedian(windows, 1), np.float32)


def _join_duplicates(features: _Floats, volumes: _Ints, is_alone: _Bools) -> tuple[_Ints, int]:
    """Joins volumes (a lone slice is one too) that share a near-duplicate.

    Returns:
        The groups (N,) int64, numbered by first appearance, and how many pairs were near-duplicates.
    """
    groups, num_pairs = volumes.copy(), 0
    decades = np.log10(max(1.0, is_alone.sum() / 1000))
    bound_alone = float(np.tanh(np.arctanh(_DUPLICATE) + _CHANCE_DECADE * decades))
    for start in range(0, len(features), _BLOCK):
        rows = slice(start, start + _BLOCK)
        similarity = features[rows] @ features[start:].T
        is_pair = similarity > _VOLUME_DUPLICATE
        is_pair[is_alone[rows]] |= (similarity[is_alone[rows]] > bound_alone) & is_alone[start:]
        is_pair &= volumes[rows, None] < volumes[start:]
        num_pairs += int(is_pair.sum())
        for row in np.flatnonzero(is_pair.any(1)):
            touched = np.unique(groups[start:][is_pair[row]])
            if (touched != groups[start + row]).any():
                groups[np.isin(groups, touched)] = groups[start + row]
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers], num_pairs


def _describe(thumbnails: _Floats, fine: float, coarse: float) -> _Floats:
    """Describes each slice by a vector of length 1 whose dot product with another's says how alike they are.

    The vector is the difference of two blurs, normalised by the part of the blur that lies on the content, at half
    the resolution. Else the frames around crops of different size decide: by plain correlation of blurred
    thumbnails the same cut annotated twice (0.919) ranks below a pair of strangers (0.920).

    Args:
        thumbnails: (N, h, w) float32.
        fine: Standard deviation of the first blur, in 64ths of the thumbnail's side.
        coarse: That of the second.

    Returns:
        (N, (h // 2) * (w // 2)) float32; zero for a slice without content, which so is like no other.
    """
    num_slices, height, width = thumbnails.shape
    shape = (width // 2, height // 2)
    down, across = (np.concatenate([_halving_blur(side, s) for s in (fine, coarse, 0)], 1) for side in (height, width))
    features = np.empty((num_slices, shape[0] * shape[1]), np.float32)
    for start in range(0, num_slices, _BLOCK):
        block = thumbnails[start : start + _BLOCK]
        rows, columns = _content_box(block)
        content = (block * rows[:, :, None] * columns[:, None, :]).reshape(-1, width)
        narrow = (content @ across[:, : 2 * shape[0]]).reshape(-1, height, 2, shape[0])
        row_weights, column_weights = np.split(rows @ down, 3, 1), np.split(columns @ across, 3, 1)
        weights = [c[:, :, None] * r[:, None, :] for c, r in zip(column_weights, row_weights, strict=True)]
        blurred = []
        for number, kernel in enumerate(np.split(down, 3, 1)[:2]):
            lines = narrow[:, :, number].transpose(0, 2, 1).reshape(-1, height)
            blurred.append((lines @ kernel).reshape(-1, *shape) / np.maximum(weights[number], 1e-3))
        band = ((blurred[0] - blurred[1]) * weights[2]).reshape(len(block), -1)
        features[start : start + _BLOCK] = band / np.maximum(np.linalg.norm(band, axis=1, keepdims=True), 1e-6)
    return features


def _content_box(thumbnails: _Floats) -> tuple[_Floats, _Floats]:
    """Finds the rows (n, h) and columns (n, w), 1 or 0, of the box that differs from the median of the frame's edge.

    The box leaves out its own border, whose pixels are part air.
    """
    edges = [thumbnails[:, [0, -1]], thumbnails[:, :, [0, -1]]]
    frame = np.median(np.concatenate([edge.reshape(len(thumbnails), -1) for edge in edges], 1), 1)
    is_content = np.asarray(np.abs(thumbnails - frame[:, None, None]) > 0.1)  # 200 HU of the default window

    def inside(has_content: _Bools) -> _Floats:
        length = has_content.shape[1]
        place = np.arange(length)
        first, last = has_content.argmax(1), length - 1 - has_content[:, ::-1].argmax(1)
        is_inside = (place > first[:, None]) & (place < last[:, None]) & has_content.any(axis=1, keepdims=True)
        return np.asarray(is_inside, np.float32)

    return inside(np.any(is_content, 2)), inside(np.any(is_content, 1))


def _halving_blur(length: int, sigma: float) -> _Floats:
    """Makes the matrix (length, length // 2) that blurs a line, `sigma` in 64ths of it, and averages pairs."""
    place = np.arange(length)
    weight = np.exp(-((place[:, None] - place) ** 2) / (2 * max(sigma * length / 64, 1e-2) ** 2))
    weight /= weight.sum(1, keepdims=True)
    return np.asarray(weight[: length // 2 * 2].reshape(length // 2, 2, length).mean(1).T, np.float32)


def assign_folds(groups: NDArray[Any], presence: _Bools, shares: Sequence[float], seed: int) -> _Ints:
    """Deals whole groups to bins, with sizes near to the shares and each class spread like the shares.

    A group goes where it fits, to the bin that most lacks its classes; one that fits nowhere goes to the emptiest bin
    (Sechidis, Tsoumakas and Vlahavas 2011, with groups in place of single examples). So no bin ends further from its
    share than the largest group, if no share is smaller than that. Of several random deals the best is kept.

    Args:
        groups: (N,) integers or strings; slices with equal values stay together.
        presence: (N, C) bool, whether class c appears in the slice.
        shares: Positive sizes of the bins, relative to each other: (0.2, 0.8) for validation and training, K equal
            ones for K folds.
        seed: The same seed and arguments give the same deal; the global random state is not touched.

    Returns:
        (N,) int64, the bin of each slice; every bin holds at least one group.

    Raises:
        InputError: If there are fewer groups than bins.
    """
    names, members = np.unique(groups, return_inverse=True)
    num_groups, num_bins = len(names), len(shares)
    if num_groups < num_bins:
        raise InputError(
            f"{plural(num_groups, 'group')} of slices found, but the split has {num_bins} parts and each needs at "
            "least one whole group: ask for fewer folds, or give a groups file that tells the patients apart."
        )
    # One column a class and one of ones: the sizes are stratified like the classes. Relative to the class's total.
    columns = np.column_stack([np.ones(len(groups)), presence]).astype(np.float64)
    columns = columns[:, columns.any(0)]
    totals = columns.sum(0)
    table = np.stack([np.bincount(members, column, num_groups) for column in columns.T], 1) / totals
    wanted = np.asarray(shares, np.float64) / np.sum(shares)
    rng = np.random.default_rng(seed)
    best, best_cost = np.zeros(num_groups, np.int64), np.inf
    # Few uneven groups profit from many tries; thousands of single slices come out within a slice at the first.
    for _ in range(int(np.clip(4000 // num_groups, 1, 64))):
        bins, filled = _deal(table, wanted, rng)
        miss = np.abs(filled - wanted[:, None]).sum(0)
        cost = float(miss[0] + miss.mean())
        if cost < best_cost - 1e-12:
            best, best_cost = bins, cost
    return best[members]


def _deal(table: NDArray[np.float64], wanted: NDArray[np.float64], rng: np.random.Generator) -> tuple[_Ints, Any]:
    """Deals groups once, roughly from large to small.

    Args:
        table: (G, 1 + C) float64, each group's share of the slices, then of each class.
        wanted: (K,) float64, the bins' shares.
        rng: For the order; groups of one size come in random order.

    Returns:
        The bins of the groups (G,) int64, and what the bins hold (K, 1 + C) in the table's units.
    """
    bins, filled = np.zeros(len(table), np.int64), np.zeros((len(wanted), table.shape[1]))
    order = np.argsort(-table[:, 0] * rng.uniform(rng.uniform(), 1, len(table)))
    num_left = len(table)
    for group in order:
        room = wanted - filled[:, 0]
        is_open = room >= table[group, 0] - 1e-9
        is_empty = filled[:, 0] == 0
        if num_left <= is_empty.sum():
            is_open = is_empty  # the last groups must not leave a bin without any
        elif not is_open.any():
            is_open = room >= room.max() - 1e-9
        # Growth of the chi-square distance from the wanted shares, up to a factor.
        growth = ((2 * (filled - wanted[:, None]) + table[group]) * table[group]).sum(1) / wanted
        bins[group] = choice = int(np.where(is_open, growth, np.inf).argmin())
        filled[choice] += table[group]
        num_left -= 1
    return bins, filled


def check_groups_array(groups: NDArray[Any], num_slices: int, name: str) -> None:
    """Refuses an array of groups that does not name one group for each slice.

    Args:
        groups: As loaded, without pickle.
        num_slices: How many slices the images hold.
        name: The file, for the message.

    Raises:
        InputError: If it is not (num_slices,) of integers, strings or finite numbers, or if a string is empty.
    """
    wanted = f"expected one integer or string for each of the {num_slices} slices, shape ({num_slices},)"
    if groups.dtype.kind not in "iufUS":
        raise InputError(f"{name}: the groups have dtype {groups.dtype}; {wanted}: save them so.")
    if groups.shape != (num_slices,):
        raise InputError(f"{name}: the groups have shape {groups.shape}; {wanted}.")
    is_missing = ~np.isfinite(groups) if groups.dtype.kind == "f" else groups == groups.dtype.type()
    if groups.dtype.kind in "fUS" and is_missing.any():
        raise InputError(
            f"{name}: {plural(int(is_missing.sum()), 'slice')} without a group (NaN, infinite or empty), the first at "
            f"index {int(is_missing.argmax())}; {wanted}."
        )
