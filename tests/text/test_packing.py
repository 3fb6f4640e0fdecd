import numpy as np
import pytest

from gold_jax.text.packing import gather_positions, pack


def rows(*texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


def read(packed, line, row):
    """The text of a row as it is found in its line."""
    return bytes(packed.tokens[line, packed.gather_index[line, row]][packed.mask[line, row]].tolist()).decode()


def test_every_row_is_found_in_its_line_and_what_rows_begin_with_stands_there_once():
    texts = ["system: what?", "system: who? I", "another", "system: who? You", ""]
    packed = pack(rows(*texts), 6)
    assert [read(packed, 0, i) for i in range(6)] == [*texts, ""]
    unpadded = bytes(packed.tokens[0].tolist()).rstrip(b"\0").decode()
    assert len(unpadded) == len("another") + len("system: what?") + len("o? I") + len("You")


def test_a_slot_that_owns_a_token_holds_it_and_stands_at_the_same_depth_in_every_row():
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 2, int(rng.integers(0, 9))).astype(np.int32) for _ in range(12)]
    packed = pack(made, 12, 3)
    width = packed.gather_index.shape[-1]
    for k in range(3):
        for i, row in enumerate(made[4 * k : 4 * k + 4]):
            slots = packed.gather_index[k, i, : len(row)]
            assert packed.tokens[k, slots].tolist() == row.tolist()
            owner = packed.first_slot[k, slots]
            assert (owner % width).tolist() == list(range(len(row)))
            assert (packed.gather_index[k].reshape(-1)[owner] == slots).all()


def test_only_rows_that_agree_from_the_first_token_on_share():
    packed = pack(rows("ab", "cb", "ab"), 3)
    slots = packed.gather_index[0, :, :2].tolist()
    assert slots[0] == slots[2] and not set(slots[0]) & set(slots[1])


def test_rows_longer_than_the_short_length_share_with_each_other_alone():
    texts = ["abcdef", "abc", "abcdeg", "abcd"]
    packed = pack(rows(*texts), 4, short_length=4)
    assert [read(packed, 0, i) for i in range(4)] == texts
    begins = packed.gather_index[0, :, :3].tolist()
    assert begins[0] == begins[2] and begins[1] == begins[3] and not set(begins[0]) & set(begins[1])


def test_positions_number_the_tokens_of_each_line():
    packed = pack(rows("ab", "ac", "ab", "x"), 4, 2)
    assert [packed.tokens[i // 2, gather_positions(packed)[i, 1]] for i in range(3)] == [ord(c) for c in "bcb"]
    assert gather_positions(packed)[2, 0] == 0


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="6 rows cannot be split evenly over 4 devices"):
        pack(rows("a"), 6, 4)
