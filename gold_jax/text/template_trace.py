"""What a chat template writes for conversations of one shape, found by running it once with holes in the place of contents.

Rendering takes a tenth of a millisecond and more. Most templates put contents where they belong and look at little of
them: whether they are empty, begin with a blank, or hold `</think>`. A hole writes down what it was asked and answers as
a plain text would; contents of which the same is true stand where the holes stood. Whatever else a template does with a
hole, which is no string, ends the tracing: such conversations are rendered.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gold_jax.text.template_budget import Generation

_LONGEST = 10_000  # characters of a content: the work of a template is bounded, see `template_budget`
_MARK = "\x00"


class _Untraceable(Exception):
    """A template asks of a content what is not written down here."""


class _Conditions:
    """What has to be true of a content."""

    def __init__(self, *others: "_Conditions"):
        self.unlike: set[str] = set().union(*(other.unlike for other in others))
        self.without: set[str] = set().union(*(other.without for other in others))
        self.begins: set[str] = set().union(*(other.begins for other in others))
        self.ends: set[str] = set().union(*(other.ends for other in others))
        self.stripped: set[tuple] = set().union(*(other.stripped for other in others))

    def hold(self, text: str) -> bool:
        if len(text) > _LONGEST or text in self.unlike:
            return False
        for string in self.without:
            if string in text:
                return False
        for method, chars in self.stripped:
            if method(text, chars) != text:
                return False
        return not (
            self.begins and text.startswith(tuple(self.begins)) or self.ends and text.endswith(tuple(self.ends))
        )


class _Traced:
    """A text with holes: `parts` are strings, and the `_Conditions` of the contents that stand there."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = tuple(part for part in parts if part != "")

    def _hole(self) -> Any:
        if len(self.parts) != 1 or isinstance(self.parts[0], str):
            raise _Untraceable
        return self.parts[0]

    def _refuse(self, *_, **__) -> Any:
        raise _Untraceable

    def __add__(self, other):
        return _Traced([*self.parts, *_parts_of(other)])

    def __radd__(self, other):
        return _Traced([*_parts_of(other), *self.parts])

    def __bool__(self):
        if not self.parts:
            return False
        if not any(isinstance(part, str) for part in self.parts):
            self.parts[0].unlike.add("")
        return True

    def __eq__(self, other):
        if isinstance(other, _Traced):
            raise _Untraceable
        if isinstance(other, str):
            self._hole().unlike.add(other)
        return False

    def __ne__(self, other):
        return not self == other

    __hash__ = None

    def __contains__(self, other):
        if not isinstance(other, str) or not other:
            raise _Untraceable
        if any(isinstance(part, str) and other in part for part in self.parts):
            return True
        self._hole().without.add(other)
        return False

    def startswith(self, prefix):
        return self._at_end("begins", prefix)

    def endswith(self, suffix):
        return self._at_end("ends", suffix)

    def _at_end(self, which: str, other) -> bool:
        if not isinstance(other, str) or not other:
            raise _Untraceable
        getattr(self._hole(), which).add(other)
        return False

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars=None):
        return self._strip(str.lstrip, 0, chars)

    def rstrip(self, chars=None):
        return self._strip(str.rstrip, -1, chars)

    def _strip(self, method: Callable, end: int, chars) -> "_Traced":
        if not isinstance(chars, str | None):
            raise _Untraceable
        parts = list(self.parts)
        while parts and isinstance(parts[end], str):
            if left := method(parts.pop(end), chars):
                parts.insert(0 if end == 0 else len(parts), left)
                return _Traced(parts)
        if parts:
            parts[end].stripped.add((method, chars))
            if len(self.parts) > 1:  # of an empty content what stands beside it would be stripped
                parts[end].unlike.add("")
        return _Traced(parts)

    __getattr__ = __getitem__ = __iter__ = __len__ = __str__ = __repr__ = __format__ = __call__ = _refuse


def _parts_of(value: Any) -> Sequence[Any]:
    if type(value) is str:
        return [value]
    if not isinstance(value, _Traced):
        raise _Untraceable
    return value.parts


class _Pieces(NamedTuple):
    """What is written for a shape of conversation: strings, and numbers of messages whose contents stand there."""

    pieces: tuple[str | int, ...]
    conditions: tuple[_Conditions, ...]  # of each message's content


class AnswerForm(NamedTuple):
    """What a template writes for all conversations of a shape."""

    pieces: tuple[str | int, ...]  # of the prompt
    conditions: tuple[_Conditions, ...]  # of the contents, that of the answer too
    before: str | None  # what the template writes between the prompt and the answer's content; None: of a prompt alone

    def fill(self, contents: Sequence[str]) -> tuple[str, str] | None:
        """Prompt and answer, "" for none; None where the contents are not those of which this is known."""
        for condition, text in zip(self.conditions, contents):
            if not condition.hold(text):
                return None
        prompt = "".join([piece if isinstance(piece, str) else contents[piece] for piece in self.pieces])
        return prompt, "" if self.before is None else self.before + contents[-1]


