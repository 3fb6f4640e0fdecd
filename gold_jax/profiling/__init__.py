"""`--profile_steps`: traces of chosen training steps, and from them a table of where a step's time goes.

A profiled step is one turn of the training loop: an update, and beside it the making of the next update's batches.
"""

from gold_jax.profiling.capture import trace_steps
from gold_jax.profiling.summary import print_summary, summarize

__all__ = ["print_summary", "summarize", "trace_steps"]
