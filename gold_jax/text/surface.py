"""Surfaces: the bytes that every entry of a tokenizer's vocabulary spells, whatever the tokenizer writes for them.

Byte-level BPE shows every byte as one printable character; SentencePiece (BPE and Unigram) shows a space as `▁` and lone
bytes as `<0xNN>`; tiktoken stores bytes. WordPiece and other vocabularies of words do not give text back byte for byte:
they forget white space (and often case), so that a surface says what an entry stands for, and only its character offsets
where that is. A special token spells nothing: it steers the model and stands for no text.
"""

import contextlib
import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from string import punctuation

import numpy as np

from gold_jax.quickstart import shown_name

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"
#: The ranges that BERT's normaliser takes for Chinese characters: it puts blanks around them.
_CHINESE = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_MOST_IDS = 10**7
_SPLIT_AT_BLANKS = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")


@dataclasses.dataclass(frozen=True, eq=False)
class Surfaces:
    """What every entry of one vocabulary spells, by token id."""

    table: list[bytes | None]  # the bytes of each entry; None for special tokens and for ids that no entry has
    strings: list[str | None]  # the raw vocabulary string of each entry; None for ids that no entry has
    is_fallback: np.ndarray  # bool [size], True for the byte-fallback entries `<0xNN>`
    name: str = "tokenizer"  # for messages
    #: Whether the surfaces of a text's tokens, joined, are the text (up to what a normaliser changed). False for
    #: WordPiece: its tokens are located by the tokenizer's character offsets, what it drew is read by its own decoder,
    #: and its surfaces serve to match vocabularies.
    reversible: bool = True
    #: int32 [size], the bytes that each entry has; bool [size], False where the table says None; and the table with b""
    #: in the place of None, for joining.
    lengths: np.ndarray = dataclasses.field(init=False, repr=False)
    spells: np.ndarray = dataclasses.field(init=False, repr=False)
    spelling: list[bytes] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        spelling = [entry or b"" for entry in self.table]
        object.__setattr__(self, "spelling", spelling)
        object.__setattr__(self, "spells", np.array([entry is not None for entry in self.table], np.bool_))
        object.__setattr__(self, "lengths", np.fromiter(map(len, spelling), np.int32, len(spelling)))

    def __len__(self) -> int:
        return len(self.table)

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes that a sequence of ids spells; tokens without a surface add none."""
        return b"".join(map(self.spelling.__getitem__, ids))

    def without(self, ids: Iterable[int]) -> "Surfaces":
        """The same surfaces with these ids made special, that is, without a surface."""
        drop = set(ids)
        table = [None if i in drop else entry for i, entry in enumerate(self.table)]
        return self if table == self.table else dataclasses.replace(self, table=table)


def surfaces_of(tokenizer) -> Surfaces:
    """The surfaces of a tokenizer.

    `tokenizer` is a transformers tokenizer (fast, or slow with a SentencePiece model), a `tokenizers.Tokenizer`, or a
    `tiktoken.Encoding`. ValueError where its entries are not known to spell bytes, such as BPE over characters with a mark
    at the end of words.
    """
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return _of_tiktoken(tokenizer)
    if (backend := backend_of(tokenizer)) is not None:
        return _of_backend(tokenizer, backend)
    if hasattr(tokenizer, "sp_model"):
        return _of_sentencepiece(tokenizer)
    raise ValueError(
        f"{name_of(tokenizer)} is a {type(tokenizer).__name__}, which shows neither a `tokenizers` backend nor a "
        "SentencePiece model, so what its entries spell is unknown; pass a fast tokenizer of transformers, a "
        "SentencePiece one, a tokenizers.Tokenizer, or a tiktoken.Encoding"
    )


def backend_of(tokenizer):
    """The `tokenizers.Tokenizer` behind a tokenizer, or None where there is none."""
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        return tokenizer
    return getattr(tokenizer, "backend_tokenizer", None)


def name_of(tokenizer) -> str:
    """What messages call a tokenizer: the name it was loaded by, else its class."""
    name = getattr(tokenizer, "name_or_path", None) or getattr(tokenizer, "name", None)
    return f"the tokenizer {shown_name(name)!r}" if isinstance(name, str) and name else f"a {type(tokenizer).__name__}"


def state_of(component) -> dict | None:
    """A component of a `tokenizers` pipeline (normalizer, pre-tokenizer, decoder) as the dict that its file holds."""
    return None if component is None else json.loads(component.__getstate__())


def parts_of(state: dict | None) -> list[dict]:
    """The components that a pipeline's state is made of, sequences within sequences laid flat."""
    if state is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        if key in state:
            return [part for inner in state[key] for part in parts_of(inner)]
    return [state]


