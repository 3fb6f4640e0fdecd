"""What writes completions: the small protocol behind which the built-in sampler and a server of one's own stand."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Sampled(NamedTuple):
    """One completion as token ids."""

    ids: np.ndarray  # int32 [N], the stop token that ended it included
    logprobs: np.ndarray  # float32 [N], of the model itself (temperature 1, no filter); NaN where it is not told
    # float32 [N], the same at the temperature that they were drawn at; None where nobody asked.
    sampling_logprobs: np.ndarray | None = None


class NonFiniteLogits(ValueError):
    """A model's logits are not finite, so that nothing can be drawn from them."""


EMPTY = Sampled(np.zeros(0, np.int32), np.zeros(0, np.float32))


class Engine(Protocol):
    """Writes completions of prompts."""

    def generate(
        self,
        model: Any,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        key: jax.Array,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
    ) -> list[Sampled]:
        """One completion for each prompt, in order.

        Args:
            model: a `Decoder`, or its `(graphdef, params)` as they stand now.
            prompts: token ids int32 [P] of each; one without tokens gets an empty completion.
            max_new_tokens: most tokens of a completion.
            key: PRNG key, which every prompt's index is folded into; or [prompts], each prompt's own.
            temperature: divides the logits; 0 takes the likeliest token always.
            top_k: draw among the k likeliest tokens; 0 is off.
            top_p: then among the fewest tokens that together have this share; 1 is off.
            stop_ids: tokens that end a completion.
        """
