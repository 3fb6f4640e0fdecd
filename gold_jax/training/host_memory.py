"""Memory of the host."""

import ctypes
import sys


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