@functools.cache
def _byte_alphabet() -> dict[int, int]:
    """For `str.translate`: the character that byte-level BPE shows for a byte, to that byte as a latin-1 character.

    Characters below 256 that the alphabet does not use go to one that latin-1 lacks, so that encoding fails on them.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: 0xFFFF for byte in hidden} | {256 + rank: byte for rank, byte in enumerate(hidden)}


def _spell_byte_level(string: str) -> bytes:
    try:
        return string.translate(_byte_alphabet()).encode("latin-1")
    except UnicodeEncodeError:  # not written in the alphabet: the decoder, too, then takes the string as it stands
        return string.encode()


def _spell_metaspace(space: str, string: str) -> bytes:
    return string.replace(space, " ").encode()


def _spell_word(continuing: str, string: str) -> bytes:
    """A blank and the word; a piece that continues a word, punctuation and Chinese characters spell themselves."""
    if continuing and string.startswith(continuing) and string != continuing:
        return string.removeprefix(continuing).encode()
    return string.encode() if not string or _stands_alone(string[0]) else f" {string}".encode()


def _stands_alone(char: str) -> bool:
    """Whether BERT's pre-tokenizer cuts a text before and after this character."""
    marks = char in punctuation or unicodedata.category(char).startswith("P")
    return marks or any(low <= ord(char) <= high for low, high in _CHINESE)


def _speller(backend) -> tuple[Callable[[str], bytes], bool] | None:
    """What turns an entry into bytes, and whether the bytes of a text's entries, joined, are the text.

    It is read off the model, else off the decoder or what stands in for it; None where they are of another kind.
    """
    model = type(backend.model).__name__
    splits = {part["type"] for part in parts_of(state_of(backend.pre_tokenizer))}
    if model == "WordPiece" or (model == "WordLevel" and splits & set(_SPLIT_AT_BLANKS)):
        return functools.partial(_spell_word, getattr(backend.model, "continuing_subword_prefix", "")), False
    if any(getattr(backend.model, mark, None) for mark in ("end_of_word_suffix", "continuing_subword_prefix")):
        return None  # CLIP: `dog</w>`
    for component in (backend.decoder, backend.pre_tokenizer, backend.normalizer):
        for part in parts_of(state_of(component)):
            if part["type"] == "ByteLevel":
                return _spell_byte_level, True
            if part["type"] == "Metaspace":
                return functools.partial(_spell_metaspace, part.get("replacement", _METASPACE)), True
            if part["type"] == "Replace" and _METASPACE in (part["content"], part["pattern"].get("String")):
                return functools.partial(_spell_metaspace, _METASPACE), True
            if part["type"] in ("WordPiece", "CTC", "BPEDecoder"):
                return None
    return None


def _unigram(model) -> dict:
    """The state of a Unigram model, which alone shows its `unk_id` and `byte_fallback`; empty for other models."""
    return json.loads(model.__getstate__()) if type(model).__name__ == "Unigram" else {}


def unknown_id(tokenizer) -> int | None:
    """The id that a tokenizer gives to what its vocabulary lacks; None where it has none."""
    backend = backend_of(tokenizer)
    if backend is not None:
        unknown = getattr(backend.model, "unk_token", None)
        found = _unigram(backend.model).get("unk_id") if unknown is None else backend.token_to_id(unknown)
        if found is not None:
            return found
    return getattr(tokenizer, "unk_token_id", None)


