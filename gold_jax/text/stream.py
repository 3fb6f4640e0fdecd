"""Rows that are checked, or read and checked, during training: sharded, and shuffled so that a run can be resumed.

In every epoch the shards are read in a random order; their rows, concatenated, are cut into windows of `WINDOW` rows,
and each window is shuffled. Both orders are functions of seed, epoch and window, so that a position is a few numbers,
and only one window is held in memory.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gold_jax.text.checks import RowChecker
from gold_jax.text.data import Example, Examples, hub_errors, hub_files, local_files, to_example
from gold_jax.text.json_rows import JsonRows, read_json_lines
from gold_jax.text.row_formats import check_renamed
from gold_jax.text.surface import excerpt
from gold_jax.wording import plural

WINDOW = 1000  # rows that are shuffled among each other
FIRST_ROWS = 100  # in which columns are looked for if the data set does not list its features


@dataclasses.dataclass(frozen=True)
class RowStream:
    """Rows that are read sequentially: `shards` maps names to functions from a row number to an iterator from there on.

    A ValueError among the rows stands for a row that cannot be read.
    """

    shards: Mapping[str, Callable[[int], Iterator[Any]]]
    source: str  # what errors call the data
    digest: str  # of the files that the shards are read from
    text_column: str = "text"
    features: Mapping | None = None
    renamed: Mapping[str, str | None] | None = None
    notices: tuple[str, ...] = ()  # lines for the start of the run

    def describe(self) -> str:
        """What updates learn from, in words."""
        return f"a stream of {plural(len(self.shards), 'shard')}"

    def epoch_steps(self, per_step: int) -> None:
        """None: the number of updates of an epoch is not known."""

    def rows(
        self, order: list[int], shard: int = 0, row: int = 0
    ) -> Iterator[tuple[int, int, str, Callable[[], Example]]]:
        """Rows of the shards in an order, from `row` of `shard` on.

        Yields the shard, the row's number in it, its name, and a function that returns the example or raises.
        """
        names = list(self.shards)
        for k in range(shard, len(order)):
            name, first = names[order[k]], row if k == shard else 0
            try:
                for number, read in enumerate(self.shards[name](first), first):
                    label = f"{number} of {name}"
                    yield k, number, label, functools.partial(self._example, read, label)
            except ValueError as error:
                raise ValueError(f"{name} of {self.source}: {error}") from error

    def _example(self, row: Any, label: str) -> Example:
        if isinstance(row, ValueError):
            raise ValueError(f"row {label} of {self.source}: {row}")
        return to_example(row, label, self.source, self.text_column, self.renamed, self.features)


@dataclasses.dataclass(frozen=True)
class ShuffledRows:
    """Rows that can be read in any order, as a stream in which every row is a shard: an epoch shuffles all of them."""

    examples: Examples
    source: str
    digest: str

    @classmethod
    def of(cls, examples: Examples) -> "ShuffledRows":
        """The rows of `text.data.Examples`."""
        rows: Any = examples.rows
        described: list[Any] = [len(examples), examples.text_column, repr(examples.features)]
        described += [repr(examples.renamed), rows.digest() if isinstance(rows, JsonRows) else None]
        return cls(examples, examples.source, _digest(described))

    @property
    def notices(self) -> list[str]:
        """Lines about how the rows were read."""
        return self.examples.notices

    @property
    def shards(self) -> range:
        """The numbers of the rows."""
        return range(len(self.examples))

    def describe(self) -> str:
        """What updates learn from, in words."""
        return f"{plural(len(self.examples), 'row')} (checked during training)"

    def epoch_steps(self, per_step: int) -> int:
        """Updates of an epoch in which no row is skipped."""
        return -(-len(self.examples) // per_step)

    def rows(
        self, order: list[int], shard: int = 0, row: int = 0
    ) -> Iterator[tuple[int, int, int, Callable[[], Example]]]:
        """As `RowStream.rows`; the name of a row is its number."""
        for k in range(shard + row, len(order)):
            yield k, 0, order[k], functools.partial(self.examples.__getitem__, order[k])


def open_stream(
    source: Any,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    renamed: Mapping[str, str | None] | None = None,
) -> RowStream:
    """Opens a data set that is streamed: a name as `load_examples` takes it, or a `datasets.IterableDataset`.

    FileNotFoundError, ValueError: as `load_examples`, or it cannot be streamed.
    """
    found = dataclasses.replace(_open(source, config, split), text_column=text_column, renamed=renamed)
    if renamed:
        rows = itertools.chain.from_iterable(read(0) for read in found.shards.values())
        first = list(itertools.islice(rows, FIRST_ROWS))
        seen = found.features or dict.fromkeys(itertools.chain(*(row for row in first if isinstance(row, Mapping))))
        open_end = not found.features and len(first) == FIRST_ROWS
        later = {name: column for name, column in renamed.items() if open_end and column and column not in seen}
        check_renamed(renamed, [*seen, *later.values()], found.source)
        looked = f"and none of the first {FIRST_ROWS} rows has such a column"
        notices = (f"--columns says {excerpt(f'{name}={column}')}, {looked}" for name, column in later.items())
        found = dataclasses.replace(found, notices=tuple(notices))
    return found


def _open(source: Any, config: str | None, split: str) -> RowStream:
    import datasets

    if not isinstance(source, str):
        return _of_dataset(source, "the data set", [])
    where = f"the data set {source!r}"
    if {"[", "+"} & set(split):
        raise ValueError(f"a part of a split, {split!r}, cannot be streamed; name a whole split, or do not stream it")
    if (local := local_files(source, split, {})) is None:
        kind, files = hub_files(source, config, split)
    else:
        kind, files = local[0], {path.name: str(path) for path in local[1]}
    described = [config, split, *files, *([] if local is None else map(os.path.getsize, files.values()))]
    if kind == "json":
        shards = {name: functools.partial(read_json_lines, path, name) for name, path in files.items()}
        return RowStream(shards, where, _digest(described))
    options: dict[str, Any] = dict(path=source, name=config, split=split)
    if files:
        options = dict(path=kind, data_files={"train": list(files.values())}, split="train")
    with hub_errors(source):
        return _of_dataset(datasets.load_dataset(**options, streaming=True), where, described)


def _of_dataset(source: Any, where: str, described: list) -> RowStream:
    count = source.num_shards

    def read(shard: int, row: int) -> Iterator[Any]:
        return iter(source.shard(count, shard).skip(row))

    shards = {f"shard {k}": functools.partial(read, k) for k in range(count)}
    return RowStream(shards, where, _digest([*described, count]), features=source.features)


def _digest(parts: list) -> str:
    return hashlib.sha256(repr([*parts, WINDOW]).encode()).hexdigest()


class StreamOrder:
    """The rows of each update: the next ones of a stream that can be learned from; an epoch's last update may be short.

    Args:
        stream: the rows.
        checker: says which of them can be learned from. The others are skipped, with a line to `say` for each reason.
        per_step: rows of an update.
        seed: of both orders.
        total: updates of the run; taken for those of an epoch where its length is not known.
    """

    def __init__(
        self,
        stream: RowStream | ShuffledRows,
        checker: RowChecker,
        per_step: int,
        seed: int,
        total: int,
        say: Callable[[str], Any],
    ):
        self.stream, self.checker, self.per_step, self.seed, self.say = stream, checker, per_step, seed, say
        self.steps_per_epoch = stream.epoch_steps(per_step) or total
        # The positions at which the last updates begin: epoch; shard (in the epoch's order) and row at which the window
        # begins; number of the window; its rows taken so far (of those that can be learned from); whether any row of the
        # epoch was learned from.
        self._positions: dict[int, dict[str, Any]] = {}
        self._at: int | None = None  # the update that the next rows belong to
        self._said: set[str] = set()
        self.restart()

    def describe(self) -> str:
        """What updates learn from, in words."""
        return self.stream.describe()

    def __call__(self, step: int) -> list[Any]:
        """Names of the rows of an update."""
        return [name for name, _ in self.take(step)]

    def restart(self) -> None:
        """Begins with the first update."""
        self._positions, self._at = {0: self._beginning(0)}, None

    def _beginning(self, epoch: int) -> dict[str, Any]:
        return dict(epoch=epoch, shard=0, row=0, window=0, taken=0, learned=False)

    def take(self, step: int) -> list[tuple[Any, Example]]:
        """Rows of an update with their names; `step` is the next one, or one of the last few again."""
        if step != self._at:
            self._seek(self._positions[step])
        found, self._at = [], None
        while len(found) < self.per_step:
            window = self._read_window()
            part = window[self._here["taken"] :][: self.per_step - len(found)]
            if part:
                found += part
                self._here |= dict(taken=self._here["taken"] + len(part), learned=True)
            elif self._next is not None:
                shard, row = self._next
                self._here |= dict(shard=shard, row=row, window=self._here["window"] + 1, taken=0)
                self._window = None
            elif found:
                break
            elif not self._here["learned"]:
                raise self.checker.nothing_left()
            else:
                self._seek(self._beginning(self._here["epoch"] + 1))
        self._positions = {k: v for k, v in self._positions.items() if step - 3 < k <= step}
        self._positions[step + 1], self._at = dict(self._here), step + 1
        return found

    def position(self, step: int) -> dict[str, Any]:
        """The position at which one of the last updates or the next begins, as JSON, for checkpoints."""
        return dict(self._positions[step])

    def resume(self, step: int, position: Mapping[str, Any]) -> None:
        """Continues with the update `step` at a `position`; ValueError if the rows there have changed."""
        self._positions, self._at = {step: dict(position)}, None
        self._seek(position)
        self._read_window()
        if position.get("rows") not in (None, self._here["rows"]):
            raise ValueError(
                f"{self.stream.source} holds other rows than when the checkpoint was saved; start a new run"
            )

    def _seek(self, position: Mapping[str, Any]) -> None:
        self._here, self._window = dict(position), None
        order = np.random.default_rng((self.seed, position["epoch"])).permutation(len(self.stream.shards)).tolist()
        self._rows = self.stream.rows(order, position["shard"], position["row"])

    def _read_window(self) -> list[tuple[Any, Example]]:
        """The rows of this window that can be learned from, shuffled."""
        if self._window is not None:
            return self._window
        found = list(itertools.islice(self._rows, WINDOW))
        self._next = (found[-1][0], found[-1][1] + 1) if len(found) == WINDOW else None
        order = np.random.default_rng((self.seed, self._here["epoch"], self._here["window"])).permutation(len(found))
        self._window = self.checker.check([found[i][2:] for i in order])
        self._here["rows"] = functools.reduce(lambda crc, pair: zlib.crc32(pair[1].fingerprint, crc), self._window, 0)
        for name, (words, remedy) in self.checker.reasons().items():
            if self.checker.left_out[name] and name not in self._said:
                self._said.add(name)
                self.say(f"Rows of {self.stream.source} {words} are skipped ({remedy}); they are counted at the end.")
        return self._window
