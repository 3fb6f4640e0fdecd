import numpy as np
import pytest
import tiktoken
import toy_tokenizers as toys
from test_surface import slow_sentencepiece

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


def test_characters_after_the_last_token_go_to_it():
    surfaces = Surfaces([b"a"], ["a"], np.zeros(1, np.bool_))
    assert spans_from_offsets(surfaces, [0, 0], [(0, 1), (1, 2)], "aa  ").tolist() == [[0, 1], [1, 4]]


def test_tiktoken_encodings_are_taken():
    encoding = tiktoken.Encoding(
        "toy", pat_str=r"\w+|\W", mergeable_ranks={bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257},
        special_tokens={"<|endoftext|>": 260},
    )  # fmt: skip
    text = "the 😀<|endoftext|>"
    encoded = PlainEncoder(encoding).encode([text])[0]
    assert pieces(text, encoded)[:2] == [b"the", b" "]
    assert b"".join(pieces(text, encoded)) == text.encode()
    assert 260 not in encoded.ids


def test_slow_sentencepiece_tokenizers_are_taken_and_their_blank_is_not_counted(tmp_path):
    encoder = PlainEncoder(slow_sentencepiece(tmp_path))
    for lead in (False, True):
        for text in ("the fox", "größer 😀", "", "a</s>b"):
            encoded = encoder.encode([text], lead=lead)[0]
            assert b"".join(pieces(text, encoded)) == text.encode()
            assert encoder.surfaces.strings.index("</s>") not in encoded.ids


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
