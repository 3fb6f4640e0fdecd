"""Memory of the host."""

import ctypes
import os
import platform
import sys

_TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb"


def release_freed_memory() -> bool:
    """Gives the system back what this process has freed, such as the copies that loading and compiling make.

    Returns:
        Whether anything could be given back; it can with glibc on Linux alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except AttributeError:  # another C library
        return False


def start_again_with_huge_pages() -> None:
    """Starts this process again, in its own place, with glibc told to ask for huge pages; returns where that is no use.

    A step on a CPU takes and frees about as much memory as the gradients fill, and every page of it is cleared when it
    is first touched: in pages of 4 KiB that takes a third of the step. Only a process's start can change what glibc
    asks for. Nothing is changed where the user has set `glibc.malloc.hugetlb` in `GLIBC_TUNABLES` (0 keeps small
    pages).
    """
    given = os.environ.get(_TUNABLES, "")
    if platform.libc_ver()[0] != "glibc" or _HUGE in given:
        return
    os.environ[_TUNABLES] = ":".join(filter(None, (given, f"{_HUGE}=1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
