"""What a model drew, read as text: never a shift, whatever the ids, and any other tokenizer can read the text."""

import functools

import numpy as np
import pytest
import real_tokenizers as real
import toy_tokenizers as toys
from hypothesis import given, settings
from hypothesis import strategies as st
from strings import mixed_strings
from transformers import PreTrainedTokenizerFast

from gold_jax.text.align import group_ends
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.detokenize import completion_from_ids
from gold_jax.text.encode import PlainEncoder

USER = [{"role": "user", "content": "the fox?"}]
AFTER = [None, USER, "the dog", ""]


def toy_chat_tokenizer(name: str) -> ChatTokenizer | None:
    tokenizer = toys.EVERY[name]()
    if name == "tiktoken":  # has no end token and no template: it encodes for others alone
        return None
    if name == "unigram":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return ChatTokenizer(tokenizer)


@functools.cache
def toy_chat_tokenizers() -> dict[str, ChatTokenizer]:
    chat_tokenizers = {name: toy_chat_tokenizer(name) for name in toys.EVERY}
    chat_tokenizers["llama2"] = ChatTokenizer(toys.sentencepiece(template=toys.LLAMA2))
    chat_tokenizers["chatml"] = ChatTokenizer(toys.byte_level(template=toys.CHATML))
    chat_tokenizers["chatml wordpiece"] = ChatTokenizer(toys.word_piece(template=toys.CHATML))
    return {name: chat_tokenizer for name, chat_tokenizer in chat_tokenizers.items() if chat_tokenizer is not None}


NAMES = [*(name for name in toys.EVERY if name != "tiktoken"), "llama2", "chatml", "chatml wordpiece"]


@functools.cache
def toy_encoders() -> dict[str, PlainEncoder]:
    return {name: PlainEncoder(make()) for name, make in toys.EVERY.items()}


def check(chat_tokenizer: ChatTokenizer, ids, after, others: dict[str, PlainEncoder]):
    """A completion is a prefix of the ids, its spans cover its text and are where the surfaces are, others align with it."""
    drawn = completion_from_ids(chat_tokenizer, ids, after=after)
    count, spans, data = len(drawn.ids), drawn.spans, drawn.text.encode()
    stops = np.flatnonzero(np.isin(ids, chat_tokenizer.stop_ids))
    written = ids[: stops[0]] if stops.size else ids
    assert drawn.ids.tolist() == list(written[:count])
    assert drawn.invalid_utf8 == (count < len(written))
    assert drawn.stopped == (bool(stops.size) and not drawn.invalid_utf8)
    assert spans.shape == (count, 2)
    if not count:
        assert drawn.text == ""
        return drawn
    assert spans[0, 0] == 0 and spans[-1, 1] == len(data)
    assert (spans[1:, 0] == spans[:-1, 1]).all() and (spans[:, 0] <= spans[:, 1]).all()
    pieces = [data[begin:end] for begin, end in spans]
    spelled = [chat_tokenizer.surfaces.table[i] for i in drawn.ids]
    assert None not in spelled
    if chat_tokenizer.surfaces.reversible:
        joined = b"".join(spelled)
        assert joined in (data, b" " + data)
        assert pieces[1:] == spelled[1:] or not pieces[0]
    else:
        assert [piece.strip() for piece in pieces] == [entry.strip() for entry in spelled]
    for encoder in others.values():
        theirs = encoder.encode([drawn.text])[0] if drawn.text else None
        if theirs is not None:
            ours_group, theirs_group, groups = group_ends(spans[:, 1], theirs.spans[:, 1])
            assert set(ours_group.tolist()) == set(theirs_group.tolist()) == set(range(groups))
    return drawn


def drawn_ids(chat_tokenizer: ChatTokenizer, rng: np.random.Generator, count: int):
    """Random ids, ids of texts with some exchanged, and ids of texts cut off somewhere."""
    size = len(chat_tokenizer.surfaces)
    texts = mixed_strings(count, int(rng.integers(1 << 30)), 80)
    for k, encoded in enumerate(chat_tokenizer.encode_completions(texts)):
        ids = encoded.ids.copy()
        if k % 3 == 0:
            ids = rng.integers(-2, size + 4, rng.integers(0, 30)).astype(np.int32)
        elif k % 3 == 1 and len(ids):
            ids[rng.integers(0, len(ids))] = rng.integers(0, size)
        else:
            ids = ids[: rng.integers(0, len(ids) + 1)]
        yield np.append(ids, chat_tokenizer.stop_id) if k % 4 == 0 else ids


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_model_draws_nothing_shifts(name):
    chat_tokenizer, rng = toy_chat_tokenizers()[name], np.random.default_rng(3)
    whole = 0
    for k, ids in enumerate(drawn_ids(chat_tokenizer, rng, 120)):
        whole += not check(chat_tokenizer, ids, AFTER[k % 4], toy_encoders()).invalid_utf8
    assert whole > 10


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_ids_give_valid_text(name, data):
    chat_tokenizer = toy_chat_tokenizers()[name]
    ids = data.draw(st.lists(st.integers(-1, len(chat_tokenizer.surfaces)), max_size=12))
    check(chat_tokenizer, np.array(ids, np.int32), data.draw(st.sampled_from(AFTER)), {})


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_a_text_are_read_back_as_that_text(name):
    chat_tokenizer = toy_chat_tokenizers()[name]
    text = "the dog jumps over the fox"
    for after in AFTER:
        encoded = chat_tokenizer.encode_completion(text, after=after)
        drawn = completion_from_ids(chat_tokenizer, [*encoded.ids, chat_tokenizer.stop_id], after=after)
        if not encoded.unknown.any():
            assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == (text, True, False), after
            assert drawn.spans.tolist() == encoded.spans.tolist(), after


