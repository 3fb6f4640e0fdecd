"""Chat templates traced: rendered once per shape of conversation, with placeholders for the contents.

Rendering takes a tenth of a millisecond or more per row. Most templates insert contents as they are and test little of
them: whether they are empty, begin with a blank, or contain `</think>`. A placeholder answers every such test with no
and records it; the traced output is valid for all contents of which the tests are false. Anything else that a template
does with a placeholder ends the tracing, and such conversations are rendered: a placeholder is not a string, has only a
few of a string's methods, and only the filters and tests named here accept one.
"""

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.filters import do_default
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gold_jax.text.template_budget import budget, counted

_LONGEST = 10_000  # characters of a content: the work of a template is bounded, see `template_budget`
_MOST_SHAPES = 1_000
_MOST_PIECES = 5  # for each message: more is written for conversations that are rendered
_METHODS = frozenset(("startswith", "endswith", "strip", "lstrip", "rstrip"))


class _Untraceable(Exception):
    """A template uses a content in a way that cannot be traced."""


def _refuse(*_: Any, **__: Any) -> Any:
    raise _Untraceable


def _loses_left(text: str, chars: str | None) -> bool:
    return text.lstrip(chars) != text


def _loses_right(text: str, chars: str | None) -> bool:
    return text.rstrip(chars) != text


class _Placeholder:
    """Stands for a content, and records what a template tests of it; every test is answered with no."""

    def __init__(self, number: int):
        self.number = number
        self.asked: set[tuple[Callable, Any]] = set()

    def accepts(self, text: str) -> bool:
        """Whether all recorded tests are false of this content."""
        if len(text) > _LONGEST:
            return False
        for ask, other in self.asked:
            if ask(text, other):
                return False
        return True


class _Traced:
    """A text with placeholders, `_parts`: strings that are not empty and do not follow each other, and `_Placeholder`s."""

    def __init__(self, parts: Iterable[Any]):
        groups = itertools.groupby(parts, lambda part: isinstance(part, str))
        joined = (part for strings, group in groups for part in (["".join(group)] if strings else group))
        self._parts = tuple(part for part in joined if part != "")

    def _ask(self, question: Callable, other: Any, types: Any = str) -> bool:
        if len(self._parts) != 1 or not isinstance(self._parts[0], _Placeholder) or not isinstance(other, types):
            raise _Untraceable
        self._parts[0].asked.add((question, other))
        return False

    def __add__(self, other):
        return _Traced([*self._parts, *_parts_of(other)])

    def __radd__(self, other):
        return _Traced([*_parts_of(other), *self._parts])

    def __bool__(self):
        if self._parts and not any(isinstance(part, str) for part in self._parts):
            self._parts[0].asked.add((operator.eq, ""))
        return bool(self._parts)

    def __eq__(self, other):
        if isinstance(other, _Traced):
            raise _Untraceable
        return isinstance(other, str) and self._ask(operator.eq, other)

    def __contains__(self, other):
        inside = isinstance(other, str) and any(isinstance(part, str) and other in part for part in self._parts)
        return inside or self._ask(operator.contains, other)

    def startswith(self, prefix):
        return self._ask(str.startswith, prefix)

    def endswith(self, suffix):
        return self._ask(str.endswith, suffix)

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars=None):
        return self._strip(str.lstrip, _loses_left, 0, chars)

    def rstrip(self, chars=None):
        return self._strip(str.rstrip, _loses_right, -1, chars)

    def _strip(self, method: Callable, loses: Callable, end: int, chars: Any) -> "_Traced":
        parts = list(self._parts)
        if parts and isinstance(parts[end], str):
            if left := method(parts.pop(end), chars):
                parts.insert(0 if end == 0 else len(parts), left)
                return _Traced(parts)
        if parts:
            _Traced([parts[end]])._ask(loses, chars, str | None)
            if len(self._parts) > 1:  # of an empty content what stands beside it would be stripped
                parts[end].asked.add((operator.eq, ""))
        return _Traced(parts)

    __getattr__ = __getitem__ = __iter__ = __len__ = __str__ = __repr__ = __format__ = __call__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __mod__ = __rmod__ = __mul__ = __rmul__ = __lt__ = __gt__ = __html__ = _refuse


class _Written(str):
    """A traced text while Jinja joins it with others."""

    def __new__(cls, _):
        return super().__new__(cls)

    def __init__(self, traced: "_Traced | _Written"):  # Python calls it again for `str` of one
        self.parts: Sequence[Any] = traced._parts if isinstance(traced, _Traced) else traced.parts

    def __str__(self):
        return self


# What filters and tests give for a traced text; all others end the tracing.
_FILTERS: Mapping[str, Callable] = {"trim": _Traced.strip, "default": do_default, "d": do_default}
_TESTS: dict[str, Callable] = dict.fromkeys(("defined", "string", "sequence", "iterable"), lambda _: True)
_TESTS |= dict.fromkeys(("undefined", "none", "mapping", "number", "integer", "float", "boolean"), lambda _: False)


