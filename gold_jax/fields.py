"""Dataclass fields that are flags: declaring them, reading their values, and answering names that are no field."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import fnmatch
import functools
import json
import math
import numbers
import os
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .trl_flags import ANSWERS, answer

_TRUE = ("true", "yes", "t", "y", "1", "on")
_FALSE = ("false", "no", "f", "n", "0", "off")
_SWITCHED = {"resume_from_checkpoint": "latest"}  # text fields that may be true, which means this, or false: none

# (what is legal, in words, whether a value is, the fields that must be so). None and infinities never come here.
Rule = tuple[str, Callable[[float], bool], tuple[str, ...]]


def flag(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    aliases: Iterable[str] = (),
    secret: bool = False,
) -> Any:
    """A dataclass field that is a flag, in the form that `transformers.HfArgumentParser` reads; `secret`: never shown."""
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = choices
    if aliases:
        metadata["aliases"] = [f"--{name}" for name in aliases]
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


class Settings:
    """What every class of flags has: it answers names that are no field, wherever they are given or set.

    A value that is set later is read and held to its range like one that is given to the constructor. What follows from
    it (`eval_steps` from `logging_steps`) follows in the copies that `replace` and `frozen_copy` make, which are
    constructed anew from what was named.

    Attributes:
        notices: lines to show once, about flags in whose place something else stands.
    """

    _rules: tuple[Rule, ...] = ()

    @property
    def given(self) -> frozenset[str]:
        """The fields that somebody named, whatever their value; of all of them (`dataclasses.replace`) those not by default."""
        if len(self._named) < len(dataclasses.fields(self)):
            return frozenset(self._named)
        plain = type(self)()
        return frozenset(name for name in self._named if getattr(self, name) != getattr(plain, name))

    def __setattr__(self, name: str, value: Any) -> None:
        cls, state = type(self), self.__dict__.get("_state", "new")
        names = field_names(cls)
        if state == "new" or name == "notices":
            _set(self, **{name: value})
        elif state == "frozen":
            raise AttributeError(
                f"{name!r} cannot be set to {value!r}: these settings belong to a trainer that was made with them. Change a copy, "
                f"such as args.replace({name}=...), and make another trainer with it."
            )
        elif name in names:
            own = names[name]
            value = read_value(cls, own, value)
            check_rules({own: value}, cls._rules)
            _set(self, **{own: value}, _named=self._named | {own: value})
        elif name in ANSWERS:
            self.notices.extend(answer(name, value))
        else:
            raise AttributeError(f"{cls.__name__} has no field {name!r}{nearest(name, names)}.")

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


def flags_dataclass(cls: type | None = None, *, rules: Iterable[Rule] = ()) -> Any:
    """`dataclass` for a subclass of `Settings`, with a constructor that also answers what is not a field.

    Other names of a field set that field; flags that TRL has and this project has not are refused or noted in
    `notices`; any other name is a TypeError that names the nearest one.

    Args:
        cls: the class; None: a decorator for it is returned.
        rules: what numbers its fields may have.
    """
    if cls is None:
        return functools.partial(flags_dataclass, rules=tuple(rules))
    cls = dataclasses.dataclass(kw_only=True)(cls)
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self, **given):
        names = field_names(cls)
        known: dict[str, Any] = {}
        _set(self, notices=[], _state="new")
        for name, value in given.items():
            if name in names:
                if names[name] in known:
                    raise TypeError(f"{cls.__name__} got {names[name]!r} twice, once under another name; give it once.")
                known[names[name]] = value
            elif name in ANSWERS:
                self.notices.extend(answer(name, value))
            else:
                raise TypeError(f"{cls.__name__} has no field {name!r}{nearest(name, names)}.")
        _set(self, _named=known)
        generated(self, **known)
        _set(self, _state="made")

    cls.__init__, cls._rules = __init__, tuple(rules)
    return cls


def _set(settings: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(settings, name, value)


@functools.cache
def field_names(cls: type) -> Mapping[str, str]:
    """Every name that sets a field of `cls`, aliases too, with the field's own name."""
    names = {f.name: f.name for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        names |= {alias.removeprefix("--"): f.name for alias in f.metadata.get("aliases", ())}
    return names


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


def kinds(cls: type, name: str) -> tuple[type, ...]:
    """The plain types that a field takes, such as `(float, NoneType)`; `list[str]` counts as `list`."""
    hint = _hints(cls)[name]
    parts = (hint,) if typing.get_origin(hint) in (None, list, dict) else typing.get_args(hint)
    return tuple(typing.get_origin(part) or part for part in parts)


def nearest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean X?` for the name that is nearest, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; the nearest is {prefix}{close[0]}" if close else ""


def listed(value: Any) -> list[str]:
    """A list of names from a list, from text with commas or spaces, or from None."""
    if value is None:
        return []
    text = value if isinstance(value, str) else ",".join(str(part) for part in value)
    return text.replace(",", " ").split()


def check_fields(settings: Any) -> None:
    """Turn every field into its type and hold it to its choices and to the rules of its class.

    Raises:
        ValueError: naming the flag, the value and what is legal.
    """
    cls = type(settings)
    for f in dataclasses.fields(cls):
        value = getattr(settings, f.name)
        setattr(settings, f.name, read_value(cls, f.name, value))
    check_rules({f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)}, cls._rules)


def check_rules(values: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Hold values, by their fields' names, to the rules.

    Raises:
        ValueError: naming the flag, the value and what is legal.
    """
    for words, legal, names in rules:
        for name in names:
            value = values.get(name)
            if value is not None and not (math.isfinite(value) and legal(value)):
                raise ValueError(f"--{name} is {value}; it must be {words}.")


def read_value(cls: type, name: str, value: Any) -> Any:
    """The value of one field in the field's type, from Python, YAML or text.

    Raises:
        ValueError: naming the flag, the value and what is legal.
    """
    types = kinds(cls, name)
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    choices = field.metadata.get("choices")
    value = value.value if isinstance(value, enum.Enum) else value
    if name in _SWITCHED and str(value).lower() in ("true", "false"):
        value = _SWITCHED[name] if str(value).lower() == "true" else None
    if isinstance(value, str) and value.lower() in ("none", "null") and (str not in types or choices or dict in types):
        if choices and value in choices:
            return value
        value = None
    if value == "auto" and int in types:
        value = None  # TRL's word for "choose for me"
    if value is None and type(None) in types:
        return None
    if value is False and choices and "no" in choices:
        return "no"  # YAML reads a bare `no` as false
    try:
        value = _READERS[next(t for t in _READERS if t in types)](value)
    except (TypeError, ValueError):
        words = f"one of {', '.join(choices)}" if choices else _WORDS[next(t for t in _READERS if t in types)]
        raise ValueError(f"--{name} is {value!r}; it must be {words}.") from None
    if choices and value not in choices:
        raise ValueError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}.")
    return value


def check_folder(name: str, value: str | None) -> None:
    """Raises ValueError where a folder is named by an empty text, which would be the current one."""
    if value is not None and not value.strip():
        raise ValueError(f"--{name} is {value!r}; it must name a folder.")


def _read_dict(value: Any) -> dict:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


def _read_list(value: Any) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]  # what YAML makes of a single step
    if not isinstance(value, str | list | tuple):
        raise TypeError
    return listed(value)


def _read_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError
    return text in _TRUE


def _read_int(value: Any) -> int:
    number = _read_float(value)
    if not number.is_integer():
        raise ValueError
    return int(value) if isinstance(value, numbers.Integral) else int(number)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        raise TypeError
    return float(value)


def _read_str(value: Any) -> str:
    return os.fspath(value)


_READERS: dict[type, Callable[[Any], Any]] = {
    dict: _read_dict,
    list: _read_list,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
}
_WORDS = {
    dict: "a JSON object, such as '{\"name\": 1}'",
    list: "a list of names",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}

# How attention over whole sequences is computed: "auto", and the implementations of gold_jax.models.attention.
ATTENTION = ("auto", "plain", "blockwise", "cudnn", "splash")
# Shell patterns of what PyTorch's transformers calls its own; with a slash: kernels on the hub.
_TORCH_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_*", "paged|*", "*/*")

# Options of from_pretrained that place or speed up a PyTorch model and change no number here.
_PLACEMENT = ("device_map", "low_cpu_mem_usage", "use_cache", "trust_remote_code")


def read_attention(where: str, value: str | None) -> tuple[str | None, list[str]]:
    """One of `ATTENTION`, or None where nothing was said, and a notice where PyTorch's name has "auto" in its place.

    Raises:
        ValueError: a name that neither this project nor transformers has; `where` is what it begins with.
    """
    value = None if value is None or str(value).lower() in ("none", "null") else str(value)
    if value is None or value in ATTENTION:
        return value, []
    if any(fnmatch.fnmatchcase(value, pattern) for pattern in _TORCH_ATTENTION):
        taken = "plain, blockwise, cudnn or splash, by platform, model and length"
        return "auto", [f"{where}: {value} is PyTorch's; in its place stands auto ({taken})."]
    legal = f"one of {', '.join(ATTENTION)} (PyTorch's names, such as sdpa, count as auto)"
    raise ValueError(f"{where} is {value!r}; it must be {legal}{nearest(value, ATTENTION)}.")


def read_load_options(name: str, given: dict | None) -> tuple[dict[str, Any], list[str]]:
    """What `model_init_kwargs` of TRL holds of `dtype`, `revision` and `attn_implementation`, and notices about the rest.

    Raises:
        ValueError: for an option that would change the model and is not there.
    """
    options: dict[str, Any] = {}
    notices = []
    for key, value in (given or {}).items():
        if key in ("dtype", "torch_dtype"):
            dtype = str(value).removeprefix("torch.")
            if dtype not in ("auto", "float32", "bfloat16"):
                raise ValueError(f"--{name} has {key}={value!r}; it must be one of auto, float32, bfloat16.")
            options["dtype"] = dtype
        elif key == "revision":
            options["revision"] = value
        elif key == "attn_implementation":
            options[key], said = read_attention(f"--{name}: {key}", value)
            notices += said
        elif key in _PLACEMENT:
            notices.append(f"--{name}: {key} has no part here; JAX places and compiles the model.")
        else:
            raise ValueError(f"--{name} has {key!r}; it must hold only dtype, revision and attn_implementation.")
    return options, notices
