import functools

import numpy as np
import pytest
import toy_tokenizers as toys
from hypothesis import given, settings
from strings import LONG, PHRASES, SPECIAL, mixed_strings, texts

from gold_jax.text.encode import PlainEncoder, spans_from_offsets, spans_from_surfaces
from gold_jax.text.surface import Surfaces, surfaces_of


def strings(encoder, encoded):
    return [encoder.surfaces.strings[i] for i in encoded.ids]


def pieces(text, encoded):
    data = text.encode()
    return [data[a:b] for a, b in encoded.spans]


def test_spans_are_the_running_sum_of_surface_lengths():
    surfaces = Surfaces([b"ab", b"\xc3", None, b""], ["ab", "Ã", "<s>", ""], np.zeros(4, np.bool_))
    assert spans_from_surfaces(surfaces, [0, 1, 3, 0]).tolist() == [[0, 2], [2, 3], [3, 3], [3, 5]]
    assert spans_from_surfaces(surfaces, []).shape == (0, 2)


@pytest.mark.parametrize("dummy", ["normalizer", "metaspace", ""])
def test_no_blank_is_put_before_a_text(dummy):
    encoder = PlainEncoder(toys.sentencepiece(dummy))
    text = "the dog\nthe  fox é"
    encoded = encoder.encode([text])[0]
    assert strings(encoder, encoded)[0] != "▁the"
    assert b"".join(pieces(text, encoded)) == text.encode()
    assert encoder.surfaces.join(encoded.ids) == text.encode()


@pytest.mark.parametrize("dummy", ["normalizer", "metaspace", ""])
def test_a_leading_blank_is_in_the_first_token_but_not_in_its_span(dummy):
    encoder = PlainEncoder(toys.sentencepiece(dummy))
    encoded = encoder.encode(["the fox"], lead=True)[0]
    assert strings(encoder, encoded)[0] == "▁the"
    assert encoded.spans[0].tolist() == [0, 3]
    assert encoded.spans[-1, 1] == 7


def test_a_leading_blank_that_is_a_token_of_its_own_has_an_empty_span():
    encoder = PlainEncoder(toys.sentencepiece())
    encoded = encoder.encode(["\nx"], lead=True)[0]
    assert strings(encoder, encoded)[0] == "▁"
    assert encoded.spans.tolist() == [[0, 0], [0, 1], [1, 2]]


def test_an_empty_text_has_no_tokens():
    for lead in (False, True):
        encoded = PlainEncoder(toys.sentencepiece()).encode([""], lead=lead)[0]
        assert encoded.ids.shape == (0,) and encoded.spans.shape == (0, 2)


def test_special_strings_are_plain_text():
    encoder = PlainEncoder(toys.byte_level())
    text = "a<|im_end|>b<think>"
    encoded = encoder.encode([text])[0]
    assert 2 not in encoded.ids
    assert b"".join(pieces(text, encoded)) == text.encode()
    assert strings(encoder, encoded)[-1] == "<think>"  # an ordinary entry, which the model does read as one


def test_the_tokenizer_given_is_left_as_it_was():
    tokenizer = toys.sentencepiece()
    before = tokenizer.backend_tokenizer.to_str()
    PlainEncoder(tokenizer).encode(["the </s> fox"])
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.encode("a</s>", add_special_tokens=False)[-1] == 2


def test_truncation_and_padding_that_the_tokenizer_was_set_to_do_not_matter():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    text = "the quick brown fox"
    assert b"".join(pieces(text, PlainEncoder(tokenizer).encode([text])[0])) == text.encode()


def test_a_composed_character_takes_the_bytes_that_it_was_composed_of():
    encoder = PlainEncoder(toys.byte_level(300, "NFC"))
    text = "xe\u0301y"
    encoded = encoder.encode([text])[0]
    assert encoder.surfaces.join(encoded.ids) == "x\u00e9y".encode()
    # é is two pieces here: no boundary is made up inside it.
    assert pieces(text, encoded) == [b"x", "e\u0301".encode(), b"", b"y"]


