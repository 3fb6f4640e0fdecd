"""Flags as dataclass fields: `flag` declares default, meaning, range, resume policy and effect, for all to read."""

import copy
import dataclasses
import enum
import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from gold_jax.config.trl_compat import ANSWERS, SETTINGS_MEMBERS, VALUES, answer, nearest, value_in_force
from gold_jax.values import READERS, Range, plain_types
from gold_jax.wording import quoted


class Effect(NamedTuple):
    """When a flag changes anything."""

    holds: Callable[[Any], bool]  # a test of the run
    otherwise: str  # what to say where it does not hold


def flag(
    default: Any,
    help: str,
    *,
    range: Range | None = None,  # the numbers it may have
    choices: tuple[str, ...] | Callable[[], Mapping[str, Any]] = (),  # the texts it may have; of a list, each element
    loads: Callable[[str], None] | None = None,  # makes a text with a colon one of the choices, or raises ValueError
    alias: str | None = None,  # another name that sets the same field
    on_resume: Literal["refuse", "warn", "ignore"] = "refuse",  # where a resumed run has another value
    effect: Effect | tuple[Effect, ...] = (),  # the conditions under which it changes anything
    differs: str = "",  # what is not as in TRL, for docs/coming-from-trl.md
    important: bool = False,  # whether the short --help shows it
    secret: bool = False,  # whether it is left out of `repr` and of what a run records
    folder: bool = False,  # whether it names a folder, so that an empty text is an error
    verbatim: bool = False,  # of a list: elements are whole arguments, blanks and commas included; occurrences add up
    true_means: str | None = None,  # the text that a bare `true` stands for, `false` being none
    pairs: bool = False,  # of a dict: its text may be `name=value,…`
    reader: Callable[[Any], Any] | None = None,  # reads a value that no type says, or raises ValueError
) -> Any:
    """A dataclass field that is a flag."""
    metadata = {name: value for name, value in locals().items() if name != "default"}
    metadata["effect"] = (effect,) if isinstance(effect, Effect) else effect
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def like(cls: type["Settings"], name: str, default: Any = dataclasses.MISSING, **changes: Any) -> Any:
    """The flag `name` of `cls` again, with another default or other metadata."""
    field = cls.__dataclass_fields__[name]
    default = field.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=default, metadata={**field.metadata, **changes}, repr=field.repr)


@typing.dataclass_transform(kw_only_default=True, field_specifiers=(flag, like))
class Settings:
    """The base of every class of flags, each a dataclass whose constructor also answers what is not a field.

    Wherever a value is set, it is checked; an alias sets its field; flags that TRL has and this project has not are
    refused or noted in `notices`; any other name is an error that names the nearest one. Copies are constructed from
    the named values, so that what follows from one (`eval_steps` from `logging_steps`) follows its changes.
    """

    notices: list[str]  # lines to show once, about flags in whose place something else stands
    _named: dict[str, Any]  # what was given to the constructor, or set since
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls):
        generated = dataclasses.dataclass(kw_only=True)(cls).__init__

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

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            setattr(self, name, read_value(type(self), name, getattr(self, name)))

    @property
    def given(self) -> frozenset[str]:
        """The fields that were named, whatever their value; of all of them (`dataclasses.replace`) those not by default."""
        if len(self._named) < len(self.__dataclass_fields__):
            return frozenset(self._named)
        plain = type(self)()
        return frozenset(name for name in self._named if getattr(self, name) != getattr(plain, name))

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__.get("_state", "new")
        if state == "new" or name == "notices":
            _set(self, **{name: value})
        elif state == "frozen":
            belong = "these settings belong to a trainer that was made with them"
            instead = f"Change a copy, such as args.replace({name}=...), and make another trainer with it."
            raise AttributeError(f"{name!r} cannot be set to {quoted(value)}: {belong}. {instead}")
        elif (own := self._own(name, value, AttributeError)) is not None:
            found = {own: read_value(type(self), own, value)}
            _set(self, **found, _named=self._named | found)

    def __getattr__(self, name: str) -> Any:  # of what is no attribute
        if not name.startswith("_") and (own := field_names(type(self)).get(name, name)) != name:
            return getattr(self, own)
        if name in ANSWERS:
            return value_in_force(name)
        why = f": {SETTINGS_MEMBERS[name]}" if name in SETTINGS_MEMBERS else nearest(name, field_names(type(self)))
        raise AttributeError(f"{type(self).__name__} has no field {quoted(name)}{why}.")

    def _own(self, name: str, value: Any, error: type[Exception]) -> str | None:
        """The field that a name sets; None where the name is TRL's and has been answered."""
        names = field_names(type(self))
        if name not in names and name not in ANSWERS:
            raise error(f"{type(self).__name__} has no field {quoted(name)}{nearest(name, names)}.")
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


