"""The page-maker: texts stay texts, and nothing is loaded from elsewhere."""

import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matchai.drawing.page import Answer, Code, Picture, Piece, Points, Section, Table, Text, render_page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</style></title><!-- {{ 7 * 7 }} -->"


class Reader(HTMLParser):
    """Every tag with its attributes, and every text, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts = [""]
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]


def make_page(text: str, subtitle: str = "sub") -> str:
    pieces: list[Piece] = [
        *(Answer(text), Text(text), Points([text]), Code(text)),
        *(Table([text, "b"], [[text, "1"]], caption=text), Picture(b"png", text, text)),
    ]
    return render_page(text, subtitle, [Section(text, pieces), Section(text, [Text(text)], is_folded=True)])


def cells(page: str) -> list[tuple[str, dict[str, str | None]]]:
    return [(tag, attributes) for tag, attributes in Reader(page).tags if tag in {"th", "td"}]


def structure(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Tags and attributes of a page; the class of a cell follows from its text, and is left out."""
    return [
        (tag, {} if tag in {"th", "td"} else attributes | ({"alt": attributes["alt"] == text} if tag == "img" else {}))
        for tag, attributes in Reader(make_page(text)).tags
    ]


@given(st.one_of(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), st.just(HOSTILE)))
def test_no_text_becomes_markup(text: str) -> None:
    assert structure(text) == structure("harmless")


def test_every_text_is_shown_as_it_is() -> None:
    texts = [text.strip() for text in Reader(make_page(HOSTILE)).texts]
    # window, title, 2 headings, answer, text, point, code, head, cell, 2 captions, folded text
    assert texts.count(HOSTILE) == 13


@pytest.mark.parametrize("text", ["plain", HOSTILE, "url(http://x) @import 'http://x'"])
def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    reader = Reader(make_page(text))
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(reader.names())
    for _, attributes in reader.tags:
        assert "href" not in attributes
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or "src" not in attributes
    style = next(text for text in reader.texts if ":root" in text)
    assert not any(word in style for word in ("url(", "@import"))


def test_the_page_forbids_itself_scripts_and_everything_from_elsewhere() -> None:
    policies = [tag[1]["content"] for tag in Reader(make_page("a")).tags if "http-equiv" in tag[1]]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@given(st.text(st.characters(categories=["Cs"]), min_size=1, max_size=5))
def test_a_character_that_cannot_be_encoded_is_replaced(text: str) -> None:
    assert b"?" * len(text) in make_page(text).encode()


def test_a_page_without_a_subtitle_has_no_empty_line() -> None:
    assert Reader(make_page("a", "")).names().count("p") == Reader(make_page("a")).names().count("p") - 1


def test_a_page_may_be_empty() -> None:
    assert Reader(render_page("a", "", [])).names()[-1] == "main"


@pytest.mark.parametrize(
    ("column", "is_numeric"),
    [
        (["1", "−0.031", "+0.5", "1,234", "5e-4", "95 %", "0.86 ± 0.01", "", "–"], True),
        (["–"], True),
        (["1", "one"], False),
        (["0.1 to 0.2"], False),
        (["", ""], False),
        ([], False),
    ],
)
def test_a_column_of_numbers_is_set_flush_right(column: list[str], is_numeric: bool) -> None:
    page = render_page("a", "", [Section("", [Table(["a"], [[cell] for cell in column])])])
    assert [attributes.get("class") == "number" for _, attributes in cells(page)] == [is_numeric] * (len(column) + 1)


def test_only_a_long_text_is_broken_into_lines() -> None:
    page = render_page(
        "a", "", [Section("", [Table(["a", "b"], [["word", "a sentence that is too long for one line"]])])]
    )
    assert [attributes.get("class") for tag, attributes in cells(page) if tag == "td"] == [None, None]
    page = render_page("a", "", [Section("", [Table(["a", "b"], [["word", "many words " * 5]])])])
    assert [attributes.get("class") for tag, attributes in cells(page) if tag == "td"] == [None, "wordy"]


def test_marked_rows_stand_out() -> None:
    page = render_page("a", "", [Section("", [Table(["a"], [["x"], ["y"], ["z"]], marked=[1])])])
    rows = [attributes.get("class") for tag, attributes in Reader(page).tags if tag == "tr"]
    assert rows == [None, None, "marked", None]


def test_every_table_scrolls_inside_a_box() -> None:
    names = Reader(make_page("a")).names()
    assert names[names.index("table") - 1] == "div"


def test_a_picture_is_inside_the_page_with_its_description() -> None:
    page = render_page("a", "", [Section("", [Picture(b"\x00\xffpng", "a curve")])])
    images = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    assert images == [{"src": "data:image/png;base64,AP9wbmc=", "alt": "a curve"}]


def test_pictures_that_follow_each_other_stand_side_by_side() -> None:
    one = Picture(b"", "one")

    def groups(*pieces: Any) -> int:
        page = render_page("a", "", [Section("", pieces)])
        return [attributes.get("class") for _, attributes in Reader(page).tags].count("pictures")

    assert [groups(one), groups(one, one), groups(one, Text("a"), one), groups(one, one, Text("a"), one, one)] == [
        *(0, 1, 0, 2),
    ]


def test_only_a_folded_section_waits_to_be_opened() -> None:
    page = render_page("a", "", [Section("facts", [Text("b")]), Section("facts", [Text("b")], is_folded=True)])
    tags = Reader(page).tags
    assert [attributes for tag, attributes in tags if tag == "details"] == [{}]
    assert Reader(page).names().count("section") == 1


def test_the_template_is_shipped_with_the_package() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "page.html" in settings["tool"]["setuptools"]["package-data"]["matchai.drawing"]
