"""Which columns of a row are read: `--columns`, and the formats of other projects, which become `messages`.

How ShareGPT, alpaca, question/answer and problem/solution are read is in `FORMATS`. Errors name the column and what it must
be; the caller adds which row it is.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gold_jax.text.columns import describe_type, text_of
from gold_jax.text.surface import excerpt
from gold_jax.text.template import ROLES
from gold_jax.wording import listed, plural

#: Format -> how it is read, for the notice.
FORMATS = {
    "ShareGPT": "`from` and `value` are role and content; human is the user, gpt the assistant, observation a tool",
    "conversations": "`conversations` are the messages",
    "alpaca": "`instruction`, then a blank line and `input` where it is not empty, are the user's message, `output` the answer",
    "question/answer": "`question` is the user's message, `answer` the assistant's",
    "problem/solution": "`problem` is the user's message, `solution` the assistant's",
}
#: Columns that may stand beside every form, and (`SYSTEM`) beside formats of other projects.
EXTRAS = ("tools", "chat_template_kwargs", "teacher_context")
SYSTEM = "system"
# Form -> its columns, in the order in which forms are looked for: these, the text column, then the pairs, of which the
# question comes first, then the answer.
_CHATS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "conversations": ("conversations",)}
_PAIRS = {
    "alpaca": ("instruction", "output", "input", "history"),
    "question/answer": ("question", "answer"),
    "problem/solution": ("problem", "solution"),
}
#: The columns that make a row one of these forms, and what a column can be read as.
FORM_COLUMNS = tuple(name for names in (*_CHATS.values(), ("text",), *_PAIRS.values()) for name in names[:2])
READABLE = (*(name for names in (*_CHATS.values(), ("text",), *_PAIRS.values()) for name in names), SYSTEM, *EXTRAS)
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


class RowColumns(NamedTuple):
    """A row under the column names that the rest of the package reads."""

    columns: Mapping[str, Any]  # of another project's format, `messages` beside `EXTRAS`
    form: str | None  # the column that decides: `messages`, `prompt` or the text column; None: the row has none of them
    format: str  # one of `FORMATS`; "" for TRL's own columns
    read: frozenset[str]  # the columns that are read, by their names in the row


def read_columns(
    row: Mapping, text_column: str = "text", renamed: Mapping[str, str | None] | None = None
) -> RowColumns:
    """The columns of a row that are read.

    `messages`, `prompt`, `conversations` and the text column are looked for in this order, then the pairs of other
    projects. `renamed` says in which column of the row another stands, such as `{"prompt": "question"}`, or None for
    one that is not to be read; where it names columns of some forms, only these forms are looked for.

    A text column that is called as one of the forms is text, and `conversations` that are no list of dicts leave the row
    to a form behind them.

    ValueError where the row has the columns of two pairs, or another project's format cannot be read as messages.
    """
    renamed = renamed or {}
    columns = {name: value for name, value in row.items() if name not in renamed}
    columns |= {name: row.get(source) for name, source in renamed.items() if source is not None}
    found = _forms_of(columns, renamed, text_column)
    if not found:
        return RowColumns(columns, None, "", frozenset())
    (form, names), format = next(iter(found.items())), ""
    if form in _PAIRS:
        if len(found) > 1:
            says = ",".join(f"{name}={renamed.get(name, name)}" for name in names[:2])
            both = " and of ".join(found)
            raise ValueError(f"it has the columns of {both}; say which are read, as with --columns {says}")
        format, columns["messages"] = form, _pair(columns, form)
    elif form in _CHATS:
        chat, format = _chat(columns, form)
        columns |= chat
    read = {*names, *(EXTRAS if form != "text" else ("teacher_context",))}
    if format and form != "prompt":
        form = "messages"
        read.add(SYSTEM)
        if columns.get(SYSTEM) is not None and text_of(columns[SYSTEM], repr(SYSTEM), "text or null"):
            columns["messages"] = _with_system(columns["messages"], columns[SYSTEM])
    own = frozenset(name for n in read if (name := renamed.get(n, n)) is not None)
    return RowColumns(columns, names[0] if form == "text" else form, format, own)


def _forms_of(
    columns: Mapping[str, Any], renamed: Mapping[str, str | None], text_column: str
) -> dict[str, tuple[str, ...]]:
    """The forms that a row has, with their columns, in order of precedence."""
    named = {name for name, source in renamed.items() if source is not None} - {SYSTEM, *EXTRAS}
    text = "text" if "text" in named else text_column
    chats = {form: names for form, names in _CHATS.items() if form != text}
    forms = {**chats, "text": (text,), **_PAIRS}
    forms = {form: names for form, names in forms.items() if not named or named & {*names}}
    found = {form: names for form, names in forms.items() if columns.get(names[0]) is not None}
    found = {form: names for form, names in found.items() if form not in _PAIRS or names[1] in columns}
    if len(found) > 1 and "conversations" in found and not _is_chat(columns["conversations"]):
        del found["conversations"]
    return found


def format_notices(counts: Mapping[str, int], source: str) -> list[str]:
    """A notice for each format of other projects, given the numbers of rows of `source`."""
    found = [(format, count) for format, count in counts.items() if format]
    return [f"{plural(count, 'row')} of {source} read as {format}: {FORMATS[format]}" for format, count in found]


def check_renamed(renamed: Mapping[str, str | None], columns: Iterable[str], source: str) -> None:
    """ValueError if a column map names a key that is not in `READABLE`, or a column that the data set lacks."""
    columns = [str(name) for name in columns]
    for name, column in renamed.items():
        if column is None:
            continue
        says = f"--columns says {excerpt(f'{name}={column}')}"
        if name not in READABLE:
            raise ValueError(f"{says}, but nothing reads {excerpt(str(name))}; it must be one of {', '.join(READABLE)}")
        if column not in columns:
            has = listed(columns, 12) or "none"
            raise ValueError(f"{says}, but {source} has no column {excerpt(str(column))}; it has {has}")


def _is_chat(value: Any) -> bool:
    """Whether it is a list of dicts."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _chat(columns: Mapping[str, Any], form: str) -> tuple[dict[str, Any], str]:
    """The columns of a chat as messages with roles, and their format ("": TRL's own)."""
    value = columns[form]
    if form == "conversations" and not (isinstance(value, list | tuple) and value):
        has = "an empty list" if isinstance(value, list) else describe_type(value)
        raise ValueError(f"{form!r} must be a list of messages, {{from, value}} or {{role, content}}, not {has}")
    turned = {name: _with_roles(columns[name], name) for name in _CHATS[form] if columns.get(name) is not None}
    changed = any(turned[name] is not columns[name] for name in turned)
    if form == "conversations":
        return turned | {"messages": turned[form]}, "ShareGPT" if changed else form
    return turned, "ShareGPT" if changed else ""


