"""Charts and self-contained HTML pages, for the reports of runs, studies and evaluations."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.drawing.figures import (
        PALETTE, TRAIN_COLOR, VAL_COLOR, class_colors, draw_confusion_matrix, draw_dice_per_class, draw_learning_curves,
        draw_panels, fill_panel, style_chart,
    )
    from matchai.drawing.layout import DPI, GRID, INK, MUTED, PAPER, save_figure
    from matchai.drawing.page import Answer, Code, Picture, Piece, Points, Section, Table, Text, render_page
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "DPI", "GRID", "INK", "MUTED", "PALETTE", "PAPER", "TRAIN_COLOR", "VAL_COLOR", "Answer", "Code", "Picture", "Piece",
    "Points", "Section", "Table", "Text", "class_colors", "draw_confusion_matrix", "draw_dice_per_class",
    "draw_learning_curves", "draw_panels", "fill_panel", "render_page", "save_figure", "style_chart",
]
