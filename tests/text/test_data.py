import datetime
import importlib
import json
import os
import re
import types

import datasets
import numpy as np
import pytest

from gold_jax.text import data, json_rows
from gold_jax.text.data import Example, _from_hub, load_examples, to_example
from gold_jax.text.template import Conversation

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def example(row):
    return to_example(row, 3, "the data set 'd'")


# Forms


def test_a_conversation_is_its_last_answer_after_the_rest():
    assert example({"messages": [USER, ANSWER]}) == Example([USER], "a", [USER, ANSWER])
    assert example({"messages": [USER, ANSWER, USER]}) == Example([USER, ANSWER, USER])


def test_a_lone_answer_follows_an_empty_prompt():
    assert example({"messages": [ANSWER]}) == Example("", "a", [ANSWER])


def test_an_empty_answer_stays_one():
    assert example({"messages": [USER, {"role": "assistant", "content": ""}]}).completion == ""
    assert example({"prompt": "q", "completion": ""}).completion == ""


def test_prompt_and_completion_as_text_or_messages():
    assert example({"prompt": "q", "completion": "a"}) == Example("q", "a")
    assert example({"prompt": [USER], "completion": [ANSWER]}) == Example([USER], "a", [USER, ANSWER])
    assert example({"prompt": [USER], "completion": "a"}) == Example([USER], "a", [USER, ANSWER])
    assert example({"prompt": "q", "completion": [ANSWER]}) == Example([USER], "a", [USER, ANSWER])


def test_a_prompt_alone_has_no_completion():
    assert example({"prompt": "q"}) == Example("q")
    assert example({"prompt": [USER], "completion": None}) == Example([USER])


def test_a_text_completes_an_empty_prompt():
    assert example({"text": "t"}) == Example("", "t")
    assert to_example({"body": "t"}, 0, "d", text_column="body") == Example("", "t")


def test_messages_go_before_other_columns_and_nulls_do_not_count():
    assert example({"messages": [USER, ANSWER], "prompt": "x", "text": "y"}).completion == "a"
    assert example({"messages": None, "prompt": "x"}) == Example("x")


def test_keys_without_a_value_are_left_out_of_messages():
    assert example({"messages": [{**USER, "tool_calls": None}]}).prompt == [USER]


# Tools, template variables, context

SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)]])
@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_tools_and_template_variables_go_with_the_messages(tools, kwargs):
    beside = {"tools": tools, "chat_template_kwargs": kwargs}
    for row in (
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": "a"},
        {"prompt": "q", "completion": [ANSWER]},
    ):
        found = example(row | beside)
        for messages, count in ((found.prompt, 1), (found.messages, 2)):
            assert isinstance(messages, Conversation) and len(messages) == count
            assert messages.tools == [SCHEMA] and messages.template_kwargs == {"enable_thinking": False}
        assert found.completion == "a"
    assert example({"prompt": [USER]} | beside).prompt.tools == [SCHEMA]
    assert example({"messages": [ANSWER]} | beside).prompt == ""


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}])
def test_columns_that_tell_nothing_leave_a_list_a_list(nothing):
    found = example({"messages": [USER, ANSWER], "tools": nothing, "chat_template_kwargs": nothing})
    assert type(found.prompt) is list and type(found.messages) is list
    assert example({"prompt": "q", "tools": nothing, "chat_template_kwargs": nothing}) == Example("q")


def test_null_is_the_users_too():
    schema = {
        "type": "function",
        "function": {"name": "look", "parameters": {"limit": {"type": "integer", "default": None}}},
    }
    call = {"function": {"name": "look", "arguments": {"city": "Ulm", "limit": None}}}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": [schema],
        "chat_template_kwargs": {"a": 1, "b": None},
    }
    for given in (row, row | {"tools": json.dumps([schema])}):
        found = example(given)
        assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert found.prompt.tools == [schema] and found.prompt.template_kwargs == {"a": 1, "b": None}


