"""`python -m matchai.phantom --output DIR`: writes a synthetic data set in the layout of the Kaggle set."""

import sys

from matchai.settings import PhantomSettings, parse_settings
from matchai.system import run_command

DESCRIPTION = (
    "Writes a synthetic data set of lung CT slices with lesions, in the layout of the Kaggle set. It comes from no "
    "patient: use it to try and to compare software, never to judge how useful a model is."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.phantom") -> int:
    """Writes the phantom; returns the exit status: 0, 2 the user's mistake, 130 Ctrl-C."""
    return run_command(lambda: _write(parse_settings(argv, DESCRIPTION, prog, PhantomSettings)))


def _write(settings: PhantomSettings) -> int:
    from matchai.data import write_phantom  # noqa: PLC0415 imports that --help does not need

    write_phantom(settings.output, settings.slices, seed=settings.seed, size=settings.size)
    print(
        f"Wrote {settings.slices} synthetic slices (a phantom, no patients; {settings.size} x {settings.size}, "
        f"seed {settings.seed}) to {settings.output}: images_medseg.npy, masks_medseg.npy, groups.npy."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
