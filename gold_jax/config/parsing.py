"""The command line and its YAML files into classes of flags, and errors that help."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

import gold_jax
from gold_jax.config.fields import Settings, field_names, groups, kinds, legal_texts, read_value
from gold_jax.config.trl_compat import ANSWERS, answer, nearest
from gold_jax.loss_spec import options_help
from gold_jax.quickstart import resolve_embedded
from gold_jax.wording import quoted, shortened

_MOST_ALIASES = 20  # of a YAML file: those of a few more, one within another, make gigabytes of some lines
_SHORT = 40  # a command with at most so many flags shows them all in --help
Fields = Mapping[str, tuple[type[Settings], dataclasses.Field]]  # every name of a flag, with its class and its field


class FlagError(ValueError):
    """A command line or configuration file that cannot be run; the text is one paragraph of not too many characters."""

    def __init__(self, text: str):
        super().__init__(text if len(text) <= 2000 else shortened(text))


class HelpRequested(Exception):
    """--help or --version was there; the text is what it shows."""


def parse_args(
    argv: Sequence[str] | None,  # the arguments after the program's name; None: those of this process
    *classes: type[Settings] | tuple[type[Settings], ...],  # of a tuple the first that has all fields that are named
    prog: str = "gold_jax",
    doc: str | None = None,
) -> list:
    """Reads a command line, and the files that its --config names, into one instance of each of `classes`, and notices.

    Each class of a tuple extends the one before. `prog` and `doc` are for `--help`.

    Raises:
        FlagError: a name that is no flag, or a value that is not legal.
        HelpRequested: --help or --version is there.
    """
    choices = [c if isinstance(c, tuple) else (c,) for c in classes]
    widest = [c[-1] for c in choices]
    fields = {n: (cls, cls.__dataclass_fields__[own]) for cls in widest for n, own in field_names(cls).items()}
    leading, *flags = _split(sys.argv[1:] if argv is None else argv)
    for name, words in flags:
        if name == "help":
            raise HelpRequested(help_text(words[0] if words else "", widest, prog, doc))
        if name == "version" and name not in fields:
            raise HelpRequested(f"gold_jax {gold_jax.__version__}\n")
    if before := leading[1]:
        follow = f"values follow a flag, as in --output_dir {quoted(before[0], plain=True)}"
        raise FlagError(f"{quoted(before[0])} stands before any flag; {follow}.")
    given: dict[str, list[str]] = {}
    for name, words in flags:  # of repeated flags the last counts, of those that are verbatim all
        adds = name in fields and fields[name][1].metadata["verbatim"]
        given[name] = [*given.get(name, ()), *words] if adds else words
    given.pop("config", None)
    files = [words for name, words in flags if name == "config"]
    if any(len(words) != 1 for words in files):
        raise FlagError("--config needs the path of one YAML file.")
    notices, named, source, filled = [], {}, {}, []
    for (path,) in files:
        values = _read_file(path, fields, given, notices)
        named |= values
        source |= dict.fromkeys(values, path)
    try:
        named |= _by_field(given, fields, notices)
        for choice in choices:
            own = {name: value for name, value in named.items() if fields[name][0] is choice[-1]}
            filled.append(next(cls for cls in choice if own.keys() <= field_names(cls).keys())(**own))
    except ValueError as error:
        flag = re.match(r"--(\w+)", str(error))
        name = flag and flag[1]
        where = f" (it stands in {source[name]})" if name in source and name not in given else ""
        raise FlagError(f"{error}{where}") from None
    for settings in filled:
        notices += settings.notices
    return [*filled, list(dict.fromkeys(notices))]


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags, with `_` for `-`, each with the values that follow it; what stands before any flag follows "".

    A value may begin with a dash, and with two if it holds a blank or comes after `=`.
    """
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        flag = re.fullmatch(r"--([^=\s]+)(?:=(.*))?", "--help" if word == "-h" else word, re.DOTALL)
        if flag:
            found.append((flag[1].replace("-", "_"), [] if flag[2] is None else [flag[2]]))
        else:
            found[-1][1].append(word)
    return found


