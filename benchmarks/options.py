"""Whether `--context` and `--soft-boundary` pay: `python benchmarks/options.py`.

Trains the phantom with each value from the same seeds, every seed with a split of its own, and prints a Markdown
table: Dice of the kept weights on the validation slices, mean and standard deviation over the seeds, and the difference
from the run without the option, seed by seed. Softened borders are tried on the phantom's labels, on labels whose
borders were shifted at random, and, with `--data`, on a folder of arrays. All are judged by the labels as they were.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sampler import Record, cpu_model, versions
from torch.utils.data import DataLoader

from matchai.data.phantom import phantom_slices, write_phantom
from matchai.metrics.confusion import confusion_counts, summarise
from matchai.runs.setup import read
from matchai.runs.trainer import run
from matchai.settings.config import TrainConfig
from matchai.system.console import Display
from matchai.system.files import write_whole
from matchai.system.machine import num_cores
from matchai.training.build import build_model_of, dataset_of
from matchai.training.checkpoint import load_weights

PACKAGES = ("torch", "segmentation-models-pytorch", "timm", "accelerate", "numpy", "matchai")
WAVES = 6.0  # pixels, standard deviation of the blur that makes neighbouring pixels shift alike
THIN = 40  # slices of the phantom's lungs in thin slices; `write_phantom` makes 8
METRICS = ("lesion_dice", "mean_dice")


def shift_borders(masks: NDArray[np.bool_], pixels: float, seed: int) -> NDArray[np.bool_]:
    """Labels as by a hand that errs: each slice's pixels moved by a smooth random field of that standard deviation."""
    generator = np.random.default_rng(seed)
    shifted = np.empty_like(masks)
    rows, columns = np.meshgrid(*map(np.arange, masks.shape[1:3]), indexing="ij")
    for mask, out in zip(masks, shifted, strict=True):
        down, across = (cv2.GaussianBlur(generator.normal(size=rows.shape), (0, 0), WAVES) for _ in range(2))
        x, y = (
            (place + pixels * field / field.std()).astype(np.float32)
            for place, field in ((columns, across), (rows, down))
        )
        labels = mask.argmax(-1).astype(np.uint8)
        moved = np.asarray(cv2.remap(labels, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE))
        out[...] = moved[..., None] == np.arange(mask.shape[-1])
    return shifted


