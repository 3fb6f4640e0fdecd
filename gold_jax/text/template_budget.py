"""A bound on the work of chat templates: they are programs, and one that never ends must not stop a run or fill the memory.

A template is rewritten before it is compiled: its loops, calls, filters and arithmetic, and what it writes, count steps
and characters. The bound is a number of steps, not a time, so that a row passes on every machine or on none.
"""

import contextlib
import contextvars
import functools
import operator
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

#: Steps of any rendering (about a second), those beside them for each message, and those that a call takes.
STEPS, STEPS_PER_MESSAGE, STEPS_OF_CALL = 500_000, 10_000, 5
CHARS_PER_STEP = 64  # of a text that an operation makes
VALUES_PER_STEP = 8  # of a list
LARGEST_INDENT = 100  # in characters
LARGEST_NUMBER = 10_000_000  # of those that a template computes, or gives to a filter or a method
MOST_FIELDS, MOST_COMPUTED = 1_000, 10  # of a format string: fields, and fields where widths are computed
LARGEST_ARGUMENT = 200  # of a filter that is applied to a list or a block by name: characters, or how many

# Methods and filters that make a text as long as a number says, and those that read a format string.
_WIDENING = frozenset("center ljust rjust zfill wordwrap".split())
_INDENTING = frozenset("expandtabs indent tojson".split())  # that many times, for every line or tab
_FORMATTING = frozenset("format format_map".split())
_MULTIPLYING = frozenset(
    "replace join format center indent wordwrap batch slice sum tojson".split()
)  # their argument, many times
_REPEATING = frozenset("batch slice round to_bytes".split())  # do as much as a number says
_SELECTING = frozenset("select reject selectattr rejectattr".split())  # compare each value with their arguments
_COMPARING = frozenset("unique sort min max groupby dictsort".split())  # compare or hash values with each other
_LOOKING_UP = frozenset("get index count changed".split())  # methods that compare or hash their argument
_SEARCHING = frozenset("rfind rindex rsplit rpartition strip lstrip rstrip trim".split())  # text times argument
_TAKING_VALUES = frozenset(  # filters that make no text of a list or an object
    "abs attr batch count d default dictsort first float groupby int items last length list max min random reject "
    "rejectattr reverse round select selectattr slice sort sum unique".split()
)
# Methods and filters whose place functions below take, which count what they make before they make it.
_OWN_METHODS = {"replace": "replaced", "join": "joined", "translate": "translated"}
_OWN_FILTERS = {"replace": "filter_replaced"}
_MAKING = _WIDENING | _INDENTING | _REPEATING  # by their arguments
_BY_NAME = _MAKING | _FORMATTING | frozenset(_OWN_METHODS)  # methods whose calls are known by their name alone
_CALLED = frozenset("loop caller super".split())  # what Jinja itself looks for by name
_FUNCTIONS = {"+": operator.add, "*": operator.mul, "%": operator.mod, "**": operator.pow}
# By how a format string marks its fields: a width of five digits or more, and one that is computed.
_WIDTH = {"%": re.compile(r"%[^a-zA-Z%]*\d{5,}"), "{": re.compile(r"\{[^{}]*:[^a-zA-Z{}]*\d{5,}")}
_COMPUTED = {"%": re.compile(r"%[^a-zA-Z%]*\*"), "{": re.compile(r"\{[^{}]*:[^{}]*\{")}


class TemplateBudgetError(jinja2.TemplateError):
    """A template does more than `budget` lets it."""


class _Budget:
    def __init__(self, steps: int):
        self.limit = self.left = steps

    def spend(self, steps: int, size: int = 0) -> None:
        if size > self.limit:
            raise TemplateBudgetError(f"it makes a text of {size:,} characters, more than {self.limit:,}")
        self.left -= steps + size // CHARS_PER_STEP
        if self.left < 0:
            raise TemplateBudgetError(
                f"it takes more than {self.limit:,} steps, in a loop, a macro or a text that is too long"
            )


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def budget(messages: list[dict], *others: Any) -> Generator[None]:
    """Bounds what a `counted` template does within, by `messages` and the `others` that it is given.

    It may take `STEPS`, `STEPS_PER_MESSAGE` for each message and one for each character given. A round of a loop, a
    filter and an operation is a step, a call some, and so are `CHARS_PER_STEP` characters of what is made. `TemplateBudgetError`
    beyond it, where one text has more characters than that, or a number is beyond `LARGEST_NUMBER`. What a filter or
    method makes is counted before it makes it, where that may be many times what it is given.
    """
    token = _BUDGET.set(_Budget(STEPS + STEPS_PER_MESSAGE * len(messages) + _chars([messages, *others])))
    try:
        yield
    finally:
        _BUDGET.reset(token)