def test_pieces_of_an_unchanged_character_keep_their_bytes_beside_a_changed_one():
    encoder = PlainEncoder(toys.byte_level(300, "NFC"))
    text = "世e\u0301"
    assert pieces(text, encoder.encode([text])[0])[:3] == ["世".encode()[k : k + 1] for k in range(3)]


def test_characters_that_the_vocabulary_lacks_belong_to_the_unknown_token():
    encoder = PlainEncoder(toys.unigram())
    text = "the ☃ fox"
    encoded = encoder.encode([text])[0]
    assert b"".join(pieces(text, encoded)) == text.encode()
    assert encoder.surfaces.strings.index("<unk>") in encoded.ids


def test_a_written_metaspace_is_located_although_it_spells_a_blank():
    encoder = PlainEncoder(toys.sentencepiece())
    text = "a▁b c"
    assert pieces(text, encoder.encode([text])[0]) == [b"a", "▁".encode(), b"b", b" ", b"c"]


def test_trimmed_blanks_go_to_the_token_that_spells_them():
    surfaces = Surfaces([b"a", b" b", b"c"], ["a", " b", "c"], np.zeros(3, np.bool_))
    spans = spans_from_offsets(surfaces, [0, 1, 2], [(0, 1), (2, 3), (5, 6)], "a b  c")
    assert spans.tolist() == [[0, 1], [1, 5], [5, 6]]


def test_trimmed_characters_at_the_start_go_to_the_first_token_and_shift_nothing():
    surfaces = Surfaces([b"\xc3", b"\xa9", b" "], ["Ã", "©", "▁"], np.zeros(3, np.bool_))
    shared = [(2, 3)] * 3
    assert spans_from_offsets(surfaces, [0, 1], shared[:2], "\t\té").tolist() == [[0, 3], [3, 4]]
    assert spans_from_offsets(surfaces, [2, 0, 1], shared, "\t\té").tolist() == [[0, 2], [2, 3], [3, 4]]
    assert spans_from_offsets(surfaces, [2, 0, 1], shared, "\t é").tolist() == [[0, 2], [2, 3], [3, 4]]


def test_characters_after_the_last_token_go_to_it():
    surfaces = Surfaces([b"a"], ["a"], np.zeros(1, np.bool_))
    assert spans_from_offsets(surfaces, [0, 0], [(0, 1), (1, 2)], "aa  ").tolist() == [[0, 1], [1, 4]]


def test_tiktoken_encodings_are_taken():
    text = "the 😀<|endoftext|>"
    encoded = PlainEncoder(toys.tiktoken_encoding()).encode([text])[0]
    assert pieces(text, encoded)[:2] == [b"the", b" "]
    assert b"".join(pieces(text, encoded)) == text.encode()
    assert 260 not in encoded.ids


def test_slow_sentencepiece_tokenizers_are_taken_and_their_blank_is_not_counted():
    encoder = PlainEncoder(toys.slow_sentencepiece())
    for lead in (False, True):
        for text in ("the fox", "größer 😀", "", "a</s>b"):
            encoded = encoder.encode([text], lead=lead)[0]
            assert b"".join(pieces(text, encoded)) == text.encode()
            assert encoder.surfaces.strings.index("</s>") not in encoded.ids


def test_a_slow_tokenizer_that_changes_the_text_is_located_by_its_own_offsets():
    encoder = PlainEncoder(toys.slow_sentencepiece("unigram", "nmt_nfkc", False))
    text = " the  ﬁx☃"
    encoded = encoder.encode([text])[0]
    assert strings(encoder, encoded) == ["▁the", "▁", "f", "i", "x", "<unk>"]
    assert pieces(text, encoded) == [b" the", b"  ", "ﬁ".encode(), b"", b"x", "☃".encode()]
    assert encoded.unknown.tolist() == [False] * 5 + [True]


def test_what_cannot_be_located_names_the_tokenizer_and_the_text():
    class Liar:
        name_or_path = "liar"

        def encode(self, text, **_):
            return [0, 0]

    surfaces = Surfaces([b"x"], ["x"], np.zeros(1, np.bool_))
    with pytest.raises(ValueError, match="'liar'.*from byte 1 on.*'xx'.*'xylophone'"):
        PlainEncoder(Liar(), surfaces).encode(["xylophone"])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        PlainEncoder(toys.byte_level()).encode(["a\ud83d"])


