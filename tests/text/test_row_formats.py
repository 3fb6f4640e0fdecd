import json

import datasets
import numpy as np
import pandas as pd
import pytest

from gold_jax.config import SFTConfig
from gold_jax.text.data import Example, load_examples
from gold_jax.text.row_formats import read_columns
from gold_jax.text.template import like

USER, ANSWER, SYSTEM = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
CALL = {"name": "look", "arguments": {"city": "Ulm"}}
ASKED = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]


def read(*rows, **options):
    return list(load_examples(list(rows), **options))


# Formats of other projects


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpt_is_read_as_messages(column):
    row = {column: [{"from": "system", "value": "s"}, *ASKED], "id": 3}
    assert read(row) == [Example([SYSTEM, USER], "a", [SYSTEM, USER, ANSWER])]
    (example,) = read({column: ASKED, "system": "s"})
    assert example.messages == [SYSTEM, USER, ANSWER] and example.unread == () and example.format == "ShareGPT"
    assert read({"prompt": ASKED[:1], "completion": ASKED[1:]}) == read({"messages": [USER, ANSWER]})


def test_conversations_may_have_role_and_content():
    (example,) = read({"conversations": [USER, ANSWER]})
    assert example == Example([USER], "a", [USER, ANSWER]) and example.format == "conversations"


@pytest.mark.parametrize("value", ["u", [], 3])
def test_conversations_that_are_none_leave_a_row_its_other_form(value):
    (text, pair) = read({"conversations": value, "text": "t"}, {"conversations": value, "question": "u", "answer": "a"})
    assert text == Example("", "t") and text.unread == ("conversations",)
    assert pair == Example([USER], "a", [USER, ANSWER])


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_a_text_column_is_text_whatever_it_is_called(column):
    (example,) = read({column: "t", "completion": "c"}, text_column=column)
    assert example == Example("", "t") and example.unread == ("completion",)


@pytest.mark.parametrize("value", [json.dumps(CALL), json.dumps([CALL])])
@pytest.mark.parametrize("observer", ["observation", "tool"])
def test_calls_and_what_tools_say_become_tool_calls_and_tool_turns(value, observer):
    called = [{"from": "function_call", "value": value}, {"from": observer, "value": "rain"}]
    (example,) = read({"conversations": [ASKED[0], *called, ASKED[1]], "tools": json.dumps([{"name": "look"}])})
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    assert list(example.messages) == [USER, call, {"role": "tool", "content": "rain"}, ANSWER]
    assert example.messages.tools == [{"name": "look"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"conversations": [{"from": "bing", "value": "u"}]},
            "message 0 of 'conversations' is from 'bing'; it must be from",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "look(Ulm)"}]},
            "is from function_call, .*JSON of a call.*look",
        ),
        ({"conversations": [{"from": "human"}]}, "the content of message 0 of .* must be text, not missing or null"),
        (
            {"conversations": "u"},
            "'conversations' must be a list of messages, {from, value} or {role, content}, not a str",
        ),
        ({"conversations": [], "system": "s"}, "'conversations' must be .* not an empty list"),
        ({"conversations": [SYSTEM, USER], "system": "s"}, "a 'system' column beside a system message"),
        ({"instruction": "u", "output": 3}, "'output' must be text, not a int"),
        ({"instruction": "u", "output": "a", "history": [["u"]]}, "'history' must be a list of pairs"),
        (
            {"question": "u", "answer": "a", "problem": "u", "solution": "a"},
            "the columns of question/answer and of problem/solution; say .*--columns question=question,answer=answer",
        ),
        ({"conversations": [{"from": "human", "value": "\ud800"}]}, r"'conversations\[0\].value' is not valid Unicode"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part 0 is of the type 'image', not text"),
    ],
)
def test_what_is_no_row_of_its_format_is_refused(row, says):
    with pytest.raises(ValueError, match=f"row 0 of the data set: .*{says}"):
        read(row)


def test_alpaca_s_input_stands_behind_a_blank_line():
    rows = [{"instruction": "Add.", "input": added, "output": "3"} for added in ("1 and 2", "", None)]
    asked = [example.prompt for example in read(*rows)]
    assert asked == [[{"role": "user", "content": text}] for text in ("Add.\n\n1 and 2", "Add.", "Add.")]
    (example,) = read({"instruction": "u", "output": "a", "system": "s", "history": [["u", "a"]]})
    assert example.messages == [SYSTEM, USER, ANSWER, USER, ANSWER] and example.format == "alpaca"
    assert read({"instruction": "u", "output": None}) == [Example([USER])]


@pytest.mark.parametrize("names", [("question", "answer"), ("problem", "solution")])
def test_pairs_are_a_question_and_its_answer(names):
    (example,) = read(dict(zip(names, "ua")) | {"level": 3})
    assert example == Example([USER], "a", [USER, ANSWER]) and example.unread == ("level",)
    assert example.format == "/".join(names)


