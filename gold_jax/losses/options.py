"""The options of a comparison, which are the keyword arguments of its function, and what each may be."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gold_jax.values import READERS, Range, plain_types
from gold_jax.wording import quoted


class Option(NamedTuple):
    """What an option means and may be; part of its annotation, `alpha: Annotated[float, Option("…", FRACTION)] = 0.1`."""

    help: str = ""
    range: Range = Range("", lambda v: True)
    flag: str | None = None  # the command-line flag that sets it; options without one are set by `--loss_kwargs`
    show: Callable[[Any], str] | None = None  # what a run says of its value; "": nothing; None: its name and value


class Parameter(NamedTuple):
    """A keyword argument of a comparison."""

    kind: type
    optional: bool  # whether it may be None
    default: Any
    option: Option


def parameters(function: Callable) -> dict[str, Parameter]:
    """The keyword-only arguments of a comparison; TypeError where one has no annotation or no default."""
    hints, found = typing.get_type_hints(function, include_extras=True), {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if name not in hints or parameter.default is inspect.Parameter.empty:
            where = getattr(function, "__name__", function)
            raise TypeError(f"{where}: the option {name!r} needs a type and a default, as in {name}: float = 0.1")
        hint, option = hints[name], Option()
        if typing.get_origin(hint) is typing.Annotated:
            option = next((x for x in hint.__metadata__ if isinstance(x, Option)), option)
            hint = hint.__origin__
        kinds = plain_types(hint)
        kind = next((t for t in READERS if t in kinds), None)
        if kind is None:
            legal = ", ".join(t.__name__ for t in READERS)
            where = getattr(function, "__name__", function)
            raise TypeError(
                f"{where}: the option {name!r} is of type {hint}; it must be one of {legal}, or None beside it"
            )
        found[name] = Parameter(kind, types.NoneType in kinds, parameter.default, option)
    return found


def complete(name: str, known: Mapping[str, Parameter], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All options of the comparison `name`: those given, read in their types, and the defaults of the others.

    An option that is not `known`, or a value that it may not have, is a ValueError that begins with `prefix`, such as the
    flag that gave the options, and names what is legal.
    """
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{prefix}{unknown[0]!r} is not an option of {name}, which has {describe(known) or 'none'}.")
    found = {}
    for key, (kind, optional, default, option) in known.items():
        value = given.get(key, default)
        read, words = READERS[kind]
        try:
            found[key] = None if value is None and optional else read(value)
            if found[key] is not None and not option.range.holds(found[key]):
                raise ValueError
        except (TypeError, ValueError, OverflowError, RecursionError):
            legal = f"{words} {option.range.words}".rstrip()
            raise ValueError(f"{prefix}{key} is {quoted(value)}; it must be {legal}.") from None
    return found


def describe(known: Mapping[str, Parameter]) -> str:
    """Options in words, such as `alpha (share of the student, between 0 and 1; 0.1)`, those with a flag by the flag."""
    shown = []
    for name, (*_, default, (help, range, flag, _)) in known.items():
        detail = ", ".join(filter(None, (help.rstrip("."), range.words)))
        shown.append(f"--{flag}" if flag else f"{name} ({'; '.join(filter(None, (detail, str(default))))})")
    return ", ".join(shown)
