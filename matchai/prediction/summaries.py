"""What a prediction comes to, for people and programs: summary.json, CSV tables, a label table, the Kaggle CSV."""

import csv
import io
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from matchai.drawing import class_colors
from matchai.metrics import affected_share
from matchai.system import InputError, write_whole
from matchai.volumes import Volume, file_labels

KAGGLE_SIZE = 512  # pixels


def affected_percent(pixels: NDArray[np.int64], lesion_classes: Sequence[int], background_class: int) -> float | None:
    """`matchai.metrics.confusion.affected_share` of one count of pixels (C,); None where no pixel is lung or lesion."""
    share = float(affected_share(pixels, lesion_classes, background_class))
    return None if math.isnan(share) else share


def affected_text(percent: float | None) -> str:
    """What `affected_percent` found, in words."""
    return "no lung found" if percent is None else f"{percent:.1f} % of the lung affected"


def describe_volume(
    volume: Volume, pixels: NDArray[np.int64], class_names: Sequence[str], percent: float | None
) -> dict[str, Any]:
    """What was found in a volume, in numbers under names.

    Args:
        volume: The volume.
        pixels: (C,) pixels of each class.
        class_names: (C,) names.
        percent: Of `affected_percent`.

    Returns:
        `input`, `slices`, `voxel_ml`, `percent_of_lung_affected`, and for every class its pixels and millilitres.
    """
    ml = volume.voxel_ml
    return {
        "input": str(volume.path),
        "slices": volume.shape[0],
        "rows": volume.shape[1],
        "columns": volume.shape[2],
        "spacing_mm": list(volume.spacing) if volume.spacing else None,
        "percent_of_lung_affected": percent,
        "classes": {
            name: {"pixels": int(count), "ml": int(count) * ml if ml is not None else None}
            for name, count in zip(class_names, pixels, strict=True)
        },
    }


def write_summaries(
    folder: Path, about: dict[str, Any], inputs: Sequence[dict[str, Any]], slices: Sequence[dict[str, Any]]
) -> None:
    """Writes summary.json, summary.csv (a row an input) and slices.csv (a row a slice).

    Args:
        folder: Where to.
        about: What summary.json says of the prediction as a whole.
        inputs: What `describe_volume` says of each input, and more.
        slices: A row for each slice: names to values.
    """
    text = json.dumps({**about, "inputs": list(inputs)}, indent=2, ensure_ascii=False)
    write_whole(folder / "summary.json", text)
    rows = []
    for one in inputs:
        row = {key: value for key, value in one.items() if not isinstance(value, dict | list)}
        row["spacing_mm"] = " ".join(f"{value:g}" for value in one["spacing_mm"] or ())
        row |= {f"{name} {key}": value for name, found in one["classes"].items() for key, value in found.items()}
        rows.append(row)
    write_table(folder / "summary.csv", rows)
    write_table(folder / "slices.csv", slices)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as CSV (UTF-8, a header, an empty cell where a value is None); the names are those of all rows."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def write_label_table(path: Path, class_names: Sequence[str], background_class: int) -> None:
    """Writes what the numbers of NIfTI and picture masks mean, with colours, as ITK-SNAP reads it.

    Args:
        path: The text file.
        class_names: (C,) names.
        background_class: Index of the class that is 0.
    """
    colors = class_colors(len(class_names), background_class)
    lines = ["# label red green blue opacity visible mesh name"]
    for label, name, color in sorted(zip(file_labels(len(colors), background_class), class_names, colors, strict=True)):
        red, green, blue = (round(255 * part) for part in to_rgb(color))
        plain, shown = name.replace('"', "'"), int(label > 0)
        lines.append(f'{label:5} {red:5} {green:3} {blue:3} {shown:8} {shown:2} {shown:2}    "{plain}"')
    write_whole(path, "\n".join([*lines, ""]))


class Submission:
    """The CSV of the Kaggle competition: `Id,Predicted`, the C-order ravel of (N, 512, 512, 2), lesion class last.

    Args:
        volumes: The inputs; one array of slices of 512 x 512 pixels.
        lesion_classes: Indices of ground glass and consolidation.

    Raises:
        InputError: If the inputs are anything else.
    """

    def __init__(self, volumes: Sequence[Volume], lesion_classes: Sequence[int]) -> None:
        sizes = {volume.shape[1:] for volume in volumes}
        if len(volumes) != 1 or sizes != {(KAGGLE_SIZE, KAGGLE_SIZE)} or len(lesion_classes) != 2:
            raise InputError(
                f"--submission takes one input of {KAGGLE_SIZE}x{KAGGLE_SIZE} slices and a run of two lesion classes, "
                f"but there are {len(volumes)} inputs of {', '.join(f'{h}x{w}' for h, w in sorted(sizes))} and "
                f"{len(lesion_classes)} lesion classes."
            )
        self.lesion_classes = np.array(lesion_classes)
        self._preds = tempfile.TemporaryFile()  # noqa: SIM115 kept for `write`; 64 kB a slice
        self._num_slices = 0

    def add(self, pred: NDArray[np.uint8]) -> None:
        """Takes the class indices (H, W) of the next slice."""
        self._preds.write(np.packbits(pred[..., None] == self.lesion_classes).tobytes())
        self._num_slices += 1

    def write(self, path: Path) -> None:
        """Writes the file."""

        def write(file: BinaryIO) -> None:
            file.write(b"Id,Predicted\n")
            per_slice = KAGGLE_SIZE * KAGGLE_SIZE * len(self.lesion_classes)
            self._preds.seek(0)
            for number in range(self._num_slices):
                values = np.unpackbits(np.frombuffer(self._preds.read(per_slice // 8), np.uint8)).tolist()
                lines = (f"{number * per_slice + k},{value}\n" for k, value in enumerate(values))
                file.write("".join(lines).encode())

        write_whole(path, write)
