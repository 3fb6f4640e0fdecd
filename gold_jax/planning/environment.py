"""What a process needs to compile for TPUs that are only described; without JAX, because it has to be there before JAX is."""

import importlib.util
import os
import sys

# JAX runs on the CPU, on a TPU's host too; no metadata server is asked which TPU this is; and another process may hold libtpu.
NEEDED = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Without these libtpu complains that it cannot find them out. What they say does not change what it compiles.
QUIET = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def prepare() -> None:
    """Sets the environment in which JAX is to start; an already imported JAX is told to run on the CPU."""
    os.environ.update(NEEDED)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def need_compiler(topology: str) -> None:
    """Sees that the TPU compiler is installed.

    Raises:
        ImportError: it is not; the text says how it gets there.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"planning for {topology} compiles the run's programs, which takes the TPU compiler (it needs no TPU): pip install "
            "'gold_jax[tpu]', or libtpu alone. GPUs, such as gpu:8xh100-80gb, are planned without."
        )


__all__ = ["NEEDED", "QUIET", "need_compiler", "prepare"]
