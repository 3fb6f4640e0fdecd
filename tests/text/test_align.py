import itertools
import random

import numpy as np
import pytest
import toy_tokenizers as toys
from hypothesis import given, settings
from hypothesis import strategies as st

from gold_jax.text.align import align, group_ends
from gold_jax.text.encode import PlainEncoder


def slow_groups(student, teacher):
    """The reference: walk along both lists and close a group wherever both stand at the same byte."""
    groups, i, j = [], 0, 0
    while i < len(student) or j < len(teacher):
        ours, theirs = [i], [j]
        i, j = i + 1, j + 1
        while student[i - 1] != teacher[j - 1]:
            if student[i - 1] < teacher[j - 1]:
                ours.append(i)
                i += 1
            else:
                theirs.append(j)
                j += 1
        while i < len(student) and student[i] == student[i - 1]:
            ours.append(i)
            i += 1
        while j < len(teacher) and teacher[j] == teacher[j - 1]:
            theirs.append(j)
            j += 1
        groups.append((ours, theirs))
    return groups


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


SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF), (0x2000, 0x206F), (0, 0x1F),
]  # fmt: skip
PHRASES = [
    "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "\r\n", "\n\n\n", "\t\t", "    ", "  ", "\u3000", "\ufeff", "\u200d", "▁", "▁▁ x", "<0x0A>", "1234567",
    "3.14159", "0000", "e\u0301", "\u212b", "ﬁ", "가", "<|im_end|>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<end_of_turn>",
    "<|eot_id|>", "<bos>", "[INST]", "<think>", "</think>", "<table>", "<unused7>", "def f(x):\n    return x\n",
    "for (int i=0;i<10;++i) {", "http://a.b/c?d=e&f=g", "don't", "I'LL", "naïve", "größer", " the", "The ", "\\frac{1}{2}", "$$",
    "日本語", "Привет", "مرحبا", "नमस्ते", "ไทย", "\x00", "\x7f", "Ġ", "Ċ", "é", " \n \n", "!!!???...",
]  # fmt: skip


def random_strings(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    strings = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 8)):
            if rng.random() < 0.5:
                parts.append(rng.choice(PHRASES))
            else:
                low, high = rng.choice(SCRIPTS)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))))
            if rng.random() < 0.4:
                parts.append(" ")
        strings.append("".join(parts))
    return strings


def check_sides(texts, sides):
    """Every pair of sides, against the reference."""
    for row, text in enumerate(texts):
        size = len(text.encode())
        ends = {}
        for name, encoded in sides.items():
            spans = encoded[row].spans
            assert spans[0, 0] == 0 and spans[-1, 1] == size, (name, text)
            assert (spans[1:, 0] == spans[:-1, 1]).all() and (spans[:, 0] <= spans[:, 1]).all(), (name, text)
            ends[name] = spans[:, 1]
        for ours, theirs in itertools.permutations(ends, 2):
            student, teacher = ends[ours], ends[theirs]
            found = group_ends(student, teacher)
            # Leading empty tokens are the one thing that the walk does not know.
            if student[0] and teacher[0]:
                expected = slow_groups(student.tolist(), teacher.tolist())
                student_group, teacher_group, count = found
                assert count == len(expected), (ours, theirs, text)
                assert student_group.tolist() == [g for g, (a, _) in enumerate(expected) for _ in a], text
                assert teacher_group.tolist() == [g for g, (_, b) in enumerate(expected) for _ in b], text
            else:
                assert set(found[0].tolist()) == set(found[1].tolist()) == set(range(found[2])), (ours, theirs, text)


def test_toy_tokenizers_align_on_random_strings_in_all_ordered_pairs():
    texts = random_strings(300)
    toy = {
        "bytes": toys.byte_level(),
        "nfc": toys.byte_level(300, "NFC"),
        "nfkc": toys.byte_level(310, "NFKC"),
        "prepend": toys.sentencepiece(),
        "metaspace": toys.sentencepiece("metaspace"),
        "plain": toys.sentencepiece(""),
        "unigram": toys.unigram(),
    }
    check_sides(texts, {name: PlainEncoder(tokenizer).encode(texts) for name, tokenizer in toy.items()})


@pytest.mark.assets
@pytest.mark.slow
def test_real_tokenizers_align_on_ten_thousand_random_strings_in_all_ordered_pairs(assets):
    from transformers import AutoTokenizer

    folders = {name: f"tokenizers/{name}" for name in ("llama3_2", "qwen3", "gemma3", "llama2", "gpt2")}
    folders["smollm2"] = "smollm2-135m-instruct"
    texts = random_strings(10_000)
    sides = {}
    for name, folder in folders.items():
        encoder = PlainEncoder(AutoTokenizer.from_pretrained(assets / folder))
        sides[name] = encoder.encode(texts)
        special = {i for i, entry in enumerate(encoder.surfaces.table) if entry is None}
        unknown = encoder.surfaces.strings.index("<unk>") if "<unk>" in encoder.surfaces.strings else None
        drawn = set(np.concatenate([e.ids for e in sides[name]]).tolist())
        assert not (drawn & special) - {unknown}, name
    check_sides(texts, sides)
