"""Updates whose loss or gradients are not finite: counted, and described where they do not end."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.training.checkpointing import named_arrays
from gold_jax.wording import plural


class Diverged(RuntimeError):
    """Too many updates in a row had to be left out; the text says what was seen and what may help."""


class NonFiniteCounter(NamedTuple):
    """Updates that were left out because loss or gradients were not finite, in all and since the last one that was made."""

    total: Any = np.int32(0)
    in_a_row: Any = np.int32(0)


def describe_divergence(
    step: int,
    counter: NonFiniteCounter,
    metrics: Mapping,
    params: Any,
    rows: Sequence[int],
    args: Any,
    counted: int = 1,
) -> str:
    """What can be said of a run that makes no more updates: of `step` so far, those left out (`counter`) too.

    `metrics` (`loss`, `grad_norm` and parts of the loss), `rows` (numbers) and how much of them `counted` are those of
    the last update; `args` the settings.
    """
    nonfinite = [name for name, x in named_arrays(params).items() if not bool(jnp.isfinite(x).all())]
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    parts = [name for name, x in metrics.items() if np.ndim(x) == 0 and not np.isfinite(float(x))]
    shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    updates = plural(counter.in_a_row, "update")
    if not counted:
        return (
            f"{updates} in a row, up to update {step}, were skipped ({counter.total} in all), so the run stops: "
            f"--max_skipped_updates is {args.max_skipped_updates}. Nothing in the rows of the last one ({shown}) counts in the "
            "loss. What may help: a higher --max_length, so that their completions are not cut away; --groups all."
        )
    if nonfinite:
        names = ", ".join(nonfinite[:3])
        cause = f"The parameters themselves are not finite ({names}): the model was broken before training."
    elif not np.isfinite(loss):
        cause = f"The parameters are finite, the loss is {loss}."
    else:
        cause = f"Parameters and loss ({loss:.4g}) are finite, the gradient's norm is {norm}."
    advice = [f"a lower --learning_rate than {args.learning_rate:g}", "a look at these rows"]
    if args.bf16 or (args.bf16 is None and jax.default_backend() != "cpu"):
        advice.append("--bf16 false, to see whether it is bfloat16's precision")
    if not args.max_grad_norm:
        advice.append("--max_grad_norm 1")
    return (
        f"{updates} in a row, up to update {step}, had a loss or gradients that were not finite and were skipped "
        f"({counter.total} in all), so the run stops: --max_skipped_updates is {args.max_skipped_updates}. {cause} "
        f"Not finite in the last one: {', '.join(parts) or 'nothing that is logged'}; it read rows {shown}. "
        f"What may help: {'; '.join(advice)}."
    )
