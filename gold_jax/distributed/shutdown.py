"""How the processes of a command end: together where all is well, each with its own exit code where something is not."""

import contextlib
import os
import sys
import time
import traceback

import jax
from jax.experimental import multihost_utils

from gold_jax.distributed import watchdog
from gold_jax.distributed.initialize import coordination_client, process_id, process_names


def end_process(ending: BaseException | None) -> None:
    """Called by the main thread of a command as the last thing it does; returns where the process may end as others do.

    JAX waits for all processes when one ends, and aborts those that waited in vain. So they first wait for each other
    here, for as long as it takes (process 0 may still be uploading). One that failed does not take part: it tells the
    others why and ends without JAX's shutdown, which would replace its exit code by that of an abort minutes later.
    """
    if coordination_client() is None:
        return
    code = 0 if ending is None else ending.code if isinstance(ending, SystemExit) else 1
    error = ending.__context__ or ending if isinstance(ending, SystemExit) else ending  # what the command printed
    if code in (None, 0, watchdog.EX_TEMPFAIL) and not isinstance(error, watchdog.PeerLost):
        try:
            multihost_utils.sync_global_devices("gold_jax ends")
            return
        except Exception as failure:
            ending, code, error = failure, 1, failure
    if not isinstance(ending, SystemExit):
        traceback.print_exception(ending)
    failures = {}
    if watchdog.comes_from_peer(error):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone
            failures = watchdog.read_failures(coordination_client())
    for i, text in failures.items():
        watchdog.log_to_stderr(f"{process_names()[i]} ended with an error: {text}.")
    if not failures:
        watchdog.report_failure(error)
    if process_id() == 0:
        time.sleep(5)  # it holds the store from which the others learn why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
