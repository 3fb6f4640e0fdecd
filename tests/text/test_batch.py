import numpy as np
import pytest
from toy_tokenizers import byte_level, sentencepiece

from gold_jax.text.batch import (
    IGNORE,
    NO_GROUP,
    Row,
    SideTokens,
    align_rows,
    build_batches,
    build_token_batches,
    counted_groups,
    encode_rows,
    normalized_weights,
)
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.detokenize import completion_from_ids


def build_rows(student, teacher, prompts, completions, *, one_vocabulary=False, **options):
    encoded = encode_rows(student, teacher, prompts, completions, one_vocabulary=one_vocabulary)
    return align_rows(encoded, (student.stop_id, teacher.stop_id), one_vocabulary=one_vocabulary, **options)


def half(prompt, completion, group):
    return SideTokens(np.arange(prompt, dtype=np.int32), np.array(completion, np.int32), np.array(group))


def test_neither_side_reads_more_of_a_long_completion_than_the_student_learns():
    student, teacher = chat_tokenizers()
    prompts, completions = ["the fox?"] * 2, ["the dog is 72, said the quick brown fox. " * 500, "the dog."]
    whole = build_rows(student, teacher, prompts, completions, max_length=40)
    encoded = encode_rows(student, teacher, prompts, completions, max_length=40)
    assert max(len(side.ids) for row in encoded for side in (row.student, row.teacher)) < 5_000
    rows = align_rows(encoded, (student.stop_id, teacher.stop_id), max_length=40)
    for row, other in zip(rows, whole):
        assert row.groups == other.groups and row.stopped
        for side, same in zip((*row.student, *row.teacher), (*other.student, *other.teacher)):
            assert np.array_equal(side, same)
    assert rows[0].teacher.group.max() == rows[0].groups - 1 and len(rows[0].teacher.completion) < 80
    assert rows[1].teacher.completion[-1] == teacher.stop_id


def row(student_groups, teacher_groups, groups, prompt=2):
    """Two sides with tokens 100, 101, … and 200, 201, … behind prompts of two and three tokens."""
    return Row(
        half(prompt, 100 + np.arange(len(student_groups)), student_groups),
        half(prompt + 1 if prompt else 0, 200 + np.arange(len(teacher_groups)), teacher_groups),
        groups,
        text="",
        stopped=False,
    )


def chat_tokenizers():
    return ChatTokenizer(byte_level()), ChatTokenizer(sentencepiece())


def inner(side, i=0):
    live = side.inner_group[i] < side.base.shape[1]
    return list(zip(*(x[i][live].tolist() for x in (side.inner_position, side.inner_token, side.inner_group))))


@pytest.mark.parametrize(
    "merge, base, multiplied",
    [
        # Prompt of 2; tokens 100 | 101 102 103 | 104 at positions 2 to 6, in groups of one, three and one.
        ("chain", [1, 4, 5], [(2, 101, 1), (3, 102, 1)]),
        ("observed", [2, 3, 6], [(4, 102, 1), (5, 103, 1)]),
        ("boundary", [1, 2, 5], []),
    ],
)
def test_a_merge_reads_the_positions_that_its_formula_names(merge, base, multiplied):
    (batch,) = build_batches([row([0, 1, 1, 1, 2], [0, 1, 2], 3)], 1, merge=merge, groups="all")
    assert batch.student.base[0, :3].tolist() == base
    assert inner(batch.student) == multiplied
    assert inner(batch.teacher) == []
    np.testing.assert_allclose(batch.weight[0, :4], [1 / 3, 1 / 3, 1 / 3, 0])


def test_the_tokens_that_are_labels_are_those_of_the_completion():
    (batch,) = build_batches([row([0, 1], [0, 1], 2)], 1, merge="chain", groups="all")
    assert batch.student.packed.tokens[0, :4].tolist() == [0, 1, 100, 101]
    assert batch.labels.token[0, :5].tolist() == [IGNORE, 100, 101, IGNORE, IGNORE]
    assert batch.labels.position[0, :3].tolist() == [0, 1, 2]
    np.testing.assert_allclose(batch.labels.weight[0, :4], [0, 0.5, 0.5, 0])


def test_one_to_one_leaves_merged_groups_out():
    assert counted_groups(row([0, 1, 1, 2], [0, 1, 2], 3), "chain", "one_to_one").tolist() == [True, False, True]


def test_without_a_prompt_the_first_group_has_nothing_that_predicts_it():
    r = row([0, 1], [0, 1], 2, prompt=0)
    assert counted_groups(r, "chain", "all").tolist() == [False, True]
    assert counted_groups(r, "observed", "all").tolist() == [True, True]