@functools.lru_cache(64)
def counted(source: str) -> nodes.Template:
    """A chat template that counts what it does, for `apply_chat_template` in the place of its source; jinja2's errors."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    return _Counting().visit(environment.parse(source)).set_environment(environment)


class _Generation(Extension):
    """transformers' mark around answers, which changes nothing of what is written."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Counting(NodeTransformer):
    """Puts calls of the functions below around what a template does."""

    generic_visit: Callable[..., Any]

    def visit_For(self, node):
        size = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        node = self.generic_visit(node)
        node.iter = _call("each_counted", node.iter, nodes.Const(1 + size // CHARS_PER_STEP))
        return node

    def visit_Output(self, node):
        node = self.generic_visit(node)
        node.nodes = [x if isinstance(x, nodes.TemplateData) else _call("written", x) for x in node.nodes]
        return node

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        node.nodes = [_call("written", x) for x in node.nodes]
        return _call("count", node)

    def _block(self, node):
        field = "call" if isinstance(node, nodes.CallBlock) else "filter"
        kept = getattr(node, field)
        if isinstance(kept, nodes.Filter):
            for applied in (kept, *kept.find_all(nodes.Filter)):
                if applied.name == "format":
                    raise TemplateBudgetError("it applies the filter format to a block")
                _check_by_name(applied.name, applied)
        kept = kept and self.generic_visit(kept)
        node = self.generic_visit(node)
        setattr(node, field, kept)  # what fills a block must stay a call, or a filter
        return node

    visit_CallBlock = visit_FilterBlock = visit_AssignBlock = _block

    def visit_Name(self, node):
        if node.name == "lipsum":
            raise TemplateBudgetError("it calls Jinja's 'lipsum', which makes text without bound")
        return node

    def _literal(self, node):
        node = self.generic_visit(node)
        return _call("count", node) if node.items and getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Pair(self, node):
        node = self.generic_visit(node)
        node.key = _compared(node.key)
        return node

    def visit_Test(self, node):
        node = self.generic_visit(node)
        node.args = [_compared(x) for x in node.args or ()]
        return node

    def _operation(self, node):
        node = self.generic_visit(node)
        return _call("operate", nodes.Const(node.operator), node.left, node.right)

    def visit_Getitem(self, node):
        if isinstance(node.arg, nodes.Slice):
            return self._counted(node)
        node = self.generic_visit(node)
        node.arg = _compared(node.arg)
        return node

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = _call("count", node.expr)
        for operand in node.ops:
            operand.expr = _compared(operand.expr)
        return node

    def _counted(self, node):
        maps = isinstance(node, nodes.Filter) and node.name == "map" and (node.args or node.dyn_args)
        if maps:
            called = node.args[0] if node.args else None
            called = called.value if isinstance(called, nodes.Const) else None
            if called == "replace" and node.node is not None:
                node = self.generic_visit(node)
                given = [node.node, *node.args[1:]], node.kwargs, node.dyn_args, node.dyn_kwargs
                return nodes.Call(_function("each_replaced"), *given)
            _check_by_name(called, node, node.args[1:])
            if called == "format" and node.node is not None:
                node.node = _call("each_format", node.node)
        node = self.generic_visit(node)
        if isinstance(node, nodes.Filter):
            name, holder = node.name, node
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            name, holder = node.node.attr, node.node
        else:
            name, holder = "", None
        if name in _MAKING and (node.dyn_args or node.dyn_kwargs):
            raise TemplateBudgetError(f"it gives {name} its arguments as a list")
        if holder is not None and holder.node is not None:  # the first filter of a block has its text from elsewhere
            own = _OWN_FILTERS if holder is node else _OWN_METHODS
            if name in own:
                given = [holder.node, *node.args], node.kwargs, node.dyn_args, node.dyn_kwargs
                return nodes.Call(_function(own[name]), *given)
            if name == "join":
                separator = [*node.args[:1], *(pair.value for pair in node.kwargs if pair.key == "d")]
                holder.node = _call("to_join", holder.node, *separator)
            elif holder is node and name in ("sum", "tojson"):
                named = [pair.value for pair in node.kwargs if pair.key in ("start", "indent")]
                holder.node = _call(f"to_{name}", holder.node, *(named or node.args[-1:]))
            elif holder is node and name in _SELECTING:
                given = [*node.args, *(pair.value for pair in node.kwargs), *filter(None, [node.dyn_args])]
                holder.node = _call("each_compared", holder.node, *given)
            elif name in _FORMATTING:
                given = [*node.args, *(pair.value for pair in node.kwargs)]
                given += filter(None, [node.dyn_args, node.dyn_kwargs])
                sign = nodes.Const("%" if holder is node else "{")
                holder.node = _call("format_string", holder.node, sign, *given)
            else:  # what is read counts, not only what is made
                compares = name in (_COMPARING if holder is node else ("index", "count"))
                makes_text = holder is node and name not in _TAKING_VALUES
                holder.node = _call("to_compare" if compares else "written" if makes_text else "count", holder.node)
        if isinstance(node, nodes.Filter | nodes.Call):
            check = "width" if name in _WIDENING else "indent" if name in _INDENTING else "count"
            check = "written" if name in _FORMATTING else "repeated" if name in _REPEATING else check
            check = "pattern" if name in _SEARCHING else check
            check = "compared" if holder is not node and name in _LOOKING_UP else check
            node.args = [_call(check, x) for x in node.args]
            for pair in node.kwargs:
                pair.value = _call(check, pair.value)
        if (
            isinstance(node, nodes.Call)
            and isinstance(node.node, nodes.Name)
            and node.node.name == "loop"
            and node.args
        ):
            node.args[0] = _call("each_counted", node.args[0], nodes.Const(1))  # a round of a recursive loop
        if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Name) and node.node.name in _CALLED):
            node.node = _call("called", node.node, nodes.Const(name))
        if name == "int":
            node = _call("width", node)
        if maps:
            node = _call("each_written", node)
        return _call("count", node, nodes.Const(STEPS_OF_CALL if isinstance(node, nodes.Call) else 1))

    visit_Add = visit_Mul = visit_Mod = visit_Pow = _operation
    visit_Call = visit_Filter = _counted


