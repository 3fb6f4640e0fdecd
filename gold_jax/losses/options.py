"""The options of a comparison, which are the keyword arguments of its function, and what each may be."""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """What an option means and may be; part of its annotation, `alpha: Annotated[float, Option("…", at_most=1)] = 0.1`.

    Attributes:
        help: what it is, for people to read.
        at_least, above, at_most: the numbers that it may be; None: any.
        flag: the command-line flag that sets it, where it has one of its own, which then also says what it may be.
            Options without one are set by `--loss_kwargs`.
        show: the option in the one line that a run says of its loss; "" says nothing. None: its name and value.
    """

    help: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    flag: str | None = None
    show: Callable[[Any], str] | None = None

    def legal(self) -> str:
        """What the number may be, in words; "" where it may be any."""
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        bounds = (("at least", self.at_least), ("greater than", self.above), ("at most", self.at_most))
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)

    def allows(self, value: Any) -> bool:
        """Whether the value is in range; what is no number has none."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        return math.isfinite(value) and low and (self.at_most is None or value <= self.at_most)


class Parameter(typing.NamedTuple):
    """A keyword argument of a comparison."""

    kinds: tuple[type, ...]  # such as (float, NoneType)
    default: Any
    option: Option

    def read(self, value: Any) -> Any:
        """The value in the parameter's type.

        Raises:
            TypeError, ValueError: it has another, or is out of range.
        """
        if value is None:
            if types.NoneType not in self.kinds:
                raise TypeError
            return None
        kind = next(k for k in self.kinds if k is not types.NoneType)
        if isinstance(value, bool) != (kind is bool) or (kind is int and isinstance(value, float) and value % 1):
            raise TypeError
        value = kind(value)
        if not self.option.allows(value):
            raise ValueError
        return value

    def legal(self) -> str:
        """What it may be, in words."""
        kind = next(k for k in self.kinds if k is not types.NoneType)
        words: dict[type, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
        return f"{words[kind]} {self.option.legal()}".rstrip()


def parameters(function: Callable) -> dict[str, Parameter]:
    """The keyword-only arguments of a comparison.

    Raises:
        TypeError: one has no annotation or no default.
    """
    hints, found = typing.get_type_hints(function, include_extras=True), {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if name not in hints or parameter.default is inspect.Parameter.empty:
            raise TypeError(
                f"{getattr(function, '__name__', function)}: the option {name!r} needs a type and a default, as in {name}: float = 0.1"
            )
        hint, option = hints[name], Option()
        if typing.get_origin(hint) is typing.Annotated:
            option = next((x for x in hint.__metadata__ if isinstance(x, Option)), option)
            hint = hint.__origin__
        found[name] = Parameter(typing.get_args(hint) or (hint,), parameter.default, option)
    return found


def complete(name: str, function: Callable, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All options of a comparison: those given, read in their types, and the defaults of the others.

    Args:
        name: the comparison's.
        function: its function.
        given: options by name.
        prefix: what errors begin with, such as the flag that gave the options.

    Raises:
        ValueError: an option that the comparison has not, or a value that it may not have; it names what is legal.
    """
    known = parameters(function)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{prefix}{unknown[0]!r} is no option of {name}, which has {describe(known) or 'none'}.")
    found = {}
    for key, parameter in known.items():
        value = given.get(key, parameter.default)
        try:
            found[key] = parameter.read(value)
        except (TypeError, ValueError):
            raise ValueError(f"{prefix}{key} is {value!r}; it must be {parameter.legal()}.") from None
    return found


def describe(known: Mapping[str, Parameter]) -> str:
    """Options in words, such as `alpha (share of the student, between 0 and 1; 0.1)`, those with a flag by the flag."""
    shown = []
    for name, (_, default, option) in known.items():
        detail = ", ".join(filter(None, (option.help.rstrip("."), option.legal())))
        shown.append(
            f"--{option.flag}" if option.flag else f"{name} ({'; '.join(filter(None, (detail, str(default))))})"
        )
    return ", ".join(shown)
