"""Where a model's probability lies: on entries that the other vocabulary has too, on prefixes of theirs, or on none."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.bucketing import bucket
from gold_jax.inspection.report import Mass
from gold_jax.inspection.vocabularies import KINDS
from gold_jax.loading import LoadedModel
from gold_jax.losses.distill import compact
from gold_jax.losses.fused_head import fused_linear_sum
from gold_jax.models.functional import merge, split
from gold_jax.text.packing import pad_right


def measure(
    who: LoadedModel, texts: Sequence[str], kinds: np.ndarray, *, max_length: int | None = None, chunk: int = 128
) -> tuple[list[Mass], list[bool]]:
    """Score texts with a model, each as a text from its beginning, behind what its tokenizer puts before any text.

    The positions are those that predict a token of the text: all but the first where nothing stands before it. `kinds`
    says what each row of the head is: bool [len(KINDS), V], see `VocabularyFigures.rows`. Texts are read as far as
    `max_length` tokens go, and the logits of `chunk` positions are held at once.

    Returns:
        One `Mass` for each text, NaN where no token is predicted; and which texts did not fit.
    """
    graph, params = split(who.model)
    tokenizer, rows = who.chat_tokenizer, jnp.asarray(kinds, jnp.float32)
    start = tokenizer.encode_prompt("")
    found, cut = [], []
    for answer in tokenizer.encode_completions(texts, after=[""] * len(texts)):
        sequence = np.concatenate([start, answer.ids])
        ids = sequence[:max_length]
        cut.append(len(ids) < len(sequence))
        width = bucket(len(ids))
        position = np.arange(width)[None]
        counted = (position >= max(1, len(start)) - 1) & (position < len(ids) - 1)
        tokens = pad_right([ids], 1, width, np.int32, tokenizer.pad_id)
        sums = _sums(graph, params, tokens, position < len(ids), counted, rows, min(chunk, width))
        positions = int(counted.sum())
        means = np.asarray(sums, np.float64) / positions if positions else np.full(len(KINDS), np.nan)
        found.append(Mass(positions, *means.tolist()))
    return found, cut


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _sums(graph, params, tokens, mask, counted, kinds, chunk):
    """The mass of every kind, `[K]`, summed over the positions of one row that `counted [1, T]` marks."""
    model = merge(graph, params)
    index, live = compact(counted)
    softcap = model.config.final_softcap

    def chunk_mass(logits, _scale, kinds, used):
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        probability = jax.nn.softmax(logits, -1) * used[:, None]
        sums = jnp.einsum("cv,kv->k", probability, kinds, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(probability), {"kinds": sums}

    used = counted[0][index].astype(jnp.float32)
    hidden, head = model(tokens, mask)[0], model.head_weight()
    return fused_linear_sum(chunk_mass, None, chunk, hidden, head, index, None, kinds, used, live)[1]["kinds"]
