import numpy as np
import pytest
import toy_tokenizers as toys

from gold_jax.text.surface import Surfaces, surfaces_of
from gold_jax.text.vocabulary import VocabularyMap


def surfaces(*entries, strings=None, fallback=()):
    strings = strings or [f"<{i}>" if e is None else e.decode("latin-1") for i, e in enumerate(entries)]
    is_fallback = np.array([i in fallback for i in range(len(entries))])
    return Surfaces(list(entries), strings, is_fallback)


def build(student, teacher, **kwargs):
    sizes = dict(student_size=len(student), teacher_size=len(teacher))
    return VocabularyMap.build(student, teacher, **sizes | kwargs)


def pairs(mapping):
    count = mapping.matched
    return list(zip(mapping.student_order[:count].tolist(), mapping.teacher_order[:count].tolist()))


def test_entries_with_equal_surfaces_match_whatever_they_are_called():
    student = surfaces(None, b" the", b"\n", b"x", strings=["<s>", "Ġthe", "Ċ", "x"])
    teacher = surfaces(b"\n", b"y", b" the", strings=["<0x0A>", "y", "▁the"])
    mapping = build(student, teacher)
    assert pairs(mapping) == [(1, 2), (2, 0)]
    assert mapping.student_order.tolist() == [1, 2, 0, 3]
    assert mapping.teacher_order.tolist() == [2, 0, 1]
    assert mapping.jaccard() == pytest.approx(2 / 4)


def test_orders_are_permutations_of_the_head_rows_with_padding_unmatched():
    student, teacher = surfaces(b"a", b"b"), surfaces(b"b", b"c")
    mapping = build(student, teacher, student_size=5, teacher_size=4)
    assert sorted(mapping.student_order.tolist()) == list(range(5))
    assert sorted(mapping.teacher_order.tolist()) == list(range(4))
    assert pairs(mapping) == [(1, 0)]
    assert mapping.student_order.dtype == mapping.teacher_order.dtype == np.int32


def test_of_duplicates_the_ordinary_entry_goes_before_the_fallback_then_the_lowest_id():
    student = surfaces(b"\n", b"\n", b"a", b"a", fallback=[0])
    teacher = surfaces(b"a", b"\n")
    assert pairs(build(student, teacher)) == [(1, 1), (2, 0)]


def test_stop_tokens_match_by_role_and_leave_other_pairs():
    student, teacher = surfaces(b"a", None, b"<end>"), surfaces(b"<end>", b"a", None)
    assert pairs(build(student, teacher, stop=(1, 2))) == [(0, 1), (1, 2), (2, 0)]
    assert pairs(build(student, teacher, stop=(2, 2))) == [(0, 1), (2, 2)]


def test_by_strings_special_tokens_match_and_spellings_do_not():
    student = surfaces(None, b" the", strings=["<s>", "Ġthe"])
    teacher = surfaces(b" the", None, strings=["▁the", "<s>"])
    assert pairs(build(student, teacher, by="strings")) == [(0, 1)]


def test_empty_surfaces_match_nothing():
    assert build(surfaces(b""), surfaces(b"")).matched == 0


def test_a_head_with_too_few_rows_is_refused_but_special_tokens_may_lie_beyond_it():
    student, teacher = surfaces(b"a", b"b"), surfaces(b"a", None)
    with pytest.raises(ValueError, match="student's head has 1 rows.*'b' with id 1"):
        build(student, teacher, student_size=1)
    assert build(student, teacher, teacher_size=1).matched == 1


def test_wrong_arguments_are_named():
    student = surfaces(b"a")
    with pytest.raises(ValueError, match="'surfaces' or by 'strings', not by 'ids'"):
        build(student, student, by="ids")
    with pytest.raises(ValueError, match="teacher's stop token 7"):
        build(student, student, stop=(0, 7))


def test_identity_matches_every_row_with_itself():
    mapping = VocabularyMap.identity(4)
    assert pairs(mapping) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert mapping.jaccard() == 1.0


def test_byte_level_and_sentencepiece_share_all_single_bytes():
    student, teacher = surfaces_of(toys.byte_level()), surfaces_of(toys.sentencepiece())
    mapping = build(student, teacher, stop=(2, 2))
    for i, j in pairs(mapping):
        assert student.table[i] == teacher.table[j]
    assert mapping.matched == mapping.shared + 1 >= 257


@pytest.mark.assets
@pytest.mark.parametrize(
    "pair, by, shared, jaccard",
    [
        # One fewer than with special tokens taken by their letters.
        (("gemma3", "qwen3"), "surfaces", 95_968, 0.302),
        (("gemma3", "qwen3"), "strings", 24_520, 0.063),
        (("llama3_2", "qwen3"), "surfaces", 109_566, 0.644),
        (("llama3_2", "qwen3"), "strings", 109_566, 0.643),
    ],
)
def test_real_vocabularies_share_what_is_known_of_them(assets, pair, by, shared, jaccard):
    from transformers import AutoTokenizer

    student, teacher = (surfaces_of(AutoTokenizer.from_pretrained(assets / "tokenizers" / name)) for name in pair)
    mapping = build(student, teacher, by=by)
    assert mapping.shared == mapping.matched == shared
    assert mapping.jaccard() == pytest.approx(jaccard, abs=5e-4)