# Word pieces: the text is what their decoder makes of them


def word_pieces(chat_tokenizer, *strings):
    return np.array([chat_tokenizer.surfaces.strings.index(string) for string in strings], np.int32)


@pytest.fixture
def bert():
    return toy_chat_tokenizers()["wordpiece"]


def test_drawn_word_pieces_have_the_spans_of_their_decoded_text(bert):
    drawn = completion_from_ids(bert, word_pieces(bert, "the", "dog", ",", "u", "##n", "##k", "[SEP]"))
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("the dog, unk", True, False)
    assert drawn.spans.tolist() == [[0, 3], [3, 7], [7, 8], [8, 10], [10, 11], [11, 12]]


def test_word_pieces_that_their_tokenizer_would_not_write_are_left_out_with_all_that_follows(bert):
    # The tokenizer has `the` as one piece: `t ##h ##e` is another way to write it, which no text gives.
    ids = word_pieces(bert, "dog", "t", "##h", "##e", "dog", "[SEP]")
    assert bert.tokenizer.decode(ids[:-1]) == "dog the dog"
    drawn = completion_from_ids(bert, ids)
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("dog", False, True)
    assert drawn.spans.tolist() == [[0, 3]]


def test_a_completion_that_begins_inside_a_word_is_damaged_from_its_start(bert):
    drawn = completion_from_ids(bert, word_pieces(bert, "##n", "the"))
    assert (drawn.text, len(drawn.ids), drawn.invalid_utf8) == ("", 0, True)


def test_the_unknown_piece_ends_what_can_be_read(bert):
    drawn = completion_from_ids(bert, word_pieces(bert, "the", "[UNK]", "dog", "[SEP]"))
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("the", False, True)


def test_chinese_word_pieces_are_read_with_the_blanks_of_their_decoder(bert):
    drawn = completion_from_ids(bert, word_pieces(bert, "世", "界"))
    assert drawn.text == "世 界" and drawn.spans[-1, 1] == 7 and not drawn.invalid_utf8


# A blank that a tokenizer puts before every text


@pytest.mark.parametrize("name", ["slow", "unigram words"])
@pytest.mark.parametrize("after", AFTER)
def test_a_blank_that_a_tokenizer_always_puts_is_no_part_of_the_text(name, after):
    chat_tokenizer = toy_chat_tokenizers()[name]
    drawn = completion_from_ids(chat_tokenizer, word_pieces(chat_tokenizer, "▁the", "▁dog"), after=after)
    assert drawn.text == "the dog" and drawn.spans.tolist() == [[0, 3], [3, 7]]


def test_a_blank_that_a_model_drew_after_a_plain_prompt_is_text():
    chat_tokenizer = toy_chat_tokenizers()["prepend"]
    assert completion_from_ids(chat_tokenizer, word_pieces(chat_tokenizer, "▁the"), after="so").text == " the"
    assert completion_from_ids(chat_tokenizer, word_pieces(chat_tokenizer, "▁the"), after="").text == "the"


def test_a_character_cut_off_by_the_length_limit_is_left_out_with_the_token_that_begins_it():
    chat_tokenizer = toy_chat_tokenizers()["chatml"]
    ids = chat_tokenizer.encode_completion("the ☃").ids
    for cut in (1, 2):
        drawn = completion_from_ids(chat_tokenizer, ids[:-cut])
        assert (drawn.text, drawn.invalid_utf8) == ("the ", True)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("drawn", [80, pytest.param(300, marks=pytest.mark.long)])
def test_whatever_real_models_draw_nothing_shifts(assets, drawn):
    import alignment_at_scale as scale

    encoders = {name: side.encoder for name, side in scale.real_sides(assets).items()}
    for name, path in scale.REAL.items():
        chat_tokenizer, rng = real.chat_tokenizer(assets / path), np.random.default_rng(7)
        for k, ids in enumerate(drawn_ids(chat_tokenizer, rng, drawn)):
            check(chat_tokenizer, ids, AFTER[k % 4], encoders)
        assert k == drawn - 1, name
