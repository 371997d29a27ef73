"""The one page-maker for run and study: pieces in, one HTML file out that opens offline and loads nothing.

Every text is escaped, and the page forbids itself scripts and anything from elsewhere, so that texts of unknown origin
can do no harm. It follows the reader's light or dark scheme and reads from a phone's width on.
"""

import base64
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

LONG_CELL = 40  # characters that still stand in one line of a table
_NUMBER = re.compile(r"[-+−]?(\d[\d.,]*(e[-+]?\d+)?( ?%)?( ± [\d.]+)?|inf|nan)|–|")


@dataclass(frozen=True)
class Answer:
    """The sentence that the reader came for.

    Attributes:
        text: The sentence.
        tone: "good" for a result that holds, "open" for one that does not yet, "plain" for any other.
    """

    text: str
    tone: Literal["good", "open", "plain"] = "plain"


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: The paragraph.
    """

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences.

    Attributes:
        texts: The sentences.
    """

    texts: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A command or a file's text, as it is typed.

    Attributes:
        text: The text; its line breaks are kept.
    """

    text: str


@dataclass(frozen=True)
class Table:
    """A table; one that is wider than the page scrolls inside its box, one that is very long too.

    Attributes:
        head: A heading for each column.
        rows: The cells of each row, as many as headings. A column of numbers is set flush right.
        marked: Rows, from 0, that stand out. Say in a cell why they do: colour alone tells a reader too little.
        caption: A line below; empty for none.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Collection[int] = ()
    caption: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column whether it holds numbers and empty cells alone."""
        return tuple(
            any(row[column] for row in self.rows) and all(_NUMBER.fullmatch(row[column]) for row in self.rows)
            for column in range(len(self.head))
        )

    @property
    def wordy(self) -> tuple[bool, ...]:
        """For each column whether it holds a text so long that it is broken into lines."""
        return tuple(any(len(row[column]) > LONG_CELL for row in self.rows) for column in range(len(self.head)))


@dataclass(frozen=True)
class Picture:
    """A picture, kept inside the page.

    Attributes:
        png: The PNG's bytes.
        description: What it shows, for those who cannot see it.
        caption: A line below; empty for none.
        width: Greatest width in CSS pixels.
    """

    png: bytes
    description: str
    caption: str = ""
    width: int = 640

    @property
    def source(self) -> str:
        """The picture as a data address of HTML."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


Piece = Answer | Text | Points | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Attributes:
        heading: Its heading; empty for none.
        pieces: What stands in it, from top to bottom. Pictures that follow each other stand side by side where there is
            room.
        is_folded: Whether only the heading is shown until the reader opens it.
    """

    heading: str
    pieces: Sequence[Piece]
    is_folded: bool = False


def render_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Makes a page.

    Args:
        title: Its title, in the window's bar too.
        subtitle: A line below; empty for none.
        sections: What stands on it.

    Returns:
        The whole HTML text. A character that UTF-8 cannot encode is replaced by "?".
    """
    groups = [(section, _group(section.pieces)) for section in sections]
    page = _template().render(title=title, subtitle=subtitle, sections=groups)
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _group(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Puts pictures that follow each other into one group, every other piece into one of its own."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups and isinstance(piece, Picture) and isinstance(groups[-1][-1], Picture):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups
