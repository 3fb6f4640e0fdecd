import numpy as np
import pytest
import tiktoken
import toy_tokenizers as toys

from gold_jax.text.surface import Surfaces, surfaces_of


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
    encoding = tiktoken.Encoding(
        "toy", pat_str=r"\w+|\W", mergeable_ranks={bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257},
        special_tokens={"<|endoftext|>": 260},
    )  # fmt: skip
    surfaces = surfaces_of(encoding)
    assert surfaces.table[257] == b"the"
    assert surfaces.table[258] is None and surfaces.strings[258] is None
    assert surfaces.table[260] is None and surfaces.strings[260] == "<|endoftext|>"
    assert len(surfaces) == 261


def test_a_slow_sentencepiece_tokenizer_has_the_same_surfaces(tmp_path):
    slow = slow_sentencepiece(tmp_path)
    surfaces = surfaces_of(slow)
    assert entry(surfaces, "▁the") == b" the"
    assert entry(surfaces, "<0x0A>") == b"\n"
    assert entry(surfaces, "</s>") is None
    assert int(surfaces.is_fallback.sum()) == 256


def slow_sentencepiece(folder):
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    text = folder / "corpus.txt"
    text.write_text("\n".join(line for text in toys.CORPUS for line in text.splitlines()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "toy"), vocab_size=380, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return SentencePieceBackend(
        vocab_file=str(folder / "toy.model"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_what_spells_no_bytes_is_refused_by_name():
    with pytest.raises(ValueError, match="WordPiece.*byte for byte"):
        surfaces_of(toys.word_piece())
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
    from transformers import AutoTokenizer

    surfaces = surfaces_of(AutoTokenizer.from_pretrained(assets / "tokenizers" / "gemma3"))
    assert entry(surfaces, "\n\n\n") == b"\n\n\n"
    assert entry(surfaces, "▁▁▁") == b"   "
    assert entry(surfaces, "<table>") == b"<table>"
    assert entry(surfaces, "<start_of_turn>") is None


@pytest.mark.assets
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "llama2", "gemma3", "gpt2"])
def test_surfaces_joined_are_what_the_real_tokenizers_decode(assets, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / name)
    surfaces = surfaces_of(tokenizer)
    for i in range(0, len(surfaces), 37):
        if surfaces.table[i] is None:
            continue
        # An `a` before the entry keeps decoders that strip a leading blank from doing so.
        ids = [*tokenizer.encode("a", add_special_tokens=False), i]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == surfaces.join(ids).decode(errors="replace").removeprefix(" "), surfaces.strings[i]
