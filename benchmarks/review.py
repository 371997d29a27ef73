"""What mirrored passes and the uncertainty are worth: `python benchmarks/review.py RUN...`.

Predicts each run's validation slices at its training size with and without mirrored passes, and prints a Markdown
table: pooled Dice, how well the uncertainty tells wrong pixels from right ones (area under the ROC curve, 0.5 for
chance), how many of the wrong pixels lie among the twentieth that is most uncertain, and how the mean uncertainty of
slices' predicted lesions ranks with their lesion Dice (Spearman; -1 would put the worst slices first).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from matchai.data.prepared import STEPS
from matchai.metrics.confusion import confusion_counts, summarise
from matchai.prediction.evaluation import read_settings
from matchai.prediction.inference import Predictor, uncertainty
from matchai.runs.facts import rank_by_lesion_dice
from matchai.runs.setup import read
from matchai.system.console import Display

MOST = 0.05  # the share of pixels that a reviewer might look at


def measure(run: Path, *, is_mirrored: bool) -> dict[str, float]:
    """The row of one run."""
    config = read_settings(run)
    data = read(config, config.input.cache or run.parent / "cache", Display(is_main_process=False))
    predictor = Predictor([run], is_mirrored=is_mirrored)
    low, high = data.slices.hu_window
    images = data.slices.images[data.val] * np.float32((high - low) / STEPS) + np.float32(low)
    assert config.network.context == 0, "the neighbours of validation slices are not at hand here"
    probs = np.stack([one for _, one in predictor.probabilities(lambda index: images[index], len(images))])
    targets = data.slices.targets[data.val]
    preds = probs.argmax(1)
    counts = confusion_counts(torch.from_numpy(preds), torch.from_numpy(targets), probs.shape[1]).numpy()
    doubts = np.stack([uncertainty(one) for one in probs])
    is_wrong = preds != targets
    is_doubtful = doubts >= np.quantile(doubts, 1 - MOST)
    ranked, dice = rank_by_lesion_dice(counts, predictor.lesion_classes)
    shown = np.isin(preds, predictor.lesion_classes)
    of_slices = [float(doubt[lesion].mean()) for doubt, lesion in zip(doubts, shown, strict=True)]
    rank = spearmanr([of_slices[row] for row in ranked], [dice[row] for row in ranked], nan_policy="omit").statistic
    figures = summarise(counts, predictor.lesion_classes, config.sampling.batch_size)
    return {
        "mean Dice": figures["mean_dice"],
        "lesion Dice": figures["lesion_dice"],
        "wrong pixels": float(is_wrong.mean()),
        "area under the curve": float(roc_auc_score(is_wrong.ravel(), doubts.ravel())),
        "wrong ones found in 5 %": float((is_wrong & is_doubtful).sum() / is_wrong.sum()),
        "Spearman of slices": float(rank),
    }


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    rows = [
        (f"{run.name} | {'mirrored, too' if is_mirrored else 'one'}", measure(run, is_mirrored=is_mirrored))
        for run in parser.parse_args().runs
        for is_mirrored in (False, True)
    ]
    print("| run | passes | " + " | ".join(rows[0][1]) + " |")
    print("|---" * (len(rows[0][1]) + 2) + "|")
    for name, figures in rows:
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in figures.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
