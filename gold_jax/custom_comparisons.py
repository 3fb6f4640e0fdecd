"""User-defined comparisons, registered by name from outside the package."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gold_jax.loss_spec import PRESETS, comparisons
from gold_jax.wording import quoted


def register_comparison(
    name: str,
    function: Callable | None = None,
    *,
    reads_text: bool = False,
    projects: bool = False,
    on_policy: bool = False,
) -> Callable:
    """Registers a function as the comparison `name`, for `LossSpec`, `GOLDConfig`, `--compare` and `--loss` in this process.

    Also a decorator, `@register_comparison("skew_kl")`. Registering a name again replaces its function for losses made
    afterwards, so that a notebook cell can be run twice. What the function takes from outside itself, such as a global,
    is compiled in when a loss is first computed: after a change there, register it again.

    Args:
        name: any but that of a built-in loss.
        function: `fn(student, teacher, overlap, *, options) -> (loss [], parts {name: []})` of one group's
            `GroupDistribution`s, like the functions of `losses.compare`. Its keyword-only arguments are its options, each
            with a type and a default.
        reads_text, projects, on_policy: what it reads and requires, see `losses.compare.Comparison`.

    Returns:
        The function.

    Raises:
        ValueError: the name is that of a built-in loss, or the function does not return scalars.
        TypeError: an option has no type or no default.
    """
    if function is None:
        flags = dict(reads_text=reads_text, projects=projects, on_policy=on_policy)
        return functools.partial(register_comparison, name, **flags)
    import jax
    import jax.numpy as jnp

    from gold_jax.losses.compare import Comparison, GroupDistribution, Overlap

    table: Any = comparisons()
    if not name or name in PRESETS or (name in table and table[name].built_in):
        raise ValueError(f"a comparison cannot be called {name!r}: there is a loss of that name; choose another")
    comparison = Comparison(function, reads_text, projects, on_policy, built_in=False)

    def one_group(*logp):
        return comparison.bind()(*(GroupDistribution.single_token(x, matched=2) for x in logp), Overlap(2))

    found = jax.eval_shape(one_group, *[jax.ShapeDtypeStruct((3,), jnp.float32)] * 2)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
        raise ValueError(f"the comparison {name!r} returns {quoted(found)}; it must return (loss, {{name: part}})")
    if wrong := [x.shape for x in jax.tree.leaves(found) if x.shape]:
        raise ValueError(
            f"the comparison {name!r} returns an array {wrong[0]}; loss and parts are scalars of one group"
        )
    table[name] = comparison
    return function


def load_comparison(name: str) -> None:
    """Imports the comparison `MODULE:FUNCTION` or `FILE.py:FUNCTION` and registers it under this name, unless it is already.

    A module may be in the working directory. The attribute may also be a `losses.compare.Comparison`. A file that has
    changed is read again; a module is imported once, as everywhere in Python.
    ValueError: it cannot be imported, or is not a comparison.
    """
    from gold_jax.losses.compare import Comparison

    table: Any = comparisons()
    where, _, attribute = name.rpartition(":")
    try:
        source = pathlib.Path(where).read_bytes() if where.endswith(".py") else None
    except OSError:  # raised again by the import below, unless the comparison is registered already
        source = None
    if name in table and (table[name].source is None or source in (None, table[name].source)):
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a module prints is no part of a command's output
            found = getattr(_import(where, source), attribute)
        given = found if isinstance(found, Comparison) else Comparison(found)
        flags = dict(reads_text=given.reads_text, projects=given.projects, on_policy=given.on_policy)
        register_comparison(name, given.function, **flags)
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and a script may end the process
        reason = quoted(f"{type(error).__name__}: {error}", plain=True)
        raise ValueError(
            f"the comparison {name!r} cannot be loaded ({reason}); docs/add-a-loss.md shows one"
        ) from error
    table[name] = dataclasses.replace(table[name], source=source)


def _import(where: str, source: bytes | None) -> Any:
    """A module by its name, as `python -m` finds it, or by the path of its file, of this source (None: to be read)."""
    if where.endswith(".py"):
        # Under a name that no import has, where dataclasses and pickles look for a class's module.
        spec: Any = importlib.util.spec_from_file_location(where, where)
        module = sys.modules[where] = importlib.util.module_from_spec(spec)
        try:
            # Not its cached bytecode: Python takes that of a file which changed within a second and kept its size.
            code = spec.loader.source_to_code(pathlib.Path(where).read_bytes() if source is None else source, where)
            exec(code, module.__dict__)
        except BaseException:
            del sys.modules[where]  # as Python does with a module that fails
            raise
        return module
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(where)