@pytest.mark.parametrize("suffix", ["", ".jsonl", ".parquet"])
def test_keys_that_arrow_fills_in_are_left_out_and_json_keeps_its_nulls(tmp_path, suffix):
    def row(arguments, parameters):
        call = {"function": {"name": "look", "arguments": arguments}}
        tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
        return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}

    rows = [row({"city": "Ulm"}, {"city": {"type": "string"}}), row({"day": "Monday"}, {"day": {"type": "string"}})]
    if suffix:
        write(tmp_path / f"rows{suffix}", rows)
        found = load_examples(tmp_path / f"rows{suffix}")
    else:
        found = load_examples(datasets.Dataset.from_list(rows))
    for read, given in zip(found, rows, strict=True):
        assert list(read.messages) == given["messages"] and read.prompt.tools == given["tools"]
    as_json = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "tools": datasets.Json(),
        }
    )
    null = {"messages": [USER, ANSWER], "tools": [{"name": "look", "parameters": {"default": None}}]}
    assert load_examples(datasets.Dataset.from_list([null], features=as_json))[0].prompt.tools == null["tools"]


def test_a_text_of_its_own_passes_tools_over():
    assert example({"text": "t", "tools": [SCHEMA]}) == Example("", "t")


def test_context_for_the_teacher_is_kept_apart():
    for row in ({"messages": [USER, ANSWER]}, {"prompt": "q"}, {"text": "t"}):
        assert example(row | {"teacher_context": "c"}).teacher_context == "c"
        assert example(row | {"teacher_context": "c"}).prompt == example(row).prompt
        for nothing in ({}, {"teacher_context": None}, {"teacher_context": ""}):
            assert example(row | nothing).teacher_context is None


# Messages


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_answer_that_calls_tools_needs_no_content(content):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    found = example({"messages": [USER, call | content]})
    assert found.messages[1]["content"] == "" == found.completion
    assert found.calls_tools
    assert not example({"messages": [USER, call | content, USER]}).calls_tools
    assert not example({"messages": [USER, ANSWER]}).calls_tools and not example({"prompt": "q"}).calls_tools


@pytest.mark.parametrize(
    "given, kept",
    [
        ('{"city": "Ulm", "day": null}', {"city": "Ulm", "day": None}),
        ({"city": "Ulm"}, {"city": "Ulm"}),
        ("{city", "{city"),
        ("3", "3"),
    ],
)
def test_arguments_of_a_call_that_are_a_json_object_as_text_become_the_object(given, kept):
    for call in (
        {"type": "function", "function": {"name": "look", "arguments": given}},
        {"name": "look", "arguments": given},
    ):
        message = example({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).messages[1]
        found = message["tool_calls"][0]
        assert found.get("function", found) == {"name": "look", "arguments": kept}


def test_further_keys_of_messages_are_passed_on():
    tool = {"role": "tool", "content": "sunny", "name": "look", "tool_call_id": "7"}
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm", "thinking": "hm"}
    assert example({"messages": [USER, tool, thought]}).messages == [USER, tool, thought]
    assert "tool_calls" not in example({"messages": [USER, ANSWER | {"tool_calls": []}]}).messages[1]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    assert example({"messages": [{"role": "user", "content": parts}]}).prompt == [{"role": "user", "content": "ab"}]
    assert example({"prompt": "q", "completion": [{"role": "assistant", "content": parts}]}).completion == "ab"


# Mistakes


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"query": "q", "reply": "a"},
            "row 3 of the data set 'd' has the columns query, reply; accepted .*--columns prompt=query",
        ),
        ({"messages": None}, "messages is there but null"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "q"}, "'messages' must be a list of .*not a str"),
        ({"messages": ["q"]}, "message 0 of 'messages' must have role and content, but is a str"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of message 1 of 'messages' must be text, not missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 0 .*must be text, not a int"),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]}]},
            "content of message 1 of 'messages' must be text or a list of text parts.*part 1 is of the type 'image'",
        ),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "its part 0 is a str, not text"),
        (
            {"messages": [USER, {"role": "tool", "tool_calls": [{"name": "look"}]}]},
            "content of message 1 .*not missing",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": "look"}]}, "tool_calls of message 1 .*a list of calls.*not a str"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": ["look"]}]},
            "tool_calls of message 1 .*a list of calls.*not a str",
        ),
        ({"prompt": [USER], "tools": "[{"}, "'tools' is text but no valid JSON .*must be a list of JSON schemas"),
        ({"prompt": [USER], "tools": {"name": "look"}}, "'tools' must be a list of JSON schemas, not a dict"),
        ({"prompt": [USER], "tools": [SCHEMA, 3]}, r"'tools\[1\]' must be a JSON schema, such as .*not a int"),
        ({"prompt": [USER], "tools": ["{"]}, r"'tools\[0\]' is text but no valid JSON .*must be a JSON schema"),
        (
            {"prompt": "q", "tools": [SCHEMA]},
            "has tools for the chat template, but its 'prompt' is text.*list of messages",
        ),
        ({"prompt": [USER], "chat_template_kwargs": '{"a": 1, "a": 2}'}, "no valid JSON .the key 'a' is there twice"),
        ({"prompt": [USER], "chat_template_kwargs": "{a"}, "'chat_template_kwargs' is text but no valid JSON"),
        ({"prompt": [USER], "chat_template_kwargs": ["a"]}, "'chat_template_kwargs' must be a dict .*not a list"),
        ({"prompt": [USER], "chat_template_kwargs": {"tokenize": 1}}, "'chat_template_kwargs' cannot hold 'tokenize'"),
        ({"prompt": "q", "teacher_context": 3}, "'teacher_context' must be text or null, not a int"),
        ({"messages": [{"content": "q"}]}, "role of message 0"),
        ({"prompt": 3}, "'prompt' must be text or a list of .*not a int"),
        ({"prompt": "q", "completion": 3}, "'completion' must be text or a list"),
        (
            {"prompt": "q", "completion": [USER]},
            "last message of a completion must have the role 'assistant', not 'user'",
        ),
        ({"text": 3}, "'text' must be text, not a int"),
        ("q", "row 3 of the data set 'd' is a str"),
    ],
)
def test_wrong_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message) as error:
        example(row)
    assert "row 3 of the data set 'd'" in str(error.value)


