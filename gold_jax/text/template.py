"""Chat templates: what a model reads for a conversation, the same on every day, and where the answers stand in it."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jinja2

from gold_jax.text.surface import excerpt, name_of
from gold_jax.text.template_budget import TemplateBudgetError, budget, counted
from gold_jax.text.template_trace import TemplateTrace

#: What stands for today in templates that ask for the date.
FIXED_DATE = "26 Jul 2024"
_STRFTIME = {
    "%d": "26", "%-d": "26", "%e": "26", "%m": "07", "%-m": "7", "%Y": "2024", "%y": "24", "%b": "Jul", "%h": "Jul",
    "%B": "July", "%a": "Fri", "%A": "Friday", "%j": "208", "%u": "5", "%w": "5", "%H": "00", "%-H": "0", "%I": "12",
    "%-I": "12", "%M": "00", "%-M": "0", "%S": "00", "%-S": "0", "%p": "AM", "%F": "2024-07-26", "%T": "00:00:00",
    "%D": "07/26/24", "%x": "07/26/24", "%X": "00:00:00", "%c": "Fri Jul 26 00:00:00 2024", "%f": "000000",
    "%R": "00:00", "%r": "12:00:00 AM", "%P": "am", "%k": " 0", "%l": "12", "%G": "2024", "%V": "30", "%U": "29",
    "%W": "30", "%C": "20", "%-y": "24", "%-j": "208", "%s": "1721952000", "%Z": "", "%z": "",
}  # fmt: skip

#: The format for a tokenizer that brings no template: a heading line for each turn (`System:`, `User:`, `Assistant:`,
#: `Tool:`), its content, a blank line; after each answer the end token. Tools come first, under `Tools:`, the JSON schema
#: of one on each line; a tool call is JSON on a line of its own after the answer's content.
PLAIN_TEMPLATE = (
    "{% if tools %}{{ 'Tools:\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% set said = message['content'] or '' %}"
    "{{ message['role'] | capitalize + ':\n' + said }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ ('\n' if said or not loop.first else '') + (call['function'] or call) | tojson }}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token | default('', true) }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

#: What rendering sets itself, so that no template variable can have these names.
RESERVED = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens", "self",
})  # fmt: skip

#: What messages may be from.
ROLES = "system", "developer", "user", "assistant", "tool"

_MARK = "qZ7probeX3answerK9"
# Keys of messages that `unwritten_keys` leaves to others; few templates write the id of the call that a tool answers.
_LOOKED_FOR = frozenset(("role", "content", "tool_calls", "tool_call_id", "reasoning_content"))
_QUESTION = [{"role": "user", "content": "Hello?"}]


class Conversation(list):
    """A list of messages with the tools and template variables that belong to it.

    Slices keep them, and `like` gives them to other messages. It equals a list of the same messages if it has neither.

    Args:
        messages: dicts with `role` and `content`.
        tools: JSON schemas of the tools that the assistant may call.
        template_kwargs: template variables of this conversation alone, such as `{"enable_thinking": False}`; they go
            before those of the run.
    """

    def __init__(self, messages=(), *, tools: list[dict] | None = None, template_kwargs: dict | None = None):
        super().__init__(messages)
        self.tools, self.template_kwargs = tools or None, template_kwargs or None

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return like(self, found) if isinstance(index, slice) else found

    def __eq__(self, other):
        return list.__eq__(self, other) and extras_of(self) == extras_of(other)

    def __ne__(self, other):
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return f"Conversation({super().__repr__()}, tools={self.tools!r}, template_kwargs={self.template_kwargs!r})"


def extras_of(messages: list[dict]) -> dict[str, Any]:
    """The tools and template variables of messages, None each where they have none."""
    return {name: getattr(messages, name, None) or None for name in ("tools", "template_kwargs")}


def like(messages: list[dict], others: list[dict]) -> list[dict]:
    """Other messages with the same tools and template variables, where there are any."""
    return Conversation(others, **extras_of(messages)) if isinstance(messages, Conversation) else others


class RenderedAnswer(NamedTuple):
    """The last answer of a conversation, as a chat template writes it."""

    prompt: str  # what the model reads before it: the earlier messages and the generation prompt
    #: What the template writes after that, without what follows every answer (`ChatTemplate.tail`) and without the
    #: blank of `ChatTemplate.lead`.
    text: str
    #: Whether `prompt` and `text` are how the whole conversation begins. False where the generation prompt is not what
    #: the template writes before such an answer.
    follows_prompt: bool


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        source: another template (Jinja, or a file of it) in the place of the tokenizer's own.
        kwargs: further variables, such as `enable_thinking`, or `date_string`, another date than `FIXED_DATE`.

    Attributes:
        given, kwargs: the arguments `source` and `kwargs`.
        source: the Jinja source in use: the one given, else the tokenizer's own, else `PLAIN_TEMPLATE` (after the
            tokenizer's beginning-of-text token, if it puts one before plain text). A tokenizer may have a template of
            its own for conversations with tools, which they then get.
        origin: whose template it is, for people.
        lead: whether the template writes one blank between the generation prompt and the answer, as Llama 2's does.
        tail: what the template writes after an answer that ends the conversation.

    Raises:
        ValueError: a template variable has the name of something that rendering sets itself, or the template is one that
            has no end (`template_budget`).
    """

    def __init__(self, tokenizer, source: str | None = None, kwargs: dict | None = None):
        if wrong := refused_variables(kwargs or {}):
            raise ValueError(f"the chat template's variables cannot hold {wrong}")
        self._tokenizer = tokenizer
        self.given, self.kwargs = source, dict(kwargs or {})
        self._kwargs = {"date_string": FIXED_DATE} | self.kwargs
        own = getattr(tokenizer, "chat_template", None)
        self.origin = (
            f"chat template of {name_of(tokenizer)}" if source is None else "a chat template in place of its own"
        )
        with_tools = own.get("tool_use") if source is None and isinstance(own, Mapping) else None
        if source is not None and os.path.isfile(source):
            with open(source, encoding="utf-8") as file:
                source = file.read()
        elif source is None and own:
            source = tokenizer.get_chat_template()
        if source is None:
            self.origin = "plain text (the tokenizer has no chat template)"
            begins = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
            source = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
        self.source = source
        self._with_tools: str | None = with_tools
        self._fixed, self._fixed_with_tools = _dated(source), _dated(with_tools or source)
        variables = tokenizer.special_tokens_map | self._kwargs
        self._trace = TemplateTrace(self._fixed, variables)
        self.lead, self.tail, self._has_generation_prompt = self._probe()

    @property
    def portable(self) -> str | dict[str, str]:
        """The template for a saved tokenizer, with the run's variables as its defaults; with that for tools, where it is another."""
        if self._with_tools is None:
            return self._with_defaults(self.source)
        own = {"default": self.source, "tool_use": self._with_tools}
        return dict(self._tokenizer.chat_template) | {name: self._with_defaults(source) for name, source in own.items()}

    @property
    def sources(self) -> str:
        """All that the template may write, for looking strings up."""
        return self.source + (self._with_tools or "")

    def _with_defaults(self, source: str) -> str:
        defaults = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja(value)} %}}{{%- endif %}}"
            for name, value in self._kwargs.items()
            if name in source and name.isidentifier()
        )
        # Jinja drops the newline after a block: the source begins a line, as it does alone.
        return defaults + "\n" * bool(defaults) + source

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes what a system message says."""
        return self._takes_role("system")

    @functools.cached_property
    def _developer(self) -> str:
        """The role that stands for a developer message: `system` where the template writes that and not `developer`."""
        return "system" if self.takes_system and not self._takes_role("developer") else "developer"

    def _takes_role(self, role: str) -> bool:
        messages = [{"role": role, "content": _MARK}, *_QUESTION]
        try:
            return _MARK in self._render(messages)
        except ValueError:
            return False

    @functools.cached_property
    def _call_form(self) -> tuple[str | None, bool]:
        """What the template takes in a message that calls tools and says nothing: its content, and whether arguments are text."""
        for content, as_text in (("", False), (None, False), ("", True), (None, True)):
            arguments = {"key": _MARK + "value"}
            call = {"name": _MARK + "name", "arguments": json.dumps(arguments) if as_text else arguments}
            calls = [{"id": "call00001", "type": "function", "function": call}]
            try:
                text = self._render([*_QUESTION, {"role": "assistant", "content": content, "tool_calls": calls}])
            except ValueError:
                continue
            if _MARK + "name" in text and _MARK + "value" in text and "None" not in text:
                return content, as_text
        return "", False

    def _adapted(self, messages: list[dict]) -> list[dict]:
        """Messages in the form that the template takes: developer messages, tool calls without content, arguments."""
        adapted = []
        for message in messages:
            if message.get("role") == "developer":
                message = message | {"role": self._developer}
            calls: Any = message.get("tool_calls")
            if calls:
                content, as_text = self._call_form
                calls = [_in_function(call, _arguments_as_text) for call in calls] if as_text else calls
                message = message | {"content": message.get("content") or content, "tool_calls": calls}
            adapted.append(message)
        return like(messages, adapted)

    def render(self, messages: list[dict], *, generate: bool = False) -> str:
        """The text that the model reads for a conversation (of a `Conversation` the template gets the tools and variables).

        `generate` says that the beginning of an assistant's answer is to follow. Where the template refuses the
        conversation, the ValueError has its own words.
        """
        adapted = self._adapted(messages)
        if any(extras_of(messages).values()):
            return self._render(adapted, generate=generate)
        return self._trace.render(adapted, generate, lambda: self._render(adapted, generate=generate))

    def _render(self, messages: list[dict], *, generate: bool = False) -> str:
        tools, variables = extras_of(messages).values()
        variables = self._kwargs | (variables or {})
        try:
            with budget(messages, tools, variables):
                return self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=counted(self._fixed_with_tools if tools else self._fixed),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **variables,
                )
        except Exception as error:  # whatever may go wrong in a program that came with a model
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            roles = ", ".join(str(message.get("role")) for message in messages)
            first = str(messages[0].get("content")) if messages else ""
            does, remedy = "refuses", "bring the messages into the form it takes, or pass"
            if isinstance(error, TemplateBudgetError):
                does, remedy = "was stopped on", "pass"
            raise ValueError(
                f"the chat template of {name_of(self._tokenizer)} {does} a conversation of the roles {roles} that begins "
                f"{excerpt(first)}: {kind}{error}; {remedy} another chat template"
            ) from error

    def answer(self, messages: list[dict]) -> RenderedAnswer:
        """The last answer of a conversation: what the template writes after the generation prompt.

        The last of `messages` is the assistant's, and not the only one. ValueError where the template refuses the
        conversation, or the answer cannot be located in what it writes.
        """
        prompt, rendered = self.render(messages[:-1], generate=True), self.render(messages)
        begin, end = len(prompt) + self.lead, len(rendered) - len(self.tail)
        starts = rendered.startswith(prompt + " " * self.lead)
        known = self.tail and self._has_generation_prompt and starts and begin <= end and rendered.endswith(self.tail)
        if not known or not _says(messages[-1], rendered[begin:end]):
            # The earlier turns stand where they stand without the answer: its generation prompt is behind them.
            earlier = len(os.path.commonprefix([self.render(messages[:-1]), rendered]))
            begin, end = self._locate(messages, len(messages) - 1, rendered, earlier)
            starts = rendered[:begin].removesuffix(" " * self.lead) == prompt
        if begin == end and (messages[-1].get("content") or "").strip():
            raise self._lost(messages, len(messages) - 1, "nothing of it is left")
        return RenderedAnswer(prompt, rendered[begin:end], starts)

    def answers(self, messages: list[dict], within: int | None = None) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation, and the characters `[start, end)` of every assistant's answer in it.

        An answer is what the template writes after the generation prompt: its content (as far as the template keeps it),
        and before it the thinking, or the empty block for it, that the template writes. Those behind the character `within`
        are not looked for. ValueError where one cannot be located exactly.
        """
        rendered = self.render(messages)
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            earlier = spans[-1][1] if spans else 0
            if within is not None and earlier >= within:
                break
            if message.get("role") == "assistant":
                spans.append(self._locate(messages, turn, rendered, earlier))
                if spans[-1][0] < earlier:
                    raise self._lost(messages, turn, "it stands before the one before it")
        return rendered, spans

    def _locate(self, messages: list[dict], turn: int, rendered: str, earlier: int = 0) -> tuple[int, int]:
        """Where the answer of a turn stands in the rendered conversation, behind the character `earlier`."""
        # Render once more with a word of ours for the answer: what stands around the word stands around the answer.
        answer = {"role": "assistant", "content": _MARK}
        marked = self.render(like(messages, [*messages[:turn], answer, *messages[turn + 1 :]]))
        if marked.count(_MARK) != 1:
            raise self._lost(messages, turn, f"the template writes it {marked.count(_MARK)} times")
        before, after = marked.split(_MARK)
        end = len(rendered) - len(after)
        if not rendered.endswith(after):
            raise self._lost(messages, turn, "what the template writes after it depends on what it says")
        begin = self._after_prompt(messages[:turn], before, rendered, earlier, end)
        if begin is None:
            begin = len(before)
            if begin > end or not rendered.startswith(before):
                raise self._lost(messages, turn, "what the template writes before it depends on what it says")
        if not _says(messages[turn], rendered[begin:end]):
            raise self._lost(messages, turn, f"{excerpt(rendered[begin:end])} stands in its place")
        return begin, end

    def _after_prompt(self, messages: list[dict], before: str, rendered: str, earlier: int, end: int) -> int | None:
        """Where an answer to messages begins: behind the generation prompt, and the blank of `lead`; None if it is not there."""
        if not messages or not self._has_generation_prompt:
            return None
        prompt = self.render(messages, generate=True)
        if rendered.startswith(prompt):
            begin = len(prompt)
        elif prompt.startswith(base := self.render(messages)) and (header := prompt.removeprefix(base)):
            at = rendered.rfind(header, earlier, len(os.path.commonprefix([before, rendered])))
            begin = at + len(header) if at >= 0 else end + 1
        else:
            return None
        begin += self.lead and rendered.startswith(" ", begin)
        return begin if begin <= end else None

    def _lost(self, messages: list[dict], turn: int, why: str) -> ValueError:
        return ValueError(
            f"turn {turn} of a conversation, the assistant's {excerpt(messages[turn].get('content') or '')}, cannot be located in "
            f"what the chat template of {name_of(self._tokenizer)} writes: {why}; pass another chat template"
        )

    def _probe(self) -> tuple[bool, str, bool]:
        """`lead`, `tail`, and whether an answer follows what the template writes where one is to be generated."""
        try:
            prompt = self.render(_QUESTION, generate=True)
            rendered = self.render([*_QUESTION, {"role": "assistant", "content": _MARK}])
        except ValueError as error:  # a template for other conversations than this one: nothing can be read off it
            if isinstance(error.__cause__, TemplateBudgetError):
                raise
            return False, "", True
        before, _, tail = rendered.rpartition(_MARK)
        lead = before == prompt + " "
        return lead, tail, lead or before == prompt or prompt != self.render(_QUESTION)


