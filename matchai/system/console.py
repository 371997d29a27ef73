"""What the terminal shows, on the main process only: one progress bar and a line an epoch, or plain lines."""

import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Column, Table

from matchai.system.output import safe_stdout

FEW_GROUPS = 10
PLAIN_EVERY = 30.0  # seconds between lines about a long epoch where there is no terminal


class Display:
    """Says things, and shows progress.

    Args:
        is_main_process: Others say nothing.
        file: Where to; without it, the terminal.
    """

    def __init__(self, is_main_process: bool, file: IO[str] | None = None) -> None:
        self.is_main_process = is_main_process
        self.console = Console(highlight=False, soft_wrap=True, file=file or safe_stdout())
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
                bar, counts, left = BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
                columns = ("{task.description}", bar, counts, "{task.fields[detail]}", left)
                self.progress = Progress(*columns, console=self.console, transient=True)
                self.task = self.progress.add_task(label, total=total, detail=detail)
                self.progress.start()
            assert self.task is not None
            self.progress.update(self.task, description=label, completed=done, total=total, detail=detail)
        elif time.monotonic() - self._last_line > PLAIN_EVERY:
            self._last_line = time.monotonic()
            self.say(f"{label} {done}/{total} {detail}".rstrip())

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StudyDisplay:
    """Shows a study: on a terminal one table of what runs, else a line for each run that ends.

    Args:
        objective: Its name.
        num_workers: By which the time left is divided.
    """

    def __init__(self, objective: str, num_workers: int) -> None:
        self.objective, self.num_workers = objective, num_workers
        self.console = Console(highlight=False, soft_wrap=True, file=safe_stdout())
        self.counts: dict[str, Any] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.has_ended = 0
        self.answer: dict[str, Any] | None = None
        self._live: Live | None = None

    def hear(self, event: dict[str, Any]) -> None:
        """Takes in what a worker tells."""
        kind, key = event["kind"], event.get("key", "")
        if kind == "say":
            self.say(event["text"])
        elif kind == "counts":
            self.counts = event
        elif kind == "begin":
            self.runs[key] = {**event, "epoch": 0, "value": None, "step": None, "total": None}
        elif kind in ("epoch", "step") and key in self.runs:
            run = self.runs[key]
            run |= {name: value for name, value in event.items() if name not in ("kind", "key")}
            if kind == "step":
                run.setdefault("first", (event["step"], time.monotonic()))
        elif kind == "end":
            self.runs.pop(key, None)
            self.has_ended += 1
            if not self.console.is_terminal:
                self.say(f"{event['title']}: {event['outcome']} · {self._line()}")
        elif kind == "error":
            self.close()
            print(f"error: {event['text']}", file=sys.stderr, flush=True)
        elif kind == "answer":
            self.answer = event
        self._show()

    def forget(self, keys: Sequence[str]) -> None:
        """Takes runs off the table whose worker is gone."""
        for key in keys:
            self.runs.pop(key, None)

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, markup=False)
        self.console.file.flush()

    def close(self) -> None:
        """Takes the table off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if not self.console.is_terminal:
            return
        table = _table(self._line(), "run", "epoch", self.objective, "time left")
        for run in self.runs.values():
            epochs = f"{run['epoch']}/{run['epochs']}"
            table.add_row(run["title"], epochs, _figure(run["value"]), _duration(_rest(run)))
        if self._live is None:
            self._live = Live(console=self.console, transient=True, refresh_per_second=4)
            self._live.start()
        self._live.update(table)

    def _line(self) -> str:
        """Counts, the best so far against the recipe, and the time left."""
        counts = self.counts
        if not counts:
            return "starting"
        done = counts["complete"] + counts["pruned"]
        parts = [f"{counts['stage']}: {done}/{counts['total']} trials"]
        parts += [f"{counts[name]} {name}" for name in ("pruned", "failed") if counts[name]]
        if counts["confirmed"]:
            parts.append(f"{counts['confirmed']}/{counts['to_confirm']} confirming runs")
        if counts["best"]:
            parts.append(f"best {counts['best'][1]:.3f} (trial {counts['best'][0]})")
        parts.append(f"recipe {_figure(counts['recipe'])}")
        if counts["seconds"]:
            runs = counts["total"] - done + counts["to_confirm"] - counts["confirmed"]
            parts.append(f"about {_duration(runs * counts['seconds'] / self.num_workers)} left")
        return " · ".join(parts)


def _table(title: str, *columns: str | Column) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


def _rest(run: dict[str, Any]) -> float | None:
    """Seconds that a run has left, at the pace it has shown so far."""
    if run["step"] is None or run["step"] <= run["first"][0]:
        return None
    pace = (time.monotonic() - run["first"][1]) / (run["step"] - run["first"][0])
    return float(pace * (run["total"] - run["step"]))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


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


def best_line(row: dict[str, Any], class_names: Sequence[str], num_slices: int, *, is_phantom: bool) -> str:
    """One line about the best epoch of a finished run, validated on `num_slices` slices, for people."""
    names, values = ["mean", "lesion", *class_names], [row["mean_dice"], row["lesion_dice"], *row["dice_per_class"]]
    dice = ", ".join(f"{name} {_figure(value, 'undefined')}" for name, value in zip(names, values, strict=True))
    note = " on the synthetic phantom, not on patients" if is_phantom else ""
    return f"Done: best at epoch {row['epoch']}; Dice pooled over {num_slices} validation slices{note}: {dice}."


def _figure(value: float | None, missing: str = "none") -> str:
    return missing if value is None else f"{value:.3f}"


def show_evaluation(result: dict[str, Any], display: Display) -> None:
    """Prints the main figures of an evaluation, each table saying what its figures are.

    Args:
        result: What `matchai.prediction.evaluation.evaluate` returns.
        display: Where to.
    """
    classes = {**result["classes"], "any lesion": result["any_lesion"]}
    names = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall"}
    for title, end in (("Pooled over pixels", "pooled_over_pixels"), ("Mean over images", "mean_over_images")):
        columns = {shown: f"{name}_{end}" for name, shown in names.items()}
        _print_table(f"{title} ({result['slices']})", columns, classes, display, with_interval=["Dice"])
    distances = [name for name in result["any_lesion"] if name.startswith(("hd95_", "nsd_"))]
    if distances:
        over = distances[0].rpartition("_")[2]
        columns = {
            name.partition("_mean_")[0].replace("_", " ").replace("hd95", "HD95").replace("nsd", "NSD"): name
            for name in distances
        }
        measured = {name: figures for name, figures in classes.items() if distances[0] in figures}
        _print_table(
            f"Surface distances, mean over {over} ({result['slices']})", columns, measured, display, list(columns)
        )
    means, share = result["means_over_classes"], result["affected_share"]
    display.say(
        f"Pooled over pixels: mean Dice {_with_interval(means['mean_dice_pooled_over_pixels'])} over the classes, "
        f"{_with_interval(means['lesion_dice_pooled_over_pixels'])} over the lesion classes"
    )
    errors = (
        f"{_with_interval(share[f'absolute_error_points_mean_over_{what}'], 1)} (mean over {what})"
        for what in ("images", "groups")
    )
    display.say(f"Absolute error of the affected share, in percentage points: {', '.join(errors)}")
    if result["num_groups"] > 1:
        display.say(
            f"In brackets: 95 % intervals by bootstrap over {result['num_groups']} groups"
            f"{', rough with so few' if result['num_groups'] < FEW_GROUPS else ''}; each figure in the file has one"
        )


def _print_table(
    title: str, columns: dict[str, str], classes: dict[str, Any], display: Display, with_interval: Sequence[str]
) -> None:
    """A row for each class, with the figure that each column names."""
    table = _table(title, "", *(Column(name, justify="right") for name in columns))
    for name, figures in classes.items():
        cells = (
            _with_interval(figures[key]) if column in with_interval else _figure(figures[key]["value"])
            for column, key in columns.items()
        )
        table.add_row(name, *cells)
    display.console.print(table, markup=False)


def _with_interval(figure: dict[str, Any], digits: int = 3) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None:
        return _figure(value)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
