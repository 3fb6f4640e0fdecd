"""Compiled programs kept for later runs: JAX's persistent compilation cache, on in the commands, off in the library.

Compiling is most of what a short run does, and a resumed run compiles what the first one did. Programs that call back to
the host, as sorting large vocabularies with numpy on CPUs does (`--uld_sort host`), JAX compiles anew in each process.

Nothing here imports JAX when it is imported: a command answers `--help` before JAX is there.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

from gold_jax.wording import shortened

MOST_BYTES = 4 * 2**30  # of a local folder; the programs used least recently are removed
SHORTEST = 0.2  # seconds of compiling below which a program is not kept
_OFF = "none"
_SHARED = ".compiled"  # in a bucket, beside the checkpoints of several processes
_before: dict[str, Any] = {}  # JAX's settings, where `keep_compiled` has changed them


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Afterwards JAX's settings are what they were, whatever `keep_compiled` has done within."""
    try:
        yield
    finally:
        if _before:
            _set(**_before)
        _before.clear()


def keep_compiled(folder: str | None, checkpoints: str | None = None) -> list[str]:
    """Has JAX keep what it compiles, from now on: in `folder`, or where none is named, in one of the user's.

    That is `$JAX_COMPILATION_CACHE_DIR` as JAX reads it, else `gold_jax/xla` among the user's caches, in a folder for
    this kind of processor. Of several processes the first alone writes, and all must read the same: they keep programs
    in `checkpoints` if that is a bucket, else in no folder that is not named. "none" keeps nothing.

    Returns:
        Notices: that programs are not kept, where the folder cannot be written to.
    """
    import jax

    if folder is None and jax.config.jax_compilation_cache_dir:
        return []
    if folder is None and jax.process_count() == 1:
        folder = default_folder()
    elif folder is None:
        in_bucket = checkpoints is not None and "://" in checkpoints
        folder = f"{checkpoints.rstrip('/')}/{_SHARED}" if in_bucket else _OFF
    if folder == _OFF:
        _set(jax_enable_compilation_cache=False)
        return []
    settings: dict[str, Any] = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": folder}
    if "://" not in folder:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written to")
        except OSError as error:
            return [f"compiled programs are not kept for later runs ({shortened(str(error))})"]
        settings["jax_compilation_cache_max_size"] = MOST_BYTES
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings["jax_persistent_cache_min_compile_time_secs"] = SHORTEST
    _set(**settings)
    return []


def _set(**settings: Any) -> None:
    """Changes settings of JAX, which looks at them once, when it first compiles, unless it is told to look again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    for name, value in settings.items():
        _before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def default_folder() -> str:
    """Among the user's caches; its own for each kind of processor, whose programs no other may be able to run."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return str(pathlib.Path(caches).expanduser() / "gold_jax" / "xla" / _processor())


def _processor() -> str:
    """The kind of processor, and a digest of the instructions that it has."""
    try:
        with open("/proc/cpuinfo") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