# Sources


def test_a_list_of_rows():
    examples = load_examples([{"prompt": "a"}, {"prompt": "b"}])
    assert len(examples) == 2
    assert examples[1] == examples[-1] == Example("b")
    assert examples[:1] == [Example("a")]
    assert [e.prompt for e in examples] == ["a", "b"]
    with pytest.raises(IndexError):
        examples[2]


def test_a_data_set_in_memory_is_read_when_asked():
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": None}])
    examples = load_examples(rows)
    assert examples.rows is rows
    with pytest.raises(ValueError, match="row 1 of the data set .*text is there but null"):
        examples[1]


def test_the_first_row_is_looked_at_at_once():
    with pytest.raises(ValueError, match="row 0 of the data set has the columns q"):
        load_examples([{"q": "a"}])


def test_a_data_set_without_rows_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        load_examples([])


def test_a_split_of_a_dictionary_of_data_sets():
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])})
    assert load_examples(both)[0].completion == "a"
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_examples(both, split="test")


def test_a_streamed_data_set_needs_a_limit():
    stream = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_iterable_dataset()
    assert len(load_examples(stream, streaming_limit=1)) == 1
    with pytest.raises(ValueError, match="has no length"):
        load_examples(stream)


def test_examples_stay_examples():
    examples = load_examples([{"text": "a"}])
    assert load_examples(examples) is examples


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write(path, [{"messages": [USER, ANSWER]}, {"messages": [USER]}])
    examples = load_examples(str(path))
    assert examples[0].completion == "a" and examples[1].completion is None
    assert len(load_examples(path, split="train[:1]")) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_with_calls_and_tools(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": '{"at": 1}'}}],
    }
    rows = [
        {"messages": [USER, call], "tools": json.dumps([SCHEMA]), "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [USER, ANSWER], "tools": None, "chat_template_kwargs": None},
    ]
    write(path, rows)
    first, second = load_examples(path)
    assert first.messages[1] == {
        "role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}],
    }  # fmt: skip
    assert first.prompt.tools == [SCHEMA] and first.prompt.template_kwargs == {"enable_thinking": False}
    assert second == Example([USER], "a", [USER, ANSWER])


def test_a_folder_of_files_and_its_splits(tmp_path):
    write(tmp_path / "train-00000.jsonl", [{"text": "a"}])
    write(tmp_path / "train-00001.jsonl", [{"text": "b"}])
    write(tmp_path / "test.jsonl", [{"text": "c"}])
    (tmp_path / "README.md").write_text("notes")
    assert [e.completion for e in load_examples(tmp_path)] == ["a", "b"]
    assert [e.completion for e in load_examples(tmp_path, split="test")] == ["c"]
    with pytest.raises(ValueError, match="no file for the split 'dev'; it has test.jsonl"):
        load_examples(tmp_path, split="dev")


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder 'nowhere.jsonl'"):
        load_examples("nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="holds no .json"):
        load_examples(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"is not a .json, .jsonl or .parquet file; convert it \(pandas.read_csv"):
        load_examples(tmp_path / "rows.csv")
    write(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="the split 'train' alone"):
        load_examples(tmp_path / "rows.jsonl", split="test")


def read(path, content):
    """Every row of a file with this content: its completion, or what is wrong with it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_examples(path, check_first=False)

    def said(i):
        try:
            return found[i].completion
        except ValueError as error:
            return f"error: {error}"

    return [said(i) for i in range(len(found))]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "texts",
    [
        ["2020-01-01", "2021-05-06T10:00:00Z"],
        ["007", "1e5"],
        ["true", "null", "NA", "nan", "NaT", "None", ""],
        ["a\u2028b\x85c", "a\x00b", " \r\n"],
        ["3", "[1]", '{"a": 1}'],
    ],
)
def test_a_text_is_never_taken_for_something_else(tmp_path, suffix, texts):
    path = tmp_path / f"rows{suffix}"
    write(path, [{"prompt": t, "completion": t, "teacher_context": f"{t}."} for t in texts])
    assert [(e.prompt, e.completion, e.teacher_context) for e in load_examples(path)] == [
        (t, t, f"{t}.") for t in texts
    ]


def test_rows_of_a_json_file_are_what_the_file_has(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [{"prompt": [USER], "completion": "3"}, {"prompt": "2020-01-01", "completion": [ANSWER]}])
    assert [e.completion for e in load_examples(path)] == ["3", "a"]
    schemas = [{"a": None, "b": 1.1}, {"b": {"c": "007"}, "a": 12345678901234567890}]
    write(path, [{"messages": [USER], "tools": [schema]} for schema in schemas])
    assert [e.prompt.tools for e in load_examples(path)] == [[schema] for schema in schemas]
    rows = {"prompt": "q", "completion": "a", "date": "2020-01-01"}
    assert read(tmp_path / "one.json", json.dumps(rows, indent=1)) == ["a"]
    assert read(tmp_path / "array.json", "\n " + json.dumps([rows, rows], indent=1)) == ["a", "a"]
    blank = '\ufeff{"text": "a"}\r\n\n  \n{"text": "b", "score": NaN}'
    assert read(tmp_path / "blank.jsonl", blank) == ["a", "b"]


def test_splits_of_a_json_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [{"text": str(i)} for i in range(10)])
    for split, rows in {"train[2:4]": "23", "train[-10%:]": "9", "train[:1]+train[50%:60%]": "05"}.items():
        assert [e.completion for e in load_examples(path, split=split)] == list(rows)
    assert [e.completion for e in load_examples(path).first(2)] == ["0", "1"]
    with pytest.raises(ValueError, match="train.1"):
        load_examples(path, split="train[1")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": ', "line 3 of rows.jsonl cannot be read as json: Expecting value at character 1"),
        (b'{"text": "caf\xe9"}', "byte 13 of line 3 of rows.jsonl is not valid UTF-8 .*xe9"),
        (b'{"text": "a\x00b"}', "line 3 .*Invalid control character at character 12 .*x00"),
        (b"\x00\x00\x00", "line 3 .*Expecting value at character 1 "),
        (b'{"text": "a", "text": "b"}', "line 3 .*the key 'text' is there twice"),
        (b'{"text": "a", "x": {"y": 1, "y": 2}}', "line 3 .*the key 'y' is there twice"),
        (b'{"text": "a"},', "line 3 .*Extra data at character 14"),
        (b'{"text": "a", "x": ' + b"[" * 100_000, "line 3 .*nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 3 .*cannot be read as json"),
        (b'["a"]', "is a list, not a dict of columns"),
        (b'"a"', "is a str, not a dict of columns"),
        (b'{"text": "a \\ud800"}', "'text' is not valid Unicode at character 2 "),
        (b'{"text": ' + b'"a' * 10**6, "line 3 "),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_leaves_the_others(tmp_path, line, says):
    first, second, third = read(tmp_path / "rows.jsonl", b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    assert (first, third) == ("a", "b") and len(second) < 500
    assert re.match(f"error: row 1 of the data set '.*rows.jsonl'.*{says}", second), second


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for encoding in "UTF-16", "UTF-32":
        with pytest.raises(ValueError, match=f"rows.jsonl is {encoding}; write it as UTF-8 .iconv -f {encoding}"):
            read(tmp_path / "rows.jsonl", '{"text": "a"}\n'.encode(encoding))
    for content, says in {
        b'[{"text": "a"},\n {"text": "\xff"}]': "byte 11 of line 2 of rows.json is not valid UTF-8",
        '[{"text": "a"},\n {"text": }]': "line 2 of rows.json cannot be read as json: Expecting value at character 11",
        "[" * 100_000: "rows.json cannot be read as json: it is nested too deeply",
    }.items():
        with pytest.raises(ValueError, match=says):
            read(tmp_path / "rows.json", content)


def test_many_files_are_not_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_MOST_HELD", 1)
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"text": name}, {"text": name * 2}])
    found = load_examples(tmp_path)
    assert [e.completion for e in found] == ["a", "aa", "b", "bb"] and found[-1].completion == "bb"
    write(tmp_path / "b.jsonl", [{"text": "b"}, {"text": "cc"}])
    with pytest.raises(ValueError, match="row 3 .*line 2 of b.jsonl was changed"):
        found[3]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl' is not a .json"):
        load_examples(tmp_path / "pipe.jsonl")


def test_a_file_that_changes_while_it_is_read_is_no_longer_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [{"text": "a"}, {"text": "b"}])
    found = load_examples(path)
    path.rename(tmp_path / "old.jsonl")
    write(path, [{"text": "other"}])
    assert found[1].completion == "b"
    write(tmp_path / "old.jsonl", [{"text": "a"}, {"text": "c"}])
    with pytest.raises(ValueError, match="row 1 .*line 2 of rows.jsonl was changed while it is in use"):
        found[1]


def test_what_the_hub_s_data_sets_lack_is_told_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", [{"text": "a"}])
    monkeypatch.setattr(
        data, "_from_hub", lambda _, config, split, files: _from_hub(str(tmp_path / "rows"), config, split)
    )
    assert load_examples("someone/rows")[0].completion == "a"
    with pytest.raises(ValueError, match="data set 'someone/rows' of the hub cannot be read: .*split.*dev"):
        load_examples("someone/rows", split="dev")
    with pytest.raises(FileNotFoundError, match="there is no file or folder 'xxx") as error:
        load_examples("x" * 10**6)
    assert len(str(error.value)) < 200


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'someone/rows' on the Hub")

    monkeypatch.setattr(data, "_from_hub", unreachable)
    with pytest.raises(ConnectionError, match="no file or folder 'someone/rows' here, and the hub, .*: Couldn't reach"):
        load_examples("someone/rows")


def test_a_file_without_rows_is_told(tmp_path):
    for name, content in {"a.jsonl": "", "b.jsonl": "\n\n", "c.json": "[]"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"the data set '.*{name}' is empty: it has no rows"):
            load_examples(tmp_path / name)


def test_a_broken_file_of_the_hub_is_called_as_in_its_repository(tmp_path, monkeypatch):
    (tmp_path / "0a1b2c").write_text('{"text": "a"}\nbroken\n')
    builder = types.SimpleNamespace(
        config=types.SimpleNamespace(data_files={"train": ["hf://datasets/u/rows@main/data/a.jsonl"]})
    )
    manager = types.SimpleNamespace(
        download_and_extract=lambda _: None, iter_files=lambda _: [str(tmp_path / "0a1b2c")]
    )
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: builder)
    monkeypatch.setattr(importlib.import_module("datasets.packaged_modules.json.json"), "Json", types.SimpleNamespace)
    monkeypatch.setattr("datasets.DownloadManager", lambda **_: manager)
    with pytest.raises(ValueError, match="row 1 of the data set 'u/rows': line 2 of data/a.jsonl cannot be read"):
        load_examples("u/rows")[1]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_files_of_the_hub_are_read_as_they_stand(tmp_path, suffix):
    texts = ["2020-01-01", "2021-05-06"] if suffix == ".jsonl" else ["007", "NA", "null", "3"]
    for split in ("train", "test"):
        path = tmp_path / f"{split}{suffix}"
        rows = [{"prompt": split, "completion": text} for text in texts]
        if suffix == ".csv":
            path.write_text(
                "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows) + "q,\n"
            )
        else:
            write(path, rows)
    for split in ("train", "test"):
        rows = _from_hub(str(tmp_path), None, f"{split}[:{len(texts)}]")
        assert [(e.prompt, e.completion) for e in load_examples(rows)] == [(split, text) for text in texts]
    with pytest.raises(ValueError, match="'train\\+test' of .* joins several"):
        _from_hub(str(tmp_path), None, "train+test")
    if suffix == ".csv":
        assert _from_hub(str(tmp_path), None, "test")[4] == {"prompt": "q", "completion": None}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "a \ud800"}]}, r"'messages\[1\].content' is not valid"),
        ({"prompt": "q", "completion": "a", "teacher_context": "\udfff"}, "'teacher_context' is not valid Unicode"),
        ({"prompt": [USER], "tools": [{"a": {"\ud800": 1}}]}, r"'tools\[0\].a: a key' is not valid"),
        ({"prompt": [USER], "chat_template_kwargs": {"a": ["\ud800"]}}, r"'chat_template_kwargs.a\[0\]' is not"),
        ({"prompt": [USER], "tools": json.loads("[" * 200 + "]" * 200)}, "nested more than 100 levels deep"),
        (
            {"prompt": [USER], "chat_template_kwargs": '{"a": ' * 9000 + "1" + "}" * 9000},
            "no valid JSON .maximum recursion",
        ),
        ({"prompt": [USER], "tools": r'[{"a": "\ud800"}]'}, r"'tools\[0\].a' is not valid Unicode"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": r'{"a": "\ud800"}'}]}]},
            r"tool_calls of message 0 of .messages.\[0\].arguments.a. is not",
        ),
        ({"prompt": datetime.date(2020, 1, 1)}, "'prompt' must be text or .*not a date .write the column as text"),
    ],
)
def test_what_cannot_be_rendered_is_named_where_it_stands(row, says):
    with pytest.raises(ValueError, match=f"row 3 of the data set 'd': .*{says}"):
        example(row)


@pytest.mark.parametrize(
    "row",
    [
        {"x" * 5_000_000: 1},
        {"prompt": [USER], "tools": "{" + "x" * 5_000_000},
        {"prompt": [{"role": "user", "content": [{"type": "x" * 5_000_000}]}]},
        {"prompt": "q", "completion": [{"role": "x" * 5_000_000, "content": "a"}]},
        {"prompt": [USER], "chat_template_kwargs": {"x" * 5_000_000: 1, "tokenize": 2}},
        {f"column {i}": 1 for i in range(100_000)},
    ],
)
def test_errors_of_rows_quote_little(row):
    with pytest.raises(ValueError) as error:
        load_examples([row])
    assert len(str(error.value)) < 800 and str(error.value).startswith("row 0 of the data set")


# What nobody reads


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "'chosen' and 'rejected': it compares two answers"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "'chosen' and 'rejected'"),
        ({"prompt": "q", "completion": "a", "label": False}, "'label' false: its answer is marked as bad"),
        ({"messages": [USER, ANSWER], "label": False}, "'label' false"),
        *(
            ({"prompt": "q", "completion": "a", "label": label}, "'label' false")
            for label in (0, 0.0, np.int64(0), np.bool_(False), "False", " no")
        ),
    ],
)
def test_rows_of_preferences_are_refused_and_named(row, says):
    with pytest.raises(ValueError, match=f"row 3 of the data set 'd' has .*{says}"):
        example(row)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "label": False}, {"text": "t", "label": False}, {"prompt": "q", "completion": "a", "label": True}],
)
def test_labels_of_what_is_no_bad_answer_are_no_matter(row):
    assert example(row).unread == ("label",)


def test_columns_that_hold_something_and_that_nothing_reads_are_known():
    assert example({"prompt": "q", "completion": "a", "id": 3, "note": None}).unread == ("id",)
    assert example({"messages": [USER, ANSWER], "prompt": "q", "tools": []}).unread == ("prompt",)
    assert example({"prompt": "q", "response": "a", "text": "t"}).unread == ("response", "text")
    assert example({"text": "t", "teacher_context": "c", "tools": [{}]}).unread == ("tools",)
    assert (
        example({"prompt": [USER], "completion": "a", "chat_template_kwargs": {"a": 1}, "teacher_context": "c"}).unread
        == ()
    )


def test_a_fingerprint_tells_apart_whatever_is_learned_from_a_row():
    row = {"prompt": [USER], "completion": "a"}
    others = [
        {"completion": "b"},
        {"teacher_context": "c"},
        {"chat_template_kwargs": {"a": 1}},
        {"tools": [{"name": "f"}]},
    ]
    found = {example(row | other).fingerprint for other in ({}, *others)}
    assert len(found) == 5 and example(row | {"id": 7}).fingerprint in found
