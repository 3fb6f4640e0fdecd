import numpy as np
import pytest
import real_tokenizers as real
import toy_tokenizers as toys

from gold_jax.text.surface import Surfaces, surfaces_of, unknown_id


def entry(surfaces: Surfaces, string: str) -> bytes | None:
    return surfaces.table[surfaces.strings.index(string)]


def test_byte_level_entries_spell_the_bytes_behind_their_alphabet():
    surfaces = surfaces_of(toys.byte_level())
    assert entry(surfaces, "Ġthe") == b" the"
    assert entry(surfaces, "Ċ") == b"\n"
    assert {bytes([b]) for b in range(256)} <= set(surfaces.table)
    assert not surfaces.is_fallback.any()


def test_sentencepiece_entries_spell_blanks_and_fallback_bytes():
    surfaces = surfaces_of(toys.sentencepiece())
    assert entry(surfaces, "▁the") == b" the"
    assert entry(surfaces, "<0x0A>") == b"\n"
    assert entry(surfaces, "<0xE2>") == b"\xe2"
    assert int(surfaces.is_fallback.sum()) == 256


def test_fallback_strings_are_text_where_the_model_has_no_byte_fallback():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_tokens(["<0x0A>"])
    surfaces = surfaces_of(tokenizer)
    assert entry(surfaces, "<0x0A>") == b"<0x0A>"
    assert not surfaces.is_fallback.any()


def test_special_tokens_have_no_surface_and_ordinary_added_ones_spell_their_letters():
    surfaces = surfaces_of(toys.byte_level())
    assert entry(surfaces, "<|im_end|>") is None
    assert entry(surfaces, "<think>") == b"<think>"


def test_added_tokens_outside_the_byte_alphabet_spell_their_letters():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_tokens(["<｜é｜>", "a b"])
    surfaces = surfaces_of(tokenizer)
    assert entry(surfaces, "<｜é｜>") == "<｜é｜>".encode()
    assert entry(surfaces, "a b") == b"a b"


def test_the_unknown_entry_that_only_the_model_names_spells_nothing():
    surfaces = surfaces_of(toys.unigram())
    assert entry(surfaces, "<unk>") is None
    assert entry(surfaces, "▁the") == b" the"


def test_tiktoken_entries_are_their_bytes():
    surfaces = surfaces_of(toys.tiktoken_encoding())
    assert surfaces.table[257] == b"the"
    assert surfaces.table[258] is None and surfaces.strings[258] is None
    assert surfaces.table[260] is None and surfaces.strings[260] == "<|endoftext|>"
    assert len(surfaces) == 261


def test_a_slow_sentencepiece_tokenizer_has_the_same_surfaces():
    surfaces = surfaces_of(toys.slow_sentencepiece())
    assert entry(surfaces, "▁the") == b" the"
    assert entry(surfaces, "<0x0A>") == b"\n"
    assert entry(surfaces, "</s>") is None
    assert int(surfaces.is_fallback.sum()) == 256


def test_byte_fallback_that_only_a_unigram_model_knows_of_is_seen():
    surfaces = surfaces_of(toys.unigram_like("bytes"))
    assert entry(surfaces, "<0x0A>") == b"\n"
    assert int(surfaces.is_fallback.sum()) == 256
    assert not surfaces_of(toys.unigram_like("words")).is_fallback.any()


def test_word_piece_entries_spell_a_blank_before_words_and_none_before_their_further_pieces():
    surfaces = surfaces_of(toys.word_piece())
    assert entry(surfaces, "the") == b" the"
    assert entry(surfaces, "##n") == b"n"
    assert entry(surfaces, "großer") == " großer".encode()


def test_punctuation_and_chinese_characters_stand_alone_in_word_piece():
    backend = toys.Tokenizer(
        toys.models.WordPiece({"[UNK]": 0, ",": 1, "世": 2, "«": 3, "$": 4, "##": 5, "ê": 6, "##ê": 7})
    )
    surfaces = surfaces_of(backend)
    assert [surfaces.table[i] for i in range(6)] == [None, b",", "世".encode(), "«".encode(), b"$", b"##"]
    assert surfaces.table[6:] == [" ê".encode(), "ê".encode()]


