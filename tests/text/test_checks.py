import functools
import threading

import numpy as np
import pytest
import real_tokenizers as real
from test_template import OPENS_THINKING, SYSTEM_AND_USER, THINKING, TOOLS, USER, call
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_tokenizers import CHATML, byte_level
from transformers import PreTrainedTokenizerFast

from gold_jax.text import checks, template_trace
from gold_jax.text.background_check import BackgroundCheck
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import check_evaluation, check_examples
from gold_jax.text.data import load_examples
from gold_jax.training.batches import TokenBatchBuilder

THINKS = THINKING.replace(
    "<|im_start|>assistant\n' }}{% endif %}",
    "<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)


def chat_tokenizer(source=CHATML):
    return ChatTokenizer(byte_level(), chat_template=source)


def answered(content="the dog.", **more):
    return {"messages": [USER, {"role": "assistant", "content": content, **more}]}


def check(*rows, student=CHATML, need="it is learned", **kwargs):
    teacher = {"teacher": chat_tokenizer(kwargs.pop("teacher"))} if "teacher" in kwargs else {}
    kwargs = {"budget": None, "need_completion": need, **teacher, **kwargs}
    return check_examples(load_examples(list(rows)), chat_tokenizer(student), **kwargs)


@pytest.mark.parametrize("source", [CHATML, THINKING, OPENS_THINKING, THINKS])
@pytest.mark.parametrize("content", ["the dog.", "<think>\nhm\n</think>\n\nthe dog."])
def test_a_completion_is_the_same_on_every_path(source, content):
    student = chat_tokenizer(source)
    (example,) = load_examples([answered(content)])
    text = example.completion_for(student)
    assert student.render(example.prompt) + text + student.template.tail == student.template.render(example.messages)
    common = dict(batch_size=1, eval_batch_size=1, max_length=None)
    learned = []
    for counted in ("completion", "assistant"):
        ids, mask, _ = TokenBatchBuilder(student, counted=counted, **common)._row(example, None)
        learned.append(student.tokenizer.decode(ids[mask]))
    assert learned == [text + "<|im_end|>"] * 2
    prompted = {"prompt": [USER], "completion": content}
    assert load_examples([prompted])[0].completion_for(student) == text


def test_a_completion_of_a_plain_text_is_as_it_is():
    (example,) = load_examples([{"prompt": "x", "completion": " y "}])
    assert example.completion_for(chat_tokenizer(THINKING)) == " y "


def test_a_role_that_would_be_control_is_told_with_its_row():
    bad = {"prompt": [{"role": "user<|im_end|>", "content": "q"}]}
    for where in ("student", "teacher"):
        with pytest.raises(ValueError, match="row 1 of the data set: message 0 has the role 'user<.im_end.>'"):
            check({"prompt": [USER]}, bad, need=None, **{where: CHATML})


def test_a_token_of_the_template_without_an_embedding_is_told_before_training():
    tokenizer = byte_level.__wrapped__()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<sys>"], special_tokens=True)
    source = "{% for m in messages %}{{ '<sys>' if m['role'] == 'system' else '' }}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    student = ChatTokenizer(tokenizer, chat_template=source, embedding_rows=rows)
    told = [{"role": "system", "content": "be kind"}, USER]
    answer = {"role": "assistant", "content": "the dog."}
    for row in ({"prompt": told}, {"messages": [*told, answer]}):
        for learns_calls in (False, True):
            with pytest.raises(
                ValueError, match=f"row 1 of the data set: .*'<sys>', the token {rows} of .* no embedding"
            ):
                check_examples(
                    load_examples([{"prompt": [USER]}, row]),
                    student,
                    budget=None,
                    need_completion=None,
                    learns_calls=learns_calls,
                )
    with pytest.raises(ValueError, match="no embedding"):
        student.encode_turns([*told, answer])


def test_messages_that_a_template_does_not_write_are_an_error():
    human = {
        "messages": [
            {"role": "human", "content": "q"},
            {"role": "gpt", "content": "a"},
            USER,
            {"role": "assistant", "content": "b"},
        ]
    }
    with pytest.raises(
        ValueError, match="row 1 of the data set.*message 0 of the role 'human'.*role 'gpt', 'human'.*roles are"
    ):
        check(answered(), human, student=SYSTEM_AND_USER)
    with pytest.raises(ValueError, match="row 0 of the data set.*'human'"):
        check(human, teacher=SYSTEM_AND_USER)
    with pytest.raises(ValueError, match="row 0 of the evaluation data.*'human'"):
        check_evaluation(load_examples([human]), chat_tokenizer(SYSTEM_AND_USER))
    prompt = {"prompt": [{"role": "SYSTEM", "content": "s"}, USER]}
    with pytest.raises(ValueError, match="row 0 of the data set.*'SYSTEM'"):
        check(prompt, student=SYSTEM_AND_USER, need=None)


def test_an_answer_under_another_role_is_named():
    row = {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}
    says = (
        "row 0 of the data set has messages of the role 'human' and 'gpt', and no answer of the assistant's .*; it is"
    )
    with pytest.raises(ValueError, match=says):
        check(row)
    with pytest.raises(ValueError, match="row 0 of the data set ends with a message of the role 'system', not with an"):
        check({"messages": [USER, {"role": "system", "content": "s"}]})


def test_a_format_of_another_project_is_said_once():
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    rows = load_examples([shared, {"question": "q", "answer": "a"}, answered(), shared])
    for said in (check(*rows.rows).notices, check_evaluation(rows, chat_tokenizer())[1]):
        assert len(said) == 2 and "2 rows of the " in said[0] and " read as ShareGPT: `from` and `value`" in said[0]
        assert "1 row of the " in said[1] and " read as question/answer: `question`" in said[1]


def test_tool_calls_that_a_template_does_not_write_are_an_error():
    row = {"messages": [USER, call("hm"), {"role": "tool", "content": "s"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="row 0.*the name of tool call 0 of message 1"):
        check(row)


def test_tools_that_a_template_does_not_write_are_told_once():
    rows = [answered() | {"tools": TOOLS}] * 3
    notices = check(*rows, teacher=CHATML).notices
    assert len(notices) == 2 and all("does not write the tools of 3 rows" in notice for notice in notices)
    assert "(student)" in notices[0] and "(teacher)" in notices[1]
    (notice,) = check(answered(reasoning_content="hm")).notices
    assert "does not write the reasoning_content of the last answer of 1 row" in notice


def test_templates_that_write_different_answers_are_told_and_what_makes_them_agree():
    (notice,) = check(answered(), answered(), student=THINKS, teacher=CHATML).notices
    assert "in 2 rows of the data set the two templates write different answers" in notice
    assert "in row 0 '<think>\\n\\n</think>\\n\\nthe dog.' (the student's) and 'the dog.' (the teacher's)" in notice
    assert """--template_kwargs '{"enable_thinking": false}' makes them agree""" in notice
    same = dict(student=THINKS, teacher=CHATML)
    assert check(answered() | {"chat_template_kwargs": {"enable_thinking": False}}, **same).notices == []
    assert check({"prompt": [USER]}, need=None, **same).notices == []


def test_a_row_that_thinks_is_read_whatever_variables_would_make_the_templates_agree():
    thinks = answered("<think>\nhm\n</think>\n\nthe dog.")
    for sides in (dict(student=THINKS, teacher=CHATML), dict(student=CHATML, teacher=THINKS)):
        assert check(thinks, **sides).kept.tolist() == [0]


def test_thinking_that_a_template_drops_is_told_and_nothing_left_is_an_error():
    drops = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    (notice,) = check(answered("<think>hm</think>yes"), student=drops).notices
    assert (
        "in 1 row of the data set the student's template leaves out a part of the answer" in notice
        and "'yes'" in notice
    )
    with pytest.raises(ValueError, match="row 0 of the data set.*nothing of it is left"):
        check(answered("<think>hm</think>"), student=drops)


def test_evaluation_rows_that_cannot_be_read_can_be_left_out():
    rows = load_examples([{"prompt": 3}, {"prompt": "x", "completion": "y"}], check_first=False)
    kept, (notice,), _ = check_evaluation(rows, chat_tokenizer(), on_bad_row="skip")
    assert [e.completion for e in kept] == ["y"] and "left out 1 of 2 rows of the evaluation data" in notice
    with pytest.raises(ValueError, match="row 0"):
        check_evaluation(rows, chat_tokenizer())


def test_a_generation_prompt_that_is_not_what_stands_before_an_answer_is_told():
    opens = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    (notice,) = check(answered(), student=opens).notices
    assert "in 1 row of the data set the generation prompt of the student's template is not what it writes" in notice
    assert "<think>" in notice and "'the dog.'" in notice


def test_a_prompt_with_a_column_that_looks_like_its_answer_is_named():
    row = {"prompt": "x", "response": "y"}
    with pytest.raises(
        ValueError, match="row 0.*no completion; it is learned. Its column 'response' may be the answer: name it"
    ):
        check(row)
    notices = check(row, row, need=None).notices
    assert "the column 'response' of 2 rows with a prompt and no completion may be the answer" in notices[0]


@pytest.mark.parametrize("name", "response chosen output Answer target label solution model_outputs reasoning".split())
def test_columns_that_may_hold_an_answer_are_known(name):
    with pytest.raises(ValueError, match=f"Its column '{name}' may be the answer"):
        check({"prompt": "x", name: "y"})
    (notice,) = check({"prompt": "x", "completion": "y", name: "z"}).notices
    assert notice == f"columns of the data that nothing reads: '{name}' (rows: 1)"


def test_a_prompt_is_read_with_the_context_that_stands_before_it():
    too_long = "{% if m['content'] | length > 39 %}{{ raise_exception('too long') }}{% endif %}"
    strict = CHATML.replace("{% for m in messages %}", "{% for m in messages %}" + too_long)
    for row, run in ({"teacher_context": "c" * 40}, None), ({}, "c" * 40):
        with pytest.raises(ValueError, match=r"row \d of the data set: the chat template.* too long"):
            check(answered(), answered() | row, teacher=strict, teacher_context=run)
        with pytest.raises(ValueError, match="row 0 of the evaluation data: the chat template.* too long"):
            check_evaluation(
                load_examples([answered() | row]), *[chat_tokenizer(s) for s in (CHATML, strict)], teacher_context=run
            )
    with pytest.raises(ValueError, match="--teacher_context is not valid Unicode"):
        check(answered(), teacher=CHATML, teacher_context="\udcff")


def test_texts_that_a_tokenizer_cannot_encode_are_found_at_the_start():
    model = models.WordLevel({w: i for i, w in enumerate("the fox is 72 b </s>".split())}, unk_token="<none>")
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    drops = byte_level_without("a")
    for tokenizer, text in (PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "c"), (drops, "aa"):
        chat = ChatTokenizer(tokenizer)
        rows = [{"prompt": "b", "completion": "b"}, {"prompt": "b", "completion": text}]
        need = dict(budget=None, need_completion="x")
        with pytest.raises(ValueError, match="row 1 of the data set: .*(cannot encode|makes no token of)"):
            check_examples(load_examples(rows), chat, **need)
        assert check_examples(load_examples(rows), chat, **need, on_bad_row="skip").kept.tolist() == [0]
        with pytest.raises(ValueError, match="row 1 of the evaluation data"):
            check_evaluation(load_examples(rows), chat)


def byte_level_without(letter):
    """Byte-level BPE that lacks a byte and drops it."""
    vocabulary = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {letter})
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate([*vocabulary, "</s>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_rows_of_which_nothing_is_left_are_left_out_and_cut_ones_counted():
    found = {"a" * 80: (0, True), "b" * 80: (3, True), "c" * 80: (5, False)}
    rows = [{"prompt": "x", "completion": text} for text in (*found, "short")]
    seen = []

    def count_targets(examples):
        seen.extend(example.completion for example in examples)
        return [found[example.completion] for example in examples]

    checked = check(*rows, max_length=70, count_targets=count_targets)
    assert checked.kept.tolist() == [1, 2, 3] and "short" not in seen
    assert checked.notices == [
        "left out 1 of 4 rows of which --max_length 70 leaves nothing to learn",
        "--max_length 70 cuts 1 of 4 rows: their ends are not learned",
    ]
    with pytest.raises(ValueError, match="none of 1 row.*leaves nothing to learn .raise --max_length"):
        check(rows[0], max_length=70, count_targets=lambda examples: [(0, True)])


def test_bad_rows_can_be_skipped_and_are_counted_with_their_reasons():
    rows = [
        {"prompt": "x", "completion": "y"},
        {"prompt": "x"},
        {"nothing": 1},
        {"messages": []},
        {"prompt": 3},
        {"text": 3},
    ]
    rows += [{"prompt": "x", "completion": "half \ud800"}, {"prompt": "z", "completion": "y"}]
    with pytest.raises(ValueError, match="row 1 of the data set"):
        check(*rows)
    checked = check(*rows, on_bad_row="skip")
    assert checked.kept.tolist() == [0, 7]
    (notice,) = [n for n in checked.notices if "cannot be read" in n]
    assert notice.startswith("left out 6 of 8 rows that cannot be read (--on_bad_row skip): row 1 of the data set")
    assert [f"row {i}" in notice for i in range(1, 7)] == [True] * 5 + [False] and notice.endswith("and 1 more")
    (notice,) = [n for n in check(*rows[:2], *rows[1:3] * 3, on_bad_row="skip").notices if "cannot be read" in n]
    assert notice.count("no completion") == 1 == notice.count("(and 3 more rows like it)") and "row 4" not in notice
    with pytest.raises(ValueError, match="none of 1 row can be learned from: 1 that cannot be read"):
        check_examples(
            load_examples([{"prompt": "x"}]), chat_tokenizer(), budget=None, need_completion="x", on_bad_row="skip"
        )


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_text_that_is_not_unicode_is_named_before_it_is_learned(column):
    row = {"prompt": "x", "completion": "y"}
    with pytest.raises(ValueError, match=f"row 1 of the data set: '{column}' is not valid Unicode.*lone surrogate"):
        check(row, row | {column: "a \ud800 b"})


@pytest.mark.assets
def test_qwen3_and_llama_agree_without_thinking(assets):
    qwen, llama = (real.chat_tokenizer(assets / "tokenizers" / n) for n in ("qwen3", "llama3_2"))
    rows = load_examples([answered(), answered(reasoning_content="hm")])
    need = dict(budget=None, need_completion="it is learned")
    notices = check_examples(rows, qwen, teacher=llama, **need).notices
    assert "(teacher) does not write the reasoning_content of the last answer of 1 row" in notices[0]
    assert "--template_kwargs '{\"enable_thinking\": false}' makes them agree" in notices[1]
    thinks = load_examples([answered(reasoning_content="hm")])[0]
    assert (
        thinks.completion_for(qwen) == "<think>\nhm\n</think>\n\nthe dog."
        and thinks.completion_for(llama) == "the dog."
    )
    vanished = load_examples([{"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}])
    with pytest.raises(ValueError, match="row 0 .*qwen3.*message 0 of the role 'human'"):
        check_examples(vanished, qwen, budget=None, need_completion=None)
    ids = [qwen.encode_prompt(rows[0].prompt), qwen.encode_completion(rows[0].completion_for(qwen)).ids]
    whole = qwen.tokenizer.encode(qwen.template.render(rows[0].messages))
    assert np.concatenate(ids).tolist() == whole[: sum(map(len, ids))]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("gemma3", marks=pytest.mark.long)])
def test_real_templates_that_drop_calls_and_tools_are_told(assets, name):
    qwen, teacher = (real.chat_tokenizer(assets / "tokenizers" / n) for n in ("qwen3", name))
    need = dict(budget=None, need_completion="it is learned")
    bare = {"role": "assistant", "content": None, "tool_calls": call("")["tool_calls"]}
    called = load_examples(
        [{"messages": [USER, bare, {"role": "tool", "content": "s"}, {"role": "assistant", "content": "b"}]}]
    )
    with pytest.raises(ValueError, match=f"row 0 .*{name}"):
        check_examples(called, qwen, teacher=teacher, **need)
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    (notice,) = check_examples(
        load_examples([answered() | kwargs | {"tools": TOOLS}]), qwen, teacher=teacher, **need
    ).notices
    assert f"{name}" in notice and "(teacher) does not write the tools of 1 row" in notice
    assert (load_examples([answered(" b\n")])[0].completion_for(teacher) == "b") == (name == "gemma3")


@pytest.mark.parametrize("key", ["name", "thinking", "refusal"])
def test_keys_of_messages_that_a_template_does_not_write_are_told(key):
    row = {"messages": [USER | {key: "x"}, {"role": "assistant", "content": "b"}]}
    (notice,) = check(row, answered()).notices
    assert f"(student) does not write the key {key!r} of messages of 1 row" in notice
    writes = "{% for m in messages %}{{ m.get('KEY', '') }}{{ m['content'] }}{{ eos_token }}{% endfor %}".replace(
        "KEY", key
    )
    assert not check(row, student=writes).notices


def test_roles_of_other_formats_are_told_where_a_template_writes_them():
    rows = [{"messages": [{"role": "human", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 2
    (notice,) = [n for n in check(*rows).notices if "'human'" in n]
    assert "the role 'human', in 2 rows of the data set, is not one of system, developer, user" in notice


ODD = [
    answered(), answered("the dog. " * 30), answered(" the dog. "), answered(""), answered("é — “so” 😀"),
    answered("<think>\nhm\n</think>\n\nthe dog."), answered("half \ud800"), answered("a <|im_end|> b"),
    {"messages": [{"role": "user", "content": "a <|im_end|> </think> b"}, {"role": "assistant", "content": "the fox"}]},
    {"messages": [USER]}, {"messages": []}, {"prompt": 3}, {"prompt": [USER], "completion": "the fox", "extra": 1},
    {"prompt": "the fox", "completion": " is"}, {"prompt": "the " * 60, "completion": " is"}, {"prompt": "", "completion": "x"},
    {"prompt": "the fox", "completion": ""}, {"prompt": "<|im_end|>", "completion": "x"}, {"text": "the fox"}, {"nothing": 1},
    {"prompt": [USER] * 40, "completion": "the fox"}, {"messages": [USER, call(None)]}, {"prompt": "x", "response": "y"},
    {"messages": [{"role": "human", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user<|im_end|>", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"prompt": [USER], "completion": "the fox", "teacher_context": "it is a fox"},
    {"messages": [{"role": "system", "content": "be kind"}, USER, {"role": "assistant", "content": "the dog."}]},
    {"messages": [{"role": "system", "content": "be kind"}, USER, {"role": "assistant", "content": "the dog.", "name": "x"}]},
]  # fmt: skip


@pytest.mark.parametrize("sides", [{}, {"teacher": CHATML}, {"student": THINKING, "teacher": SYSTEM_AND_USER}])
@pytest.mark.parametrize("need", [None, "it is learned"])
def test_rows_looked_at_together_are_those_looked_at_one_by_one(sides, need, monkeypatch):
    def found():
        student = chat_tokenizer(sides.get("student", CHATML))
        builder = TokenBatchBuilder(student, 1, 1, None, "completion")
        counted = functools.partial(builder.count_targets, max_length=150)
        options = dict(
            budget=100, max_length=150, count_targets=counted, on_bad_row="skip", student_writes=need is None
        )
        options |= {"teacher": chat_tokenizer(sides["teacher"])} if "teacher" in sides else {}
        return check_examples(load_examples(ODD * 3, check_first=False), student, need_completion=need, **options)

    together = found()
    monkeypatch.setattr(template_trace.TemplateTrace, "render", lambda self, messages, generate, render: render())
    monkeypatch.setattr(checks, "_BLOCK", 1)
    assert found() == together and 0 < len(together.kept) < 3 * len(ODD) - 20


def test_the_first_bad_row_is_told_though_others_are_looked_at_with_it():
    def count_targets(examples):
        if any("fox" in e.completion for e in examples):
            raise ValueError("no fox")
        return [(1, False)] * len(examples)

    rows = [{"prompt": "x", "completion": text} for text in ("dog " * 20, "fox " * 20, "fox " * 20)]
    with pytest.raises(ValueError, match="^row 1 of the data set: no fox"):
        check(*rows, {"prompt": 3}, max_length=30, count_targets=count_targets)
    checked = check(*rows, {"prompt": 3}, max_length=30, count_targets=count_targets, on_bad_row="skip")
    assert checked.kept.tolist() == [0] and "and 1 more rows like it" in checked.notices[0]


def test_a_check_that_training_ended_before_says_what_it_found_by_then(monkeypatch):
    monkeypatch.setattr(checks, "_BLOCK", 2)
    rows, reached, stopped = (
        [{"prompt": "a", "completion": "b"}, {"prompt": 5}] * 3,
        threading.Event(),
        threading.Event(),
    )

    def check(after_block):
        def slowly(checker):
            after_block(checker)
            reached.set()
            stopped.wait(60)

        options = dict(budget=None, need_completion=None, on_bad_row="skip")
        return check_examples(load_examples(rows, check_first=False), chat_tokenizer(), slowly, **options)

    background = BackgroundCheck(check, len(rows))
    with background:
        assert reached.wait(60)
        found = background.unfinished()
        background._stop.set()
        stopped.set()
    assert found[0] == "2 of 6 rows were checked before training ended."
    assert found[1].startswith("note: left out 1 of 2 rows") and "row 1 of the data set" in found[1]
