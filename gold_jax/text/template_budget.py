"""A bound on the work of chat templates: they are programs, and one that never ends must not stop a run or fill the memory.

A template's syntax tree is changed before it is compiled: rounds of loops, calls, filters, arithmetic and output count
steps, and the characters or values that they make. The bound is a number of steps, not a time, so that a row passes on
every machine or on none. It is against mistakes, not against attackers: what one filter or method makes is counted
afterwards, so that a single `'a' | center(10**9)` takes its gigabyte first.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

#: Steps of any rendering (about a second), those beside them for each message, and those that a call takes.
STEPS, STEPS_PER_MESSAGE, STEPS_PER_CALL = 500_000, 10_000, 5
CHARS_PER_STEP = 64  # of a text that an operation makes
VALUES_PER_STEP = 8  # of a list
MOST_BITS = 64  # of an integer that is a product or a power


class TemplateBudgetError(jinja2.TemplateError):
    """A template does more than `budget` lets it."""


class _Budget:
    def __init__(self, steps: int):
        self.limit = self.left = steps

    def spend(self, steps: int, value: Any = None, times: int = 1) -> None:
        """Takes so many steps, and those for the size of `times` such values."""
        is_text = isinstance(value, str)
        size = len(value) * max(times, 0) if is_text or isinstance(value, list | tuple | dict) else 0
        if size > self.limit:
            made = f"text of {size:,} characters" if is_text else f"list of {size:,} values"
            raise TemplateBudgetError(f"it makes a {made}, more than {self.limit:,}")
        self.left -= steps + size // (CHARS_PER_STEP if is_text else VALUES_PER_STEP)
        if self.left < 0:
            where = "in a loop, a macro or a text that is too long"
            raise TemplateBudgetError(f"it takes more than {self.limit:,} steps, {where}")


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def budget(messages: list[dict], *others: Any) -> Generator[None]:
    """Bounds what a `counted` template does within, by `messages` and the `others` that it is given.

    It may take `STEPS`, `STEPS_PER_MESSAGE` for each message and one for each character given. A round of a loop, a
    filter and an operation is a step, a call some, and so are `CHARS_PER_STEP` characters or `VALUES_PER_STEP` values of
    what is made. `TemplateBudgetError` beyond it, and where one text or list is longer than that.
    """
    token = _BUDGET.set(_Budget(STEPS + STEPS_PER_MESSAGE * len(messages) + len(repr([messages, *others]))))
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
        node.iter = _call("each", node.iter, nodes.Const(1 + size // CHARS_PER_STEP))
        return node

    def visit_Call(self, node):
        node = self.generic_visit(node)
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":  # a round of a recursive loop
            node.args = [_call("each", values, nodes.Const(1)) for values in node.args]
        return _call("count", node, nodes.Const(STEPS_PER_CALL))

    def visit_CallBlock(self, node):
        node = self.generic_visit(node)
        node.call = node.call.args[0]  # must stay a call
        return node

    def _block(self, node):
        node = self.generic_visit(node)
        node.filter = node.filter and node.filter.args[0]  # must stay a filter
        return node

    def visit_Output(self, node):
        node = self.generic_visit(node)
        node.nodes = [x if isinstance(x, nodes.TemplateData) else _call("written", x) for x in node.nodes]
        return node

    def _expression(self, node):
        return _call("count", self.generic_visit(node))

    def _operation(self, node):
        node = self.generic_visit(node)
        return _call("multiply" if isinstance(node, nodes.Mul) else "power", node.left, node.right)

    visit_FilterBlock = visit_AssignBlock = _block
    visit_Filter = visit_Concat = visit_Add = visit_Mod = _expression
    visit_Mul = visit_Pow = _operation


def _call(function: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.ImportedName(f"{__name__}.{function}"), list(arguments), [], None, None)


def each(values: Iterable, steps: int) -> Iterator:
    """The values, each of them for so many steps."""
    for value in values:
        _BUDGET.get().spend(steps)
        yield value


def count(value: Any, steps: int = 1) -> Any:
    """The value, for so many steps and its size."""
    _BUDGET.get().spend(steps, value)
    return value


def written(value: Any) -> Any:
    """The value, for a step and the size of the text that is written of it."""
    count(str(value) if isinstance(value, list | tuple | dict) else value)
    return value


def multiply(left: Any, right: Any) -> Any:
    """`left * right`, counted before it is made."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int):
            _BUDGET.get().spend(1, value, times)
    return left * right


def power(left: Any, right: Any) -> Any:
    """`left ** right`, unless it is too large."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)
    return count(left**right)


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise TemplateBudgetError(f"it computes a number of more than {MOST_BITS} bits")
