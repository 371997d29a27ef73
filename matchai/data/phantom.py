"""A synthetic thorax phantom in Hounsfield units: data of the right form where no patient's may be used.

`python -m matchai.phantom --output DIR --slices N` writes it in the layout of the Kaggle set. The anatomy is made of
ovals on smoothly warped coordinates, the vessels of a grown tree, the lesions of noisy blobs that lean on the pleura.
It exercises and compares software; it says nothing about patients.

Coordinates: `a` runs from the patient's front (-1) to the back (1) along the columns and `b` from the patient's right
(-1) to the left (1) along the rows, as in the Kaggle arrays, whose vertical flip is the anatomical mirror; `z` runs
from the top of the lungs (0) to the bottom (1). Distances in the plane are in half image widths.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, sync_folder, write_whole

GROUND_GLASS, CONSOLIDATION, LUNGS_OTHER, BACKGROUND = range(4)

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]
_Pair = tuple[float, float]

_NUM_NODES = 6  # noise nodes along z: features last about two of eight slices
_VESSEL_CANVAS = 1024  # vessels are drawn at one size and averaged down, so their width does not depend on `size`
_NOISE_CANVAS = 256  # so is the CT noise, whose grain at 512 is near two pixels, as of a soft kernel


def _oval(a: _Floats, b: _Floats, centre: _Pair, radii: _Pair, *, tilt: float = 0.0, square: float = 0.0) -> _Floats:
    """Returns each pixel's distance from an oval, roughly, negative inside; `tilt` in radians, `square` from 0 to 1."""
    u, v = a - centre[0], b - centre[1]
    if tilt:
        u, v = u * math.cos(tilt) + v * math.sin(tilt), v * math.cos(tilt) - u * math.sin(tilt)
    u *= 1 / radii[0]
    v *= 1 / radii[1]
    u *= u
    v *= v
    norm: _Floats = u + v
    if square:
        norm += square * (np.sqrt(u * u + v * v) - norm)  # the fourth powers' norm has rounded boxes for level lines
    np.sqrt(norm, out=norm)
    norm -= 1
    norm *= min(radii)
    return norm


def _share(distance: _Floats, width: float) -> _Floats:
    """Returns the share of tissue in each pixel, 0 to 1, for an edge at distance 0 that is `width` wide."""
    return np.asarray(np.clip(0.5 - distance / width, 0, 1))


def _edge(size: int) -> float:
    """Returns how wide an edge between tissues looks, in half image widths: 3 pixels at 512, never under one."""
    return max(0.012, 2 / size)


def _mix(hu: _Floats, tissue: float | _Floats, share: _Floats) -> None:
    """Replaces a share of what is there by another tissue, in place; `tissue` in HU."""
    hu += share * (tissue - hu)


