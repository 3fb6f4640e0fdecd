import numpy as np
import pytest

from gold_jax.text.lines import pack_lines, positions


def rows(*texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


def read(lines, line, row):
    """The text of a row as it is found in its line."""
    return bytes(lines.tokens[line, lines.place[line, row]][lines.mask[line, row]].tolist()).decode()


def test_every_row_is_found_in_its_line_and_what_rows_begin_with_stands_there_once():
    texts = ["system: what?", "system: who? I", "another", "system: who? You", ""]
    lines = pack_lines(rows(*texts), 6)
    assert [read(lines, 0, i) for i in range(6)] == [*texts, ""]
    laid = bytes(lines.tokens[0].tolist()).rstrip(b"\0").decode()
    assert len(laid) == len("another") + len("system: what?") + len("o? I") + len("You")


def test_a_slot_that_owns_a_token_holds_it_and_stands_at_the_same_depth_in_every_row():
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 2, int(rng.integers(0, 9))).astype(np.int32) for _ in range(12)]
    lines = pack_lines(made, 12, 3)
    width = lines.place.shape[-1]
    for k in range(3):
        for i, row in enumerate(made[4 * k : 4 * k + 4]):
            place = lines.place[k, i, : len(row)]
            assert lines.tokens[k, place].tolist() == row.tolist()
            owner = lines.owner[k, place]
            assert (owner % width).tolist() == list(range(len(row)))
            assert (lines.place[k].reshape(-1)[owner] == place).all()


def test_only_rows_that_agree_from_the_first_token_on_share():
    lines = pack_lines(rows("ab", "cb", "ab"), 3)
    place = lines.place[0, :, :2].tolist()
    assert place[0] == place[2] and not set(place[0]) & set(place[1])


def test_positions_number_the_tokens_of_each_line():
    lines = pack_lines(rows("ab", "ac", "ab", "x"), 4, 2)
    assert [lines.tokens[i // 2, positions(lines)[i, 1]] for i in range(3)] == [ord(c) for c in "bcb"]
    assert positions(lines)[2, 0] == 0


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="6 rows cannot be shared out evenly among 4 devices"):
        pack_lines(rows("a"), 6, 4)
