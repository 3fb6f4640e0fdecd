"""The terminal and the page show every token, in the right place and unharmed."""

import html.parser
import io
import re

import numpy as np
import pytest
from rich.console import Console

from gold_jax.inspection import page, terminal
from gold_jax.inspection.report import Mass, PairMass, Report
from gold_jax.inspection.terminal import lines_of
from gold_jax.inspection.tokenization import CutText, Group, Token, shapes_of
from gold_jax.inspection.vocabularies import Vocabulary, compare
from gold_jax.text.surface import Surfaces

VOID = {"meta", "br"}


def group(student: str, teacher: str) -> Group:
    """A group from tokens with bars between them."""
    return Group(*(tuple(Token(7, part.encode()) for part in side.split("|")) for side in (student, teacher)))


def cut(*groups: Group, name: str = "made") -> CutText:
    return CutText(name, b"".join(g.data for g in groups).decode(), groups)


MADE = cut(
    group("The", "The"), group(" quick| fox", " qui|ck| fox"), group(" x", " x"), group("\n", "\n"),
    group("1|2|3", "123"), group("<b>", "<b>"), group("[red]&", "[red]|&"),
)  # fmt: skip


def report(*texts: CutText, mass: bool = True, names=("a/student", "b/teacher")) -> Report:
    def surfaces(*table):
        return Surfaces(list(table), [entry.decode() for entry in table], np.zeros(len(table), bool))

    student, teacher = surfaces(b"a", b"<b>", b"a&b", b"1", b"  "), surfaces(b"a", b"<b>", b"1", b"1<2", b"12", b" ")
    part = Mass(10, 0.25, 0.5, 0.25, 0.0, 0.2)
    pair_mass = PairMass(part, part, ((part, part),) * len(texts), "float32")
    figures = compare(Vocabulary(student, 5), Vocabulary(teacher, 6))
    return Report(*names, texts, shapes_of(texts), figures, pair_mass if mass else None, ("A note on <it>.",))


def printed(found: Report, width: int = 80) -> str:
    out = io.StringIO()
    terminal.show(found, Console(file=out, width=width))
    return out.getvalue()


def test_groups_stand_above_each_other_and_lines_end_with_them():
    assert [line.plain for line in lines_of(MADE, 40)] == [
        "  S The ·quick│·fox  ·x ↵",
        "  T The ·qui│ck│·fox ·x ↵",
        "",
        "  S 1│2│3 <b> [red]& ",
        "  T 123   <b> [red]│&",
    ]
    assert [line.plain for line in lines_of(MADE, 24)] == [
        "  S The ·quick│·fox ",
        "  T The ·qui│ck│·fox",
        "",
        "  S ·x ↵",
        "  T ·x ↵",
        "",
        "  S 1│2│3 <b> [red]& ",
        "  T 123   <b> [red]│&",
    ]


def test_wide_characters_take_two_cells():
    made = cut(group("世界", "世|界"), group("ab", "ab"), group("😀", "😀"), group("c", "c"))
    lines = list(lines_of(made, 60))
    assert [line.plain for line in lines] == ["  S 世界  ab 😀 c", "  T 世│界 ab 😀 c"]
    assert lines[0].cell_len == lines[1].cell_len


def test_merged_groups_have_one_colour_on_both_sides_and_their_neighbours_another():
    lines = list(lines_of(cut(group("a|b", "ab"), group("c", "c"), group("d|e", "de"), group("f", "f|g")), 60))
    colours = [[str(span.style) for span in line.spans if " on #" in str(span.style)] for line in lines]
    assert colours[0] == colours[1] == list(terminal.MERGED[:3])


def test_a_group_wider_than_the_line_is_folded():
    lines = [line.plain for line in lines_of(cut(group("a" * 30, "|".join("aaa" for _ in range(10)))), 26)]
    assert max(map(len, lines)) <= 26
    assert "".join(line[4:].rstrip() for line in lines if line.startswith("  S")) == "a" * 30
    assert "".join(line[4:].rstrip() for line in lines if line.startswith("  T")) == "│".join(["aaa"] * 10)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_terminal_shows_everything_within_its_width(width):
    shown = printed(report(MADE, cut(group("z", "z"), name="[bold]second")), width)
    assert max(map(len, shown.splitlines())) <= width
    for part in (
        "a/student",
        "[red]│&",
        "2:3",
        "1│2│3 ⇔ 123",
        "[bold]second",
        "Jaccard",
        "12 → 1",
        "a&b → a",
        "50.0%",
        "80.0%",
    ):
        assert part in shown or width == 40, part
    assert "A note on <it>." in shown


def test_very_long_texts_are_cut_in_the_terminal_and_on_the_page(monkeypatch):
    long = cut(*[group("a", "a")] * (terminal.SHOWN_GROUPS + 7))
    assert list(lines_of(long, 80))[-1].plain.strip() == "… and 7 more groups"
    monkeypatch.setattr(page, "SHOWN_GROUPS", 5)
    text = page.page(report(long))
    assert text.count("1:1, 1 bytes") == 5 and f"… and {terminal.SHOWN_GROUPS + 2} more groups" in text


def test_a_report_without_models_says_nothing_of_probability():
    found = report(MADE, mass=False)
    assert "probability" not in printed(found) and "Probability" not in page.page(found)
    assert found.to_dict()["mass"] is None


def test_a_pair_that_cuts_alike_has_no_shapes():
    found = report(cut(group("a", "a")))
    assert found.shapes == () and "by shape" not in printed(found) and "by shape" not in page.page(found)


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order; keeps attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text, self.style = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def whole():
    return report(MADE, cut(group("z", "z"), name='<i>"second"</i>'), names=("a/<student>", "b/teacher"))


def test_the_page_is_well_formed_and_holds_every_token(whole):
    reader = read(page.page(whole))
    text = "".join(reader.text)
    for part in (
        "<b>",
        "[red]&",
        "·quick·fox",
        "a/<student>",
        '<i>"second"</i>',
        "1│2│3",
        "a&b",
        "1<2",
        "A note on <it>.",
    ):
        assert part in text, part
    titles = [value for name, value in reader.attributes if name == "title"]
    assert "3:1, 3 bytes; student 7 7 7; teacher 7" in titles
    classes = [value for name, value in reader.attributes if name == "class"]
    assert classes.count("g") == 5 and [c for c in classes if re.fullmatch(r"g m\d", c)] == ["g m0", "g m1", "g m2"]


def test_the_page_needs_nothing_from_outside(whole):
    text = page.page(whole)
    reader = read(text)
    assert not {"src", "href", "srcset", "data", "action", "xmlns"} & {name for name, _ in reader.attributes}
    assert not re.search(r"https?:|url\(|@import|<script|<link|//", text)
    assert "prefers-color-scheme: dark" in reader.style


def test_the_part_for_notebooks_styles_nothing_but_itself(whole):
    reader = read(page.page(whole, "fragment.html"))
    rules = re.sub(r"@media[^{]*\{", "", reader.style)
    selectors = [s.strip() for block in re.findall(r"([^{}]+)\{", rules) for s in block.split(",")]
    assert selectors and all(s.startswith(".gold-jax-pair") for s in selectors)
    assert "<html" not in page.page(whole, "fragment.html") and page.page(whole, "fragment.html") in page.page(whole)