class _Volume:
    """One patient: everything drawn at random but the CT noise, for any slice and resolution."""

    def __init__(self, seed: int, volume: int) -> None:
        self.seed, self.number = seed, volume
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(volume,)))
        # Python floats, for a float64 scalar of NumPy's would turn every float32 image that it meets into float64.
        self.zoom, self.noise_sd = rng.uniform((0.90, 18), (1.04, 32)).tolist()
        self.lung_width = rng.uniform((0.97, 0.89), (1.11, 1.03)).tolist()  # right, left: the heart takes from the left
        self.fat, self.heart, self.dome = rng.uniform((0.04, 0.88, -0.06), (0.10, 1.12, 0.06)).tolist()
        self.blood, self.air, self.atelectasis = rng.uniform((35, -890, 60), (110, -820, 380)).tolist()
        self.top, self.bottom = rng.uniform((0.10, 0.84), (0.18, 0.92)).tolist()
        self.grids = {
            cells: rng.standard_normal((count, _NUM_NODES, cells, cells), np.float32)
            for cells, count in ((5, 2), (11, 3), (26, 3), (80, 2))
        }
        self.vessels = [self._grow_vessels(rng, side) for side in (0, 1)]
        # Severity walks by the golden ratio from a start of the seed's own, so that small sets hold mild and severe.
        start = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=())).random()
        self.severity = (start + volume * 0.6180339887) % 1.0
        is_healthy = (volume + int(16 * start)) % 16 == 15  # so about 94 % of the slices hold ground glass
        self.glass_hu, self.solid_hu = rng.uniform((-640, -180), (-400, 40)).tolist()
        self.fuzz, self.border = rng.uniform((0.18, -0.14), (0.42, 0.14)).tolist()  # border: where the annotator draws
        self.paving = max(0.0, rng.uniform(-200, 260))
        self.foci = [] if is_healthy else self._draw_foci(rng)

    def _cavity(self, side: int, z: float) -> tuple[_Pair, _Pair]:
        """Returns centre and radii of one pleural cavity, before the mediastinum and the diaphragm take their part."""
        grow = float(np.interp(z, (0.0, 0.1, 0.25, 0.5, 1.0), (0.40, 0.66, 0.88, 1.0, 1.03)))
        wide = grow * self.lung_width[side]
        return (0.06 - 0.03 * grow, (2 * side - 1) * (0.17 + 0.29 * wide)), (0.60 * grow, 0.42 * wide)

    def _grow_vessels(self, rng: np.random.Generator, side: int) -> tuple[_Doubles, _Doubles, _Doubles]:
        """Grows one lung's vessel tree from the hilum to random ends, each joined by a short way that leads outwards.

        Returns:
            Starts (S, 3) and ends (S, 3) of its segments in (a, b, z), and their radii (S,), thicker where more
            ends hang on them.
        """
        ends = rng.uniform((-0.55, 0.12, 0.02), (0.62, 0.86, 1.0), (280, 3)) * (1, 2 * side - 1, 1)
        hilum = np.array((0.06, 0.20 * (2 * side - 1), 0.46))
        ends = ends[np.argsort(((ends - hilum) ** 2).sum(1))]
        steps = (0.35, 0.7, 1.0)
        nodes = np.tile(hilum, (1 + len(steps) * len(ends), 1))
        parents = [0] * len(nodes)
        trail = np.zeros(len(nodes))  # length of the way back to the hilum
        bends = rng.normal(0, 0.06, (len(ends), len(steps), 3)) * (1, 1, 0.5)
        for number, end in enumerate(ends):
            first = 1 + len(steps) * number
            lengths = np.sqrt(((nodes[:first] - end) ** 2).sum(1))
            parent = int((lengths + 0.45 * trail[:first]).argmin())  # all weight on the first term makes it meander
            nodes[first : first + 3] = nodes[parent] + np.outer(steps, end - nodes[parent])
            nodes[first : first + 3] += bends[number] * lengths[parent]
            trail[first : first + 3] = trail[parent] + lengths[parent] * np.array(steps)
            parents[first : first + 3] = [parent, first, first + 1]
        loads = [1.0] * len(nodes)
        for node in range(len(nodes) - 1, 0, -1):
            loads[parents[node]] += loads[node]
        # Near Murray's cube law; a half image width is some 180 mm, so they are 0.7 mm to 11 mm across.
        radii = np.minimum(0.0019 * np.array(loads[1:]) ** 0.42, 0.032)
        return nodes[parents[1:]], nodes[1:], radii

    def _draw_foci(self, rng: np.random.Generator) -> list[dict[str, float]]:
        """Draws the lesions of the volume, spread along z, most of them at the back and near the pleura."""
        num_foci = 6 + int(14 * self.severity)
        scale = 0.85 + 1.0 * self.severity**1.5
        return [
            {
                "side": float(rng.integers(2)),
                "angle": rng.normal(0.25, 0.9) if rng.random() < 0.8 else rng.uniform(-3.1, 3.1),
                "depth": 1 - abs(rng.normal(0, 0.22)),
                "z": (index + rng.random()) / num_foci,
                "height": rng.uniform(0.12, 0.30) * scale,
                "radial": rng.uniform(0.07, 0.17) * scale,
                "along": rng.uniform(0.12, 0.30) * scale,
                "solid": rng.uniform(0.45, 0.88) if rng.random() < 0.20 + 0.33 * self.severity else 0.0,
            }
            for index in range(num_foci)
        ]

    def _noise(self, cells: int, which: int, z: float, size: int) -> _Floats:
        """Returns smooth noise (size, size) of variance near 1, `cells` features across, that changes gently with z."""
        position = z * (_NUM_NODES - 1)
        node = min(int(position), _NUM_NODES - 2)
        turn = (position - node) * math.pi / 2  # a turn rather than a line from node to node keeps the variance
        grid = self.grids[cells][which]
        mixed = grid[node] * math.cos(turn) + grid[node + 1] * math.sin(turn)
        return np.asarray(cv2.resize(mixed, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)

    def _vessel_share(self, z: float, size: int) -> _Floats:
        """Returns the share of each pixel (size, size) that vessels fill, within a slab around z."""
        canvas = np.zeros((_VESSEL_CANVAS, _VESSEL_CANVAS), np.uint8)
        to_pixels = _VESSEL_CANVAS / 2 * self.zoom
        for starts, ends, radii in self.vessels:
            way = ends - starts
            rise = np.where(np.abs(way[:, 2]) < 1e-4, 1e-4, way[:, 2])
            enter, leave = np.sort(((z - 0.03 - starts[:, 2]) / rise, (z + 0.03 - starts[:, 2]) / rise), axis=0)
            enter, leave = np.maximum(enter, 0), np.minimum(leave, 1)
            seen = enter < leave
            spans = starts[seen, None, :2] + np.stack((enter, leave), 1)[seen, :, None] * way[seen, None, :2]
            corners = np.rint(16 * (spans * to_pixels + _VESSEL_CANVAS / 2)).astype(int).tolist()
            widths = np.maximum(1, np.rint(2 * to_pixels * radii[seen])).astype(int).tolist()
            for (first, last), width in zip(corners, widths, strict=True):
                cv2.line(canvas, first, last, 255, width, cv2.LINE_AA, shift=4)  # shift: corners in 1/16 pixel
        return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / np.float32(255)

    def render(self, index: int, position: float, size: int) -> tuple[_Floats, NDArray[np.uint8]]:
        """Renders one slice.

        Args:
            index: The slice's number in the volume, which keys its CT noise.
            position: Where it lies between the volume's top (0) and bottom (1).
            size: Pixels a side.

        Returns:
            The image (size, size) float32 in HU and the labels (size, size) uint8.
        """
        z = self.top + position * (self.bottom - self.top)
        axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) / self.zoom
        coarse, fine, pores = (self._noise(cells, 0, z, size) for cells in (11, 26, 80))
        a = axis[None, :] + 0.022 * self._noise(5, 0, z, size) + 0.010 * coarse + 0.003 * fine
        b = axis[:, None] + 0.022 * self._noise(5, 1, z, size) + 0.010 * self._noise(11, 1, z, size) + 0.003 * fine

        hu, lung, dome = self._anatomy(a, b, z, coarse, fine)
        glass, solid = self._lesion_fields(a, b, z, coarse, size)
        vessel = self._vessel_share(z, size)
        parenchyma = self.air + 45 * a + 14 * coarse + 16 * pores
        # Not lesions: tissue at the back that its own weight presses together, the diaphragm's slope, fissure, vessels.
        parenchyma += self.atelectasis * np.clip(1 + lung / 0.10, 0, 1) ** 2 * np.clip(2.2 * a - 0.3, 0, 1)
        fissure = _oval(a, b, (-0.75 + 0.9 * z, 0.0), (0.55, 1.1))
        _mix(parenchyma, 58.0, _share(dome - 0.01, 0.08))
        parenchyma += 170 * np.clip(1 - np.abs(fissure) / (0.6 * _edge(size)), 0, 1)
        _mix(parenchyma, self.blood - 40, 0.95 * vessel)

        opacity = np.clip(0.5 + glass / (2 * self.fuzz), 0, 1) * np.clip(0.8 + 0.22 * fine + 0.16 * pores, 0.15, 1)
        _mix(parenchyma, np.maximum(self.glass_hu + 110 * coarse, parenchyma), opacity)
        ridge = np.clip(1 - np.abs(self._noise(80, 1, z, size)) / 0.35, 0, 1)
        parenchyma += self.paving * ridge * opacity * (1 - vessel)
        opacity = np.clip(0.95 + 0.2 * self._noise(26, 1, z, size) + 0.12 * pores, 0.2, 1)
        opacity *= np.clip(0.5 + solid / 0.3, 0, 1)
        _mix(parenchyma, np.maximum(self.solid_hu + 40 * fine, parenchyma), opacity)
        _mix(hu, parenchyma, _share(lung, _edge(size)))

        labels = np.full((size, size), BACKGROUND, np.uint8)
        labels[lung < 0] = LUNGS_OTHER
        labels[(lung < 0) & (glass > self.border)] = GROUND_GLASS
        labels[(lung < 0) & (solid > self.border)] = CONSOLIDATION

        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.number, index)))
        grain = rng.standard_normal((_NOISE_CANVAS, _NOISE_CANVAS), np.float32) * self.noise_sd
        how = cv2.INTER_CUBIC if size > _NOISE_CANVAS else cv2.INTER_AREA
        hu = cv2.GaussianBlur(hu, (0, 0), size / 700) + cv2.resize(grain, (size, size), interpolation=how)
        return np.maximum(hu, -1024, dtype=np.float32), labels

    def _anatomy(self, a: _Floats, b: _Floats, z: float, coarse: _Floats, fine: _Floats) -> tuple[_Floats, ...]:
        """Returns all but the lungs, in HU, and the distances from the lungs and the diaphragm, negative inside."""

        def along(*knots: _Pair) -> float:
            return float(np.interp(z, [at for at, _ in knots], [value for _, value in knots]))

        edge = _edge(len(a))
        skin = _oval(a, b, (0.02, 0.0), (0.74, 1.0), square=0.3)
        hu = np.full(a.shape, -1000, np.float32)
        _mix(hu, -100 + 12 * fine, _share(skin, edge))
        muscle = skin + self.fat + 0.012 * coarse
        _mix(hu, 45 + 8 * fine, _share(muscle, 2 * edge))

        cavity = np.minimum(*(_oval(a, b, *self._cavity(side, z), square=0.25) for side in (0, 1)))
        heart = along((0.36, 0.05), (0.48, 0.70), (0.70, 1.0), (1.0, 0.95)) * self.heart
        middle = np.minimum.reduce([
            _oval(a, b, (-0.02, 0.0), (0.58, along((0.1, 0.20), (0.3, 0.14), (0.8, 0.09)))),
            _oval(a, b, (-0.12, -0.02), (0.30, along((0.1, 0.17), (0.3, 0.24), (0.5, 0.27), (0.8, 0.15)))),
            _oval(a, b, (-0.20, 0.16), (0.36 * heart, 0.42 * heart), tilt=-0.5),
        ])  # fmt: skip
        aorta = _oval(a, b, (0.33, 0.13), (0.10, 0.095)) if z > 0.27 else np.ones_like(a)
        spine = _oval(a, b, (0.56, 0.0), (0.17, 0.16), square=0.4)
        hull = np.minimum(cavity, middle)
        dome = np.full_like(a, 9)
        for centre, start in (((-0.06, -0.46), 0.68), ((-0.16, 0.50), 0.77)):
            if (rise := z - start + self.dome) > 0.02:
                np.minimum(dome, _oval(a, b, centre, (0.04 + 2.0 * rise, 1.7 * rise)) + 0.02 * coarse, out=dome)
        _mix(hu, -70 + 30 * coarse, _share(hull, 3 * edge))
        _mix(hu, 42 + 5 * fine, _share(middle + 0.03 + 0.012 * coarse, 2 * edge))
        _mix(hu, self.blood, np.maximum(_share(aorta, edge), _share(middle + 0.10, 0.08) * (z > 0.4)))
        around = np.arctan2(b, a - 0.03)
        rib = np.hypot((hull - 0.055) / 0.030, np.sin(5 * np.abs(around) + 14 * z + 1) / 0.55) - 1
        bone = np.maximum.reduce([rib * 0.03, muscle, 0.2 - np.abs(b)])  # the front of the midline is the sternum's
        _mix(hu, 620 + 300 * np.clip(rib, -1, 0), _share(bone, edge))
        _mix(hu, 260 + 30 * fine, _share(np.maximum(_oval(a, b, (-0.63, 0.0), (0.045, 0.15)), muscle), edge))
        for process in (_oval(a, b, (0.70, s * 0.20), (0.045, 0.14), tilt=s * 0.45) for s in (-1, 1)):
            _mix(hu, 420 + 40 * fine, _share(process, edge))
        _mix(hu, 480 + 60 * fine + 2200 * np.clip(spine, -0.12, 0), _share(spine, edge))
        _mix(hu, 30.0, _share(_oval(a, b, (0.69, 0.0), (0.055, 0.07)), edge))

        split = along((0.36, 0.0), (0.40, 0.07), (0.52, 0.17))
        calibre = along((0.36, 0.085), (0.52, 0.055), (0.60, 0.0))
        lung = np.maximum.reduce([cavity, -middle, 0.02 - aorta, 0.05 - spine, -dome])
        for side in (-1, 1) if calibre > 0.01 else ():
            _mix(hu, -980.0, _share(_oval(a, b, (0.16, side * split), (calibre * 1.1, calibre)), edge) * (lung > 0))
        _mix(hu, 58.0, _share(dome, edge) * _share(cavity, edge))
        return hu, lung, dome

    def _lesion_fields(self, a: _Floats, b: _Floats, z: float, coarse: _Floats, size: int) -> tuple[_Floats, _Floats]:
        """Returns how deep each pixel lies in ground glass and in consolidation, near 0 at their borders."""
        glass, solid = np.full_like(a, -2.0), np.full_like(a, -2.0)
        for focus in self.foci:
            if (reach := 1 - ((z - focus["z"]) / focus["height"]) ** 2) < 0.02:  # the slice passes it by
                continue
            side = int(focus["side"])
            centre, radii = self._cavity(side, z)
            out = (math.cos(focus["angle"]), math.sin(focus["angle"]) * (2 * side - 1))
            at = (centre[0] + focus["depth"] * radii[0] * out[0], centre[1] + focus["depth"] * radii[1] * out[1])
            shape = (focus["radial"] * reach**0.5, focus["along"] * reach**0.5)
            field = -_oval(a, b, at, shape, tilt=math.atan2(out[1], out[0])) / min(shape)
            np.maximum(glass, field, out=glass)
            if focus["solid"]:
                np.maximum(solid, (field - 1) / focus["solid"] + 1, out=solid)
        rough, spots = self._noise(11, 2, z, size), self._noise(26, 2, z, size)
        glass += np.where(glass > -1.9, 0.34 * rough + 0.24 * spots, 0)
        solid += np.where(solid > -1.9, 0.26 * spots - 0.28 * coarse, 0)
        return glass, solid


