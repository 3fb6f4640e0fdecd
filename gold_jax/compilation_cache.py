"""Compiled programs kept for later runs: JAX's persistent compilation cache, on in the commands, off in the library.

Compiling is most of what a short run does, and a resumed run compiles what the first one did. Programs that call back to
the host, as sorting with numpy on CPUs does (`--uld_sort host`), JAX compiles anew in each process.
"""

import hashlib
import os
import pathlib
import platform

from gold_jax.wording import shortened

OFF = "none"
_FOLDER = ".compiled"  # beside the checkpoints of several processes
MOST_BYTES = 4 * 2**30  # of a folder of the user's; the programs used least recently are removed
SHORTEST = 0.2  # seconds of compiling below which a program is not kept


def keep_compiled(folder: str | None, shared: str | None = None) -> str | None:
    """Has JAX keep what it compiles, from now on: in `folder`, or where none is named, in one of the user's.

    That is `$JAX_COMPILATION_CACHE_DIR` as JAX reads it, else `gold_jax/xla` among the user's caches, in a folder for
    this kind of processor; in a run of several processes, of which the first alone writes, one in `shared`, where its
    checkpoints are. "none" keeps nothing.

    Returns:
        What to tell the user: that programs are not kept, where the folder cannot be written to; else None.
    """
    import jax

    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if folder is None:
        if jax.config.jax_compilation_cache_dir:
            return None
        folder = default_folder() if shared is None else f"{shared.rstrip('/')}/{_FOLDER}"
    if "://" not in folder:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written to")
        except OSError as error:
            return f"compiled programs are not kept for later runs ({shortened(str(error))})"
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    return None


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
