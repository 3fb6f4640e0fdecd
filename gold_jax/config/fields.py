"""Flags as dataclass fields: one declaration holds a flag's default, meaning, range, resume policy and effect.

`flag` declares a field; `Settings` and `flags_dataclass` make a class of such fields that checks its values however
they are given. Constructors, the command line, YAML files, `--help`, docs/flags.md and resuming all read the same
metadata.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import json
import math
import numbers
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from .trl_compat import ANSWERS, answer, nearest

_TRUE = ("true", "yes", "t", "y", "1", "on")
_FALSE = ("false", "no", "f", "n", "0", "off")


class Range(NamedTuple):
    """The numbers a flag may have, in words and as a test; None and infinities never reach the test."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Range("at least 1", lambda v: v >= 1)
NOT_NEGATIVE = Range("at least 0", lambda v: v >= 0)
POSITIVE = Range("greater than 0", lambda v: v > 0)
FRACTION = Range("between 0 and 1", lambda v: 0 <= v <= 1)


class Effect(NamedTuple):
    """When a flag changes anything, as a test of the run it is part of, and what to say where it does not."""

    holds: Callable[[Any], bool]
    otherwise: str


def flag(
    default: Any,
    help: str,
    *,
    range: Range | None = None,
    choices: tuple[str, ...] = (),
    alias: str | None = None,
    on_resume: Literal["refuse", "warn", "ignore"] = "refuse",
    effect: Effect | tuple[Effect, ...] = (),
    differs: str = "",
    important: bool = False,
    secret: bool = False,
    folder: bool = False,
    verbatim: bool = False,
    true_means: str | None = None,
) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: the value where none is given.
        help: what the flag means, for `--help` and docs/flags.md.
        range: the numbers it may have.
        choices: the texts it may have; of a list, the texts each element may have.
        alias: another name that sets the same field.
        on_resume: what a resumed run does where its value differs from the checkpoint's.
        effect: the conditions under which the flag changes anything.
        differs: what is not as in TRL, for docs/coming-from-trl.md.
        important: whether the short `--help` shows it.
        secret: whether it is left out of `repr` and of what a run records.
        folder: whether it names a folder, so that an empty text is an error.
        verbatim: of a list: its elements are whole arguments, whatever blanks and commas they hold, and occurrences add
            up.
        true_means: the text that a bare `true` stands for, `false` being none.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    metadata["effect"] = (effect,) if isinstance(effect, Effect) else effect
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def like(cls: type[Settings], name: str, default: Any = dataclasses.MISSING, **changes: Any) -> Any:
    """The flag `name` of `cls` again, with another default or other metadata."""
    field = field_of(cls, name)
    default = field.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=default, metadata={**field.metadata, **changes}, repr=field.repr)