def _set(settings: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(settings, name, value)


@functools.cache
def field_names(cls: type[Settings]) -> Mapping[str, str]:
    """Every name that sets a field of `cls`, the alias too, with the field's own name."""
    return {name: f.name for f in dataclasses.fields(cls) for name in (f.name, f.metadata["alias"]) if name}


def fields_with(cls: type[Settings], **metadata: Any) -> frozenset[str]:
    """The names of the fields that have this metadata."""
    return frozenset(f.name for f in dataclasses.fields(cls) if metadata.items() <= dict(f.metadata).items())


def groups(cls: type[Settings]) -> dict[type, list[dataclasses.Field]]:
    """The fields of `cls` by the class that declares them first, whose docstring says what they have in common."""
    found: dict[type, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(cls):
        owner = next(base for base in cls.__mro__[::-1] if field.name in vars(base).get("__annotations__", ()))
        found.setdefault(owner, []).append(field)
    return found


def legal_texts(field: dataclasses.Field) -> tuple[str, ...]:
    """The texts that a flag may have; () where it may have any. A table of them is loaded when it is first asked for."""
    choices = field.metadata["choices"]
    return tuple(choices()) if callable(choices) else choices


_hints = functools.cache(typing.get_type_hints)


@functools.cache
def kinds(cls: type[Settings], name: str) -> tuple[type, ...]:
    """The plain types that a field takes, such as `(float, NoneType)`."""
    return plain_types(_hints(cls)[name])


def without_effect(settings: Settings, run: Any) -> Iterator[tuple[str, str]]:
    """The flags that change nothing in a run, named or not, each with every reason: an `Effect.otherwise`."""
    for field in dataclasses.fields(settings):
        for effect in field.metadata["effect"]:
            if not effect.holds(run):
                loss = run.loss if "{loss}" in effect.otherwise else ""
                yield field.name, effect.otherwise.replace("{loss}", loss)


def named_without_effect(settings: Settings, run: Any) -> list[str]:
    """A line for each group of flags that were named, not to be off as by default, and do nothing for one reason."""
    values = {f.name: (getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)}
    off = {name for name, (value, default) in values.items() if not value and value == default}
    lines: dict[str, list[str]] = {}
    for name, reason in without_effect(settings, run):
        if name in settings.given - off:
            lines.setdefault(reason, []).append(f"--{name}")
    return [f"{', '.join(names)}: {reason}." for reason, names in lines.items()]


def read_value(cls: type[Settings], name: str, value: Any) -> Any:
    """The value of one field in the field's type, from Python, YAML or text; a ValueError names what is legal."""
    types, field = kinds(cls, name), cls.__dataclass_fields__[name]
    has_choices, range, true_means = (field.metadata[key] for key in ("choices", "range", "true_means"))
    value = value.value if isinstance(value, enum.Enum) else value
    if true_means and str(value).lower() in ("true", "false"):
        value = true_means if str(value).lower() == "true" else None
    if isinstance(value, str) and value.lower() in ("none", "null"):
        if (str not in types or has_choices or dict in types) and value not in legal_texts(field):
            value = None
    if field.metadata["pairs"] and isinstance(value, str) and re.fullmatch(r"[^=,{]+=[^=,]+(,[^=,]+=[^=,]+)*", value):
        value = dict(pair.split("=") for pair in value.split(","))
    if value == "auto" and int in types:
        value = None  # TRL's word for "choose for me"
    if field.metadata["reader"] and value is not None:
        return field.metadata["reader"](value)
    if list in types:
        return _read_list(field, value)
    if value is None and type(None) in types:
        return None
    if field.metadata["loads"] and isinstance(value, str) and ":" in value:
        try:
            field.metadata["loads"](value)
        except ValueError as error:
            raise ValueError(f"--{name}: {error}.") from error
    choices = legal_texts(field)

    def refused(words: str) -> ValueError:
        shown = "given" if field.metadata["secret"] else f"is {quoted(value)}"
        return ValueError(f"--{name} {shown}; it must {words}.")

    if value is False and "no" in choices:
        return "no"  # YAML reads a bare `no` as false
    one_of = f"be one of {', '.join(choices)}"
    read, words = next(READERS[t] for t in READERS if t in types)
    words = "pairs NAME=COLUMN with commas between them, or a mapping" if field.metadata["pairs"] else words
    try:
        value = read(value)
    except (TypeError, ValueError, RecursionError):
        raise refused(one_of if choices else f"be {words}") from None
    except OverflowError:
        raise refused("be smaller than 2**63 in magnitude") from None
    if choices and value not in choices:
        why = VALUES.get(name, {}).get(value)
        raise refused(f"{one_of} ({why})" if why else one_of)
    if range is not None and not range.holds(value):
        raise refused(f"be {range.words}")
    if field.metadata["folder"] and not value.strip():
        raise refused("name a folder")
    return value


def _read_list(field: dataclasses.Field, value: Any) -> list[str]:
    """Texts from a list, from one text with commas or blanks between them, or from a number of YAML's; none: an empty list."""
    if value is None:
        return []
    if isinstance(value, bool) or not isinstance(value, str | int | list | tuple):
        raise ValueError(f"--{field.name} is {quoted(value)}; it must be a list of names.")
    parts = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    if field.metadata["verbatim"]:
        return parts
    parts = ",".join(parts).replace(",", " ").split()
    parts = [] if parts == ["none"] else parts
    legal = legal_texts(field)
    for part in parts:
        if legal and part not in legal:
            raise ValueError(f"--{field.name} is {quoted(part)}; it must be none or some of {', '.join(legal)}.")
    return parts