def test_another_mark_of_further_pieces_is_read_off_the_model():
    vocabulary = {"[UNK]": 0, "the": 1, "@@re": 2, "##re": 3}
    backend = toys.Tokenizer(toys.models.WordPiece(vocabulary, continuing_subword_prefix="@@"))
    assert surfaces_of(backend).table == [None, b" the", b"re", b"##re"]


def test_the_tokens_of_word_piece_that_stand_for_no_text_spell_nothing():
    surfaces = surfaces_of(toys.word_piece())
    assert [entry(surfaces, string) for string in ("[UNK]", "[PAD]", "[CLS]", "[SEP]")] == [None] * 4


def test_word_piece_is_not_reversible_also_without_some_ids():
    surfaces = surfaces_of(toys.word_piece())
    assert not surfaces.reversible
    assert not surfaces.without([surfaces.strings.index("the")]).reversible
    assert not surfaces_of(toys.words()).reversible
    for name in ("bytes", "plain", "unigram words", "tiktoken", "slow"):
        surfaces = surfaces_of(toys.EVERY[name]())
        assert surfaces.reversible and surfaces.without([len(surfaces) - 1]).reversible


def test_whole_words_spell_a_blank_and_themselves():
    surfaces = surfaces_of(toys.words())
    assert entry(surfaces, "the") == b" the"
    assert entry(surfaces, ".") == b"."
    assert entry(surfaces, "[UNK]") is None


@pytest.mark.parametrize("name", toys.EVERY)
def test_the_unknown_token_is_found_where_there_is_one(name):
    tokenizer = toys.EVERY[name]()
    found = unknown_id(tokenizer)
    if name in ("bytes", "nfc", "nfkc", "tiktoken"):
        assert found is None
    else:
        assert surfaces_of(tokenizer).strings[found] in ("<unk>", "[UNK]")
        assert surfaces_of(tokenizer).table[found] is None


def test_what_spells_no_bytes_is_refused_by_name():
    with pytest.raises(ValueError, match="a Tokenizer .*BPEDecoder.* are unknown"):
        surfaces_of(toys.end_of_word())
    clip = toys.end_of_word()
    clip.decoder = toys.decoders.ByteLevel()
    with pytest.raises(ValueError, match="marks the ends of words"):
        surfaces_of(clip)
    with pytest.raises(ValueError, match="a object.*SentencePiece"):
        surfaces_of(object())


def test_lengths_and_join_take_special_tokens_for_nothing():
    surfaces = Surfaces([b"ab", None, b"\xc3"], ["ab", "<s>", "Ã"], np.zeros(3, np.bool_))
    assert surfaces.lengths.tolist() == [2, 0, 1]
    assert surfaces.join([0, 1, 2]) == b"ab\xc3"


def test_without_makes_ids_special():
    surfaces = Surfaces([b"ab", None, b"c"], ["ab", "<s>", "c"], np.zeros(3, np.bool_))
    assert surfaces.without([0, 1, 99]).table == [None, None, b"c"]
    assert surfaces.without([1]) is surfaces


@pytest.mark.assets
def test_gemma_added_runs_and_tags_spell_their_letters(assets):
    surfaces = real.surfaces(assets / "tokenizers" / "gemma3")
    assert entry(surfaces, "\n\n\n") == b"\n\n\n"
    assert entry(surfaces, "▁▁▁") == b"   "
    assert entry(surfaces, "<table>") == b"<table>"
    assert entry(surfaces, "<start_of_turn>") is None


@pytest.mark.assets
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "llama2", "gemma3", "gpt2"])
def test_surfaces_joined_are_what_the_real_tokenizers_decode(assets, name):
    tokenizer, surfaces = (read(assets / "tokenizers" / name) for read in (real.tokenizer, real.surfaces))
    for i in range(0, len(surfaces), 37):
        if surfaces.table[i] is None:
            continue
        # An `a` before the entry keeps decoders that strip a leading blank from doing so.
        ids = [*tokenizer.encode("a", add_special_tokens=False), i]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == surfaces.join(ids).decode(errors="replace").removeprefix(" "), surfaces.strings[i]