def test_columns_of_trl_s_go_before_those_of_other_formats():
    (example,) = read({"instruction": "u", "output": "a", "text": "t"})
    assert example == Example("", "t") and example.unread == ("instruction", "output") and example.format == ""
    assert read({"conversations": ASKED, "text": "t"})[0].completion == "a"
    assert read({"messages": [USER, ANSWER], "conversations": ASKED[:1]})[0].completion == "a"


# A column map


@pytest.mark.parametrize(
    "given", ["prompt=q,completion=a", '{"prompt": "q", "completion": "a"}', {"prompt": "q", "completion": "a"}]
)
def test_a_column_map_is_read_from_pairs_json_and_mappings(given):
    renamed = SFTConfig(columns=given).columns
    (example,) = read({"q": "x", "a": "y", "prompt": "other", "messages": [USER]}, renamed=renamed)
    assert example == Example("x", "y") and example.unread == ("prompt", "messages")
    with pytest.raises(ValueError, match="--columns is 'prompt'; it must be pairs NAME=COLUMN"):
        SFTConfig(columns="prompt")


def test_a_column_map_names_columns_of_other_formats_too():
    rows = {"problem": "u", "solution": "long", "reply": "a", "functions": [{"name": "f"}]}
    (example,) = read(rows, renamed={"answer": "reply", "question": "problem", "tools": "functions"})
    assert example.messages == like(example.messages, [USER, ANSWER]) and example.prompt.tools == [{"name": "f"}]
    assert example.unread == ("solution",)
    assert read({"prompt": "x", "a": "y"}, renamed={"completion": "a"}) == [Example("x", "y")]
    assert read({"chat": ASKED}, renamed={"messages": "chat"})[0].completion == "a"
    assert read_columns({"body": "t"}, "story", {"text": "body"}).columns["text"] == "t"


def test_a_column_map_must_name_columns_that_are_there_and_that_are_read():
    for check_first in (True, False):
        with pytest.raises(ValueError, match="'prompt=query', but the data set has no column 'query'; it has q, a"):
            read({"q": "x"}, {"a": "y"}, renamed={"prompt": "query"}, check_first=check_first)
    with pytest.raises(ValueError, match="nothing reads 'promt'; it must be one of messages, prompt"):
        read({"q": "x"}, renamed={"promt": "q"})
    rows = load_examples([{"q": "x", "a": "y"}, {"q": "x"}], renamed={"prompt": "q", "completion": "a"})
    assert [example.completion for example in rows] == ["y", None]
    late = load_examples([*[{"q": "x"}] * 300, {"q": "x", "a": "y"}], renamed={"prompt": "q", "completion": "a"})
    assert [late[0].completion, late[300].completion] == [None, "y"]
    with pytest.raises(ValueError, match="row 1 of the data set has the columns a; accepted are"):
        read({"q": "x"}, {"a": "y"}, renamed={"prompt": "q"})


def test_a_row_of_no_form_names_the_column_that_nearly_is_one():
    for name, meant in (("mesages", "messages"), ("Promt", "prompt"), ("conversation", "conversations")):
        with pytest.raises(
            ValueError, match=f"has the columns {name}, completion; '{name}' may be meant for '{meant}'; accepted"
        ):
            read({name: "x", "completion": "y"})
    with pytest.raises(
        ValueError, match="has the columns query, answers; 'answers' may be meant for 'answer'; accepted"
    ):
        read({"query": "x", "answers": "y"})
    with pytest.raises(ValueError, match="has the columns messages, level .messages is there but null.; accepted"):
        read({"messages": None, "level": 3})


# What Python holds


def test_a_frame_is_read_as_its_rows_with_nothing_for_null():
    frame = pd.DataFrame({"prompt": ["x", "y"], "completion": ["1", None], "level": [3, np.nan]}, index=[7, 7])
    found = load_examples(frame)
    assert list(found) == [Example("x", "1"), Example("y")]
    assert [example.unread for example in found] == [("level",), ()]
    assert read({"messages": [USER, ANSWER]}) == list(load_examples(pd.DataFrame({"messages": [[USER, ANSWER]]})))
    with pytest.raises(ValueError, match="two columns of one name among prompt, prompt"):
        load_examples(pd.DataFrame([["x", "y"]], columns=["prompt", "prompt"]))
    with pytest.raises(ValueError, match="the data set is empty"):
        load_examples(frame[:0])


def test_lists_that_pandas_read_from_parquet_lose_the_nulls_that_fill_them(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    messages = [USER, call, {"role": "tool", "content": "rain"}, ANSWER]
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "rows.parquet")
    assert list(load_examples(pd.read_parquet(tmp_path / "rows.parquet"))) == read({"messages": messages})


def test_an_iterator_is_read_once_and_its_size_said():
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    for source in ((row for row in rows), dict(enumerate(rows)).values()):
        found = load_examples(source)
        assert [example.prompt for example in found] == ["x", "y"] == [example.prompt for example in found]
        assert found.notices == ["the data set was read from an iterator, once: 2 rows, which stay in memory"]
    assert load_examples(rows).notices == []
    with pytest.raises(ValueError, match="the data set is a int; pass a name"):
        load_examples(3)
    with pytest.raises(ValueError, match="the data set is empty"):
        load_examples(iter(()))