def test_a_batch_is_what_its_texts_are_alone():
    encoder = PlainEncoder(toys.byte_level(300, "NFC"))
    texts = ["the", "", "e\u0301", "😀 fox"]
    for text, encoded in zip(texts, encoder.encode(texts)):
        alone = encoder.encode([text])[0]
        assert encoded.ids.tolist() == alone.ids.tolist() and encoded.spans.tolist() == alone.spans.tolist()


def test_surfaces_of_an_encoder_can_be_given():
    surfaces = surfaces_of(toys.byte_level())
    assert PlainEncoder(toys.byte_level(), surfaces).surfaces is surfaces


# Word pieces


def test_word_pieces_have_the_bytes_of_the_text_and_not_of_what_the_normaliser_made_of_it():
    encoder = PlainEncoder(toys.word_piece())
    text = "The GRÖẞER dog, Êtes-vous? 世界"
    encoded = encoder.encode([text])[0]
    found = list(zip(strings(encoder, encoded), pieces(text, encoded)))
    assert found[0] == ("the", b"The")
    assert (
        ("dog", b" dog") in found
        and (",", b",") in found
        and ("großer", " GRÖẞER".encode()) in found
        and ("界", "界".encode()) in found
    )
    assert "".join(piece.decode() for _, piece in found) == text


def test_the_blank_before_a_changed_word_belongs_to_it():
    encoder = PlainEncoder(toys.word_piece())
    text = "the Dog  DOG"
    assert pieces(text, encoder.encode([text])[0]) == [b"the", b" Dog ", b" DOG"]


def test_a_blank_before_a_text_makes_no_difference_to_word_pieces():
    encoder = PlainEncoder(toys.word_piece())
    plain, led = (encoder.encode(["the dog"], lead=lead)[0] for lead in (False, True))
    assert plain.ids.tolist() == led.ids.tolist() and plain.spans.tolist() == led.spans.tolist() == [[0, 3], [3, 7]]


@pytest.mark.parametrize("name", ["wordpiece", "words", "unigram words", "slow unigram"])
def test_a_text_of_which_nothing_is_left_is_one_unknown_token(name):
    encoder = PlainEncoder(toys.EVERY[name]())
    for lead in (False, True):
        encoded = encoder.encode([" \n ", "the"], lead=lead)[0]
        assert strings(encoder, encoded) in (["[UNK]"], ["<unk>"])
        assert encoded.spans.tolist() == [[0, 3]] and encoded.unknown.tolist() == [True]


def test_nothing_left_and_no_unknown_token_is_refused():
    backend = toys.Tokenizer(toys.models.BPE({"a": 0, "▁": 1}, []))
    backend.pre_tokenizer = toys.pre_tokenizers.Metaspace()
    encoder = PlainEncoder(backend)
    assert encoder.encode(["aXa"])[0].spans.tolist() == [[0, 2], [2, 3]]  # X goes to the token before
    with pytest.raises(ValueError, match="makes no token of the text 'XX'.*no unknown token"):
        encoder.encode(["a", "XX"])


def lacking(*dropped: int):
    """Byte-level BPE without merges but `.,`, which drops some bytes as SmolLM2's does."""
    alphabet = sorted(toys.pre_tokenizers.ByteLevel.alphabet())
    backend = toys.Tokenizer(toys.models.BPE({char: i for i, char in enumerate([*alphabet, ".,"])}, [(".", ",")]))
    backend.pre_tokenizer = toys.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = toys.decoders.ByteLevel()
    by_byte = {entry: string for entry, string in zip(surfaces_of(backend).table, surfaces_of(backend).strings)}
    kept = [char for char in alphabet if char not in {by_byte[bytes([byte])] for byte in dropped}]
    backend.model = toys.models.BPE({char: i for i, char in enumerate([*kept, ".,"])}, [(".", ",")])
    return backend


