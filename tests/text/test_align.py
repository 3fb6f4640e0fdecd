import functools
import itertools

import alignment_at_scale as scale
import numpy as np
import pytest
import strings
import toy_tokenizers as toys
from alignment_at_scale import slow_groups, walk_agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from strings import random_strings

from gold_jax.text.align import align, group_ends, groups_of
from gold_jax.text.encode import Encoded, PlainEncoder


def as_groups(student_group, teacher_group, count):
    return [
        (np.flatnonzero(student_group == g).tolist(), np.flatnonzero(teacher_group == g).tolist()) for g in range(count)
    ]


@st.composite
def two_cuts(draw):
    total = draw(st.integers(1, 40))
    sides = []
    for _ in range(2):
        cuts = draw(st.lists(st.integers(1, total), max_size=30))
        sides.append(sorted([*cuts, total]))
    return sides


@given(two_cuts())
@settings(max_examples=400, deadline=None)
def test_groups_are_those_of_a_walk_along_both_sides(cuts):
    student, teacher = cuts
    assert as_groups(*group_ends(student, teacher)) == slow_groups(student, teacher)


@given(two_cuts(), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_tokens_without_bytes_at_the_start_join_the_first_group(cuts, ours, theirs):
    student, teacher = [0] * ours + cuts[0], [0] * theirs + cuts[1]
    student_group, teacher_group, count = group_ends(student, teacher)
    assert not student_group[: ours + 1].any() and not teacher_group[: theirs + 1].any()
    assert set(student_group) == set(teacher_group) == set(range(count))
    plain = group_ends(*cuts)
    assert (student_group[ours:] == plain[0]).all() and (teacher_group[theirs:] == plain[1]).all()


def without_bytes():
    return st.tuples(st.lists(st.just(0), max_size=2), st.lists(st.just(0), max_size=2))


@given(st.lists(st.one_of(two_cuts(), without_bytes(), st.tuples(without_bytes(), two_cuts()))))
@settings(max_examples=200, deadline=None)
def test_many_texts_are_cut_as_each_by_itself(texts):
    texts = [[[*a, *b] for a, b in zip(*text)] if isinstance(text[0], tuple) else text for text in texts]
    found = groups_of([ours for ours, _ in texts], [theirs for _, theirs in texts])
    assert len(found) == len(texts)
    for (ours, theirs, count), text in zip(found, texts):
        alone = group_ends(*text)
        assert (ours.tolist(), theirs.tolist(), count) == (alone[0].tolist(), alone[1].tolist(), alone[2])
        assert ours.dtype == theirs.dtype == np.int32


def test_a_text_among_many_whose_ends_fall_is_shown():
    with pytest.raises(ValueError, match=r"ends of the teacher's tokens must not fall, as they do in \[3, 1, 4\]"):
        groups_of([[2, 5], [4]], [[5], [3, 1, 4]])
    with pytest.raises(ValueError, match="student's ends at 4 and the teacher's at 3"):
        groups_of([[2, 5], [4]], [[5], [3]])
    with pytest.raises(ValueError, match=r"as they do in \[-1, 4\]"):
        groups_of([[2, 5], [-1, 4]], [[5], [4]])


def test_an_example_by_hand():
    #        |He|llo| wor|ld|     |Hello| w|orld|
    student_group, teacher_group, count = group_ends([2, 5, 9, 11], [5, 7, 11])
    assert student_group.tolist() == [0, 0, 1, 1]
    assert teacher_group.tolist() == [0, 1, 1]
    assert count == 2
    assert student_group.dtype == teacher_group.dtype == np.int32


def test_texts_without_bytes():
    assert group_ends([], [])[2] == 0
    assert group_ends([0, 0], [0])[2] == 1
    student_group, teacher_group, count = group_ends([0], [])
    assert (student_group.tolist(), teacher_group.tolist(), count) == ([0], [], 0)


def test_sides_that_end_apart_are_refused():
    with pytest.raises(ValueError, match="student's ends at 3 and the teacher's at 4"):
        group_ends([1, 3], [4])
    with pytest.raises(ValueError, match="student's ends at 3 and the teacher's at 0"):
        group_ends([3], [])


def test_ends_that_fall_are_refused():
    with pytest.raises(ValueError, match="teacher's tokens must not fall"):
        group_ends([4], [3, 2, 4])


def test_align_gives_both_sides_and_their_groups():
    alignment = align(toys.byte_level(), toys.sentencepiece(), "The fox is größer 😀!")
    assert b"".join(data for data, _, _ in alignment.groups()) == alignment.text
    for data, ours, theirs in alignment.groups():
        assert len(ours) and len(theirs) and data
    singles = [len(ours) == len(theirs) == 1 for _, ours, theirs in alignment.groups()]
    assert alignment.one_to_one().tolist() == singles
    assert any(singles) and not all(singles)


def test_align_of_an_empty_text_has_no_group():
    alignment = align(toys.byte_level(), toys.sentencepiece(), "")
    assert alignment.count == 0 and list(alignment.groups()) == []
    assert alignment.one_to_one().tolist() == []


def test_groups_in_which_a_token_does_not_say_its_text_are_named():
    alignment = align(toys.byte_level(), toys.unigram(), "the ☃ fox")
    found = [data for (data, _, _), unknown in zip(alignment.groups(), alignment.unknown()) if unknown]
    assert found == ["☃".encode()]
    assert alignment.unknown().shape == (alignment.count,)
    assert not align(toys.byte_level(), toys.sentencepiece(), "the ☃ fox").unknown().any()
    assert align(toys.byte_level(), toys.unigram(), "").unknown().tolist() == []


def test_word_pieces_are_aligned_with_bytes_in_the_smallest_groups():
    alignment = align(toys.byte_level(), toys.word_piece(), "The dog, the DOG.")
    assert [data for data, _, _ in alignment.groups()] == [b"The", b" dog", b",", b" the", b" DOG", b"."]


def check_sides(texts, encoders):
    """Every ordered pair of encoders on every text, against the walk."""
    for lead in (False, True):
        sides = {name: encoder.encode(texts, lead=lead) for name, encoder in encoders.items()}
        for row, text in enumerate(texts):
            size = len(text.encode())
            for name, encoded in sides.items():
                spans = encoded[row].spans
                assert spans[0, 0] == 0 and spans[-1, 1] == size, (name, text)
                assert (spans[1:, 0] == spans[:-1, 1]).all() and (spans[:, 0] <= spans[:, 1]).all(), (name, text)
            for ours, theirs in itertools.permutations(sides, 2):
                ends = sides[ours][row].spans[:, 1], sides[theirs][row].spans[:, 1]
                assert walk_agrees(*ends), (ours, theirs, text)


@functools.cache
def toy_encoders():
    return {name: PlainEncoder(make()) for name, make in toys.EVERY.items()}


def test_toy_tokenizers_align_on_random_strings_in_all_ordered_pairs():
    check_sides(random_strings(40), toy_encoders())


@given(strings.texts().filter(bool))
@settings(max_examples=25, deadline=None)
def test_toy_tokenizers_align_on_any_text_in_all_ordered_pairs(text):
    check_sides([text], toy_encoders())


def test_many_strings_are_checked_at_once_in_all_ordered_pairs_of_toy_tokenizers():
    report = scale.run(scale.toy_sides(), 450, batch=150)
    assert report.failed() == 0, report.lines(toys.EVERY)[-1]
    assert report.counts["unigram", "unknown"] > 100 and report.counts["bytes", "unknown"] == 0
    line = next(line for line in report.lines(toys.EVERY) if line.startswith("nfc ") and " slow unigram " in line)
    assert line.split()[3] == "450" and line.endswith(" 0")


@pytest.mark.parametrize("name", toys.CLASSES)
def test_tokenizer_classes_of_transformers_align_with_bytes(name):
    tokenizer = toys.of_class(name)
    if tokenizer is None:
        pytest.skip(f"this version of transformers has no {name}")
    sides = scale.toy_sides(["bytes"]) | {name: scale.Side(tokenizer)}
    report = scale.Report()
    for lead in (False, True):
        texts = strings.mixed_strings(60, seed=lead) + random_strings(30, seed=lead)
        scale.check_strings(sides, texts, report, lead=lead, seed=0)
    assert report.failed() == 0, report.lines(sides)[-1]
    words = sides[name].encoder.encode(["the dog jumps"])[0]
    assert sides[name].encoder.surfaces.join(words.ids) in (b"the dog jumps", b" the dog jumps")


def test_the_check_at_scale_finds_a_shift(monkeypatch):
    sides = scale.toy_sides(["bytes", "plain"])
    encode = sides["plain"].encoder.encode

    def shifted(texts, lead=False):
        rows = encode(texts, lead=lead)
        ids, spans = rows[3].ids, rows[3].spans.copy()
        spans[:-1, 1] += 1
        spans[1:, 0] += 1
        return [*rows[:3], Encoded(ids, spans), *rows[4:]]

    monkeypatch.setattr(sides["plain"].encoder, "encode", shifted)
    texts, report = ["the", "fox", "over", "the dog", "the"], scale.Report()
    scale.check_strings(sides, texts, report, lead=False, seed=0)
    assert report.failures[0] == ("plain", "the dog")


@pytest.mark.parametrize(("wrong", "row"), [("merged", 1), ("swapped", 2), ("late", 1)])
def test_the_check_at_scale_finds_wrong_groups(monkeypatch, wrong, row):
    texts = ["the", "fox jumps", "a b"]
    sides = scale.toy_sides(["bytes", "tiktoken"])
    right = scale.group_ends

    def group_ends(student, teacher):
        ours, theirs, count = (x.copy() if isinstance(x, np.ndarray) else x for x in right(student, teacher))
        cut = int(theirs[(teacher > 4 * 3).argmax()])  # the first group of the second text
        if wrong == "merged":
            ours[ours > cut] -= 1
            theirs[theirs > cut] -= 1
            count -= 1
        elif wrong == "swapped":
            ours[-2:] = ours[-2:][::-1]
        else:
            ours[(ours == cut + 1).argmax()] -= 1
        return ours, theirs, count

    monkeypatch.setattr(scale, "group_ends", group_ends)
    report = scale.Report()
    scale.check_strings(sides, texts, report, lead=False, seed=0, sample=0)
    assert report.failures and report.failures[0] == (("bytes", "tiktoken"), texts[row])


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("strings", [1000, pytest.param(3000, marks=pytest.mark.long)])
def test_real_tokenizers_align_on_thousands_of_strings_in_all_ordered_pairs(assets, capsys, strings):
    assert scale.main(["--assets", str(assets), "--strings", str(strings), "--batch", "1000"]) == 0
    assert "\n0 failures" in capsys.readouterr().out


@pytest.mark.assets
@pytest.mark.slow
def test_real_tokenizers_align_by_the_walk_and_read_no_special_token_out_of_a_text(assets):
    texts = random_strings(2000)
    encoders = {name: side.encoder for name, side in scale.real_sides(assets).items()}
    check_sides(texts[:600], encoders)
    for name, encoder in encoders.items():
        for encoded in encoder.encode(texts):
            assert (encoder.surfaces.spells[encoded.ids] | encoded.unknown).all(), name
            assert not encoded.unknown.any() or name in (*scale.TRAINED, "llama2", "gemma3"), name