def _check_by_name(name: str | None, node: nodes.Filter, arguments: list[nodes.Expr] | None = None) -> None:
    """Refuses a filter that `map` or a block applies, whose calls are not seen, where it may multiply long arguments."""
    given = [*(node.args if arguments is None else arguments), *(pair.value for pair in node.kwargs)]
    largest = LARGEST_ARGUMENT if name != "tojson" else 8  # characters for each level, before each value
    short = [isinstance(x, nodes.Const) and _size(x.value) <= largest for x in given]
    if name is None or (name in _MULTIPLYING and not (all(short) and node.dyn_args is node.dyn_kwargs is None)):
        raise TemplateBudgetError(f"it applies the filter {name or 'of a computed name'} to a list or a block")


def _size(value: Any) -> int:
    """Of a filter's argument: a text's characters, or the number itself, which may be how many characters are added."""
    return len(value) if isinstance(value, str) else value if isinstance(value, int) else 0


def _function(name: str) -> nodes.ImportedName:
    return nodes.ImportedName(f"{__name__}.{name}")


def _call(function: str, *arguments: Any) -> nodes.Call:
    return nodes.Call(_function(function), list(arguments), [], None, None)


def _compared(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("compared", node)


def count(value: Any, steps: int = 1) -> Any:
    """The value, for so many steps and its size."""
    values = len(value) if isinstance(value, list | tuple | dict) else 0
    _BUDGET.get().spend(steps + values // VALUES_PER_STEP, len(value) if isinstance(value, str | bytes) else values)
    return value


def compared(value: Any) -> Any:
    """The value, for steps by all that is in it: it is compared with another, or hashed."""
    return count(value, 1 + _length(value) // CHARS_PER_STEP)


def to_compare(values: Any) -> Any:
    """The values, which are compared with each other."""
    return compared(values if isinstance(values, str | bytes | list | tuple | dict) else list(values))


def each_compared(values: Iterable, *arguments: Any) -> Iterator:
    """The values, each of which is compared with the arguments."""
    return each_counted(values or (), 1 + _length(arguments) // CHARS_PER_STEP)


def each_written(values: Iterable) -> Iterator:
    """The values that a filter makes one after the other, each counted as `written`."""
    return map(written, values)


def each_format(values: Iterable) -> Iterator:
    """The values, each of which is a format string."""
    return (format_string(value, "%") for value in values or ())


def repeated(value: Any) -> Any:
    """The value, for as many steps as it says where it is a number."""
    return count(value, 1 + abs(value) if isinstance(value, int) else 1)


def pattern(value: Any) -> Any:
    """The value, which a long text may be searched for, character by character."""
    return count(value, 1 + 200 * max(0, len(value) - 100) if isinstance(value, str | bytes) else 1)


def to_sum(values: Iterable, start: Any = 0) -> Any:
    """The values, which are added up: lists are copied once for each."""
    if isinstance(start, list | tuple):
        values = list(values)
        _BUDGET.get().spend(1 + len(values) * _length(values) // CHARS_PER_STEP)
    return count(values)


def to_tojson(value: Any, indent: Any = 0) -> Any:
    """The value, which is written with so much before each line, for each level."""
    written(value)

    def levels(value: Any, level: int = 1) -> int:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return level + sum(levels(part, level + 1) for part in parts)

    if _size(indent):
        _BUDGET.get().spend(0, levels(value) * _size(indent))
    return value


def written(value: Any) -> Any:
    """The value, for a step and all the characters of which a text of it is made."""
    _BUDGET.get().spend(1, _length(value))
    return value


def _length(value: Any) -> int:
    """About the characters of a value as text. A part that stands in several places is looked at once, and counts each time."""
    known: dict[int, int] = {}

    def length(value: Any) -> int:
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) not in known:
            known[id(value)] = 2 + len(value)  # should it hold itself
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] += sum(map(length, parts))
        return known[id(value)]

    return length(value)


def called(function: Any, name: str = "") -> Any:
    """The function, which is not one that is counted by its name where it is called by another one."""
    own = getattr(function, "__name__", None)
    if own in _BY_NAME and own != name:
        raise TemplateBudgetError(f"it calls the method {own} by another name")
    return function


def replaced(text: Any, *arguments: Any) -> Any:
    """`text.replace(…)`."""
    if not isinstance(text, str | bytes):
        return called(text.replace)(*arguments)
    if len(arguments) > 1 and all(isinstance(x, str | bytes) for x in arguments[:2]):
        old, new, *most = arguments
        times = text.count(old)
        if most and isinstance(most[0], int) and most[0] >= 0:
            times = min(times, most[0])
        _BUDGET.get().spend(STEPS_OF_CALL, len(text) + times * max(0, len(new) - len(old)))
    return text.replace(*arguments)


def filter_replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """`text | replace(old, new)`."""
    return replaced(*(str(written(x)) for x in (text, old, new)), -1 if count is None else count)


def each_replaced(values: Iterable, *arguments: Any, **named: Any) -> Iterator:
    """`values | map("replace", …)`."""
    return (filter_replaced(value, *arguments, **named) for value in values or ())


def joined(separator: Any, values: Iterable) -> Any:
    """`separator.join(values)`."""
    if not isinstance(separator, str | bytes):
        return called(separator.join)(values)
    return separator.join(to_join(values, separator))


def to_join(values: Iterable, separator: Any = "") -> Any:
    """The values, which the separator is written between."""
    values = values if isinstance(values, str | bytes | list | tuple | dict) else list(values)
    _BUDGET.get().spend(STEPS_OF_CALL, _length(values) + len(values) * _length(separator))
    return values


def translated(text: Any, table: Any) -> Any:
    """`text.translate(table)`."""
    if not isinstance(text, str | bytes):
        return called(text.translate)(table)
    longest = max(map(_length, table.values()), default=1) if isinstance(table, dict) else 1
    _BUDGET.get().spend(STEPS_OF_CALL, _length(text) * longest)
    return text.translate(table)


def width(value: Any) -> Any:
    """The value, which may be how long a text becomes."""
    return count(_check_number(value))


def indent(value: Any) -> Any:
    """The value, which may be how far, or with what, each line of a text is indented."""
    if (size := _size(value)) > LARGEST_INDENT:
        raise TemplateBudgetError(f"it indents lines by {size:,} characters, more than {LARGEST_INDENT:,}")
    return count(value)


def format_string(value: Any, sign: str, *given: Any) -> Any:
    """The value, whose fields (that begin with `sign`) are not too many or too wide where it is a format string."""
    if isinstance(value, str | bytes):
        text = (value if isinstance(value, str) else value.decode("latin-1")).replace(2 * sign, "")
        if found := _WIDTH[sign].search(text):
            raise TemplateBudgetError(f"it formats a value to the width {found[0]}")
        most = MOST_FIELDS
        if _COMPUTED[sign].search(text):
            most = MOST_COMPUTED
            _check_numbers(given)
        if (fields := text.count(sign)) > most:
            raise TemplateBudgetError(f"it formats {fields:,} values, more than {most:,}, into one text")
    return count(value)


def each_counted(values: Iterable, steps: int) -> Iterator:
    """The values, each of them for so many steps."""
    for value in values:
        _BUDGET.get().spend(steps)
        yield value


def operate(sign: str, left: Any, right: Any) -> Any:
    """`left + right`, `left * right`, `left % right` or `left ** right`, unless that is too large."""
    if isinstance(left, int) and isinstance(right, int):
        if sign == "**" and left.bit_length() * max(right, 0) > 64:
            raise TemplateBudgetError(f"it computes {left} ** {right}")
        return _check_number(count(_FUNCTIONS[sign](left, right)))
    if sign == "%" and isinstance(left, str | bytes):
        format_string(left, "%", right)
        written(right)
    if sign == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                _BUDGET.get().spend(0, len(text) * times)
    return count(_FUNCTIONS[sign](left, right))


def _check_number(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise TemplateBudgetError(f"it states or computes the number {value:,}, beyond {LARGEST_NUMBER:,}")
    return value


def _check_numbers(value: Any) -> None:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_numbers(part)
    _check_number(value)


def _chars(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_chars, value.keys())) + sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list | tuple) else len(value) if isinstance(value, str) else 0
