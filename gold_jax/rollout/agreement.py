"""Whether a server writes with the student's weights: its log-probabilities beside the student's own.

A server may answer that it has loaded weights and go on with others. What it drew is compared with what the student gives
to the same tokens, which finds another model. An update changes less than two implementations differ by, so that weights
that stay behind are found on a fixed text, by how far either has moved on it: what both always round differently drops out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.bucketing import bucket
from gold_jax.models.functional import merge, split
from gold_jax.rollout.client import ServerError
from gold_jax.rollout.engine import NonFiniteLogits, Sampled

ROWS = 4  # completions that are compared; on a mesh, the next multiple of its shards
TOLERANCE = 0.25  # mean absolute difference in nats a token; implementations in bfloat16 differ by 0.01 to 0.05
# How far the student must have moved to tell, root mean square: in nats; in differences from the server, of which those
# that come of rounding the weights alone need not be followed; and in these where there are few tokens, over their root.
_LEAST_MOVE, _LEAST_RATIO, _LEAST_CLEAR = 0.01, 2, 10
_LEAST_SHARE = 0.25  # of the student's change that a server must have made, too
_LONG = 2048  # tokens of a row up to which all are padded alike
_PART = 16  # positions of a row whose logits are held at once; divides every `bucketing.bucket`


class FixedText(NamedTuple):
    """A text with N tokens that stand behind another, as both scored it when they were compared last."""

    rows: list[np.ndarray]  # int32 token ids
    own: np.ndarray  # [N] the student's log-probabilities, with weights `as_served`
    served: np.ndarray  # [N] the server's


class Agreement:
    """Compares a server with the student after every push.

    Args:
        url: the server, for the errors.
        score: its log-probabilities of a text's tokens but the first; None where it does not tell them.
        notify: is told, once, that they are not told.
        longest: most tokens of a prompt and its completion, where that is known: then there is one program, up to 2,048.
    """

    def __init__(self, url: str, score: Callable[[list[int]], list[float] | None], notify: Callable, longest: int = 0):
        self.url, self.score, self.notify, self.longest = url, score, notify, longest
        self._scores_prompts, self._text = True, None

    def restart(self) -> None:
        """Forgets the fixed text."""
        self._text = None

    def check_drawn(self, model: Any, prompts: Sequence[np.ndarray], drawn: Sequence[Sampled]) -> float | None:
        """Mean absolute difference in nats of the tokens drawn by the weights of `model`; None where nothing is told.

        A `ServerError` says that it is too large, `NonFiniteLogits` that the model's own are no numbers.
        """
        rows, drawn_part, told = _drawn_rows(prompts, drawn)
        if not rows:
            return None
        difference, text = None, [row[:-1] for row in rows]
        silent, served = np.isnan(told).all(), None
        if silent or self._text is None:  # to score a text, a server draws one more token: it may have no room for all
            served = self._served(text)
        if silent and served is not None:
            told = np.concatenate([np.append(x, np.nan) for x in served])[drawn_part]
        if len(known := np.flatnonzero(~np.isnan(told))):
            own = own_logprobs(model, rows, _width(rows, self.longest))[drawn_part]
            difference = float(np.abs(own - told)[known].mean())
            if difference > TOLERANCE:
                raise ServerError(
                    f"{self.url} is not sampling from the student's weights: its log-probabilities of {len(known)} tokens that it "
                    f"drew differ from the student's own by {difference:.2f} nats on average, {TOLERANCE} at most where the weights "
                    "are the same. Start it with the student, for this run alone, and see its log for what it loaded."
                )
        if self._text is None and served is not None and sum(map(len, served)):
            own = own_logprobs(as_served(model), text, _width(rows, self.longest))
            self._text = FixedText(text, own, np.concatenate(served))
        return difference

    def check_followed(self, model: Any, updates: int) -> None:
        """A `ServerError` where the server, after a push of `model`, did not go with the student on the fixed text."""
        if (text := self._text) is None:
            return
        own, served = (
            own_logprobs(as_served(model), text.rows, _width(text.rows, self.longest)),
            self._served(text.rows),
        )
        share = None if served is None else fraction_followed(text, own, np.concatenate(served))
        if share is None:
            return
        if share < _LEAST_SHARE:
            raise ServerError(
                f"{self.url} reported that it loaded the student's weights of update {updates}, and still serves others: on "
                f"{len(own)} tokens the student has moved by {np.abs(own - text.own).mean():.2g} nats on average since it was "
                f"compared last, the server {share:.0%} of that. See its log for what it loaded."
            )
        self._text = text._replace(own=own, served=np.concatenate(served))

    def _served(self, rows: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """The server's log-probabilities of the tokens of each row but the first; None where it does not tell them."""
        found = []
        for row in rows:
            scores = self.score([int(i) for i in row]) if self._scores_prompts else None
            if scores is None:
                break
            found.append(np.asarray(scores, np.float32))
        else:
            return found
        if self._scores_prompts:
            self.notify(
                f"{self.url} returns no log-probabilities of a prompt, so that weights that it does not load are found only "
                "where sampling_logp_difference shows them, or not at all where that is not logged."
            )
        self._scores_prompts = False
        return None