def test_weights_are_the_same_however_rows_are_split_into_micro_batches():
    rows = [row([0, 1, 1, 2], [0, 1, 2], 3), row([0], [0], 1), row([0, 1], [0, 1], 2)]
    for normalization in ("groups", "row_mean"):
        whole = build_batches(rows, 4, merge="chain", groups="all", normalization=normalization)
        split = build_batches(rows, 1, merge="chain", groups="all", normalization=normalization)
        assert len(split) == 3
        total = [sum(b.weight.sum() for b in bs) for bs in (whole, split)]
        np.testing.assert_allclose(total, 1, rtol=1e-6)
        np.testing.assert_allclose([b.weight.sum() for b in split], whole[0].weight.sum(1)[:3], rtol=1e-6)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="groups or row_mean"):
        normalized_weights([np.ones(1, bool)], "mean")


def test_both_stop_tokens_form_the_last_group():
    student, teacher = chat_tokenizers()
    (r,) = build_rows(student, teacher, [[{"role": "user", "content": "hi"}]], ["hello there"], max_length=100)
    assert r.student.completion[-1] == student.stop_id and r.teacher.completion[-1] == teacher.stop_id
    assert r.student.group[-1] == r.teacher.group[-1] == r.groups - 1
    assert r.stopped and (np.diff(r.student.group) >= 0).all()


def test_stop_tokens_can_be_left_out_as_trl_does():
    student, teacher = chat_tokenizers()
    prompt, text = [[{"role": "user", "content": "hi"}]], ["hello there"]
    (taught,) = build_rows(student, teacher, prompt, text, max_length=100)
    (left,) = build_rows(student, teacher, prompt, text, max_length=100, skip_student_stop=True)
    assert left.groups == taught.groups - 1 and left.student.group[-1] == NO_GROUP


def test_a_completion_of_no_tokens_teaches_stopping_alone():
    student, teacher = chat_tokenizers()
    (r,) = build_rows(student, teacher, ["hi"], [""], max_length=100)
    assert r.groups == 1 and r.student.completion.tolist() == [student.stop_id]
    (batch,) = build_batches([r], 1, merge="chain", groups="all")
    assert batch.weight.sum() == 1


def test_a_group_that_does_not_fit_whole_is_cut_off_on_both_sides():
    student, teacher = chat_tokenizers()
    prompt, text = ["a question"], ["some words that go on and on, and then a number: 12345"]
    (whole,) = build_rows(student, teacher, prompt, text, max_length=1000)
    for limit in range(len(whole.student.prompt), len(whole.student.prompt) + len(whole.student.completion)):
        (r,) = build_rows(student, teacher, prompt, text, max_length=limit)
        assert len(r.student.prompt) + len(r.student.completion) <= limit
        assert r.groups < whole.groups
        for cut, full in ((r.student, whole.student), (r.teacher, whole.teacher)):
            assert (cut.group < r.groups).sum() == (full.group < r.groups).sum()  # every counted group is whole


def test_a_prompt_that_fills_the_window_leaves_a_row_that_counts_for_nothing():
    student, teacher = chat_tokenizers()
    (r,) = build_rows(student, teacher, ["a rather long question"], ["yes"], max_length=2)
    assert r.groups == 0
    (batch,) = build_batches([r], 2, merge="chain", groups="all")
    assert batch.weight.sum() == 0 and batch.labels.weight.sum() == 0


def test_what_the_student_drew_keeps_its_own_tokens():
    student, teacher = chat_tokenizers()
    ids = [i for c in "hello" for i in student.encode_completion(c, after="x").ids]  # letter by letter
    drawn = completion_from_ids(student, [*ids, student.stop_id], after="x")
    (r,) = build_rows(student, teacher, ["x"], [drawn], max_length=100)
    assert r.student.completion.tolist() == [*ids, student.stop_id] and r.stopped
    assert r.text == "hello"


def test_with_one_vocabulary_the_teacher_reads_the_very_tokens_of_the_student():
    student, _ = chat_tokenizers()
    ids = [i for c in "hello" for i in student.encode_completion(c, after="x").ids]
    drawn = completion_from_ids(student, ids, after="x")
    (r,) = build_rows(student, student, ["x"], [drawn], max_length=100, one_vocabulary=True)
    assert r.teacher.completion.tolist() == ids and r.groups == len(ids) and not r.stopped


def test_positional_pairs_cut_to_the_shorter_side_and_end_with_the_stop_tokens():
    student, teacher = chat_tokenizers()
    (r,) = build_rows(student, teacher, ["x"], ["hello there 123"], max_length=100, positional=True)
    shorter = min(len(r.student.completion), len(r.teacher.completion)) - 1
    assert r.groups == shorter + 1
    assert r.student.group[-1] == r.teacher.group[-1] == shorter
    (batch,) = build_batches([r], 1, merge="chain", groups="all")
    np.testing.assert_allclose(batch.weight.sum(), 1, rtol=1e-6)


def test_token_batches_count_a_token_at_the_position_before_it():
    rows = [(np.array([5, 6, 7], np.int32), np.array([True, False, True]))]
    (batch,) = build_token_batches(rows, 2)
    assert batch.labels.token[0, :4].tolist() == [IGNORE, 7, IGNORE, IGNORE]  # nothing stands before the first token
    assert batch.labels.weight.sum() == 1 and batch.packed.mask.sum() == 3