def write_thin(folder: Path, num_slices: int, size: int) -> None:
    """Phantom volumes of 8 neighbouring slices each, a fifth as far apart as those of `write_phantom`."""
    generator = np.random.default_rng(0)
    shown = []
    for volume in range(num_slices // 8):
        whole = phantom_slices(THIN, seed=1000 + volume, size=size, slices_per_volume=THIN)
        start = int(generator.integers(THIN // 5, THIN - 8 - THIN // 5))  # not at the tips of the lungs
        shown += list(itertools.islice(whole, start, start + 8))
    folder.mkdir()
    np.save(folder / "images_medseg.npy", np.stack([np.squeeze(image) for image, _, _ in shown]))
    np.save(folder / "masks_medseg.npy", np.stack([labels[..., None] == np.arange(4) for _, labels, _ in shown]))
    np.save(folder / "groups.npy", np.repeat(np.arange(num_slices // 8), 8))


def write_noisy(clean: Path, folder: Path, pixels: float) -> None:
    """The same images and groups, with shifted borders."""
    folder.mkdir()
    for name in ("images_medseg.npy", "groups.npy"):
        (folder / name).symlink_to(clean / name)
    masks = shift_borders(np.load(clean / "masks_medseg.npy"), pixels, 0)
    np.save(folder / "masks_medseg.npy", masks)


def judge(config: TrainConfig, labels: Path) -> dict[str, float]:
    """Dice of a run's kept weights on its validation slices, by the labels of a folder of the same images."""
    display, cache = Display(False), config.input.cache
    assert cache is not None
    assert config.run.output is not None
    data = read(config, cache, display)
    truth = read(config.updated(data=labels), cache, display).slices
    model = build_model_of(config, is_resuming=True)
    model.load_state_dict(load_weights(config.run.output)[0])
    model.eval().to(memory_format=torch.channels_last)
    counts = []
    names = config.input.class_names
    with torch.no_grad():
        for images, _, positions in DataLoader(dataset_of(config, data, data.val), config.sampling.batch_size):
            target = torch.from_numpy(np.asarray(truth.targets)[np.asarray(data.val)[positions]])
            pred = model(images.to(memory_format=torch.channels_last)).argmax(1)
            counts.append(confusion_counts(pred, target, len(names)))
    lesions = [names.index(name) for name in config.input.lesion_classes]
    found = summarise(torch.cat(counts).numpy(), lesions, config.sampling.batch_size)
    return {metric: found[metric] for metric in METRICS}


def train(what: str, value: int, seed: int, data: Path, labels: Path, options: argparse.Namespace) -> Record:
    """One run and what it came to."""
    folder = Path(options.folder)
    setting = "context" if what.startswith("context") else "soft_boundary"
    config = TrainConfig().updated(
        data=data,
        encoder=options.encoder,
        encoder_weights="none",
        image_size=options.size,
        epochs=options.epochs,
        seed=seed,
        max_lr=2e-3,
        output=folder / f"{what}-{value}-{seed}".replace(" ", "-"),
        cache=folder / "cache",
        num_workers=0,
        **{setting: value},
    )
    run(config, display=Display(False), draw_every=float("inf"))
    return {"what": what, "value": value, "seed": seed, **judge(config, labels)}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def report(records: list[Record]) -> list[str]:
    """The table in Markdown."""
    found = {(one["what"], one["value"], one["seed"]): one for one in records}
    seeds = sorted({one["seed"] for one in records})
    lines = [
        "| what | | lesion Dice | difference from 0, by seed | mean | mean Dice | difference from 0, by seed | mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, value in dict.fromkeys((one["what"], one["value"]) for one in records):
        cells = []
        for metric in METRICS:
            values = [found[what, value, seed][metric] for seed in seeds]
            gains = [one - found[what, 0, seed][metric] for one, seed in zip(values, seeds, strict=True)]
            cells += [spread(values), ", ".join(f"{gain:+.3f}" for gain in gains) if value else "", ""]
            if value:
                cells[-1] = f"{statistics.mean(gains):+.3f}"
        lines.append(f"| {what} | {value} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Trains all, prints the table, and writes every measurement."""
    parser = argparse.ArgumentParser(description="Measures --context and --soft-boundary.")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--slices", type=int, default=160, help="of the phantom, 8 a volume")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--noise", type=float, default=2.0, help="pixels by which borders are shifted")
    parser.add_argument("--data", type=Path, help="a folder of arrays to try softened borders on")
    parser.add_argument("--trials", nargs="+", choices=("context", "thin", "shifted", "exact", "data"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "options.json")
    options = parser.parse_args()
    options.trials = options.trials or ["context", "thin", "shifted", "exact", *(["data"] if options.data else [])]
    records: list[Record] = []
    about = {
        "command": shlex.join(["python", "benchmarks/options.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": num_cores(), "threads": torch.get_num_threads()},
        "versions": versions(PACKAGES),
    }
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        clean, noisy = Path(folder) / "clean", Path(folder) / "noisy"
        write_phantom(clean, options.slices, size=options.size)
        write_noisy(clean, noisy, options.noise)
        thin = Path(folder) / "thin"
        write_thin(thin, options.slices, options.size)
        trials: dict[str, tuple[str, Sequence[int], Path, Path]] = {
            "context": ("context, 8 slices of the lungs", (0, 1, 2), clean, clean),
            "thin": (f"context, 8 slices of {THIN}", (0, 1, 2), thin, thin),
            "shifted": (f"soft boundary, borders shifted by {options.noise:g} px", (0, 1, 2, 3), noisy, clean),
            "exact": ("soft boundary, exact borders", (0, 2), clean, clean),
        }
        if options.data:
            trials["data"] = (f"soft boundary, {options.data.name}", (0, 1, 2, 3), options.data, options.data)
        for seed in range(options.seeds):
            for name in options.trials:
                what, values, data, labels = trials[name]
                for value in values:
                    records.append(train(what, value, seed, data, labels, options))
                    print(records[-1], file=sys.stderr, flush=True)
            lines = report(records)
            write_whole(options.output, json.dumps({**about, "table": lines, "records": records}, indent=1).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
