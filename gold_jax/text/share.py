"""Which rows of a batch a process makes, where several processes make one batch together.

The rows of a micro-batch lie in lines, one for each shard of the mesh, and a process makes the lines that its devices hold. Two
processes make the same line where the devices of one shard belong to both; it counts for the first of them. Numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def _alone(values: Any) -> Any:
    return values


class Share(NamedTuple):
    """A process's part of every micro-batch.

    Attributes:
      owner: of each line, the process for which it counts.
      mine: the lines made here, ascending.
      process: this process.
      total: sums of an array over all processes.
      largest: maxima of an array over all processes.
      gather: from a list of int32 arrays the lists of all processes.
    """

    owner: tuple[int, ...] = (0,)
    mine: tuple[int, ...] = (0,)
    process: int = 0
    total: Callable[[np.ndarray], np.ndarray] = _alone
    largest: Callable[[np.ndarray], np.ndarray] = _alone
    gather: Callable[[list[np.ndarray]], list[list[np.ndarray]]] = lambda arrays: [arrays]

    @classmethod
    def whole(cls, lines: int = 1) -> Share:
        """The share of a process that is the only one."""
        return cls((0,) * lines, tuple(range(lines)))

    @property
    def lines(self) -> int:
        """How many lines a micro-batch has."""
        return len(self.owner)

    def height(self, batch_size: int) -> int:
        """Rows of a line.

        Raises:
          ValueError: they cannot be shared out evenly.
        """
        if batch_size % self.lines:
            raise ValueError(f"{batch_size} rows cannot be shared out evenly among {self.lines} devices")
        return batch_size // self.lines

    def parts(self, count: int, batch_size: int) -> list[list[int]]:
        """Of each micro-batch of `count` rows the numbers of those that are made here."""
        height = self.height(batch_size)
        return [
            [i for line in self.mine for i in range(start + line * height, min(start + (line + 1) * height, count))]
            for start in range(0, count, batch_size)
        ]

    def here(self, count: int, batch_size: int) -> list[int]:
        """The numbers of all rows that are made here."""
        return [i for part in self.parts(count, batch_size) for i in part]

    def owner_of(self, row: int, batch_size: int) -> int:
        """The process for which a row counts."""
        return self.owner[row % batch_size // self.height(batch_size)]

    def counts(self, row: int, batch_size: int) -> bool:
        """Whether a row counts here."""
        return self.owner_of(row, batch_size) == self.process

    def all_of(self, wanted: Sequence[int], mine: Mapping[int, np.ndarray], batch_size: int) -> list[np.ndarray]:
        """Token ids of some rows, in order, from those of the rows that are made here."""
        if len(set(self.owner)) == 1 and len(self.mine) == self.lines:
            return [mine[i] for i in wanted]
        told = self.gather([np.asarray(mine[i], np.int32) for i in wanted if self.counts(i, batch_size)])
        left = [iter(arrays) for arrays in told]
        return [next(left[self.owner_of(i, batch_size)]) for i in wanted]
