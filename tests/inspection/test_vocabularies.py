import numpy as np
import pytest
from text import toy_tokenizers as toys

from gold_jax.inspection.vocabularies import EXAMPLES, KINDS, Vocabulary, compare
from gold_jax.text.surface import Surfaces, surfaces_of


def made(*table, strings=None, fallback=()) -> Surfaces:
    shown = [f"<{i}>" if entry is None else entry.decode("latin-1") for i, entry in enumerate(table)]
    return Surfaces(list(table), strings or shown, np.array([i in fallback for i in range(len(table))]))


def kind(figures, side: int, name: str) -> list[int]:
    return np.flatnonzero(figures.rows[side][KINDS.index(name)]).tolist()


@pytest.fixture(scope="module")
def figures():
    student = made(b" ", b"1", b"   ", b"12", b" 123", b"ab", None, b"zz", b"a")
    teacher = made(b"a", b"1", b" ", None, b"1,", b"abc")
    return compare(Vocabulary(student, 10, [6]), Vocabulary(teacher, 6, [3]))


def test_matched_rows_routes_and_kinds(figures):
    # Matched: the blank, 1, a, and the stop tokens by role; by strings the same without the stop tokens.
    assert kind(figures, 0, "surfaces") == [0, 1, 6, 8] and kind(figures, 0, "strings") == [0, 1, 8]
    assert kind(figures, 1, "surfaces") == [0, 1, 2, 3] and kind(figures, 1, "strings") == [0, 1, 2]
    assert kind(figures, 0, "routed") == [2, 3, 4, 5]
    assert kind(figures, 0, "whitespace") == [2] and kind(figures, 0, "numerals") == [3, 4]
    assert kind(figures, 1, "routed") == [4, 5] and kind(figures, 1, "numerals") == []


def test_unmatched_rows_are_counted_and_shown_with_the_prefix_that_they_give_to(figures):
    student, teacher = figures.student, figures.teacher
    assert (student.rows, student.routed, student.lost, student.whitespace, student.numerals) == (6, 4, 2, 1, 2)
    assert (teacher.rows, teacher.routed, teacher.lost) == (2, 2, 0)
    assert student.examples == {
        "whitespace": (("···", "·"),),
        "numerals": (("12", "1"), ("·123", "·")),
        "others": (("ab", "a"),),
    }
    assert teacher.examples["others"] == (("1,", "1"), ("abc", "a"))


def test_overlaps(figures):
    assert (figures.surfaces.shared, figures.surfaces.student, figures.surfaces.teacher) == (3, 8, 5)
    assert figures.surfaces.jaccard == 3 / 10
    assert not figures.identical


def test_further_stop_tokens_and_rows_beyond_the_tokenizer_are_told_apart():
    student, teacher = made(b"a", None, None), made(b"a", None)
    # The last stop token is a padding row.
    found = compare(Vocabulary(student, 6, [1, 2, 4]), Vocabulary(teacher, 2, [1]))
    assert kind(found, 0, "surfaces") == [0, 1] and kind(found, 0, "routed") == [2, 4]
    assert found.student.lost == 2
    assert found.student.examples["others"] == (("<2>", "<1>"), ("row 4", "<1>"))


def test_byte_fallback_entries_are_shown_by_their_strings():
    student = made(b"a", b"a", strings=["a", "<0x61>"], fallback=[1])
    found = compare(Vocabulary(student, 2), Vocabulary(made(b"a"), 1))
    assert found.student.examples["others"] == (("<0x61>", "a"),)


def test_a_vocabulary_compared_with_itself_matches_every_row():
    surfaces = surfaces_of(toys.byte_level())
    found = compare(Vocabulary(surfaces, 500, [2]), Vocabulary(surfaces, 500, [2]))
    assert found.identical and found.surfaces.jaccard == found.strings.jaccard == 1
    assert found.student.rows == found.teacher.rows == 0 and found.rows[0][KINDS.index("surfaces")].all()


def test_vocabularies_without_anything_in_common_are_compared_all_the_same():
    found = compare(Vocabulary(made(b"a"), 1), Vocabulary(made(b"b"), 1))
    assert found.surfaces.jaccard == 0 and (found.student.lost, found.teacher.lost) == (1, 1)


def test_examples_are_few_and_from_all_over_the_vocabulary():
    entries = [b"a", *(b"a%d!" % i for i in range(100))]
    found = compare(Vocabulary(made(*entries), 101), Vocabulary(made(b"a"), 1))
    shown = [int(entry.strip("a!")) for entry, _ in found.student.examples["others"]]
    assert len(shown) == EXAMPLES and shown == sorted(shown) and shown[0] < 25 and shown[-1] >= 75
