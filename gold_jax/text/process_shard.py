"""Which rows of a batch a process makes, where several processes make one batch together.

The rows of a micro-batch lie in lines, one for each shard of the mesh, and a process makes the lines that its devices
hold. Two processes make the same line where the devices of one shard belong to both; it counts for the first of them.
Numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def _identity(values: Any) -> Any:
    return values


class ProcessShard(NamedTuple):
    """A process's part of every micro-batch.

    Attributes:
        owners: of each line, the process for which it counts.
        local_shards: the lines made here, ascending.
        process_index: this process.
        all_reduce_sum: sums of an array over all processes.
        all_reduce_max: maxima of an array over all processes.
        all_gather: from a list of int32 arrays the lists of all processes.
    """

    owners: tuple[int, ...] = (0,)
    local_shards: tuple[int, ...] = (0,)
    process_index: int = 0
    all_reduce_sum: Callable[[np.ndarray], np.ndarray] = _identity
    all_reduce_max: Callable[[np.ndarray], np.ndarray] = _identity
    all_gather: Callable[[list[np.ndarray]], list[list[np.ndarray]]] = lambda arrays: [arrays]

    @classmethod
    def single_process(cls, num_shards: int = 1) -> ProcessShard:
        """The share of a process that is the only one."""
        return cls((0,) * num_shards, tuple(range(num_shards)))

    @property
    def num_shards(self) -> int:
        """How many lines a micro-batch has."""
        return len(self.owners)

    def rows_per_shard(self, batch_size: int) -> int:
        """Rows of a line.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if batch_size % self.num_shards:
            raise ValueError(f"{batch_size} rows cannot be shared out evenly among {self.num_shards} devices")
        return batch_size // self.num_shards

    def local_rows_per_batch(self, count: int, batch_size: int) -> list[list[int]]:
        """Of each micro-batch of `count` rows the numbers of those that are made here."""
        rows = self.rows_per_shard(batch_size)
        return [
            [
                i
                for shard in self.local_shards
                for i in range(start + shard * rows, min(start + (shard + 1) * rows, count))
            ]
            for start in range(0, count, batch_size)
        ]

    def local_rows(self, count: int, batch_size: int) -> list[int]:
        """The numbers of all rows that are made here."""
        return [i for part in self.local_rows_per_batch(count, batch_size) for i in part]

    def owner_of(self, row: int, batch_size: int) -> int:
        """The process for which a row counts."""
        return self.owners[row % batch_size // self.rows_per_shard(batch_size)]

    def is_owner(self, row: int, batch_size: int) -> bool:
        """Whether a row counts here."""
        return self.owner_of(row, batch_size) == self.process_index

    def gather_token_ids(
        self, wanted: Sequence[int], local: Mapping[int, np.ndarray], batch_size: int
    ) -> list[np.ndarray]:
        """Token ids of some rows, in order, from those of the rows that are made here."""
        if len(set(self.owners)) == 1 and len(self.local_shards) == self.num_shards:
            return [local[i] for i in wanted]
        gathered = self.all_gather([np.asarray(local[i], np.int32) for i in wanted if self.is_owner(i, batch_size)])
        remaining = [iter(arrays) for arrays in gathered]
        return [next(remaining[self.owner_of(i, batch_size)]) for i in wanted]