def with_context(prompt: str | list[dict], context: str, template: ChatTemplate) -> str | list[dict]:
    """A prompt with more to know before it, such as a worked answer that the teacher alone is shown.

    Of a text, the context, a blank line and the text. Of messages, the same with the context at the beginning of the
    system message, which is put there if there is none; where `template`, that of the model that is to read it, takes no
    system messages, at the beginning of the first user message. Tools and template variables stay. An empty context
    changes nothing.
    """
    if not context:
        return prompt
    if isinstance(prompt, str):
        return f"{context}\n\n{prompt}"
    roles = [message.get("role") for message in prompt]
    bearer = "system" if "system" in roles or template.takes_system else "user"
    if bearer not in roles:
        return like(prompt, [{"role": bearer, "content": context}, *prompt])
    at = roles.index(bearer)
    with_text = dict(prompt[at], content=f"{context}\n\n{prompt[at].get('content') or ''}")
    return like(prompt, [*prompt[:at], with_text, *prompt[at + 1 :]])


def unwritten_parts(template: ChatTemplate, messages: list[dict], *, whole: bool = False) -> list[str]:
    """Which parts of a conversation its template does not write, in words; `tools` for its tools.

    Every content, every tool call's name and arguments, every tool's name and the last answer's reasoning is replaced
    by a word of its own, which is looked for in what the template writes; so the result is the same for all
    conversations of one shape (`conversation_shape`). Empty where the template refuses such a conversation.

    The conversation may have an answer at its end. `whole` says that the model reads it as it is written at once, not
    the prompt, and then the answer.
    """
    parts: dict[str, str] = {}

    def word(part: str) -> str:
        parts[f"{_MARK}{len(parts)}x"] = part
        return next(reversed(parts))

    def in_words(call: Any, which: str) -> Any:
        name, arguments = (word(f"the {what} of {which}") for what in ("name", "arguments"))
        return _in_function(call, lambda _: {"name": name, "arguments": {"key": arguments}})

    marked = []
    for turn, message in enumerate(messages):
        changed = dict(message)
        if message.get("content"):
            changed["content"] = word(f"message {turn} of the role {message.get('role')!r}")
        if message.get("reasoning_content") and turn == len(messages) - 1:
            changed["reasoning_content"] = word("reasoning_content")
        if message.get("tool_calls"):
            calls = enumerate(message["tool_calls"])
            changed["tool_calls"] = [in_words(call, f"tool call {k} of message {turn}") for k, call in calls]
        marked.append(changed)
    extras = extras_of(messages)
    extras["tools"] = [_in_function(tool, lambda _: {"name": word("tools")}) for tool in extras["tools"] or ()]
    conversation = Conversation(marked, **extras)
    answered = marked[-1].get("role") == "assistant"
    try:
        text = template.render(conversation, generate=not answered)
        if answered and not whole and len(marked) > 1:
            text += template.render(conversation[:-1], generate=True)
    except ValueError:
        return []
    return list(dict.fromkeys(part for mark, part in parts.items() if mark not in text))


