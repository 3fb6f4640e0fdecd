"""Completions that were drawn and are not learned from yet: what a checkpoint keeps of them."""

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Rollout(NamedTuple):
    """One completion as its student drew it."""

    ids: np.ndarray  # int32 [N], the stop token that ended it included
    logprobs: np.ndarray  # float32 [N], at the sampling temperature, unfiltered; NaN where they are not told


Rollouts = Mapping[int, list[Rollout]]  # of each update (counted from 0) those of its on-policy rows, in their order


def to_bytes(rollouts: Rollouts) -> bytes:
    """A compressed npz."""
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
    """The rollouts of `to_bytes`; any error where it is another's."""
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        updates, counts, lengths, ids, logprobs = (
            found[x] for x in ("updates", "counts", "lengths", "ids", "logprobs")
        )
    ends = np.cumsum(lengths)[:-1]
    drawn = map(Rollout, np.split(ids, ends), np.split(logprobs, ends)) if len(lengths) else iter(())
    return {int(update): [next(drawn) for _ in range(count)] for update, count in zip(updates, counts)}
