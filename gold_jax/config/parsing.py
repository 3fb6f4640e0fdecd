"""The command line and its YAML file into classes of flags, with `argparse`, and errors that help."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gold_jax.loss_spec import options_help
from gold_jax.quickstart import PREFIX, resolve

from .fields import Settings, field_names, groups, kinds, read_value
from .trl_compat import ANSWERS, answer, nearest

_SHORT = 40  # a command with at most so many flags shows them all in --help


class FlagError(ValueError):
    """A command line or configuration file that cannot be run; the text is one paragraph."""


class HelpRequested(Exception):
    """--help was there; the text is what it shows."""


def parse_args(
    argv: Sequence[str] | None,
    *classes: type[Settings] | tuple[type[Settings], ...],
    prog: str = "gold_jax",
    doc: str | None = None,
) -> list:
    """Reads a command line and the files that its --config names.

    Args:
        argv: the arguments after the program's name; None: those of this process.
        classes: what to fill, such as `ModelArguments, DataArguments, GOLDConfig`; of a tuple, each extending the one
            before, the first that has all fields that are named.
        prog: the program's name in help.
        doc: what the program does, for `--help`.

    Returns:
        One instance for each class, then the list of notices: lines about accepted flags in whose place something else
        stands.

    Raises:
        FlagError: a name that is no flag, or a value that is not legal.
        HelpRequested: --help is there.
    """
    choices = [c if isinstance(c, tuple) else (c,) for c in classes]
    widest = [c[-1] for c in choices]
    owner = {name: cls for cls in widest for name in field_names(cls)}
    given, files = _read_command_line(sys.argv[1:] if argv is None else argv, widest, prog, doc)
    notices: list[str] = []
    source: dict[str, str] = {}
    named: dict[str, Any] = {}
    for path in files:
        values, said = _read_settings(path, owner, given)
        notices += said
        named |= values
        source |= dict.fromkeys(values, path)
    try:
        values, said = _by_field(given, owner)
        notices += said
        named |= values
        filled = []
        for choice in choices:
            own = {name: value for name, value in named.items() if owner[name] is choice[-1]}
            filled.append(next(cls for cls in choice if own.keys() <= field_names(cls).keys())(**own))
    except ValueError as error:
        flag = re.match(r"--(\w+)", str(error))
        name = flag.group(1) if flag else None
        where = f" (it stands in {source[name]})" if name in source and name not in given else ""
        raise FlagError(f"{error}{where}") from None
    for settings in filled:
        notices += settings.notices
    return [*filled, list(dict.fromkeys(notices))]


class _Collect(argparse.Action):
    """Keeps a flag's values under the name that was written; of repeated ones the last, of those that are verbatim all."""

    def __call__(self, parser, namespace, values, option_string=None):
        name = (option_string or "").removeprefix("--")
        adds = self.const and name in namespace.given
        namespace.given[name] = [*namespace.given[name], *values] if adds else values


class _Help(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise HelpRequested(values)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action, default_metavar):  # nargs is "*" so that `_by_field` can say what is wrong
        return action.metavar


def _parser(classes: Sequence[type[Settings]], shown: Sequence[str], **options: Any) -> argparse.ArgumentParser:
    """A parser of the classes' flags and of `ANSWERS`, whose help has the fields that are `shown`."""
    parser = argparse.ArgumentParser(**options, add_help=False, allow_abbrev=False, formatter_class=_Formatter)
    # Whatever begins with a single dash is a value (argparse takes numbers such as -1 alone for one).
    parser._negative_number_matcher = re.compile("-[^-]")
    unlisted = [prefix + name for name in ANSWERS for prefix in ("", "no_")]
    for cls in classes:
        for owner, fields in groups(cls).items():
            about = (owner.__doc__ or "").partition("\n")[0].rstrip(".")
            group = parser.add_argument_group(f"{group_name(owner)}: {about}")
            for field in fields:
                own = [name for name, of in field_names(cls).items() if of == field.name]
                said = f"{field.metadata['help']} [{default_text(field)}]"
                if field.name == "loss_kwargs" and field.name in shown and (known := options_help()):
                    said += f" {known}"
                group.add_argument(
                    *(f"--{name}" for name in own),
                    nargs="*",
                    action=_Collect,
                    const=field.metadata["verbatim"],
                    metavar=values_text(cls, field),
                    help=said.replace("%", "%%") if field.name in shown else argparse.SUPPRESS,
                )
                unlisted += [f"no_{name}" for name in own if bool in kinds(cls, field.name)]
    for name in unlisted:
        parser.add_argument(f"--{name}", nargs="*", action=_Collect, metavar="", help=argparse.SUPPRESS)
    more = parser.add_argument_group("help, and settings in a file")
    says = "Show the flags that matter most, those of a group (--help optimizer), or all (--help all)."
    more.add_argument("--help", "-h", metavar="[GROUP]", nargs="?", const="", action=_Help, help=says)
    says = "YAML file with the same settings; flags win over it."
    more.add_argument("--config", metavar="FILE", nargs="*", action="append", default=[], help=says)
    return parser