def phantom_slices(
    num_slices: int, *, seed: int = 0, size: int = 512, slices_per_volume: int = 8
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8], int]]:
    """Yields phantom slices, volume by volume, each volume from top to bottom.

    A volume is a function of `seed` and its index: the first k slices are the same whatever `num_slices` is, and
    `size` changes nothing but the resolution. Trachea and main bronchi are labelled background, vessels within the
    lungs as lungs; one volume in 16 is healthy.

    Args:
        num_slices: How many slices in all; the last volume may be cut short.
        seed: Of all random draws, 0 or more.
        size: Pixels a side.
        slices_per_volume: How finely each volume is cut.

    Yields:
        The image (size, size) float32 in HU; the labels (size, size) uint8, 0 ground glass, 1 consolidation,
        2 lungs other, 3 background; and the volume's index.
    """
    for start in range(0, num_slices, slices_per_volume):
        number = start // slices_per_volume
        volume = _Volume(seed, number)
        for index in range(min(slices_per_volume, num_slices - start)):
            image, labels = volume.render(index, (index + 0.5) / slices_per_volume, size)
            yield image, labels, number


def write_phantom(directory: Path, num_slices: int = 128, *, seed: int = 0, size: int = 512) -> None:
    """Writes a phantom data set in the Kaggle layout, slice by slice, in bounded memory.

    `images_medseg.npy` (N, size, size, 1) float32 in HU, `masks_medseg.npy` (N, size, size, 4) one-hot bool and
    `groups.npy` (N,) int64, the volume of each slice, get their names when all are on the disk, the images last, so
    that a killed writer leaves no set that looks whole.

    Args:
        directory: The folder; made if it does not exist.
        num_slices: How many slices in all, 8 a volume, at least 2.
        seed: Of all random draws, 0 or more.
        size: Pixels a side, at least 32.

    Raises:
        InputError: If a number is out of its range, if one of the files is already there, or if the folder cannot be
            made or written.
    """
    for name, found, least in (("number of slices", num_slices, 2), ("size", size, 32), ("seed", seed, 0)):
        if found < least:
            raise InputError(f"Found {found} for the {name}, which must be at least {least}; ask for {least} or more.")
    names = ("images_medseg.npy", "masks_medseg.npy", "groups.npy")
    besides = [directory / f".{name}.{os.getpid()}.tmp" for name in names[:2]]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in directory.iterdir()}.intersection(names)  # a broken link counts as well
        if present:
            raise InputError(f"Found {', '.join(sorted(present))} in {directory}; remove it or choose another folder.")
        groups = []
        # Plain writes, not memory maps: on a full disk they raise an error, where a map kills the process.
        with besides[0].open("wb") as images, besides[1].open("wb") as masks:
            for file, channels, dtype in ((images, 1, np.float32), (masks, 4, np.bool_)):
                header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
                np.lib.format.write_array_header_1_0(file, header | {"shape": (num_slices, size, size, channels)})
            for image, labels, group in phantom_slices(num_slices, seed=seed, size=size):
                images.write(image.tobytes())
                masks.write((labels[..., None] == np.arange(4, dtype=np.uint8)).tobytes())
                groups.append(group)
            for file in (images, masks):
                file.flush()
                os.fsync(file.fileno())
        write_whole(directory / names[2], lambda file: np.save(file, np.array(groups, np.int64)))
        besides[1].replace(directory / names[1])
        besides[0].replace(directory / names[0])
        sync_folder(directory)
    except OSError as error:
        raise InputError(f"Cannot write to {directory} ({error.strerror or error}); choose another folder.") from error
    finally:
        for path in besides:
            with contextlib.suppress(OSError):  # the folder may be what could not be made
                path.unlink()
