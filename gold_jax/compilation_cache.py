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
import uuid
from collections.abc import Iterator
from typing import Any

from gold_jax.wording import quoted, shortened

MOST_BYTES = 4 * 2**30  # of a local folder; the programs used least recently are removed
SHORTEST = 0.2  # seconds of compiling below which a program is not kept
_PROBE = 64 * 2**10  # bytes that are written to see whether there is room
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
        Notices: that programs are not kept, where the folder of the user's cannot be written to, or where JAX's cache is
        switched off (`JAX_ENABLE_COMPILATION_CACHE`), which is left so.

    Raises:
        ValueError: `folder` cannot be written to.
    """
    import jax

    named = folder is not None and folder != _OFF
    if not jax.config.jax_enable_compilation_cache:
        off = f"JAX_ENABLE_COMPILATION_CACHE is off: --compilation_cache {folder} has no effect"
        return [off] if named else []
    if folder is None and jax.config.jax_compilation_cache_dir:
        return []
    try:
        if folder is None and jax.process_count() == 1:
            folder = default_folder()
        elif folder is None:
            in_bucket = checkpoints is not None and "://" in checkpoints
            folder = f"{checkpoints.rstrip('/')}/{_SHARED}" if in_bucket else _OFF
        if folder == _OFF:
            _set(jax_enable_compilation_cache=False)
            return []
        is_local = "://" not in folder
        if is_local:
            folder = str(pathlib.Path(folder).expanduser().absolute())
        if is_local or (named and jax.process_index() == 0):
            _write_into(folder)
        if is_local:
            _write_missing_access_times(pathlib.Path(folder))
    except Exception as error:  # of a file system, of what reads buckets, or no home
        why = shortened(f"{type(error).__name__}: {error}")
        if named:
            remedy = "name a folder that can be written to, or none"
            raise ValueError(
                f"--compilation_cache is {quoted(folder)}, which cannot be used ({why}); {remedy}"
            ) from error
        return [f"compiled programs are not kept for later runs ({why})"]
    settings: dict[str, Any] = {"jax_persistent_cache_min_compile_time_secs": SHORTEST}
    if is_local:
        settings["jax_compilation_cache_max_size"] = MOST_BYTES
    settings = {name: value for name, value in settings.items() if name.upper() not in os.environ}
    _set(jax_compilation_cache_dir=folder, **settings)
    return []


def _write_into(folder: str) -> None:
    """Makes the folder, writes a file into it and removes it again; whatever error that gives."""
    from etils import epath

    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"0" * _PROBE)
    finally:
        probe.unlink(missing_ok=True)


def _write_missing_access_times(folder: pathlib.Path) -> None:
    """Gives programs the file that says when they were last used, without which JAX writes nothing where sizes are bounded.

    Programs lack it where JAX kept them without a bound, and where a process was killed between the two.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another process has removed it meanwhile
            if not used.exists() or used.stat().st_size != 8:
                used.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


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
    return str(user_caches() / "xla" / _processor())


def user_caches() -> pathlib.Path:
    """This package's folder among the user's caches, as the XDG specification has it."""
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
    if not caches.is_absolute():  # to be ignored, says the XDG specification
        caches = pathlib.Path("~/.cache").expanduser()
    return caches / "gold_jax"


def _processor() -> str:
    """The kind of processor, and a digest of the instructions that it has."""
    try:
        with open("/proc/cpuinfo") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