def _read_command_line(
    argv: Sequence[str], classes: Sequence[type[Settings]], prog: str, doc: str | None
) -> tuple[dict[str, list[str]], list[str]]:
    """Flags as they are written with the values that follow them, and configuration files."""
    # --gradient-checkpointing is --gradient_checkpointing
    words = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    try:
        found, rest = _parser(classes, ()).parse_known_args(words, argparse.Namespace(given={}))
    except HelpRequested as wanted:
        raise HelpRequested(help_text(str(wanted), classes, prog, doc)) from None
    unknown = next((word[2:].partition("=")[0] for word in rest if word.startswith("--") and word != "--"), None)
    if unknown is not None:
        names = [name for cls in classes for name in field_names(cls)]
        near = nearest(unknown, [*names, *ANSWERS, "config"], prefix="--") or "; --help all lists them"
        raise FlagError(f"there is no flag --{unknown}{near}.")
    if rest:
        raise FlagError(f"{rest[0]!r} stands before any flag; values follow a flag, as in --output_dir {rest[0]}.")
    if any(len(paths) != 1 for paths in found.config):
        raise FlagError("--config needs the path of one YAML file.")
    return found.given, [path for (path,) in found.config]


def _by_field(given: Mapping[str, list[str]], owner: Mapping[str, type[Settings]]) -> tuple[dict[str, Any], list[str]]:
    """The values of a command line by their fields' names, and notices about flags of other projects."""
    values: dict[str, Any] = {}
    said: dict[str, str] = {}  # the flag that each field was set by
    notices: list[str] = []
    for name, words in given.items():
        flag = name if name in owner or name in ANSWERS else name.removeprefix("no_")
        if flag not in owner:
            notices += answer(name, " ".join(words) if words else True) if flag == name else []
            continue
        own = field_names(owner[flag])[flag]
        if own in said:
            raise FlagError(f"--{name} and --{said[own]} are one setting; give it once.")
        said[own] = name
        types = kinds(owner[flag], own)
        if flag != name and words:
            raise FlagError(f"--{name} takes no value, but {words[0]!r} follows it.")
        if not words and bool not in types:
            raise FlagError(f"--{name} needs a value.")
        if len(words) > 1 and list not in types:
            raise FlagError(f"--{name} takes one value, but {words[1]!r} follows {words[0]!r}; quote text with spaces.")
        values[own] = flag == name if not words else words if list in types else words[0]
    return values, notices


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice; PyYAML by itself keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


def _read_settings(
    path: str, owner: Mapping[str, type[Settings]], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The values of a YAML file by their fields' names, and notices about flags of other projects that are not in `given`."""
    values: dict[str, Any] = {}
    notices: list[str] = []
    for name, value in _read_yaml(path).items():
        name = str(name).replace("-", "_")
        try:
            if name in owner:
                own = field_names(owner[name])[name]
                if own in values:
                    raise ValueError(f"{name!r} sets {own}, which is there already; give it once.")
                values[own] = read_value(owner[name], own, value)
            elif name not in ANSWERS:
                raise ValueError(f"{name!r} is no setting{nearest(name, [*owner, *ANSWERS])}.")
            elif name not in given and f"no_{name}" not in given:  # else the command line has the word
                notices += answer(name, value)
        except ValueError as error:
            raise FlagError(f"in {path}: {error}") from None
    return values, notices


def _read_yaml(path: str) -> Mapping[str, Any]:
    if path.startswith(PREFIX):
        try:
            path = str(resolve(path))
        except (ValueError, FileNotFoundError) as error:
            raise FlagError(f"--config: {error}") from None
    if not os.path.isfile(path):
        raise FlagError(f"--config names {path}, which is not a file.")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlagError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise FlagError(f"{path} holds a {type(content).__name__}; it must hold lines such as `learning_rate: 1e-7`.")
    return content


# Help.


def help_text(wanted: str, classes: Sequence[type[Settings]], prog: str = "gold_jax", doc: str | None = None) -> str:
    """What --help shows: nothing wanted, the flags that matter first; else those of a group, or `all`.

    Raises:
        FlagError: there is no such group.
    """
    members = {group_name(owner): fields for cls in classes for owner, fields in groups(cls).items()}
    shown = [field for fields in members.values() for field in fields]
    more = ""
    if wanted in members:
        shown = members[wanted]
    elif wanted not in ("", "all"):
        raise FlagError(
            f"--help {wanted} is no group{nearest(wanted, members)}; there are {', '.join(members)} and all."
        )
    elif not wanted and len(shown) > _SHORT:
        more = f"{len(shown)} flags in all: --help all, or --help GROUP with one of\n  {', '.join(members)}"
        shown = [field for field in shown if field.metadata["important"]]
    usage = f"{prog} --FLAG VALUE …"
    return _parser(classes, [f.name for f in shown], prog=prog, usage=usage, description=doc, epilog=more).format_help()


def group_name(owner: type) -> str:
    """What --help calls the flags that a class declares: `OptimizerFlags` is `optimizer`."""
    return re.sub("(Flags|Arguments|Config)$", "", owner.__name__).lower()


def default_text(field: dataclasses.Field) -> str:
    """A field's default as it is written on the command line."""
    return str(field.default).lower() if field.default in (None, True, False) else str(field.default)


def values_text(cls: type[Settings], field: dataclasses.Field) -> str:
    """What may follow a flag."""
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    kind = next(t for t in (dict, list, bool, int, float, str) if t in kinds(cls, field.name))
    return {dict: "JSON", list: "NAMES", bool: "[true|false]", int: "N", float: "X", str: "TEXT"}[kind]