def _pair(columns: Mapping[str, Any], format: str) -> list[dict]:
    """The messages of a row of question and answer; without an answer where that is null."""
    question, answer, *more = _PAIRS[format]
    said = [text_of(columns[question], repr(question))]
    messages = []
    if more:  # alpaca
        if columns.get("input") is not None:
            said.append(text_of(columns["input"], "'input'", "text or null"))
        for turn in columns.get("history") or ():
            if isinstance(turn, str) or not isinstance(turn, Sequence) or len(turn) != 2:
                raise ValueError("'history' must be a list of pairs of texts, [[question, answer], …]")
            texts = [text_of(text, "what stands in 'history'") for text in turn]
            messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
    messages.append({"role": "user", "content": "\n\n".join(text for text in said if text.strip())})
    if columns[answer] is not None:
        messages.append({"role": "assistant", "content": text_of(columns[answer], repr(answer))})
    return messages


def _with_system(messages: Any, system: str) -> Any:
    """The messages, after one with the row's `system`."""
    if not isinstance(messages, list):
        return messages
    if any(isinstance(message, Mapping) and message.get("role") == "system" for message in messages):
        raise ValueError("it has a 'system' column beside a system message; keep one of the two")
    return [{"role": "system", "content": system}, *messages]


def _with_roles(messages: Any, column: str) -> Any:
    """Messages of {from, value} as those of {role, content}; anything else as it is."""
    if not isinstance(messages, list) or not any(map(_has_from, messages)):
        return messages
    named = [(m, f"message {turn} of {column!r}") for turn, m in enumerate(messages)]
    return [_with_role(m, which) if _has_from(m) else m for m, which in named]


def _has_from(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" not in message and "from" in message


def _with_role(message: Mapping, which: str) -> dict:
    message = dict(message)
    said = text_of(message.pop("from"), f"'from' of {which}")
    message["role"] = _ROLES.get(said, said)
    if "content" not in message:
        message["content"] = message.pop("value", None)
    if message["role"] not in ROLES:
        known = "system, human, user, gpt, assistant, function_call, observation or tool"
        raise ValueError(f"{which} is from {excerpt(said)}; it must be from {known}")
    if said == "function_call":
        message |= {"content": None, "tool_calls": _calls(message["content"], which)}
    return message


def _calls(value: Any, which: str) -> list[dict]:
    """The tool calls of a `function_call`, whose value is the JSON of one call, or of a list of them."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    calls: list[Any] = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls):
        must = 'the JSON of a call, {"name": …, "arguments": {…}}, or of a list of them'
        found = excerpt(value) if isinstance(value, str) else describe_type(value)
        raise ValueError(f"{which} is from function_call, so that its value must be {must}, not {found}")
    return [{"type": "function", "function": dict(call)} for call in calls]
