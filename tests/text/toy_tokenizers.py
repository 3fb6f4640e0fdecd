"""Tokenizers of every kind, trained in a moment on a few lines of text, so that tests need nothing from outside."""

import collections
import functools
import json
import tempfile

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, then the other dog jumps over the fox.",
    "There are 24 dogs and 48 foxes; 24 + 48 = 72. The answer is 72.",
    "def there(x):\n    return x + 1\n\nprint(there(24))\n",
    "Über die Wörter: größer, schöner, ähnlich. Où êtes-vous? Привет, мир. 世界 日本語 😀",
] * 4


def _wrapped(backend: Tokenizer, **tokens) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


@functools.cache
def byte_level(size: int = 420, normalizer: str = "", template: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's special tokens and one ordinary added token, `<think>`."""
    backend = Tokenizer(models.BPE())
    if normalizer:
        backend.normalizer = getattr(normalizers, normalizer)()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>"])
    tokenizer = _wrapped(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template or None
    return tokenizer


@functools.cache
def sentencepiece(dummy: str = "normalizer", template: str = "") -> PreTrainedTokenizerFast:
    """BPE over `▁` with byte fallback, as Llama 2 has it; `dummy` says what puts the blank before a text."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    alphabet = ["▁", *(c for c in _letters() if c != " ")][:60]
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, limit_alphabet=60, show_progress=False)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(
        models.BPE(
            vocabulary, [tuple(m) for m in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    if dummy == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif dummy == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if dummy else [])
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = _wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template or None
    return tokenizer


def _letters() -> list[str]:
    """The characters of the corpus, the most frequent first; trainers choose among equal ones another way in each process."""
    counts = collections.Counter("".join(CORPUS))
    return sorted(counts, key=lambda c: (-counts[c], c))


@functools.cache
def unigram() -> Tokenizer:
    """A Unigram model over `▁`, with an unknown entry and no byte fallback, as a bare `tokenizers.Tokenizer`."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@functools.cache
def unigram_like(kind: str, template: str = "") -> PreTrainedTokenizerFast:
    """A Unigram model as a family of checkpoints has it.

    "bytes": NFKC, runs of blanks made one, byte fallback (its decoder does not say so), a blank before every text.
    "blanks": NFKC and runs of blanks made one, unknown tokens (Pegasus, NLLB, BigBird).
    "words": the text cut at white space, which is lost, and a blank put before every word (T5, mBART, XLM-RoBERTa).
    """
    model = json.loads(unigram().to_str())["model"]
    pieces = [("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *map(tuple, model["vocab"][1:])]
    if kind != "bytes":
        pieces = [("</s>", 0.0), *map(tuple, model["vocab"][1:])]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], 0, kind == "bytes"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    if kind == "words":
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), backend.pre_tokenizer])
    tokenizer = _wrapped(backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template or None
    return tokenizer


@functools.cache
def word_piece(size: int = 260, lowercase: bool = True, template: str = "") -> PreTrainedTokenizerFast:
    """WordPiece as BERT has it: lower case, no accents, white space forgotten, `[UNK]` for what it lacks."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    # Not more than a few of the many lone letters of the corpus: others are unknown.
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = _wrapped(backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")
    tokenizer.chat_template = template or None
    return tokenizer


@functools.cache
def words() -> PreTrainedTokenizerFast:
    """A vocabulary of whole words, without a decoder."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend, unk_token="[UNK]", eos_token="[EOS]")


#: Classes of transformers by the vocabulary that they are made of, with the tokens that come first in it.
CLASSES = {
    "T5Tokenizer": ("unigram", "<pad> </s> <unk>"),
    "XLMRobertaTokenizer": ("unigram", "<s> <pad> </s> <unk> <mask>"),
    "AlbertTokenizer": ("unigram", "<pad> <unk> [CLS] [SEP] [MASK]"),
    "MBartTokenizer": ("unigram", "<s> <pad> </s> <unk>"),
    "PegasusTokenizer": ("unigram", "<pad> </s> <unk>"),
    "XLNetTokenizer": ("unigram", "<unk> <s> </s> <cls> <sep> <pad> <mask> <eod> <eop>"),
    "BigBirdTokenizer": ("unigram", "<s> <pad> </s> <unk>"),
    "CamembertTokenizer": ("unigram", "<s> <pad> </s> <unk>"),
    "BertTokenizer": ("words", ""),
    "GPT2Tokenizer": ("bytes", ""),
    "Qwen2Tokenizer": ("bytes", ""),
    "CohereTokenizer": ("bytes", ""),
    "LlamaTokenizer": ("spaces", ""),
    "GemmaTokenizer": ("spaces", ""),
    "ReformerTokenizer": ("spaces", ""),
}


@functools.cache
def of_class(name: str):
    """A tokenizer of a class of transformers; None where its version has no such class."""
    import transformers

    kind, first = CLASSES[name]
    made_of = {"words": word_piece, "bytes": byte_level, "spaces": sentencepiece, "unigram": unigram}[kind]()
    model = json.loads(getattr(made_of, "backend_tokenizer", made_of).to_str())["model"]
    vocabulary = model["vocab"]
    if kind == "unigram":
        vocabulary = [(token, 0.0) for token in first.split()] + [tuple(piece) for piece in vocabulary[1:]]
    merges = {"merges": [tuple(merge) for merge in model["merges"]]} if "merges" in model else {}
    found = getattr(transformers, name, None)
    return None if found is None else found(vocab=vocabulary, **merges)


def end_of_word() -> Tokenizer:
    """BPE over characters with a mark at the end of words, as CLIP has it: what its entries spell is not known."""
    backend = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    return backend


@functools.cache
def tiktoken_encoding():
    """A `tiktoken.Encoding`, with holes in its numbering."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding(
        "toy", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260}
    )  # fmt: skip


@functools.cache
def slow_sentencepiece(kind: str = "bpe", rule: str = "identity", byte_fallback: bool = True):
    """A tokenizer of transformers around a SentencePiece model, without a `tokenizers` backend."""
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    with tempfile.TemporaryDirectory() as folder:
        lines = [line for text in CORPUS for line in text.splitlines() if line]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=f"{folder}/toy", vocab_size=380, model_type=kind,
            byte_fallback=byte_fallback, hard_vocab_limit=False, minloglevel=2, normalization_rule_name=rule,
            remove_extra_whitespaces=rule != "identity",
        )  # fmt: skip
        return SentencePieceBackend(
            vocab_file=f"{folder}/toy.model", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )


#: Every kind that `surfaces_of` takes.
EVERY = {
    "bytes": byte_level,
    "nfc": lambda: byte_level(300, "NFC"),
    "nfkc": lambda: byte_level(310, "NFKC"),
    "prepend": sentencepiece,
    "metaspace": lambda: sentencepiece("metaspace"),
    "plain": lambda: sentencepiece(""),
    "unigram": unigram,
    "unigram bytes": lambda: unigram_like("bytes"),
    "unigram blanks": lambda: unigram_like("blanks"),
    "unigram words": lambda: unigram_like("words"),
    "wordpiece": word_piece,
    "cased wordpiece": lambda: word_piece(300, False),
    "words": words,
    "tiktoken": tiktoken_encoding,
    "slow": slow_sentencepiece,
    "slow unigram": lambda: slow_sentencepiece("unigram", "nmt_nfkc", False),
}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
