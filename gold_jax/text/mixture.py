"""Several data sets as one: the entries of `--datasets`, which TRL's YAML files list under `datasets:`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gold_jax.text.data import Examples, load_examples
from gold_jax.text.json_rows import JsonRows
from gold_jax.text.row_formats import READABLE
from gold_jax.wording import plural


def load_mixture(entries: Sequence[Mapping[str, Any]], **options: Any) -> Examples:
    """The rows of several data sets, one after another; options and errors as `load_examples`.

    Where entries have a `fraction` (all or none), the first rows of each are taken, as many in all as these shares allow
    without a row coming twice.
    """
    parts = [_load_entry(entry, entry.get("split") or "train", **options) for entry in entries]
    if shares := [entry["fraction"] for entry in entries if entry.get("fraction")]:
        weights = [share / sum(shares) for share in shares]
        total = min(len(part) / weight for part, weight in zip(parts, weights))
        counts = [round(weight * total) for weight in weights]
        for entry in (entry for entry, count in zip(entries, counts) if not count):
            share = f"the fraction {entry['fraction']:g} of {entry['path']} comes to no row"
            raise ValueError(f"--datasets: {share} beside {sum(counts):,} of the others; raise it, or leave it out")
        parts = [part.first(count) for part, count in zip(parts, counts)]
    names = [f"{plural(len(part), 'row')} of {entry['path']}" for part, entry in zip(parts, entries)]
    return Examples(JsonRows(parts), "the mixture", check_first=False, notices=[f"the mixture has {', '.join(names)}"])


def load_evaluations(entries: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Examples]:
    """The rows of each `eval_split` by the data set's `name`, else the stem of its path; ValueError where two are alike."""
    found = {}
    for entry in entries:
        if entry.get("eval_split"):
            name = str(entry.get("name") or pathlib.PurePath(entry["path"]).stem)
            if name in found:
                two = f"--datasets evaluates on two data sets of the name {name!r}"
                raise ValueError(f"{two}; give one of them another `name`")
            found[name] = _load_entry(entry, entry["eval_split"], **options)
    return found


def _load_entry(entry: Mapping[str, Any], split: str, **options: Any) -> Examples:
    columns = entry.get("columns")
    if isinstance(columns, Mapping):
        options["renamed"] = columns
    elif columns:  # only these are read
        options["renamed"] = {name: name if name in columns else None for name in READABLE}
    given: dict[str, Any] = options | {"config": entry.get("name"), "split": split}
    given |= {key: entry.get(key) for key in ("data_files", "data_dir")}
    return load_examples(entry["path"], **given)