class Settings:
    """The base of every class of flags: values are checked, and names that are no field answered, wherever they are set.

    A value that is set later is read and checked like one that is given to the constructor. What follows from
    it (`eval_steps` from `logging_steps`) follows in the copies that `replace` and `frozen_copy` make, which are
    constructed from the named values.

    Attributes:
        notices: lines to show once, about flags in whose place something else stands.
    """

    notices: list[str]
    _named: dict[str, Any]  # what was given to the constructor, or set since
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # every subclass is a `flags_dataclass`

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, read_value(type(self), field.name, getattr(self, field.name)))

    @property
    def given(self) -> frozenset[str]:
        """The fields that were named, whatever their value; of all of them (`dataclasses.replace`) those not by default."""
        if len(self._named) < len(dataclasses.fields(self)):
            return frozenset(self._named)
        plain = type(self)()
        return frozenset(name for name in self._named if getattr(self, name) != getattr(plain, name))

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__.get("_state", "new")
        if state == "new" or name == "notices":
            _set(self, **{name: value})
        elif state == "frozen":
            raise AttributeError(
                f"{name!r} cannot be set to {value!r}: these settings belong to a trainer that was made with them. Change a copy, "
                f"such as args.replace({name}=...), and make another trainer with it."
            )
        elif (own := self._own(name, value, AttributeError)) is not None:
            found = {own: read_value(type(self), own, value)}
            _set(self, **found, _named=self._named | found)

    def _own(self, name: str, value: Any, error: type[Exception]) -> str | None:
        """The field that a name sets; None where the name is TRL's and has been answered."""
        names = field_names(type(self))
        if name not in names and name not in ANSWERS:
            raise error(f"{type(self).__name__} has no field {name!r}{nearest(name, names)}.")
        if name not in names:
            self.notices.extend(answer(name, value))
        return names.get(name)

    def replace(self, **changes):
        """A new one of the same class, with some fields (or `notices`) other than in this one."""
        names = field_names(type(self))
        notices = changes.pop("notices", self.notices)
        own = {names.get(name, name): value for name, value in changes.items()}
        fresh = type(self)(**(copy.deepcopy(self._named) | own))
        _set(fresh, notices=list(dict.fromkeys([*notices, *fresh.notices])))
        return fresh

    def frozen_copy(self):
        """As `replace` without changes, and nothing can be set in it."""
        fresh = self.replace()
        _set(fresh, _state="frozen")
        return fresh

    def to_dict(self) -> dict[str, Any]:
        """Every field, fit for JSON; secrets are left out."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["secret"]}


@typing.dataclass_transform(kw_only_default=True, field_specifiers=(flag, like))
def flags_dataclass(cls: type) -> Any:
    """`dataclass` for a subclass of `Settings`, with a constructor that also answers what is not a field.

    An alias sets its field; flags that TRL has and this project has not are refused or noted in `notices`; any other
    name is a TypeError that names the nearest one.
    """
    cls = dataclasses.dataclass(kw_only=True)(cls)
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self, **given):
        known: dict[str, Any] = {}
        _set(self, notices=[], _state="new", _named=known)
        for name, value in given.items():
            own = self._own(name, value, TypeError)
            if own in known:
                raise TypeError(f"{cls.__name__} got {own!r} twice, once under another name; give it once.")
            if own is not None:
                known[own] = value
        generated(self, **known)
        _set(self, _state="made")

    cls.__init__ = __init__
    return cls


def _set(settings: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(settings, name, value)


# What a class of flags says of itself.


@functools.cache
def field_names(cls: type[Settings]) -> Mapping[str, str]:
    """Every name that sets a field of `cls`, the alias too, with the field's own name."""
    return {name: f.name for f in dataclasses.fields(cls) for name in (f.name, f.metadata["alias"]) if name}


def field_of(cls: type[Settings], name: str) -> dataclasses.Field:
    """The field of this name."""
    return cls.__dataclass_fields__[name]


def fields_with(cls: type[Settings], **metadata: Any) -> frozenset[str]:
    """The names of the fields that have this metadata."""
    return frozenset(f.name for f in dataclasses.fields(cls) if metadata.items() <= dict(f.metadata).items())


