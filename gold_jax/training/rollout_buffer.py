"""Completions that were drawn for later updates (`--rollout_batches`), and how checkpoints store them."""

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Rollout(NamedTuple):
    """One completion as the student drew it."""

    ids: np.ndarray  # int32 [N], the stop token that ended it included
    logprobs: np.ndarray  # float32 [N] in nats, at the sampling temperature, before top-k and top-p; NaN: unknown


# Of each update (counted from 0) the completions of its on-policy rows, in the order of rows.
Rollouts = Mapping[int, list[Rollout]]


def to_bytes(rollouts: Rollouts) -> bytes:
    """A compressed `.npz`, whose arrays hold the completions of all updates end to end."""
    drawn = [d for update in rollouts.values() for d in update]
    columns = {
        "updates": np.array([*rollouts], np.int64),
        "counts": np.array([len(update) for update in rollouts.values()], np.int64),
        "lengths": np.array([len(d.ids) for d in drawn], np.int64),
        "ids": np.concatenate([np.zeros(0, np.int32), *(d.ids for d in drawn)]),
        "logprobs": np.concatenate([np.zeros(0, np.float32), *(d.logprobs for d in drawn)]),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **columns)
    return file.getvalue()


def from_bytes(data: bytes) -> Rollouts:
    """The inverse of `to_bytes`; other bytes raise whatever numpy raises."""
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        updates, counts, lengths, ids, logprobs = (
            found[x] for x in ("updates", "counts", "lengths", "ids", "logprobs")
        )
    ends = np.cumsum(lengths)[:-1]
    drawn = map(Rollout, np.split(ids, ends), np.split(logprobs, ends)) if len(lengths) else iter(())
    return {int(update): [next(drawn) for _ in range(count)] for update, count in zip(updates, counts)}