def unwritten_keys(template: ChatTemplate, messages: list[dict]) -> list[str]:
    """Which further keys of messages that hold text the template does not write, such as `name` or `thinking`.

    The texts of one key at a time are replaced, so that what a template decides by one of them does not hide a content.
    """
    mark, missing = f"{_MARK}x", []
    texts = [{key for key, value in m.items() if isinstance(value, str) and value} for m in messages]
    for key in sorted(set().union(*texts) - _LOOKED_FOR):
        marked = [m | {key: mark} if key in has else m for m, has in zip(messages, texts)]
        with contextlib.suppress(ValueError):  # the template takes no such text: it reads the key
            if mark not in template.render(like(messages, marked), generate=marked[-1].get("role") != "assistant"):
                missing.append(key)
    return missing


def conversation_shape(messages: list[dict]) -> tuple:
    """What conversations have in common of which a template writes the same parts: roles and keys, but no texts."""
    shape = tuple(
        (m.get("role"), bool(m.get("content")), tuple(sorted(k for k in m if m[k])), len(m.get("tool_calls") or ()))
        for m in messages
    )
    tools, variables = extras_of(messages).values()
    return shape, len(tools or ()), repr(variables)


def refused_variables(variables: Iterable[str]) -> str:
    """What is wrong with the names of template variables, and what would be right; "" if nothing is."""
    wrong = sorted(RESERVED.intersection(variables))
    rest = "; tools have a column of their own, `tools`" if "tools" in wrong else ""
    return f"{', '.join(map(repr, wrong))}, which rendering sets itself{rest}" if wrong else ""