def logprob_difference(
    model: Any, prompts: Sequence[np.ndarray], drawn: Sequence[Sampled], longest: int = 0
) -> float | None:
    """Mean absolute difference in nats between what a model gives to tokens of `ROWS` completions and what they were drawn with.

    None where nothing was drawn. `longest` as for `Agreement`.
    """
    rows, drawn_part, told = _drawn_rows(prompts, drawn)
    if not rows:
        return None
    return float(np.abs(own_logprobs(model, rows, _width(rows, longest))[drawn_part] - told).mean())


def _drawn_rows(prompts: Sequence[np.ndarray], drawn: Sequence[Sampled]) -> tuple[list, np.ndarray, np.ndarray]:
    """Some prompts with their completions; which of their tokens but the first were drawn, end to end; with what log-probabilities."""
    pairs = [(prompt, d) for prompt, d in zip(prompts, drawn) if len(d.ids)][:ROWS]
    rows = [np.concatenate([prompt, d.ids]).astype(np.int32) for prompt, d in pairs]
    parts = [np.arange(1, len(row)) >= len(prompt) for row, (prompt, _) in zip(rows, pairs)]
    none = np.zeros(0)
    return rows, np.concatenate([*parts, none]).astype(bool), np.concatenate([*(d.logprobs for _, d in pairs), none])


def _width(rows: Sequence[np.ndarray], longest: int) -> int:
    """One width for all rows of up to `longest` tokens, if that is not very long."""
    return bucket(max(min(longest, _LONG), *map(len, rows)))


def fraction_followed(text: FixedText, own: np.ndarray, served: np.ndarray) -> float | None:
    """How much of the student's change the server has made, too, 1 for all; None where the student moved too little."""
    moved, root = own - text.own, np.sqrt(len(own))
    noise = max(_LEAST_RATIO, _LEAST_CLEAR / root) * np.linalg.norm(text.served - text.own)
    if np.linalg.norm(moved) < max(noise, _LEAST_MOVE * root):
        return None
    return float((served - text.served) @ moved / (moved @ moved))


def as_served(model: Any) -> tuple:
    """A model with its weights rounded to bfloat16, as servers hold them: smaller updates do not move them."""
    graph, params = split(model)
    rounded = merge(graph, params).dtype == jnp.bfloat16  # where it is computed
    return graph, params if rounded else jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def own_logprobs(model: Any, rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """A model's log-probabilities, end to end, of the tokens of each row but the first, in one program for a `width`.

    `NonFiniteLogits` says that one is no number.
    """
    graph, params = split(model)
    placement = merge(graph, params).placement
    shards = 1 if placement is None else placement.row_shards
    tokens = np.zeros((-(-ROWS // shards) * shards, width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], lengths[number] = row, len(row)
    found = np.asarray(_token_logprobs(graph, params, tokens, lengths))
    own = np.concatenate([x[: len(row) - 1] for x, row in zip(found, rows)])
    if not np.isfinite(own).all():
        raise NonFiniteLogits("the model's log-probabilities of what was sampled are not finite.")
    return own


@functools.partial(jax.jit, static_argnames="graphdef")
def _token_logprobs(graphdef, params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Log-probabilities float32 [B, T] of the tokens behind those of int32 [B, T], `lengths` [B] of them in each row."""
    model, (rows, width) = merge(graphdef, params), tokens.shape
    if model.placement is not None:
        tokens, lengths = (model.placement.shard_rows(x) for x in (tokens, lengths))
    hidden = model(tokens, jnp.arange(width) < lengths[:, None])

    def of_part(part):
        hidden, behind = part
        logits = model.logits(hidden)
        return jnp.take_along_axis(logits, behind[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)

    parts = hidden, jnp.roll(tokens, -1, axis=1)
    parts = tuple(jnp.moveaxis(x.reshape(rows, -1, _PART, *x.shape[2:]), 1, 0) for x in parts)
    found = jnp.moveaxis(jax.lax.map(of_part, parts), 0, 1).reshape(rows, width)
    if model.placement is None:
        return found
    return jax.lax.with_sharding_constraint(found, model.placement.replicated)