def groups(cls: type[Settings]) -> dict[type, list[dataclasses.Field]]:
    """The fields of `cls` by the class that declares them first, whose docstring says what they have in common."""
    bases = cls.__mro__[::-1]
    owner = {
        f.name: next(b for b in bases if f.name in vars(b).get("__annotations__", ())) for f in dataclasses.fields(cls)
    }
    found: dict[type, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(cls):
        found.setdefault(owner[field.name], []).append(field)
    return found


@functools.cache
def kinds(cls: type[Settings], name: str) -> tuple[type, ...]:
    """The plain types that a field takes, such as `(float, NoneType)`; `list[str]` counts as `list`."""
    hint = _hints(cls)[name]
    parts = (hint,) if typing.get_origin(hint) in (None, list, dict) else typing.get_args(hint)
    return tuple(typing.get_origin(part) or part for part in parts)


@functools.cache
def _hints(cls: type[Settings]) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


# Which flags change nothing in a run.


def without_effect(settings: Settings, run: Any) -> Iterator[tuple[str, str]]:
    """The flags that change nothing in a run, named or not, each with every reason: an `Effect.otherwise`."""
    for field in dataclasses.fields(settings):
        for effect in field.metadata["effect"]:
            if not effect.holds(run):
                loss = run.loss if "{loss}" in effect.otherwise else ""
                yield field.name, effect.otherwise.replace("{loss}", loss)


def named_without_effect(settings: Settings, run: Any) -> list[str]:
    """A line for each group of flags that were named and that change nothing for the same reason.

    Flags that were named only to be off (false, none, zero where that is the default) are no matter.
    """
    values = {f.name: (getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)}
    off = {name for name, (value, default) in values.items() if not value and value == default}
    lines: dict[str, list[str]] = {}
    for name, reason in without_effect(settings, run):
        if name in settings.given - off:
            lines.setdefault(reason, []).append(f"--{name}")
    return [f"{', '.join(names)}: {reason}." for reason, names in lines.items()]


# Reading values.


def read_value(cls: type[Settings], name: str, value: Any) -> Any:
    """The value of one field in the field's type, from Python, YAML or text, held to its choices and range.

    Raises:
        ValueError: naming the flag, the value and what is legal.
    """
    types, metadata = kinds(cls, name), field_of(cls, name).metadata
    choices = metadata["choices"]
    value = value.value if isinstance(value, enum.Enum) else value
    if metadata["true_means"] and str(value).lower() in ("true", "false"):
        value = metadata["true_means"] if str(value).lower() == "true" else None
    if isinstance(value, str) and value.lower() in ("none", "null") and (str not in types or choices or dict in types):
        if choices and value in choices:
            return value
        value = None
    if value == "auto" and int in types:
        value = None  # TRL's word for "choose for me"
    if list in types:
        return _read_list(name, value, metadata)
    if value is None and type(None) in types:
        return None
    if value is False and "no" in choices:
        return "no"  # YAML reads a bare `no` as false
    kind = next(t for t in _READERS if t in types)
    try:
        value = _READERS[kind][0](value)
    except (TypeError, ValueError):
        words = f"one of {', '.join(choices)}" if choices else _READERS[kind][1]
        raise ValueError(f"--{name} is {value!r}; it must be {words}.") from None
    if choices and value not in choices:
        raise ValueError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}.")
    if metadata["range"] is not None and not (math.isfinite(value) and metadata["range"].holds(value)):
        raise ValueError(f"--{name} is {value}; it must be {metadata['range'].words}.")
    if metadata["folder"] and not value.strip():
        raise ValueError(f"--{name} is {value!r}; it must name a folder.")
    return value


def _read_list(name: str, value: Any, metadata: Mapping[str, Any]) -> list[str]:
    """Texts from a list, from one text with commas or blanks between them, or from a number of YAML's; none: an empty list."""
    if value is None:
        return []
    if isinstance(value, bool) or not isinstance(value, str | int | list | tuple):
        raise ValueError(f"--{name} is {value!r}; it must be a list of names.")
    parts = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    if metadata["verbatim"]:
        return parts
    parts = ",".join(parts).replace(",", " ").split()
    parts = [] if parts == ["none"] else parts
    for part in parts:
        if metadata["choices"] and part not in metadata["choices"]:
            legal = ", ".join(metadata["choices"])
            raise ValueError(f"--{name} is {part!r}; it must be none or some of {legal}.")
    return parts


def _read_dict(value: Any) -> dict:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


def _read_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError
    return text in _TRUE


def _read_int(value: Any) -> int:
    number = _read_float(value)
    if number % 1:  # NaN of infinities
        raise ValueError
    return int(value) if isinstance(value, numbers.Integral) else int(number)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        raise TypeError
    return float(value)


# type -> (how a value becomes one, what it must be). The first that a field takes reads it.
_READERS: Mapping[type, tuple[Callable[[Any], Any], str]] = {
    dict: (_read_dict, "a JSON object, such as '{\"name\": 1}'"),
    bool: (_read_bool, "true or false"),
    int: (_read_int, "a whole number"),
    float: (_read_float, "a number"),
    str: (os.fspath, "text"),
}
