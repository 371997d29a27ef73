"""A picture that is filled from top to bottom, with text that wraps, and written whole."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Affine2DBase, ScaledTranslation

from matchai.system import printable, write_whole

INK, MUTED, GRID, PAPER = "#1F2430", "#6B7280", "#E5E7EB", "#FFFFFF"

DPI = 150
WIDTH = 8.0  # inches, so 1,200 pixels
MARGIN, GAP = 0.24, 0.08  # inches, around the page and between panels: whole pixels, so that all panels are equal
LEADING = 1.3  # line height as a multiple of the font size
TEXT_SIZE = 8.5  # points

Entry = tuple[str, dict[str, Any]]  # a legend's label, and the Line2D properties of its key; none for a heading


class FigurePage:
    """A figure filled from top to bottom; lengths are inches from its top left corner, and it grows with its content.

    Attributes:
        width: Of the page.
        y: How far down the page is filled.
    """

    def __init__(self, title: str, width: float = WIDTH) -> None:
        self.width, self.y = width, MARGIN
        self.figure = Figure(figsize=(width, 1), dpi=DPI, facecolor=PAPER)
        self.canvas: Any = FigureCanvasAgg(self.figure)  # Any: matplotlib gives no types for it
        self._down = self.figure.dpi_scale_trans + ScaledTranslation(0, 1, cast(Affine2DBase, self.figure.transFigure))
        self._placed: list[tuple[Axes, tuple[float, float, float, float]]] = []
        self.paragraph(title, size=12, weight="bold")
        self.y += 0.06

    def measure(self, text: str, size: float, weight: str = "normal") -> float:
        """Returns how wide one line of text is, in inches; `size` in points."""
        font = FontProperties(size=size, weight=weight)
        shown = _drawable(text)
        width, _, _ = self.canvas.get_renderer().get_text_width_height_descent(shown, font, ismath=False)
        return float(width) / DPI

    def wrap(self, text: str, width: float, size: float, weight: str = "normal") -> list[str]:
        """Breaks text into lines of at most `width` inches, inside a word only where the word alone is wider."""
        columns = max(1, len(text))
        while True:
            lines = textwrap.wrap(text, columns) or [""]
            widest = max(self.measure(line, size, weight) for line in lines)
            if widest <= width or columns == 1:
                return lines
            columns = max(1, min(columns - 1, round(columns * width / widest)))

    def write(self, x: float, y: float, lines: Sequence[str], size: float, **properties: Any) -> None:
        """Puts lines of text, `size` in points, at a place on the page, the top of the first at `y`.

        Each line stands on its own computed baseline: matplotlib aligns a block by the letters that happen to be in it.
        """
        for number, line in enumerate(lines):
            baseline = y + (number * LEADING + 1) * size / 72
            style: dict[str, Any] = {"color": INK, "fontsize": size, "transform": self._down, "parse_math": False}
            self.figure.text(x, -baseline, line, **style | properties)

    def paragraph(self, text: str, size: float, weight: str = "normal", color: str = INK) -> None:
        """Writes text across the page, wrapped, and moves down past it."""
        lines = self.wrap(text, self.width - 2 * MARGIN, size, weight)
        self.write(MARGIN, self.y, lines, size, weight=weight, color=color)
        self.y += text_height(lines, size)

    def legend(self, entries: Sequence[Entry]) -> None:
        """Writes keys and labels from left to right, on as many lines as they need, and moves down past them.

        matplotlib's own legend drops labels that begin with an underscore and does not wrap.
        """
        left, right = MARGIN, self.width - MARGIN
        x, tall = left, 0.0
        for label, key in entries:
            weight = "normal" if key else "bold"
            key_width = 0.0 if not key else 0.2 if "marker" in key else 0.3
            lines = self.wrap(label, right - left - key_width, TEXT_SIZE, weight)
            width = key_width + max(self.measure(line, TEXT_SIZE, weight) for line in lines)
            if x > left and x + width > right:
                x, self.y, tall = left, self.y + tall + 0.03, 0.0
            if key:
                ends = [x + 0.07] if "marker" in key else [x, x + 0.22]
                middle = self.y + 0.65 * TEXT_SIZE / 72  # half the height of a small letter above the baseline
                self.figure.add_artist(Line2D(ends, [-middle] * len(ends), transform=self._down, **key))
            self.write(x + key_width, self.y, lines, TEXT_SIZE, weight=weight)
            x, tall = x + width + 0.22, max(tall, text_height(lines, TEXT_SIZE))
        self.y += tall + 0.1

    def axes(self, left: float, width: float, height: float) -> Axes:
        """Makes axes at the present height, on whole pixels, without moving down."""
        self.y = math.ceil(round(self.y * DPI, 3)) / DPI
        axes = self.figure.add_axes((0, 0, 1, 1))
        self._placed.append((axes, (left, self.y, width, height)))
        return axes

    def save(self, path: Path) -> None:
        """Writes the page as a PNG, as high as it was filled."""
        height = math.ceil((self.y + MARGIN) * DPI) / DPI
        self.figure.set_size_inches(self.width, height)
        for axes, (left, top, width, tall) in self._placed:
            axes.set_position((left / self.width, 1 - (top + tall) / height, width / self.width, tall / height))
        save_figure(self.figure, path)


def text_height(lines: Sequence[str], size: float) -> float:
    """Returns the height of a block of lines in inches; `size` in points."""
    return len(lines) * size * LEADING / 72


def _drawable(text: str) -> str:
    """A text with replacement characters for what the font lacks, for which matplotlib warns letter by letter."""
    fonts = [get_font(findfont(FontProperties(weight=weight))) for weight in ("normal", "bold")]
    return "".join(
        letter if letter.isspace() or all(font.get_char_index(ord(letter)) for font in fonts) else "\ufffd"
        for letter in printable(text)
    )


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG; its folder must exist. Letters that the font lacks are replaced."""
    texts: Any = figure.findobj(Text)
    for text in texts:
        text.set_text(_drawable(text.get_text()))
    write_whole(path, cast(Any, FigureCanvasAgg(figure)).print_png)  # Any: matplotlib gives no types for it
