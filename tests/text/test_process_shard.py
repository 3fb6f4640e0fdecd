import jax
import numpy as np
import pytest
from training.small import rows

from gold_jax.text.batch import build_batches, build_token_batches
from gold_jax.text.process_shard import ProcessShard

OWNER = (0, 0, 1, 2)
SHARDS = ((0, 1), (2, 3), (3,))  # the last two processes both hold devices of shard 3; process 1 does not count it


class Together:
    """Processes that run one after the other: what each sends is recorded, and returned to all in the next round."""

    def __init__(self, count):
        self.said = [[] for _ in range(count)]
        self.count = count

    def shard_of(self, process, owner=OWNER, shards=SHARDS):
        call = iter(range(10**6))

        def exchange(combine):
            def with_others(values):
                number = next(call)
                if len(self.said[process]) == number:
                    self.said[process].append(values)
                everyone = [said[number] if number < len(said) else values for said in self.said]
                return combine(everyone)

            return with_others

        return ProcessShard(
            owner, shards[process], process, exchange(sum), exchange(lambda x: np.max(x, axis=0)), exchange(list)
        )


def by_all(build, count=3):
    """What every process builds, in rounds, until each has what the others send at every exchange."""
    together = Together(count)
    for _ in range(4):
        found = [build(together.shard_of(process)) for process in range(count)]
    return found


def put_together(parts, height):
    """The arrays of the whole batch, from those of every process's shards."""

    def joined(*arrays):
        unit = len(arrays[0]) // len(SHARDS[0])
        shards = {shard: x[k * unit : (k + 1) * unit] for x, own in zip(arrays, SHARDS) for k, shard in enumerate(own)}
        return np.concatenate([shards[shard] for shard in range(len(OWNER))])

    return jax.tree.map(joined, *parts)


@pytest.mark.parametrize("normalization", ["groups", "row_mean"])
@pytest.mark.parametrize("count", [8, 13])
def test_processes_make_together_what_one_makes_alone(normalization, count):
    made = rows(count, seed=3)
    options = dict(merge="chain", groups="all", normalization=normalization)
    alone = build_batches(made, 8, process_shard=ProcessShard.single_process(4), **options)

    def build(process_shard):
        here = set(process_shard.local_rows(count, 8))
        return build_batches(
            [row if i in here else None for i, row in enumerate(made)], 8, process_shard=process_shard, **options
        )

    parts = by_all(build)
    for number, whole in enumerate(alone):
        together = put_together([found[number] for found in parts], 2)
        jax.tree.map(np.testing.assert_array_equal, together, whole)


def test_labels_too():
    made = [(np.concatenate([r.student.prompt, r.student.completion]), ...) for r in rows(13, 1)]
    made = [(ids, np.arange(len(ids)) % 3 > 0) for ids, _ in made]
    alone = build_token_batches(made, 8, process_shard=ProcessShard.single_process(4))

    def build(process_shard):
        here = set(process_shard.local_rows(13, 8))
        return build_token_batches(
            [row if i in here else None for i, row in enumerate(made)], 8, process_shard=process_shard
        )

    parts = by_all(build)
    for number, whole in enumerate(alone):
        jax.tree.map(np.testing.assert_array_equal, put_together([found[number] for found in parts], 2), whole)


def test_every_row_counts_for_one_process():
    process_shards = [ProcessShard(OWNER, shards, process) for process, shards in enumerate(SHARDS)]
    for row in range(16):
        assert sum(one.is_owner(row, 8) for one in process_shards) == 1
    assert process_shards[1].local_rows(13, 8) == [4, 5, 6, 7, 12]
    assert process_shards[2].local_rows(13, 8) == [6, 7]


def test_token_ids_of_all_rows_are_known_to_all():
    ids = [np.arange(i + 1, dtype=np.int32) for i in range(13)]
    wanted = [0, 2, 3, 5, 6, 8, 12]

    def build(process_shard):
        mine = {i: ids[i] for i in process_shard.local_rows(13, 8)}
        try:
            return process_shard.gather_token_ids(wanted, mine, 8)
        except StopIteration:  # the others have not spoken yet
            return None

    for found in by_all(build):
        assert [x.tolist() for x in found] == [ids[i].tolist() for i in wanted]
