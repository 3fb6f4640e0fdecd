import numpy as np
import pytest
import tiny_models as tiny
from toy_tokenizers import CHATML, byte_level, sentencepiece

from gold_jax.loss_spec import LossSpec
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import check_evaluation, check_examples
from gold_jax.text.data import Example, load_examples
from gold_jax.text.template import PLAIN_TEMPLATE
from gold_jax.training.batches import DistillationBatchBuilder, RowOrder, TokenBatchBuilder, sampling_rows


def chat_tokenizer(template=None):
    return ChatTokenizer(byte_level(), chat_template=template)


@pytest.mark.parametrize("rows, per_step", [(10, 3), (12, 4), (1, 8)])
def test_every_epoch_goes_through_every_row_once_in_an_order_of_its_own(rows, per_step):
    order = RowOrder(range(rows), per_step, seed=0)
    per_epoch = order.steps_per_epoch
    epochs = [[i for k in range(per_epoch) for i in order(e * per_epoch + k)] for e in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows == 1 or epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_and_the_step_alone():
    assert RowOrder(range(100), 7, seed=1)(25) == RowOrder(range(100), 7, seed=1)(25)
    assert RowOrder(range(100), 7, seed=1)(25) != RowOrder(range(100), 7, seed=2)(25)


def examples(*rows):
    return load_examples(list(rows))


def test_rows_with_too_long_prompts_are_left_out_and_counted():
    data = examples({"prompt": "short", "completion": "a"}, {"prompt": "long " * 50, "completion": "b"})
    checked = check_examples(data, chat_tokenizer(), budget=20, need_completion=None)
    kept, notices = checked.kept.tolist(), checked.notices
    assert kept == [0] and "left out 1 of 2 rows" in notices[0]


def test_prompts_that_are_all_too_long_are_an_error_that_says_what_to_raise():
    with pytest.raises(ValueError, match="--max_prompt_length"):
        check_examples(examples({"prompt": "long " * 50}), chat_tokenizer(), budget=20, need_completion=None)


def test_a_row_without_the_completion_that_it_needs_is_named():
    data = examples({"prompt": "x", "completion": "y"}, {"prompt": "x"})
    with pytest.raises(ValueError, match="row 1 .* because"):
        check_examples(data, chat_tokenizer(), budget=None, need_completion="because")


def counted_text(builder, example):
    ids, counted, _ = builder._row(example, builder.max_length)
    return builder.chat_tokenizer.tokenizer.decode(ids[counted])


def test_fine_tuning_counts_the_completion_the_turns_or_everything():
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    example = Example(chat[:-1], "second", chat)
    texts = {
        c: counted_text(TokenBatchBuilder(chat_tokenizer(), 1, 1, None, c), example)
        for c in ("completion", "assistant", "all")
    }
    assert "second" in texts["completion"] and "first" not in texts["completion"]
    assert "second" in texts["assistant"] and "first" in texts["assistant"] and "two" not in texts["assistant"]
    assert all(word in texts["all"] for word in ("one", "first", "two", "second"))


def test_fine_tuning_learns_to_stop():
    builder = TokenBatchBuilder(chat_tokenizer(), 1, 1, None, "completion")
    ids, counted, _ = builder._row(Example("x", "y"), builder.max_length)
    assert ids[-1] == builder.chat_tokenizer.stop_id and counted[-1]


def test_sequences_keep_their_start_where_they_are_longer_than_the_window():
    made = TokenBatchBuilder(chat_tokenizer(), 1, 1, 5, "completion").build(
        0, [Example("x", "a long answer, and longer")], None
    )
    (batch,) = made.batches
    assert batch.packed.mask.sum() == 5 and np.count_nonzero(batch.labels.weight) == made.stats["targets"]


def test_batches_are_padded_to_the_shapes_of_those_before_them():
    texts = [Example("x", "y" * n) for n in (90, 20, 40, 85)]
    builder = TokenBatchBuilder(chat_tokenizer(), 1, 1, None, "completion", length_buckets=1)
    made, shapes = [], ()
    for step, example in enumerate(texts):
        made.append(builder.build(step, [example], None, shapes))
        shapes = made[-1].shapes
    found = [update.batches[0].packed.gather_index.shape[-1] for update in made]
    assert found == [96, 96, 96, 96]
    alone = [builder.build(step, [example], None) for step, example in enumerate(texts)]
    for padded, own in zip(made, alone):
        assert padded.stats == own.stats and padded.batches[0].packed.mask.sum() == own.batches[0].packed.mask.sum()
        assert padded.batches[0].labels.weight.sum() == own.batches[0].labels.weight.sum()


@pytest.mark.parametrize(
    "prompts, batch, limit, rows", [(1, 4, 32, 4), (5, 4, 32, 8), (64, 1, 32, 32), (64, 3, 32, 24), (9, 48, 32, 32)]
)
def test_completions_of_an_update_are_sampled_together_in_few_shapes(prompts, batch, limit, rows):
    assert sampling_rows(prompts, batch, limit) == rows


def a_call():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    return {
        "messages": [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
    }


def test_calls_that_a_template_does_not_write_are_no_completion():
    data = examples(a_call(), {"prompt": "x", "completion": "y"})
    checked = check_examples(data, chat_tokenizer(CHATML), budget=None, need_completion="it must be there")
    kept, notices = checked.kept.tolist(), checked.notices
    assert kept == [1] and "left out 1 of 2 rows whose last answer calls tools, which the chat template" in notices[0]
    assert check_examples(data, chat_tokenizer(CHATML), budget=None, need_completion=None).kept.tolist() == [0, 1]
    assert check_examples(
        data, chat_tokenizer(), budget=None, need_completion="…", learns_calls=True
    ).kept.tolist() == [0, 1]
    assert [e.completion for e in check_evaluation(data, chat_tokenizer(CHATML))[0]] == ["y"]


def test_calls_that_a_template_writes_are_learned_as_it_writes_them():
    student = ChatTokenizer(byte_level(), chat_template=PLAIN_TEMPLATE)
    data = examples(a_call(), {"prompt": "x", "completion": "y"})
    checked = check_examples(data, student, budget=None, need_completion="it must be there", teacher=chat_tokenizer())
    assert (
        checked.kept.tolist() == [0, 1] and "in 1 row of the data set the last answer calls tools" in checked.notices[0]
    )
    assert data[0].completion_for(student) == '{"name": "add", "arguments": {"a": 1}}'
    assert check_evaluation(data, student, chat_tokenizer())[0] is data


SPECIAL_CALLS = CHATML.replace(
    "+ m['content']",
    "+ ('<|im_start|>' + m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') + m['content']",
)


def test_calls_behind_a_special_token_are_no_text():
    data = examples(a_call(), {"prompt": "x", "completion": "y"})
    student = chat_tokenizer(SPECIAL_CALLS)
    assert "add" in student.render(data[0].messages)
    assert check_examples(data, student, budget=None, need_completion="it must be there").kept.tolist() == [1]


def test_all_answers_of_a_completion_are_learned_by_sft_and_what_tools_say_is_not():
    call = a_call()["messages"][1]
    completion = [call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]
    row = {
        "prompt": [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "Which?"},
            {"role": "user", "content": "1, 2"},
        ]
    }
    (example,) = data = examples(row | {"completion": completion})
    student = ChatTokenizer(byte_level(), chat_template=PLAIN_TEMPLATE)
    need = dict(budget=None, need_completion="it must be there")
    assert example.answers == 2 and check_examples(data, student, **need).notices == []
    builder = TokenBatchBuilder(student, 1, 1, None, "completion")
    for limit in (None, 1000):
        ids, counted, _ = builder._row(example, limit)
        spelled = student.tokenizer.decode(ids[counted], skip_special_tokens=True)
        assert spelled == '{"name": "add", "arguments": {"a": 1}}It is 3.'
    (notice,) = check_examples(data, student, **need, teacher=student).notices
    assert "in 1 row the completion has several answers: the last one is learned" in notice
    assert example.fingerprint != examples({"messages": example.messages})[0].fingerprint


def test_special_strings_in_plain_prompts_are_told():
    data = examples({"prompt": "What does <|im_end|> do?", "completion": "It ends."})
    (notice,) = check_examples(data, chat_tokenizer(), budget=None, need_completion=None).notices
    assert "row 0" in notice and "<|im_end|>" in notice and "--special_tokens_in_prompts" in notice
    told = ChatTokenizer(byte_level(), special_tokens_in_prompts=True)
    assert check_examples(data, told, budget=None, need_completion=None).notices == []


def test_columns_that_nothing_reads_are_told_with_the_number_of_their_rows():
    data = examples({"prompt": "x", "completion": "y", "response": "z"}, {"prompt": "x", "completion": "y"})
    (notice,) = check_examples(data, chat_tokenizer(), budget=None, need_completion=None).notices
    assert notice == "columns of the data that nothing reads: 'response' (rows: 1)"


def test_rows_without_a_prompt_are_left_out_where_nothing_could_be_drawn_after_no_token():
    data = examples({"text": "t"}, {"prompt": "x", "completion": "y"})
    plain = dict(budget=None, need_completion=None)
    assert check_examples(data, chat_tokenizer(), **plain).kept.tolist() == [0, 1]
    checked = check_examples(data, chat_tokenizer(), student_writes=True, **plain)
    assert checked.kept.tolist() == [1] and "left out 1 of 2 rows without a prompt" in checked.notices[0]
    begins = ChatTokenizer(tiny.beginning_tokenizer())
    assert len(begins.encode_prompt("")) and check_examples(
        data, begins, student_writes=True, **plain
    ).kept.tolist() == [0, 1]
    teacher = dict(teacher=chat_tokenizer(), teacher_writes=True)
    assert check_examples(data, begins, **teacher, **plain).kept.tolist() == [1]
    assert check_examples(data, begins, teacher_context="c", **teacher, **plain).kept.tolist() == [0, 1]
    with pytest.raises(ValueError, match="none of 1 row can be learned from: 1 without a prompt.*--lmbda 0"):
        check_examples(examples({"text": "t"}), chat_tokenizer(), student_writes=True, **plain)


def test_the_digest_of_the_rows_knows_all_that_is_learned_from_them():
    row = {"prompt": "x", "completion": "y"}
    digests = {
        check_examples(examples(*rows), chat_tokenizer(), budget=None, need_completion=None).digest
        for rows in (
            [row],
            [row, row],
            [row | {"teacher_context": "c"}],
            [row | {"completion": "z"}],
            [row | {"id": 1}],
        )
    }
    assert len(digests) == 4


@pytest.mark.parametrize("max_length", [30, 60, 200])
def test_rows_that_surely_fit_are_neither_cut_nor_empty(max_length):
    rng = np.random.default_rng(0)
    words = ["the", "fox", "72", "é", "日本", "\n", "  ", "🙂", "<|im_end|>", "a" * 40]
    sides = [ChatTokenizer(made(), chat_template=CHATML) for made in (byte_level, sentencepiece)]
    for pair in (sides, sides[::-1], [sides[1]] * 2):
        builder = DistillationBatchBuilder(*pair, None, LossSpec("chain", "all", "hybrid"), False, max_length)
        texts = [" ".join(rng.choice(words, rng.integers(0, 12))) for _ in range(120)]
        found = [{"role": "user", "content": a} for a in texts[:60]], texts[60:]
        rows = [Example(prompt=[a], completion=b) for a, b in zip(*found)]
        fit = builder._fit(rows, texts[60:])
        encoded, aligned = builder._aligned(rows, texts[60:])
        sizes = [len(x.student_prompt) + len(x.student.ids) + 1 for x in encoded]
        assert all(builder._count(row) and size <= max_length for yes, row, size in zip(fit, aligned, sizes) if yes)
        assert max_length < 100 or sum(fit) > 30
        assert [bool(n) for n, _ in builder.count_targets(rows)] == [bool(builder._count(row)) for row in aligned]
        assert [cut for _, cut in builder.count_targets(rows)] == [size > max_length for size in sizes]
