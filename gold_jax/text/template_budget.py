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
LARGEST_INDENT = 1_000  # in characters
LARGEST_NUMBER = 10_000_000  # of those that a template computes, or gives to a filter or a method

# Methods and filters that make a text as long as a number says, and those that read a format string.
_WIDENING = frozenset("center ljust rjust zfill wordwrap".split())
_INDENTING = frozenset("expandtabs indent tojson".split())  # that many times, for every line or tab
_FORMATTING = frozenset("format format_map".split())
_FUNCTIONS = {"+": operator.add, "*": operator.mul, "%": operator.mod, "**": operator.pow}
_WIDTH = re.compile(
    r"(?:%|\{[^{}]*:)[^a-zA-Z%{}]*\d{8,}"
)  # of a value in a format string, as large as `LARGEST_NUMBER`


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
    beyond it, where one text has more characters than that, or a number is beyond `LARGEST_NUMBER`. What a single filter
    or method makes is seen afterwards: up to then it holds memory. Of a list that stands in another one many times its
    own length is counted once.
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
        node.nodes = [x if isinstance(x, nodes.TemplateData) else _call("count", x) for x in node.nodes]
        return node

    def _block(self, node):
        field = "call" if isinstance(node, nodes.CallBlock) else "filter"
        kept = getattr(node, field) and self.generic_visit(getattr(node, field))
        node = self.generic_visit(node)
        setattr(node, field, kept)  # what fills a block must stay a call, or a filter
        return node

    visit_CallBlock = visit_FilterBlock = visit_AssignBlock = _block

    def visit_Name(self, node):
        if node.name == "lipsum":
            raise TemplateBudgetError("it calls Jinja's 'lipsum', which makes text without bound")
        return node

    def visit_Const(self, node):
        if isinstance(node.value, str) and (width := _WIDTH.search(node.value)):
            raise TemplateBudgetError(f"it formats a value to the width {width[0]}")
        return node

    def _operation(self, node):
        node = self.generic_visit(node)
        return _call("operate", nodes.Const(node.operator), node.left, node.right)

    def visit_Getitem(self, node):
        return self._counted(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = _call("count", node.expr)
        for operand in node.ops:
            operand.expr = _call("count", operand.expr)
        return node

    def _counted(self, node):
        for constant in node.find_all(nodes.Const):  # before Jinja folds them
            _check_number(constant.value)
        node = self.generic_visit(node)
        if isinstance(node, nodes.Filter):
            name, holder = node.name, node
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            name, holder = node.node.attr, node.node
        else:
            name, holder = "", None
        if holder is not None and holder.node is not None:  # what is read, not only what is made
            holder.node = _call("format_string" if name in _FORMATTING else "count", holder.node)
        if isinstance(node, nodes.Filter | nodes.Call):
            check = "width" if name in _WIDENING else "indent" if name in _INDENTING else "count"
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
        if name == "int":
            node = _call("width", node)
        return _call("count", node, nodes.Const(STEPS_OF_CALL if isinstance(node, nodes.Call) else 1))

    visit_Add = visit_Mul = visit_Mod = visit_Pow = _operation
    visit_Call = visit_Filter = visit_Concat = _counted


def _call(function: str, *arguments: Any) -> nodes.Call:
    return nodes.Call(nodes.ImportedName(f"{__name__}.{function}"), list(arguments), [], None, None)


def count(value: Any, steps: int = 1) -> Any:
    """The value, for so many steps and its size."""
    _BUDGET.get().spend(steps, len(value) if isinstance(value, str | list | tuple | dict) else 0)
    return value


def width(value: Any) -> Any:
    """The value, which may be how long a text becomes."""
    return count(_check_number(value))


def indent(value: Any) -> Any:
    """The value, which may be how far, or with what, each line of a text is indented."""
    size = len(value) if isinstance(value, str) else value
    if isinstance(size, int) and size > LARGEST_INDENT:
        raise TemplateBudgetError(f"it indents lines by {size:,} characters, more than {LARGEST_INDENT:,}")
    return count(value)


def format_string(value: Any) -> Any:
    """The value, whose fields are not too wide where it is a format string."""
    if isinstance(value, str) and (found := _WIDTH.search(value)):
        raise TemplateBudgetError(f"it formats a value to the width {found[0]}")
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
    if sign == "%" and isinstance(left, str):
        format_string(left)
        for value in right if "*" in left and isinstance(right, tuple) else ():
            _check_number(value)
    if sign == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int):
                _BUDGET.get().spend(0, len(text) * times)
    return count(_FUNCTIONS[sign](left, right))


def _check_number(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise TemplateBudgetError(f"it states or computes the number {value:,}, beyond {LARGEST_NUMBER:,}")
    return value


def _chars(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_chars, value.keys())) + sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list | tuple) else len(value) if isinstance(value, str) else 0
