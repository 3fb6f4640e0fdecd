"""What stands in the columns of a row: messages, tools, template variables, checked and brought into one form.

Errors name the column and what it must be; the caller puts the row before them.
"""

import datetime
import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gold_jax.json_files import unique_keys
from gold_jax.text.encode import utf8
from gold_jax.text.surface import excerpt
from gold_jax.text.template import refused_variables
from gold_jax.wording import listed

_CALL = '{"type": "function", "function": {"name": …, "arguments": {…}}}'
_DEEPEST = 100  # levels of lists and dicts in a column
_TOOL = '{"type": "function", "function": {"name": …, "parameters": {…}}}'


def messages_of(value, column: str, wanted: str = "a list of {role, content} messages") -> list[dict]:
    """Checked copies of messages.

    Keys of messages and of tool calls that hold null are left out; nulls inside arguments stay. Content that is a list of
    text parts becomes one text. An assistant's message that calls tools may have no content: it gets an empty one;
    arguments that are a JSON object as text become the object, which templates expect. All other keys stay as they are.
    ValueError where it is no list of messages, it is empty, or a message lacks its role or its content.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise ValueError(f"{column!r} must be {wanted}, not {describe_type(value)}")
    if not value:
        raise ValueError(f"{column!r} is an empty list; it needs at least one message")
    return [_message(message, f"message {turn} of {column!r}") for turn, message in enumerate(value)]


def conversation_extras(row: Mapping) -> dict[str, Any]:
    """A row's `tools` and template variables, as `Conversation` takes them; what is null or empty is left out.

    ValueError where `tools` is not a list of JSON schemas, `chat_template_kwargs` not a dict, a string in their place not
    valid JSON, or a variable has a name that rendering needs.
    """
    extras = {}
    if tools := _parsed(row.get("tools"), "tools", "a list of JSON schemas"):
        extras["tools"] = _tools(tools)
    name, wanted = "chat_template_kwargs", "a dict of template variables"
    if variables := _parsed(row.get(name), name, wanted):
        if not isinstance(variables, Mapping):
            raise ValueError(
                f'{name!r} must be {wanted}, such as {{"enable_thinking": false}}, not {describe_type(variables)}'
            )
        if wrong := refused_variables(variables):
            raise ValueError(f"{name!r} cannot hold {wrong}")
        extras["template_kwargs"] = dict(variables)
    return extras


def what_is_compared(row: Mapping) -> str:
    """Why a row is one of preferences, whose bad answer would be learned as a good one, and the remedy; "" if it is not.

    Such rows have `chosen` and `rejected`, or an answer with `label` false (or 0).
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return (
            "the columns 'chosen' and 'rejected': it compares two answers, and here one is learned. Rename the one "
            "that is to be learned to 'completion', and leave the other out"
        )
    answered = row.get("completion") is not None or row.get("messages") is not None
    if answered and _is_false(row.get("label")):
        return (
            "'label' false: its answer is marked as bad, and here answers are learned. Keep the rows whose label is "
            "true, and leave the column out"
        )
    return ""


def _is_false(label: Any) -> bool:
    """Whether a label says no, as whatever kind of value a file or a frame has made of it."""
    if isinstance(label, str):
        return label.strip().lower() in ("false", "no", "0", "0.0")
    return isinstance(label, bool | np.bool_ | numbers.Number) and label == 0


def check_texts(value: Any, place: str, depth: int = 0) -> None:
    """ValueError where a text in a value of nested lists and dicts is no Unicode, or it is nested too deeply to be rendered.

    `place` is what the error calls the value, such as `messages[1].content`.
    """
    if isinstance(value, str):
        if not value.isascii():
            utf8(value, excerpt(place))
    elif isinstance(value, Mapping | list | tuple):
        if depth == _DEEPEST:
            raise ValueError(f"{excerpt(place)} is nested more than {_DEEPEST} levels deep")
        if isinstance(value, Mapping):
            for key, item in value.items():
                check_texts(key, f"{place}: a key", depth + 1)
                check_texts(item, f"{place}.{key}", depth + 1)
        else:
            for k, item in enumerate(value):
                check_texts(item, f"{place}[{k}]", depth + 1)


