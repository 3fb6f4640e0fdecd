"""The text of a sequence that is being written: the same however many of its tokens come at once."""

import numpy as np
import pytest

from gold_jax.loading import load_model_and_tokenizer
from gold_jax.serving.batcher import Tokens
from gold_jax.serving.writing import Writing

TEXT = "5168 is five größer 😀 thousand"


@pytest.fixture(scope="module")
def chat():
    return load_model_and_tokenizer("embedded:student").chat_tokenizer


def write(chat, ids, stops, at_once) -> tuple[list[str], Writing]:
    """The pieces of text that so many tokens at once give, and what wrote them."""
    writing, told = Writing(chat, None, stops), []
    for at in range(0, len(ids), at_once):
        some = np.array(ids[at : at + at_once], np.int32)
        told.append(writing.add(Tokens(some, np.zeros(len(some)), *np.zeros((2, len(some), 0)))))
        if writing.finish:
            return told, writing
    return [*told, writing.end("length")], writing


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("stops", "text", "finish"),
    [
        ((), TEXT, "length"),
        (("nowhere", "thousand!"), TEXT, "length"),  # kept back, and told at the end
        (("is",), "5168 ", "stop"),
        (("five größer!", "ive", "fi"), "5168 is ", "stop"),
        (("is five g", "five"), "5168 is ", "stop"),  # the first that is complete, not the one that begins first
        (("ößer 😀",), "5168 is five gr", "stop"),  # across tokens, and within a character of several tokens
        (("5",), "", "stop"),
    ],
)
def test_the_first_complete_stop_string_ends_it_and_no_part_of_one_is_told(chat, stops, text, finish, at_once):
    ids = chat.encode_completion(TEXT).ids.tolist()
    told, writing = write(chat, ids, stops, at_once)
    assert "".join(told) == writing.text == text and writing.finish == finish
    ends = [TEXT.index(stop) + len(stop) for stop in stops if stop in TEXT]
    needed = TEXT[: min(ends)].encode() if finish == "stop" else TEXT.encode()
    assert len(chat.surfaces.join(writing.ids).lstrip()) >= len(needed)
    assert len(chat.surfaces.join(writing.ids[:-1]).lstrip()) < len(needed)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_what_is_no_utf8_ends_it_after_the_same_token(chat, at_once):
    """Four tokens may be a character that is not whole yet; the fifth says that they are none."""
    ids = chat.encode_completion("5168 ö").ids.tolist()
    broken = [*ids[:-1], *[ids[-2]] * 9]  # the first byte of a character again and again
    told, writing = write(chat, broken, (), at_once)
    assert "".join(told) == "5168 " and writing.finish == "stop" and writing.ids == broken[: len(ids) - 2 + 5]
    assert len(writing.ready()[1]) == len(writing.ids)
