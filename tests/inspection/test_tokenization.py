import numpy as np
import pytest
from text import toy_tokenizers as toys

from gold_jax.inspection.tokenization import Counts, Group, Shape, Token, cut_text, shapes_of
from gold_jax.text.align import align
from gold_jax.text.encode import PlainEncoder

TEXTS = [
    "The other dog, over the fox; 24 + 48 = 72.",
    "def there(x):\n    return x + 1\n",
    "Привет, größer 世界 😀!",
    "x",
]


def reader(tokenizer):
    encoder = PlainEncoder(tokenizer)
    return lambda text: encoder.encode([text])[0]


@pytest.fixture(scope="module")
def cuts():
    pair = reader(toys.byte_level()), reader(toys.sentencepiece())
    return [cut_text(*pair, f"text {k}", text) for k, text in enumerate(TEXTS)]


def total(cuts) -> Counts:
    return Counts.of([group for cut in cuts for group in cut.groups])


def ends(tokens) -> list[int]:
    return np.cumsum([len(token.data) for token in tokens]).tolist()


def test_groups_end_where_tokens_of_both_sides_end(cuts):
    for cut in cuts:
        student = [token for group in cut.groups for token in group.student]
        teacher = [token for group in cut.groups for token in group.teacher]
        data = cut.text.encode()
        assert b"".join(t.data for t in student) == b"".join(t.data for t in teacher) == data
        assert np.cumsum([len(group.data) for group in cut.groups]).tolist() == sorted(
            {*ends(student)} & {*ends(teacher)}
        )


def test_counts_are_those_of_the_alignment(cuts):
    for cut in cuts:
        found = align(toys.byte_level(), toys.sentencepiece(), cut.text)
        groups = [(data, len(ours), len(theirs)) for data, ours, theirs in found.groups()]
        alone = [data for data, ours, theirs in groups if ours == theirs == 1]
        counts = cut.counts
        assert (counts.groups, counts.one_to_one) == (len(groups), len(alone))
        assert counts.one_to_one_bytes == sum(map(len, alone))
        assert (counts.student_tokens, counts.teacher_tokens) == (len(found.student.ids), len(found.teacher.ids))
        assert [t.id for g in cut.groups for t in g.teacher] == found.teacher.ids.tolist()
        assert counts.share_of_groups == len(alone) / len(groups)
        assert counts.share_of_bytes == sum(map(len, alone)) / len(cut.text.encode())
        assert counts.student_bytes_per_token == len(cut.text.encode()) / len(found.student.ids)


def test_the_total_adds_texts_up(cuts):
    whole = total(cuts)
    assert whole.bytes == sum(len(text.encode()) for text in TEXTS)
    assert whole.groups == sum(len(cut.groups) for cut in cuts)
    assert 0 < whole.share_of_groups < 1
    assert whole.one_to_one_bytes == sum(cut.counts.one_to_one_bytes for cut in cuts)
    assert whole.share_of_bytes == whole.one_to_one_bytes / whole.bytes


def test_shapes_count_merged_groups_with_the_commonest_examples_first(cuts):
    shapes = shapes_of(cuts)
    counts = total(cuts)
    assert sum(shape.count for shape in shapes) == counts.groups - counts.one_to_one
    assert [s.count for s in shapes] == sorted((s.count for s in shapes), reverse=True)
    assert "1:1" not in [shape.name for shape in shapes]

    def group(student, teacher):
        return Group(*(tuple(Token(0, data) for data in side) for side in (student, teacher)))

    groups = [group([b"a"], [b"a"]), group([b" ", b"b"], [b" b"])] + [group([b"c", b"d"], [b"cd"])] * 2
    cut = type(cuts[0])("made", "a bcdcd", tuple(groups))
    assert shapes_of([cut]) == (Shape(2, 1, 3, ((("c", "d"), ("cd",)), (("·", "b"), ("·b",)))),)


def test_a_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match="not valid Unicode"):
        cut_text(reader(toys.byte_level()), reader(toys.sentencepiece()), "bad", "a\ud800")