def text_of(value, what: str, wanted: str = "text") -> str:
    """A value that must be text; ValueError where it is something else."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be {wanted}, not {describe_type(value)}")
    return value


def describe_type(value) -> str:
    """What messages call a value."""
    if isinstance(value, datetime.date):
        return f"a {type(value).__name__} (write the column as text)"
    return "missing or null" if value is None else f"a {type(value).__name__}"


def _message(message, which: str) -> dict:
    if not isinstance(message, Mapping):
        raise ValueError(f"{which} must have role and content, but is {describe_type(message)}")
    text_of(message.get("role"), f"the role of {which}")
    known = _without_nulls(message)
    calls = known.pop("tool_calls", None)
    if calls:
        known["tool_calls"] = _calls(calls, which)
        check_texts(known["tool_calls"], f"tool_calls of {which}")  # arguments were text, perhaps
    content = known.get("content")
    if content is None and calls and known["role"] == "assistant":
        content = ""
    known["content"] = _content(content, f"the content of {which}")
    return known


def _content(content, what: str) -> str:
    if not isinstance(content, list):
        return text_of(content, what)
    for k, part in enumerate(content):
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = f"of the type {part.get('type')!r}" if isinstance(part, Mapping) else describe_type(part)
            raise ValueError(
                f'{what} must be text or a list of text parts, {{"type": "text", "text": …}}, but its part {k} is '
                f"{kind}, not text; only text can be read"
            )
    return "".join(part["text"] for part in content)


def _calls(calls, which: str) -> list[dict]:
    wrong = [call for call in calls if not isinstance(call, Mapping)] if isinstance(calls, list) else [calls]
    if wrong:
        kind = describe_type(wrong[0])
        raise ValueError(f"the tool_calls of {which} must be a list of calls, {_CALL}, not {kind}")
    return [_call(call) for call in calls]


def _call(call: dict) -> dict:
    """A call with its arguments as an object, whether they stand in it or in its `function`."""
    call = _without_nulls(call)
    if isinstance(call.get("function"), Mapping):
        return call | {"function": _call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _tools(tools) -> list[dict]:
    if isinstance(tools, Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"'tools' must be a list of JSON schemas, not {describe_type(tools)}")
    found = [_parsed(tool, f"tools[{k}]", "a JSON schema") for k, tool in enumerate(tools)]
    for k, tool in enumerate(found):
        if not isinstance(tool, Mapping):
            raise ValueError(f"'tools[{k}]' must be a JSON schema, such as {_TOOL}, not {describe_type(tool)}")
    return found


def _parsed(value, column: str, wanted: str):
    """A column that may be a string of JSON; a blank one counts as null."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, object_pairs_hook=unique_keys) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{column!r} is text but no valid JSON ({error}); it must be {wanted}") from None
    check_texts(parsed, column)
    return parsed


def without_fill(value: Any, feature: Any) -> Any:
    """A value of a `datasets` column without the nulls that Arrow fills in where a struct lacks a key that others have.

    `feature` is what `datasets.Features` says of it: of a struct (a dict) keys that hold null are left out, at every
    depth; JSON (`datasets.Json`) and what is unknown (None) stay as they are, with the nulls that somebody wrote.
    """
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: without_fill(item, feature.get(key)) for key, item in value.items() if item is not None}
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [without_fill(item, inner) for item in value]
    return value


def frame_rows(frame: Any) -> list[dict]:
    """The rows of a pandas DataFrame; NaN, NaT and the like are null.

    A list column of a Parquet file comes as numpy arrays. They become lists, in whose dicts nulls are left out as
    `without_fill` does.
    """

    def plain(value: Any, filled: bool = False) -> Any:
        if isinstance(value, np.ndarray):
            return [plain(item, True) for item in value.tolist()]
        if filled and isinstance(value, Mapping):
            return {key: plain(item, True) for key, item in value.items() if item is not None}
        return [plain(item, filled) for item in value] if filled and isinstance(value, list) else value

    names, missing = [str(name) for name in frame.columns], frame.isna().to_numpy()
    if len({*names}) < len(names):
        raise ValueError(f"the DataFrame has two columns of one name among {listed(names, 12)}; rename one")
    cells = zip(*(frame.iloc[:, k].tolist() for k in range(len(names))))
    return [
        {name: None if no else plain(value) for name, value, no in zip(names, row, nulls)}
        for row, nulls in zip(cells, missing)
    ]


def _without_nulls(value: Mapping) -> dict:
    return {key: item for key, item in value.items() if item is not None}
