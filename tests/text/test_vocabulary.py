import numpy as np
import pytest
import real_tokenizers as real
import toy_tokenizers as toys

from gold_jax.text.surface import Surfaces, surfaces_of
from gold_jax.text.vocabulary import VocabularyMap, one_sided_ids


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
    student, teacher = (real.surfaces(assets / "tokenizers" / name) for name in pair)
    mapping = build(student, teacher, by=by)
    assert mapping.shared == mapping.matched == shared
    assert mapping.jaccard() == pytest.approx(jaccard, abs=5e-4)


def test_an_unmatched_entry_gives_to_the_longest_matched_prefix_of_its_surface():
    student = surfaces(b"a", b"ab", b"abcd", b"abx", b"zz", None, b"c")
    teacher = surfaces(b"ab", b"c", b"a", b"cab", b"ca")
    mapping = build(student, teacher, student_size=8)
    assert pairs(mapping) == [(0, 2), (1, 0), (6, 1)]
    others = mapping.student_order[3:].tolist()
    assert dict(zip(others, mapping.student_prefix_of_unmatched.tolist())) == {2: 1, 3: 1, 4: 3, 5: 3, 7: 3}
    assert dict(zip(mapping.teacher_order[3:].tolist(), mapping.teacher_prefix_of_unmatched.tolist())) == {3: 2, 4: 2}
    assert (
        np.diff(mapping.student_prefix_of_unmatched) >= 0
    ).all() and mapping.student_prefix_of_unmatched.dtype == np.int32


def test_a_duplicate_gives_to_its_own_surface_and_further_stop_tokens_to_the_stop_tokens():
    student, teacher = surfaces(b"a", b"a", None, None, fallback=[0]), surfaces(b"a", None, b"b")
    mapping = build(student, teacher, stop=((2, 3), (1,)))
    assert pairs(mapping) == [(1, 0), (2, 1)]
    assert dict(zip(mapping.student_order[2:].tolist(), mapping.student_prefix_of_unmatched.tolist())) == {0: 0, 3: 1}


def test_runs_of_blanks_and_numerals_can_be_masked():
    student = surfaces(b" ", b"1", b"    ", b" 19", b"\n\n", b"12x", b" \n")
    teacher = surfaces(b" ", b"1", b"\n")
    routes = {}
    for mask in ((), ("whitespace",), ("numerals", "whitespace")):
        mapping = build(student, teacher, mask=mask)
        routes[mask] = dict(zip(mapping.student_order[2:].tolist(), mapping.student_prefix_of_unmatched.tolist()))
    assert routes[()] == {2: 0, 3: 0, 4: 2, 5: 1, 6: 0}
    assert routes[("whitespace",)] == {2: 3, 3: 0, 4: 3, 5: 1, 6: 3}
    assert routes[("numerals", "whitespace")] == {2: 3, 3: 3, 4: 3, 5: 1, 6: 3}
    with pytest.raises(ValueError, match="not 'words'"):
        build(student, teacher, mask=["words"])


def test_one_vocabulary_matches_by_id_where_the_stop_tokens_are_the_same():
    mapping = VocabularyMap.identity(4, 5, stop=((2,), (2, 1)))
    assert pairs(mapping) == [(i, i) for i in range(4)]
    assert mapping.teacher_order.tolist() == list(range(5)) and mapping.teacher_prefix_of_unmatched.tolist() == [4]


def test_one_vocabulary_matches_other_stop_tokens_by_role_and_never_by_their_ids():
    mapping = VocabularyMap.identity(5, 6, stop=((3,), (1, 3)))
    assert pairs(mapping) == [(0, 0), (2, 2), (3, 1), (4, 4)]
    assert mapping.student_order.tolist() == [0, 2, 3, 4, 1] and mapping.student_prefix_of_unmatched.tolist() == [4]
    # The teacher's further stop token goes where its first one is; padding goes nowhere.
    assert mapping.teacher_order.tolist() == [0, 2, 1, 4, 3, 5] and mapping.teacher_prefix_of_unmatched.tolist() == [
        2,
        4,
    ]


def test_one_vocabulary_may_have_added_tokens_of_one_side_alone():
    ours, theirs = toys.byte_level.__wrapped__(), toys.byte_level.__wrapped__()
    assert one_sided_ids(ours, theirs) == (frozenset(), frozenset())
    size = len(ours)
    ours.add_tokens(["<mine>"])
    theirs.add_tokens(["<yours>", "<also>"])
    assert one_sided_ids(ours, theirs) == ({size}, {size, size + 1})
    ours.add_tokens(["<also>"])
    assert one_sided_ids(ours, theirs) == ({size}, {size})
    theirs.add_tokens(["<mine>"])  # under another id
    assert one_sided_ids(ours, theirs) is None
    assert one_sided_ids(toys.byte_level(420), toys.byte_level(400)) is None
    assert one_sided_ids(toys.byte_level(), toys.sentencepiece()) is None


def test_ids_of_one_side_alone_match_nothing():
    found = VocabularyMap.identity(6, 8, unmatched={2, 7})
    assert found.matched == 5 == found.shared
    assert found.student_order.tolist() == [0, 1, 3, 4, 5, 2] and found.teacher_order.tolist() == [
        0,
        1,
        3,
        4,
        5,
        2,
        6,
        7,
    ]


@pytest.mark.assets
def test_qwen_with_added_tokens_is_one_vocabulary(assets):
    from transformers import AutoTokenizer

    qwen, more = (AutoTokenizer.from_pretrained(assets / "tokenizers" / "qwen3") for _ in range(2))
    more.add_tokens(["<a>", "<b>"])
    assert one_sided_ids(qwen, more) == (frozenset(), {len(qwen), len(qwen) + 1})