def _says(message: dict, text: str) -> bool:
    """Whether a text is an assistant's message: its content, perhaps with thinking before it or dropped from it, or its calls."""
    content = message.get("content") or ""
    if content and text.endswith(content):  # of a long text most is spared
        return True
    found, wanted = ("".join(x.split()) for x in (text, content))
    if not found and wanted:  # of thinking alone nothing may be left
        return wanted.endswith(">")
    return wanted.endswith(found) or found.endswith(wanted) or writes_calls(message, found)


def _jinja(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_jinja(key)}: {_jinja(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_jinja, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if value is not None else "none"


def _in_function(call: Any, changes: Callable[[Any], dict]) -> Any:
    """A tool call, or a tool, with changes where its name stands: in its `function`, or in itself."""
    inner = call.get("function")
    return call | ({"function": _in_function(inner, changes)} if isinstance(inner, Mapping) else changes(call))


def _arguments_as_text(call: Mapping) -> dict:
    arguments = call.get("arguments")
    return {} if isinstance(arguments, str) else {"arguments": json.dumps(arguments, ensure_ascii=False)}


def writes_calls(message: dict, text: str) -> bool:
    """Whether a message calls tools and all of their names stand in a text."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or []]
    return bool(calls) and all(str(call.get("name")) in text for call in calls)


def _dated(source: str) -> str:
    """A template after a macro that shadows `strftime_now` with a fixed date (values given to it must be plain data)."""
    if "strftime_now" not in source:
        return source
    steps = "".join(f" | replace('{directive}', '{value}')" for directive, value in _STRFTIME.items())
    # The empty expression keeps Jinja from eating a newline at the template's start.
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro %}{{ '' }}" + source
