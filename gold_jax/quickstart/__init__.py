"""Two tiny models with different tokenizers and a task to learn, all part of the package.

`embedded:teacher` writes numbers in words, `embedded:student` answers in the right form with the wrong words, and
`embedded:task` holds the questions. `tools/quickstart` beside the package makes all of them from nothing.
"""

import pathlib
from typing import Any

ASSETS = pathlib.Path(__file__).parent / "assets"
PREFIX = "embedded:"
_PATHS = {"teacher": "teacher", "student": "student", "task": "task", "quickstart": "quickstart.yaml"}


def resolve(name: str) -> pathlib.Path:
    """Where something that comes with the package lies.

    That is `embedded:teacher` or `embedded:student` (model folders), `embedded:task` (a folder with train.jsonl and
    test.jsonl) or `embedded:quickstart` (the YAML file that trains the one from the other).

    Raises:
        ValueError: there is nothing of that name.
        FileNotFoundError: the package was installed without it.
    """
    relative = _PATHS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if relative is None:
        known = ", ".join(PREFIX + n for n in _PATHS)
        raise ValueError(f"nothing is embedded under the name {name!r}; there are {known}")
    path = ASSETS / relative
    if not path.exists():
        raise FileNotFoundError(
            f"{name} should lie in {path}, which is not there: this installation lacks the package's data. Install gold_jax "
            "again, or make the data with python -m tools.quickstart.build in a checkout"
        )
    return path


def shown_name(name: str) -> str:
    """A path as messages show it: one of the package's own as the `embedded:…` name that stands for it."""
    path = pathlib.Path(name)
    return f"{PREFIX}{path.name}" if path.parent == ASSETS and path.name in _PATHS else name


def resolve_embedded(source: Any) -> Any:
    """Where something lies that an `embedded:…` name stands for; everything else as it is."""
    return resolve(source) if isinstance(source, str) and source.startswith(PREFIX) else source
