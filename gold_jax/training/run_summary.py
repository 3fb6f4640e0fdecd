"""`summary.json` in a run's folder: settings, data and models, environment, times, outcome and measures."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from gold_jax import progress
from gold_jax.config import SFTConfig
from gold_jax.json_files import read_json_object
from gold_jax.training.logging import SUMMARY
from gold_jax.training.model_card import shown_command
from gold_jax.training.signals import Preempted
from gold_jax.wording import shortened, without_passwords

_LIBRARIES = ("gold_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def settings_beside_defaults(args: SFTConfig) -> dict[str, Any]:
    """The settings that differ from the defaults, without secrets."""
    defaults, settings = type(args)().to_dict(), args.to_dict()
    for name in settings.keys() & {"model_init_kwargs", "teacher_model_init_kwargs"}:  # commands write all options
        settings[name] = {option: value for option, value in settings[name].items() if value is not None}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def environment() -> dict[str, Any]:
    """Versions of the libraries, and the devices and processes that JAX has."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    return {
        "versions": versions,
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


class RunSummary:
    """Keeps `summary.json` of one folder up to date (None: does nothing).

    `parts` has an entry for each time the run was started or resumed: command, environment, first and last update,
    times, and how it ended. File system errors are ignored: the run continues without the summary.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        facts: Mapping[str, Any] | None = None,
        command: Sequence[str] | None = None,
    ):
        self._path, self._facts = None if folder is None else pathlib.Path(folder) / SUMMARY, dict(facts or {})
        self._command = shown_command(command) if command else None
        self._parts: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def part(self, run_id: str, total: int, done: Callable[[], int], *, resumed: bool) -> Iterator[None]:
        """An entry of `parts`, written at the beginning and at the end of the context.

        Args:
            run_id: of the run; entries of another run are dropped.
            total: updates of the whole run.
            done: returns the number of updates made so far.
            resumed: whether earlier entries of the file stay.

        The entry's `how` becomes "finished", "interrupted", "preempted" or the error's type and text.
        """
        self._parts = self._parts_before(run_id) if resumed else []
        self._facts |= {"run_id": run_id, "total_updates": total}
        self._facts.pop("results", None)
        part = {"command": self._command, "started": _now(), **environment()}
        part |= {"from_update": done(), "to_update": done(), "ended": None}
        self._parts.append(part)
        self._write()
        began, before, how = time.monotonic(), progress.compiled(), "finished"
        try:
            yield
        except BaseException as error:
            named = {KeyboardInterrupt: "interrupted", Preempted: "preempted"}.items()
            failed = shortened(f"{type(error).__name__}: {error}", 500)
            how = next((name for kind, name in named if isinstance(error, kind)), failed)
            raise
        finally:
            programs, seconds = (now - then for now, then in zip(progress.compiled(), before))
            times = {"seconds": round(time.monotonic() - began, 1), "compiling_seconds": round(seconds, 1)}
            part |= {"to_update": done(), "ended": _now(), "how": how, "programs_compiled": programs, **times}
            self._write()

    def add(self, **facts: Any) -> None:
        """Adds facts of the whole run, beside `parts`."""
        self._facts |= facts
        self._write()

    def _parts_before(self, run_id: str) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        try:
            found = read_json_object(self._path)
        except ValueError:
            with contextlib.suppress(OSError):  # kept beside the one that is written now
                self._path.replace(self._path.with_suffix(".damaged.json"))
            return []
        except OSError:
            return []
        same = found.get("run_id") == run_id and isinstance(found.get("parts"), list)
        return found["parts"] if same else []

    def _write(self) -> None:
        if self._path is None:
            return
        summary = _without_nan(self._facts | {"parts": self._parts})
        text = json.dumps(summary, indent=1, ensure_ascii=False, default=str, allow_nan=False)
        with contextlib.suppress(OSError):
            unfinished = self._path.with_suffix(".json.new")
            # Paths that are not UTF-8 have surrogates in Python, which are written as escapes.
            unfinished.write_text(without_passwords(text) + "\n", encoding="utf-8", errors="backslashreplace")
            unfinished.replace(self._path)


def _without_nan(value: Any) -> Any:
    """A value with NaN and infinities, which JSON lacks, as strings."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