def _guarded(function: Callable, traced: Callable) -> Callable:
    """A filter or a test, in the place of which `traced` is called where a traced text is given."""

    @functools.wraps(function)
    def guarded(*values: Any, **named: Any) -> Any:
        has = any(isinstance(value, _Traced) for value in (*values, *named.values()))
        return (traced if has else function)(*values, **named)

    return guarded


def _parts_of(value: Any) -> Sequence[Any]:
    if type(value) is str:
        return [value]
    if not isinstance(value, _Traced):
        raise _Untraceable
    return value._parts


class _Form(NamedTuple):
    """What a template writes for all conversations of a shape."""

    pieces: tuple[str | int, ...]  # strings, and numbers of messages whose contents stand there
    placeholders: tuple[_Placeholder, ...]  # of each message's content

    def fill(self, contents: Sequence[str]) -> str | None:
        """What is written; None where the contents are not those of which this is known."""
        for placeholder, text in zip(self.placeholders, contents):
            if not placeholder.accepts(text):
                return None
        return "".join([piece if isinstance(piece, str) else contents[piece] for piece in self.pieces])


class TemplateTrace:
    """A template of which conversations were traced.

    Args:
        source: its Jinja source.
        variables: all that rendering gives it beside messages.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]):
        self._source, self._variables = source, variables
        self._known: dict[tuple, _Form | None] = {}
        self._seen_right: set[tuple] = set()
        self._template: jinja2.Template | None = None

    def __deepcopy__(self, memo: dict) -> "TemplateTrace":
        """A new one without cached forms: Jinja's templates cannot be copied."""
        return TemplateTrace(self._source, copy.deepcopy(self._variables, memo))

    def render(self, messages: Sequence[dict], generate: bool, render: Callable[[], str]) -> str:
        """What `render` gives for messages, which is called where it is not known."""
        shape = _shape(messages)
        if shape is None:
            return render()
        shape, contents = (generate, *shape), [message["content"] for message in messages]
        if shape not in self._known and len(self._known) < _MOST_SHAPES:
            self._known[shape] = self._trace(messages, generate)
        found = self._known.get(shape)
        filled = None if found is None else found.fill(contents)
        if filled is None:
            return render()
        if shape not in self._seen_right:  # once for each shape
            if filled != (rendered := render()):
                self._known[shape] = None
                return rendered
            self._seen_right.add(shape)
        return filled

    def _trace(self, messages: Sequence[dict], generate: bool) -> _Form | None:
        placeholders = tuple(map(_Placeholder, range(len(messages))))
        given = [m | {"content": _Traced([placeholder])} for m, placeholder in zip(messages, placeholders)]
        options = dict(self._variables, tools=None, documents=None, add_generation_prompt=generate)
        try:
            if "autoescape" in self._source:
                return None
            self._template = self._template or _Environment().from_string(counted(self._source))
            with budget(list(messages), options):
                written = _parts_of(self._template.render(messages=given, **options))
        except Exception:  # what it means is said where the template is rendered
            return None
        pieces = tuple(part if isinstance(part, str) else part.number for part in written)
        return _Form(pieces, placeholders) if len(pieces) <= _MOST_PIECES * (len(messages) + 1) else None


def _shape(messages: Sequence[dict]) -> tuple | None:
    """Keys and roles of messages; None where they are more than roles and contents."""
    plain = all(len(m) == 2 and type(m.get("content")) is str and type(m.get("role")) is str for m in messages)
    return tuple((*m, m["role"]) for m in messages) if plain else None


class _Environment(ImmutableSandboxedEnvironment):
    """One in which what a template writes keeps its placeholders, and which answers for them only as `_Traced` does."""

    def __init__(self):
        super().__init__(finalize=_keep_placeholders)
        self.tests = {name: _guarded(test, _TESTS.get(name, _refuse)) for name, test in self.tests.items()}
        self.filters = {name: _guarded(made, _FILTERS.get(name, _refuse)) for name, made in self.filters.items()}
        self.globals = self.globals | {"raise_exception": _refuse}

    def getattr(self, obj, attribute):
        """As Jinja's; of a traced text the methods that it has."""
        return super().getattr(obj, attribute) if not isinstance(obj, _Traced) or attribute in _METHODS else _refuse()

    def getitem(self, obj, argument):
        """As Jinja's, which would take a traced text for no string."""
        traced = isinstance(obj, _Traced) or isinstance(argument, _Traced)
        return _refuse() if traced else super().getitem(obj, argument)

    def concat(self, texts):
        """What a template or a macro has written: a text, or one with placeholders."""
        parts = [part for text in texts for part in (text.parts if isinstance(text, _Written) else (text,))]
        return _Traced(parts) if any(isinstance(part, _Placeholder) for part in parts) else "".join(parts)


def _keep_placeholders(value: Any) -> str:
    return _Written(value) if isinstance(value, _Traced) else str(value)  # which raises where it holds a traced text
