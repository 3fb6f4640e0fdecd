"""`python -m gold_jax.train` in which process 1 takes its time over the batch of the fourth update."""

import os
import sys
import time

from gold_jax.cli import run
from gold_jax.train import main
from gold_jax.training.batches import DistillationBatchBuilder

made = DistillationBatchBuilder.build


def late(self, step, *arguments):
    if step == 3 and os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(25)
    return made(self, step, *arguments)


if __name__ == "__main__":
    DistillationBatchBuilder.build = late
    run("gold_jax.train", main, sys.argv[1:])
