"""Names for the host's work in a profiler's trace, which `gold_jax.profiling` adds up."""

import contextlib
from collections.abc import Iterator

import jax

STEP = "train"  # the profilers' own name for the annotation around a step
PREFIX = "gold_jax: "  # tells these annotations from others in a trace

ENCODING, ALIGNMENT, BATCHES = "rendering and encoding", "alignment", "padding and batches"
SAMPLER, DISPATCH, WAITING = "waiting for the sampler", "starting programs", "waiting for the update"
EVALUATION, SAVING = "evaluation", "saving"


@contextlib.contextmanager
def annotate(name: str) -> Iterator[None]:
    """Names a block, or as a decorator every call of a function, in a trace."""
    with jax.profiler.TraceAnnotation(PREFIX + name):
        yield