def _by_field(given: Mapping[str, list[str]], fields: Fields, notices: list[str]) -> dict[str, Any]:
    """The values of a command line by their fields' names; `notices` gets those about flags of other projects."""
    values, said = {}, {}  # and the flag that each field was set by
    for name, words in given.items():
        flag = name if name in fields or name in ANSWERS else name.removeprefix("no_")
        cls, field = fields.get(flag, (None, None))
        types = kinds(cls, field.name) if field else (bool,) if flag in ANSWERS else ()
        if not types or (flag != name and bool not in types):
            near = nearest(name, [*fields, *ANSWERS, "config"], prefix="--") or "; --help all lists them"
            raise FlagError(f"there is no flag --{name}{near}.")
        if not field:
            notices += answer(name, " ".join(words) if words else True) if flag == name else []
            continue
        if field.name in said:
            raise FlagError(f"--{name} and --{said[field.name]} are one setting; give it once.")
        said[field.name] = name
        if flag != name and words:
            raise FlagError(f"--{name} takes no value, but {quoted(words[0])} follows it.")
        if not words and bool not in types:
            raise FlagError(f"--{name} needs a value.")
        if len(words) > 1 and list not in types:
            said_words = (
                "another follows it" if field.metadata["secret"] else "{1} follows {0}".format(*map(quoted, words))
            )
            raise FlagError(f"--{name} takes one value, but {said_words}; quote text with spaces.")
        values[field.name] = flag == name if not words else words if list in types else words[0]
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice, of which PyYAML by itself keeps the last, and aliases are few and end somewhere."""

    aliases = 0

    def compose_node(self, parent, index):
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.aliases += is_alias
        if self.aliases > _MOST_ALIASES:
            raise yaml.YAMLError(f"it has more than {_MOST_ALIASES} aliases (*name); write the values out")
        if is_alias and node.end_mark is None:  # which is not yet read to its end
            raise yaml.YAMLError("a value contains itself; write it out")
        return node

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {quoted(twice)} is there twice")
        return super().construct_mapping(node, deep)


def _read_file(path: str, fields: Fields, given: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """The values of a YAML file by their fields' names; `notices` gets those about flags of other projects."""
    values: dict[str, Any] = {}
    for name, value in _read_yaml(path).items():
        name = str(name).replace("-", "_")
        try:
            if name in fields:
                cls, field = fields[name]
                if field.name in values:
                    raise ValueError(f"{name!r} sets {field.name}, which is there already; give it once.")
                values[field.name] = read_value(cls, field.name, value)
            elif name not in ANSWERS:
                raise ValueError(f"{quoted(name)} is not a setting{nearest(name, [*fields, *ANSWERS])}.")
            elif name not in given and f"no_{name}" not in given:  # else the command line has the word
                notices += answer(name, value)
        except ValueError as error:
            raise FlagError(f"in {path}: {error}") from None
    return values


def _read_yaml(path: str) -> Mapping[str, Any]:
    try:
        path = str(resolve_embedded(path))
    except (ValueError, FileNotFoundError) as error:
        raise FlagError(f"--config: {error}") from None
    if not os.path.isfile(path):
        raise FlagError(f"--config names {path}, which is not a file.")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # no date, no UTF-8, a number of thousands of digits
        raise FlagError(f"{path} is not YAML: {quoted(' '.join(str(error).split()), plain=True)}.") from None
    except RecursionError:
        raise FlagError(
            f"{path} is nested too deeply to be read; settings are lines such as `learning_rate: 1e-7`."
        ) from None
    if content is not None and not isinstance(content, Mapping):
        raise FlagError(f"{path} holds a {type(content).__name__}; it must hold lines such as `learning_rate: 1e-7`.")
    return content or {}


def help_text(wanted: str, classes: Sequence[type[Settings]], prog: str = "gold_jax", doc: str | None = None) -> str:
    """What --help shows: nothing wanted, the flags that matter first; else those of a group, or `all`."""
    members = {group_name(owner): (cls, owner, found) for cls in classes for owner, found in groups(cls).items()}
    if wanted not in ("", "all", *members):
        near = nearest(wanted, members)
        raise FlagError(f"--help {wanted} is not a group{near}; there are {', '.join(members)} and all.")
    count = sum(len(found) for *_, found in members.values())
    short = not wanted and count > _SHORT
    more = f"{count} flags in all: --help all, or --help GROUP with one of\n  {', '.join(members)}" if short else None
    style: dict[str, Any] = dict(formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser = argparse.ArgumentParser(prog, f"{prog} --FLAG VALUE …", doc, more, **style)
    for name, (cls, owner, found) in members.items():
        about = (owner.__doc__ or "").partition("\n")[0].rstrip(".")
        group = parser.add_argument_group(f"{name}: {about}")
        for field in found if wanted in ("", "all", name) else ():
            if short and not field.metadata["important"]:
                continue
            names = [f"--{name}" for name, own in field_names(cls).items() if own == field.name]
            options = options_help() if field.name == "loss_kwargs" else ""
            said = f"{field.metadata['help']} [{default_text(field)}] {options}".strip().replace("%", "%%")
            group.add_argument(*names, metavar=values_text(cls, field), help=said)
    group = parser.add_argument_group("help, and settings in a file")
    says = "Show the flags that matter most, those of a group (--help optimizer), or all (--help all)."
    group.add_argument("--help", "-h", metavar="[GROUP]", help=says)
    group.add_argument("--config", metavar="FILE", help="YAML file with the same settings; flags win over it.")
    return parser.format_help()


def group_name(owner: type) -> str:
    """What --help calls the flags that a class declares: `OptimizerFlags` is `optimizer`."""
    return re.sub("(Flags|Arguments|Config)$", "", owner.__name__).lower()


def default_text(field: dataclasses.Field) -> str:
    """A field's default as it is written on the command line."""
    return str(field.default).lower() if field.default in (None, True, False) else str(field.default)


def values_text(cls: type[Settings], field: dataclasses.Field) -> str:
    """What may follow a flag."""
    several = "TEXT [TEXT …]" if field.metadata["verbatim"] else "NAMES"
    words = {dict: "JSON", list: several, bool: "[true|false]", int: "N", float: "X", str: "TEXT"}
    return "|".join(legal_texts(field)) or next(words[t] for t in words if t in kinds(cls, field.name))
