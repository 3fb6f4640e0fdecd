"""Locks that keep two runs out of one folder."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from gold_jax.distributed.consensus import raised_in_all_processes
from gold_jax.distributed.initialize import is_main_process


@contextlib.contextmanager
def locked(folder: pathlib.Path, flag: str = "--output_dir") -> Iterator[None]:
    """Locks the folder of a flag for this process; ValueError if another process holds it, which it names.

    The lock ends with the process, even if that is killed. Without support of the file system nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / ".lock"
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip() or "another process"
            file.close()
            raise ValueError(
                f"{folder} is in use by another run ({who}); choose another {flag}, or end that run"
            ) from None
        except OSError:  # not every network file system has locks
            break
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # removed by the process that held it, after it was opened here
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def folders_locked(output: pathlib.Path, checkpoint_dir: str | None) -> Iterator[None]:
    """Creates and locks a run's local folders in the first process; raises in all processes if one is in use."""
    folders = {"output_dir": output}
    if checkpoint_dir and "://" not in checkpoint_dir:
        folders["checkpoint_dir"] = pathlib.Path(checkpoint_dir)
    with contextlib.ExitStack() as held:
        with raised_in_all_processes("the folders of the run", (ValueError, OSError)):
            for name, folder in folders.items() if is_main_process() else ():
                folder.mkdir(parents=True, exist_ok=True)
                if name == "output_dir" or not folder.samefile(output):
                    held.enter_context(locked(folder, f"--{name}"))
        yield