def test_bytes_that_a_vocabulary_lacks_shift_nothing():
    encoder = PlainEncoder(lacking(4))
    text = "\x04.\x04\x04,;.,!\x04"
    encoded = encoder.encode([text])[0]
    assert strings(encoder, encoded) == [".", ",", ";", ".,", "!"]
    assert pieces(text, encoded) == [b"\x04.\x04\x04", b",", b";", b".,", b"!\x04"]
    assert encoder.encode([".,;"])[0].spans.tolist() == [[0, 2], [2, 3]]


def test_a_character_of_which_a_byte_is_lacking_is_not_cut():
    encoder = PlainEncoder(lacking(0xF1))
    text = "é\U00040000;"
    encoded = encoder.encode([text])[0]
    assert pieces(text, encoded) == [b"\xc3", b"\xa9", "\U00040000".encode(), b"", b"", b";"]


def test_a_tokenizer_that_lacks_no_byte_is_not_changed_for_it():
    model = PlainEncoder(toys.byte_level())._backend.model
    assert model.unk_token is None


def test_a_vocabulary_that_knows_neither_a_character_nor_an_unknown_token_is_refused_by_name():
    backend = toys.Tokenizer(toys.models.Unigram([("b", 0.0), ("▁", -1.0)]))
    backend.pre_tokenizer = toys.pre_tokenizers.Metaspace()
    encoder = PlainEncoder(backend)
    assert encoder.encode(["b b"])[0].ids.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="a Tokenizer cannot encode.*'bab'"):
        encoder.encode(["bab"])


# Unigram


@pytest.mark.parametrize("kind", ["bytes", "blanks"])
def test_of_blanks_that_become_one_the_last_is_the_one(kind):
    encoder = PlainEncoder(toys.unigram_like(kind))
    text = "the    dog"
    encoded = encoder.encode([text])[0]
    assert encoder.surfaces.table[encoded.ids[-1]] == pieces(text, encoded)[-1] == b" dog"
    assert pieces(text, encoded)[-2].endswith(b"e   ")


def test_the_marks_of_words_stay_where_white_space_is_lost():
    encoder = PlainEncoder(toys.unigram_like("words"))
    text = "the dog\n the"
    encoded = encoder.encode([text])[0]
    assert strings(encoder, encoded) == ["▁the", "▁dog", "▁the"]
    assert pieces(text, encoded) == [b"the", b" dog\n", b" the"]
    assert encoder.encode(["the dog"], lead=True)[0].spans.tolist() == [[0, 3], [3, 7]]


def test_a_blank_that_is_put_before_every_word_has_no_bytes_where_there_is_none():
    encoder = PlainEncoder(toys.unigram_like("words"))
    text = "☃ ☃"
    encoded = encoder.encode([text])[0]
    assert strings(encoder, encoded) == ["▁", "<unk>", "▁", "<unk>"]
    assert pieces(text, encoded) == [b"", "☃".encode(), b" ", "☃".encode()]
    assert encoded.unknown.tolist() == [False, True, False, True]


@pytest.mark.parametrize("name", toys.EVERY)
def test_no_special_token_is_read_out_of_a_text(name):
    encoder = encoders()[name]
    encoded = encoder.encode([f"a{string}b" for string in SPECIAL])
    for string, one in zip(SPECIAL, encoded):
        read = {encoder.surfaces.strings[i] for i in one.ids[~encoder.surfaces.spells[one.ids]]}
        assert read <= {"<unk>", "[UNK]"}, string


def test_bytes_that_are_written_out_are_letters_to_a_unigram_model():
    encoder = PlainEncoder(toys.unigram_like("bytes"))
    encoded = encoder.encode(["the<0x0A>dog"])[0]
    assert encoder.surfaces.join(encoded.ids) == b"the<0x0A>dog"


# Unknown tokens


def test_tokens_are_known_where_the_surfaces_spell_the_text():
    encoded = PlainEncoder(toys.byte_level()).encode(["the ☃", ""])
    assert encoded[0].unknown.dtype == np.bool_
    assert [e.unknown.tolist() for e in encoded] == [[False] * len(encoded[0].ids), []]


def test_an_unknown_token_has_the_span_of_the_characters_that_it_stands_for():
    encoder = PlainEncoder(toys.unigram())
    text = "the ☃☃ fox"
    encoded = encoder.encode([text])[0]
    assert np.array(pieces(text, encoded), object)[encoded.unknown].tolist() == ["☃☃".encode()]


