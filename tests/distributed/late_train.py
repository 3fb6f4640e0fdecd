"""`python -m gold_jax.train` in which process 1 takes its time over a batch, and who waits says so after two seconds.

LATE_UPDATE in the environment is the update whose batch it is, counted from 0.
"""

import os
import sys
import time

from gold_jax.cli import run
from gold_jax.distributed.watchdog import Watchdog
from gold_jax.train import main
from gold_jax.training import loop
from gold_jax.training.batches import DistillationBatchBuilder

made = DistillationBatchBuilder.build


def late(self, step, *arguments):
    if step == int(os.environ["LATE_UPDATE"]) and os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(8)
    return made(self, step, *arguments)


def impatient(timeout):
    return Watchdog(timeout, late_after=2)


if __name__ == "__main__":
    DistillationBatchBuilder.build = late
    loop.Watchdog = impatient
    run("gold_jax.train", main, sys.argv[1:])
