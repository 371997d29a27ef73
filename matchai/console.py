"""What the terminal shows, on the main process only: one progress bar and a line an epoch, or plain lines."""

import time
from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 30.0  # seconds between lines about a long epoch where there is no terminal


class Display:
    """Says things, and shows progress.

    Args:
        is_main_process: Others say nothing.
        file: Where to; without it, the terminal.
    """

    def __init__(self, is_main_process: bool, file: IO[str] | None = None) -> None:
        self.is_main_process = is_main_process
        self.console = Console(highlight=False, soft_wrap=True, file=file)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self._last_line = time.monotonic()

    def say(self, text: str) -> None:
        """Prints one line."""
        if self.is_main_process:
            self.console.print(text, markup=False)
            self.console.file.flush()

    def warn(self, text: str) -> None:
        """Prints one line that asks for attention."""
        self.say(f"warning: {text}")

    def show(self, label: str, done: int, total: int, detail: str = "") -> None:
        """Moves the bar to `done` of `total`; without a terminal, prints a line now and then."""
        if not self.is_main_process:
            return
        if self.console.is_terminal:
            if self.progress is None:
                self.progress = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=None),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[detail]}"),
                    TimeRemainingColumn(),
                    console=self.console,
                    transient=True,
                )
                self.task = self.progress.add_task(label, total=total, detail=detail)
                self.progress.start()
            assert self.task is not None
            self.progress.update(self.task, description=label, completed=done, total=total, detail=detail)
        elif time.monotonic() - self._last_line > PLAIN_EVERY:
            self._last_line = time.monotonic()
            self.say(f"{label} {done}/{total} {detail}")

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def epoch_line(row: dict[str, Any], epochs: int, class_names: Sequence[str], is_best: bool) -> str:
    """One line about an epoch, for people."""
    dice = " · ".join(
        f"{name} {_figure(value)}" for name, value in zip(class_names, row["dice_per_class"], strict=True)
    )
    skipped = f" · {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return (
        f"epoch {row['epoch']}/{epochs} · loss {_figure(row['train_loss'])} train {_figure(row['val_loss'])} val · "
        f"Dice: mean {_figure(row['mean_dice'])} · lesion {_figure(row['lesion_dice'])} · {dice} · "
        f"{row['images_per_second'] or 0:.1f} images/s · {row['seconds']:.0f} s{skipped}{' · best' if is_best else ''}"
    )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