def test_an_unknown_token_that_shares_a_character_has_its_bytes():
    surfaces = Surfaces([b" ", None, b"x"], ["▁", "<unk>", "x"], np.zeros(3, np.bool_))
    # One character that a normaliser made three of, and a blank that was put before it.
    spans = spans_from_offsets(surfaces, [0, 2, 1], [(0, 1), (0, 1), (0, 1)], "㌀")
    assert spans.tolist() == [[0, 0], [0, 0], [0, 3]]
    spans = spans_from_offsets(surfaces, [2, 0, 1, 2], [(0, 2), (1, 3), (1, 3), (2, 4)], "x ☃x")
    assert spans.tolist() == [[0, 1], [1, 2], [2, 5], [5, 6]]


def test_a_blank_that_stands_before_a_text_alone_is_not_unknown_text():
    backend = toys.Tokenizer(toys.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = toys.pre_tokenizers.Split("a", "isolated")
    backend.decoder = toys.decoders.Metaspace()
    encoder = PlainEncoder(backend)
    assert [encoder.encode(["a"], lead=lead)[0].unknown.tolist() for lead in (False, True)] == [[False], [False, False]]


# Damaged text


@functools.cache
def encoders():
    return {name: PlainEncoder(make()) for name, make in toys.EVERY.items()}


def check(encoder, text, lead=False):
    encoded = encoder.encode([text], lead=lead)[0]
    spans, data = encoded.spans, text.encode()
    assert len(spans) == len(encoded.ids) == len(encoded.unknown)
    if not text:
        assert not len(spans)
        return
    assert spans[0, 0] == 0 and spans[-1, 1] == len(data)
    assert (spans[1:, 0] == spans[:-1, 1]).all() and (spans[:, 0] <= spans[:, 1]).all()
    spells = encoder.surfaces.spells[encoded.ids]
    assert (encoded.unknown == (~spells & (spans[:, 0] < spans[:, 1]))).all()
    # Inside a character there is an end only where the surfaces spell the bytes on either side of it.
    for i, (begin, end) in zip(encoded.ids, spans):
        if any(at < len(data) and data[at] & 0xC0 == 0x80 for at in (begin, end)) and begin < end:
            assert data[begin:end].lstrip(b" ").startswith(encoder.surfaces.spelling[i].lstrip(b" "))


DAMAGED = [
    *PHRASES, *(a + b for a in ("the", " ", "😀") for b in ("\r\n", "\x00", "\ufeff", "\u200b", "\u0301", "\ufffd", "▁")),
    "\ufeffthe", " the ", "\r\n the \r\n", "e\u0301\u0323\u0301", "\u0301", "\u200d\u200d", "\ufe0f", "\ufffd\ufffd", "\U0010ffff",
    bytes(range(256)).decode(errors="replace"), "👨‍👩‍👧‍👦"[:-1], "가".encode()[:2].decode(errors="replace"), "\x85\xa0\u2028\u3000",
]  # fmt: skip


@pytest.mark.parametrize("lead", [False, True])
@pytest.mark.parametrize("name", toys.EVERY)
def test_damaged_texts_are_covered_exactly(name, lead):
    for text in DAMAGED + mixed_strings(60):
        check(encoders()[name], text, lead)


@pytest.mark.parametrize("name", toys.EVERY)
def test_very_long_runs_are_covered_exactly(name):
    for text in LONG:
        check(encoders()[name], text)
        check(encoders()[name], f"the{text}the")


@pytest.mark.parametrize("name", toys.EVERY)
def test_half_a_surrogate_pair_is_refused_by_every_tokenizer(name):
    for text in ("a\ud83d", "\ude00b", "the \ud83d\ude00"):
        with pytest.raises(ValueError, match="not valid Unicode at character .*surrogate"):
            encoders()[name].encode(["the", text])


@pytest.mark.parametrize("name", toys.EVERY)
@given(text=texts())
@settings(max_examples=30, deadline=None)
def test_any_text_is_covered_exactly(name, text):
    check(encoders()[name], text)
    check(encoders()[name], text, True)
