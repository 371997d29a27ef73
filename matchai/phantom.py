"""`python -m matchai.phantom --output DIR`: writes a synthetic data set in the layout of the Kaggle set."""

import argparse
import sys
from pathlib import Path

from matchai.data.phantom import write_phantom
from matchai.system.errors import InputError


def main() -> None:
    """Runs the command line; exits with status 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m matchai.phantom",
        description="Write a synthetic data set of lung CT slices with lesions, in the layout of the Kaggle set. "
        "No patient is behind it: use it to try and to compare software, never to judge a model's use.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--slices", type=int, default=128, metavar="N", help="how many slices, 8 a volume; at least 2")
    parser.add_argument("--size", type=int, default=512, help="pixels a side; at least 32")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws; 0 or more")
    settings = parser.parse_args()
    try:
        write_phantom(settings.output, settings.slices, seed=settings.seed, size=settings.size)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"Wrote {settings.slices} synthetic slices (a phantom, no patients; {settings.size} x {settings.size}, "
        f"seed {settings.seed}) to {settings.output}: images_medseg.npy, masks_medseg.npy, groups.npy."
    )


if __name__ == "__main__":
    main()