def special_ids(tokenizer) -> set[int]:
    """The ids of the tokens that a tokenizer with a `tokenizers` backend calls special."""
    added = backend_of(tokenizer).get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special} | set(getattr(tokenizer, "all_special_ids", ()))


def _of_backend(tokenizer, backend) -> Surfaces:
    speller = _speller(backend)
    if speller is None:
        raise ValueError(
            f"{name_of(tokenizer)} (model {type(backend.model).__name__}, decoder {backend.decoder}) is neither "
            "byte-level, nor SentencePiece-like, nor WordPiece, or it marks the ends of words, so the bytes that its "
            "entries spell are unknown; use a model whose tokenizer is one of the three"
        )
    spell, reversible = speller
    added = backend.get_added_tokens_decoder()
    special = special_ids(tokenizer) | {unknown_id(tokenizer)}
    falls_back = reversible and (
        getattr(backend.model, "byte_fallback", False)
        or _unigram(backend.model).get("byte_fallback", False)
        or any(part["type"] == "ByteFallback" for part in parts_of(state_of(backend.decoder)))
    )
    entries = [(i, string) for string, i in backend.get_vocab(with_added_tokens=True).items()]
    as_written = added if spell is _spell_byte_level else ()  # an added entry is not shown in the byte alphabet
    return _build(entries, spell, special, falls_back, name_of(tokenizer), as_written, reversible)


def _of_sentencepiece(tokenizer) -> Surfaces:
    model = tokenizer.sp_model
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    pieces = {i: tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))}
    for i in range(model.get_piece_size()):
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            special.add(tokenizer.convert_tokens_to_ids(model.id_to_piece(i)))
    falls_back = any(model.is_byte(i) for i in range(model.get_piece_size()))
    spell = functools.partial(_spell_metaspace, _METASPACE)
    return _build(pieces.items(), spell, special, falls_back, name_of(tokenizer))


def _of_tiktoken(encoding) -> Surfaces:
    special = {encoding.encode_single_token(text): text for text in encoding.special_tokens_set}
    entries = dict(special)
    for i in range(encoding.n_vocab):
        with contextlib.suppress(KeyError):  # a hole in the numbering
            entries.setdefault(i, encoding.decode_single_token_bytes(i).decode("latin-1"))
    return _build(entries.items(), lambda string: string.encode("latin-1"), special, False, name_of(encoding))


def _build(entries: Iterable, spell, special, falls_back: bool, name: str, as_written=(), reversible=True):
    entries = [(i, string) for i, string in entries if string is not None]
    size = max((i for i, _ in entries), default=-1) + 1
    if size > _MOST_IDS:
        raise ValueError(f"{name} has the id {size - 1} ({dict(entries)[size - 1]!r}); ids are below {_MOST_IDS:,}")
    table: list[bytes | None] = [None] * size
    strings: list[str | None] = [None] * size
    is_fallback = np.zeros(size, np.bool_)
    for i, string in entries:
        if strings[i] is not None:
            raise ValueError(f"{name} gives two entries the id {i}: {excerpt(strings[i])} and {excerpt(string)}")
        strings[i] = string
        if i in special:
            continue
        byte = _FALLBACK.fullmatch(string) if falls_back and len(string) == 6 else None
        if byte:
            is_fallback[i], table[i] = True, bytes([int(byte[1], 16)])
        else:
            table[i] = string.encode() if i in as_written else spell(string)
    return Surfaces(table, strings, is_fallback, name, reversible)


def excerpt(text: str | bytes | Sequence, at: int = 0, width: int = 60) -> str:
    """A short quotation of a text around a position, for messages."""
    start = max(0, at - width // 2)
    cut = text[start : start + width]
    return f"{'…' if start else ''}{cut!r}{'…' if start + width < len(text) else ''}"
