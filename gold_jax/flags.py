"""The command line: flags and a YAML file into the dataclasses of `gold_jax.config`, with errors that help."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gold_jax.quickstart import PREFIX, resolve

from .fields import field_names, kinds, nearest, read_value
from .loss_spec import options_help
from .trl_flags import ANSWERS, answer


class FlagError(ValueError):
    """A command line or configuration file that cannot be run; the text is one paragraph."""


def parse_args(
    argv: Sequence[str] | None, *dataclass_types: type, prog: str = "gold_jax", doc: str | None = None
) -> list:
    """Read a command line; on an error, say it in one paragraph and exit with 2.

    Args:
        argv: the arguments after the program's name; None: those of this process.
        dataclass_types: what to fill, such as `ModelArguments, DataArguments, GOLDConfig`.
        prog: the program's name in help and errors.
        doc: what the program does, for `--help`.

    Returns:
        One instance for each type, then the list of notices: lines about accepted flags in whose place something
        else stands.
    """
    # Without this, transformers says on import that it misses PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return read_args(sys.argv[1:] if argv is None else argv, *dataclass_types, prog=prog, doc=doc)
    except FlagError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_args(argv: Sequence[str], *dataclass_types: type, prog: str = "gold_jax", doc: str | None = None) -> list:
    """As `parse_args`, but raises FlagError."""
    owner = {name: cls for cls in dataclass_types for name in field_names(cls)}
    given, files, wants_help = _split(list(argv))
    if wants_help:
        _help(dataclass_types, prog, doc)
    notices: list[str] = []
    from_file: dict[str, tuple[Any, str]] = {}
    for path in files:
        for name, value in _read_yaml(path).items():
            name = str(name).replace("-", "_")
            try:
                if name in owner:
                    own = field_names(owner[name])[name]
                    if own in from_file and from_file[own][1] == path:
                        raise ValueError(f"{name!r} sets {own}, which is there already; give it once.")
                    from_file[own] = (read_value(owner[name], own, value), path)
                elif name in ANSWERS:
                    # the command line may have switched it off
                    notices += [] if name in given else answer(name, value)
                else:
                    raise ValueError(f"{name!r} is no setting{nearest(name, [*owner, *ANSWERS])}.")
            except ValueError as error:
                raise FlagError(f"in {path}: {error}") from None
    try:
        canonical = _canonical(given, owner, notices)
        named = {name: value for name, (value, _) in from_file.items()} | canonical
        filled = [cls(**{n: v for n, v in named.items() if owner[n] is cls}) for cls in dataclass_types]
    except ValueError as error:
        flag = re.match(r"--(\w+)", str(error))
        name = flag.group(1) if flag else None
        where = f" (it stands in {from_file[name][1]})" if name in from_file and name not in given else ""
        raise FlagError(f"{error}{where}") from None
    for settings in filled:
        notices += settings.notices
    return [*filled, list(dict.fromkeys(notices))]


def _split(argv: list[str]) -> tuple[dict[str, list[str]], list[str], bool]:
    """Flags with the values that follow them (the last of repeated ones wins), configuration files, help wanted."""
    given: dict[str, list[str]] = {}
    files: list[list[str]] = []
    current: list[str] | None = None
    for token in argv:
        if token in ("-h", "--help"):
            return {}, [], True
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            current = [value] if equals else []
            if name == "config":
                files.append(current)
            else:
                given[name.replace("-", "_")] = current
        elif current is None:
            raise FlagError(f"{token!r} stands before any flag; values follow a flag, as in --output_dir {token}.")
        else:
            current.append(token)
    if any(len(found) != 1 for found in files):
        raise FlagError("--config needs the path of one YAML file.")
    return given, [path for (path,) in files], False


def _canonical(given: Mapping[str, list[str]], owner: Mapping[str, type], notices: list[str]) -> dict[str, str]:
    """Field name to its text; flags of other projects become notices."""
    canonical: dict[str, str] = {}
    said: dict[str, str] = {}  # the flag that each field was set by

    def settle(flag: str, own: str, text: str) -> None:
        if own in said:
            raise FlagError(f"--{flag} and --{said[own]} are one setting; give it once.")
        canonical[own], said[own] = text, flag

    for name, values in given.items():
        positive = name.removeprefix("no_")
        if name in owner:
            own = field_names(owner[name])[name]
            settle(name, own, _text(name, values, kinds(owner[name], own)))
        elif name in ANSWERS:
            notices += answer(name, " ".join(values) if values else True)
        elif positive in owner and bool in kinds(owner[positive], field_names(owner[positive])[positive]):
            if values:
                raise FlagError(f"--{name} takes no value, but {values[0]!r} follows it.")
            settle(name, field_names(owner[positive])[positive], "false")
        elif positive not in ANSWERS:  # what this project has not need not be switched off
            near = nearest(name, [*owner, *ANSWERS, "config"], prefix="--") or "; --help lists all"
            raise FlagError(f"there is no flag --{name}{near}.")
    return canonical


def _text(name: str, values: list[str], types: tuple[type, ...]) -> str:
    if bool in types and not values:
        return "true"
    if not values:
        raise FlagError(f"--{name} needs a value.")
    if list in types:
        return ",".join(values)
    if len(values) > 1:
        raise FlagError(f"--{name} takes one value, but {values[1]!r} follows {values[0]!r}; quote text with spaces.")
    return values[0]


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice; PyYAML by itself keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


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


def _help(dataclass_types: Sequence[type], prog: str, doc: str | None) -> None:
    """Print what all flags mean, and exit."""
    from transformers import HfArgumentParser  # slow to import, and only needed here

    parser = HfArgumentParser(dataclass_types, prog=prog, description=doc, allow_abbrev=False)
    if any("loss_kwargs" in field_names(cls) for cls in dataclass_types) and (options := options_help()):
        parser.epilog = f"--loss_kwargs: {options}.".replace("%", "%%")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same settings; flags win over it.")
    for action in parser._actions:
        if action.choices:
            action.metavar = "{" + ",".join(map(str, action.choices)) + "}"
    parser.parse_args(["--help"])