class TemplateTrace:
    """A template of which conversations were traced.

    Args:
        source: its Jinja source.
        variables: all that rendering gives it beside messages.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]):
        self._source, self._variables = source, variables
        self._known: dict[tuple, _Pieces | None] = {}
        self._seen_right: set[tuple] = set()
        self._template: jinja2.Template | None = None

    def render(self, messages: Sequence[dict], generate: bool, render: Callable[[], str]) -> str:
        """What `render` gives for messages, which is called where it is not known."""
        shape = _shape(messages)
        if shape is None:
            return render()
        shape, contents = (generate, *shape), [message["content"] for message in messages]
        if shape not in self._known and len(self._known) < 1000:
            self._known[shape] = self._trace(messages, generate)
        found = self._known.get(shape)
        written = None if found is None else _fill(found, contents)
        if written is None:
            return render()
        if shape not in self._seen_right:  # once for each shape
            if written != (rendered := render()):
                self._known[shape] = None
                return rendered
            self._seen_right.add(shape)
        return written

    def answer_form(self, messages: Sequence[dict], lead: str, tail: str) -> "AnswerForm | None":
        """The form of conversations like this one, which was rendered; None where it is not known.

        Their answer stands between the generation prompt with `lead` and `tail`, and ends with the last content.
        """
        shape = _shape(messages)
        if shape is None:
            return None
        keys = (True, *shape[:-1]), (False, *shape)
        prompt, whole = (self._known.get(key) if key in self._seen_right else None for key in keys)
        if prompt is None or whole is None or not tail:
            return None
        marked = [
            "".join(x if isinstance(x, str) else f"{_MARK}{x}{_MARK}" for x in form.pieces) for form in (prompt, whole)
        ]
        last, begin, end = f"{_MARK}{len(messages) - 1}{_MARK}", len(marked[0]) + len(lead), len(marked[1]) - len(tail)
        before = marked[1][begin : end - len(last)]
        if _MARK in before or marked[1] != marked[0] + lead + before + last + tail:
            return None
        merged = [_Conditions(*pair) for pair in zip(prompt.conditions, whole.conditions)]
        return AnswerForm(prompt.pieces, (*merged, whole.conditions[-1]), before)

    def prompt_form(self, messages: Sequence[dict]) -> "AnswerForm | None":
        """The same of prompts alone, before which an answer is to be generated."""
        key = (True, *(_shape(messages) or ()))
        found = self._known.get(key) if key in self._seen_right else None
        return None if found is None else AnswerForm(*found, None)

    def _trace(self, messages: Sequence[dict], generate: bool) -> _Pieces | None:
        conditions = tuple(_Conditions() for _ in messages)
        given = [m | {"content": _Traced([hole])} for m, hole in zip(messages, conditions)]
        try:
            if _MARK in self._source:
                return None
            self._template = self._template or _Environment().from_string(self._source)
            options = dict(self._variables, tools=None, documents=None, add_generation_prompt=generate)
            written: Any = self._template.render(messages=given, **options)
        except Exception:  # what it means is said where the template is rendered
            return None
        pieces = (part if isinstance(part, str) else conditions.index(part) for part in _parts_of(written))
        return _Pieces(tuple(pieces), conditions)


def _shape(messages: Sequence[dict]) -> tuple | None:
    """Keys and roles of messages; None where they are more than roles and contents."""
    plain = all(len(m) == 2 and type(m.get("content")) is str and type(m.get("role")) is str for m in messages)
    return tuple((*m, m["role"]) for m in messages) if plain else None


def _fill(found: _Pieces, contents: Sequence[str]) -> str | None:
    if not all(condition.hold(text) for condition, text in zip(found.conditions, contents)):
        return None
    return "".join([piece if isinstance(piece, str) else contents[piece] for piece in found.pieces])


class _Environment(ImmutableSandboxedEnvironment):
    """One in which what a template writes keeps its holes."""

    def __init__(self):
        self._written: list[_Traced] = []  # holes on their way into a text
        extensions = [Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._finalize)
        trim: Any = self.filters["trim"]
        self.tests = self.tests | {"string": lambda value: isinstance(value, str | _Traced)}
        self.filters = self.filters | {
            "trim": lambda value, chars=None: value.strip(chars) if isinstance(value, _Traced) else trim(value, chars)
        }
        self.globals = self.globals | {"raise_exception": _Traced([])._refuse}

    def _finalize(self, value):
        if not isinstance(value, _Traced):
            if _MARK in str(value):
                raise _Untraceable
            return value
        self._written.append(value)
        return f"{_MARK}{len(self._written) - 1}{_MARK}"

    def concat(self, texts):
        """What a template or a macro has written: a text, or one with holes."""
        parts = re.split(f"{_MARK}(\\d+){_MARK}", "".join(texts))
        if len(parts) == 1:
            return parts[0]
        return _Traced(
            [x for k, part in enumerate(parts) for x in (self._written[int(part)].parts if k % 2 else [part])]
        )
