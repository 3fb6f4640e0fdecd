"""Which rows of a global batch this process builds, and the reductions over processes that its normalisation needs.

The rows of a micro-batch are split over the mesh's row shards, one packed sequence each. Two processes build the same
shard where its devices belong to both (tensor parallelism across hosts); in sums it counts for its owner alone, the first
of them. Numpy only: the collectives are passed in as functions.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np


class ProcessShard(NamedTuple):
    """The part of every micro-batch that one process builds."""

    owners: tuple[int, ...] = (0,)  # for each shard, the index of the process that counts it in sums
    local_shards: tuple[int, ...] = (0,)  # the shards built here, ascending
    process_index: int = 0
    # Elementwise sum and maximum of an array over all processes, and the lists of arrays of all, in process order.
    all_reduce_sum: Callable[[np.ndarray], np.ndarray] = lambda values: values
    all_reduce_max: Callable[[np.ndarray], np.ndarray] = lambda values: values
    all_gather: Callable[[list[np.ndarray]], list[list[np.ndarray]]] = lambda arrays: [arrays]

    @classmethod
    def single_process(cls, num_shards: int = 1) -> Self:
        """All shards, for a run of one process."""
        return cls((0,) * num_shards, tuple(range(num_shards)))

    @property
    def num_shards(self) -> int:
        """Row shards of a micro-batch."""
        return len(self.owners)

    def exchanging_within(self, context: Callable[[], contextlib.AbstractContextManager]) -> Self:
        """A copy whose collectives run within a context."""

        def within(exchange: Callable) -> Callable:
            def exchanged(values):
                with context():
                    return exchange(values)

            return exchanged

        reduce_sum, reduce_max, gather = map(within, (self.all_reduce_sum, self.all_reduce_max, self.all_gather))
        return self._replace(all_reduce_sum=reduce_sum, all_reduce_max=reduce_max, all_gather=gather)

    def rows_per_shard(self, batch_size: int) -> int:
        """Rows of one shard; ValueError where the shards do not divide the batch."""
        if batch_size % self.num_shards:
            raise ValueError(f"{batch_size} rows cannot be split evenly over {self.num_shards} devices")
        return batch_size // self.num_shards

    def local_height(self, batch_size: int) -> int:
        """Rows of a micro-batch that are built here, the missing ones of the last included."""
        return self.rows_per_shard(batch_size) * len(self.local_shards)

    def local_rows_per_batch(self, count: int, batch_size: int) -> list[list[int]]:
        """For each micro-batch of `count` rows in all, the indices of the rows built here."""
        rows = self.rows_per_shard(batch_size)
        return [
            [i for k in self.local_shards for i in range(start + k * rows, min(start + (k + 1) * rows, count))]
            for start in range(0, count, batch_size)
        ]

    def local_rows(self, count: int, batch_size: int) -> list[int]:
        """The indices of all rows built here."""
        return [i for part in self.local_rows_per_batch(count, batch_size) for i in part]

    def owner_of(self, row: int, batch_size: int) -> int:
        """The index of the process that counts a row."""
        return self.owners[row % batch_size // self.rows_per_shard(batch_size)]

    def is_owner(self, row: int, batch_size: int) -> bool:
        """Whether this process counts a row."""
        return self.owner_of(row, batch_size) == self.process_index

    def gather_token_ids(self, rows: Sequence[int], local: Mapping[int, np.ndarray], batch_size: int) -> list:
        """Token ids of these rows, int32 [T] each, in order, all-gathered from the processes that have them."""
        if len(set(self.owners)) == 1 and len(self.local_shards) == self.num_shards:
            return [local[i] for i in rows]
        gathered = self.all_gather([np.asarray(local[i], np.int32) for i in rows if self.is_owner(i, batch_size)])
        remaining = [iter(arrays) for arrays in gathered]
        return [next(remaining[self.owner_of(i, batch_size)]) for i in rows]
