"""Turning text into tokens and byte spans: the text as it is, with no token that the text does not spell."""

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from gold_jax.text.surface import (
    Surfaces,
    backend_of,
    excerpt,
    name_of,
    parts_of,
    special_ids,
    state_of,
    surfaces_of,
    unknown_id,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of a text."""

    ids: np.ndarray  # int32 [T]
    #: int32 [T, 2], the bytes `[start, end)` of the text's UTF-8 that each token spells. They follow each other without a
    #: gap from 0 to the text's length; a token that spells no bytes of its own has an empty span.
    spans: np.ndarray
    #: bool [T], True for the tokens that stand for bytes of the text although they have no surface, such as `<unk>` for a
    #: character that the vocabulary lacks: what the model reads there does not say which text it is, so that a loss may
    #: leave their groups out.
    unknown: np.ndarray = cast(np.ndarray, None)  # unless given, `__post_init__` says False of every token

    def __post_init__(self):
        if self.unknown is None:
            object.__setattr__(self, "unknown", np.zeros(len(self.ids), np.bool_))


def spans_from_surfaces(surfaces: Surfaces, ids) -> np.ndarray:
    """The spans of tokens in the text that their surfaces make when joined: int32 [T, 2], in bytes."""
    return _spans(np.cumsum(surfaces.lengths[np.asarray(ids, np.int32)], dtype=np.int32))


def spans_from_offsets(surfaces: Surfaces, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str):
    """The spans of tokens from a tokenizer's own character offsets.

    Tokens that share a character (pieces of one that the vocabulary lacks) are told apart by their surfaces where those
    spell the character; where they do not (a normaliser changed it), one of them takes all its bytes, an unknown one
    before others, else the first, and the others get empty spans, so that no boundary is made up inside it. Characters
    that no token claims (a combining mark that a normaliser composed, blanks that were trimmed) go to the token that
    spells them, else to the one before; of blanks before a token that spells one, the last goes to it.

    `offsets` are the characters `[start, end)` of each of the `ids`, [T]. The spans, int32 [T, 2] in bytes, follow each
    other without a gap and cover the text.
    """
    widths = [len(char.encode()) for char in text]
    at = [0, *itertools.accumulate(widths)]  # character -> byte
    return _spans_from_bytes(surfaces, ids, [(at[start], at[end]) for start, end in offsets], text.encode())


def _spans_from_bytes(surfaces: Surfaces, ids: Sequence[int], offsets: Sequence[tuple[int, int]], data: bytes):
    """The same from offsets that count bytes."""
    ends: list[int] = []
    begin = 0  # the first byte that no run of tokens has claimed
    for first, last, start, end in _runs(offsets):
        start, end = max(start, begin), max(end, begin)
        run = ids[first:last]
        if start > begin and (spelled := surfaces.join(run)) != data[begin:end]:
            begin = start
            if spelled.startswith(b" ") and data[start - 1] == 0x20 and data[start : start + 1] != b" ":
                begin -= 1
            _stretch(ends, begin)
        ends += [begin + e for e in _ends_in_run(surfaces, run, data[begin:end])]
        begin = end
    _stretch(ends, len(data))
    return _spans(np.asarray(ends, np.int32))


def _runs(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Tokens that overlap: the first one and the one after the last, where they start and where they end."""
    k, count = 0, len(offsets)
    while k < count:
        start, end = offsets[k]
        last = k + 1
        # SentencePiece gives all bytes of a character to the last of its pieces: those before it are empty.
        while last < count and (offsets[last][0] < end or start == end == offsets[last][0]):
            end = max(end, offsets[last][1])
            last += 1
        yield k, last, start, end
        k = last


def _stretch(ends: list[int], end: int):
    """Give bytes that no token claims to the last token that has any; empty ones behind it stay behind it."""
    value = ends[-1] if ends else None  # at the text's start there is none: the first token begins there in any case
    for k in reversed(range(len(ends))):
        if ends[k] != value:
            return
        ends[k] = end


def _ends_in_run(surfaces: Surfaces, run: Sequence[int], data: bytes) -> list[int]:
    """Where the tokens of a run end within its bytes.

    From both ends, tokens that spell the bytes at their position get them, up to complete characters; one token gets
    what is left in the middle.
    """
    if len(run) == 1:
        return [len(data)]
    pieces = [surfaces.spelling[i] for i in run]
    sizes = list(map(len, pieces))
    if b"".join(pieces) == data:
        return list(itertools.accumulate(sizes))
    starts_character = [byte & 0xC0 != 0x80 for byte in data] + [True]  # whether a character starts here
    front = low = at = 0
    for k, piece in enumerate(pieces[:-1]):
        if not piece or not data.startswith(piece, at):
            break
        at += len(piece)
        if starts_character[at]:
            front, low = k + 1, at
    back, high = len(run), len(data)
    at = high
    for k in range(len(run) - 1, front, -1):
        if not pieces[k] or not data.endswith(pieces[k], low, at):
            break
        at -= len(pieces[k])
        if starts_character[at]:
            back, high = k, at
    taker = next((k for k in range(front, back) if not surfaces.spells[run[k]]), front)
    before = list(itertools.accumulate(sizes[:front]))
    behind = list(itertools.accumulate(sizes[back:], initial=high))[1:]
    return before + [low] * (taker - front) + [high] * (back - taker) + behind


def _spans(ends: np.ndarray) -> np.ndarray:
    spans = np.empty((len(ends), 2), np.int32)
    spans[:, 1] = ends
    spans[1:, 0] = ends[:-1]
    spans[:1, 0] = 0
    return spans


class PlainEncoder:
    """Encodes texts as plain text: no special token is added, none is read out of the text, no blank is put before it.

    A changed copy of the tokenizer, which is whatever `surfaces_of` takes, does the work.
    """

    def __init__(self, tokenizer, surfaces: Surfaces | None = None):
        self.surfaces = surfaces or surfaces_of(tokenizer)
        self.name, self._tokenizer = name_of(tokenizer), tokenizer
        self._dropped: int | None = None
        #: Whether the tokenizer by itself puts a blank before a text: "" (no), "always", "unless" the text has one, or
        #: "forced" where this encoder cannot keep it from doing so (its span is then cut to the text).
        self.prefix = ""
        self._backend = copy.deepcopy(backend_of(tokenizer))
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self._backend.post_processor = None  # nothing is added here, and some cut blanks off the offsets
            self.prefix = _remove_prefix(self._backend)
            _hide_pieces(self._backend, special_ids(tokenizer))
            self._dropped = _mark_dropped(self._backend)
        if not self.surfaces.reversible or self._puts_a_blank():
            self.prefix = "forced"

    def _puts_a_blank(self) -> bool:
        try:
            return self.surfaces.join(self._ids(["a"])[0]).startswith(b" ")
        except ValueError:  # a vocabulary that lacks the letter, and has no unknown token
            return False

    def encode(self, texts: Sequence[str], *, lead: bool = False) -> list[Encoded]:
        """The tokens of texts; one of which the tokenizer leaves nothing (blanks before WordPiece) is one unknown token.

        `lead` says that a blank stands before each text, which the first token may hold (`▁answer`) but which is not
        part of the text: spans count from the text's first byte. ValueError where a text is not valid Unicode, or the
        tokens made of it cannot be located in it.
        """
        data = [utf8(text, f"a text for {self.name}") for text in texts]
        blank = b" " if lead and self.prefix != "forced" else b""
        read = {row: blank.decode() + text for row, text in enumerate(texts) if text}
        found: dict[int, Encoded] = {}
        if self.surfaces.reversible:
            for row, ids in zip(read, self._ids(list(read.values()))):
                if (exact := self._exact(blank + data[row], ids)) is not None:
                    found[row] = exact
        others = [row for row in read if row not in found]
        found.update(zip(others, self._located([read[row] for row in others])))
        if blank:
            found = {row: _without_first_byte(e) for row, e in found.items()}
        nothing = Encoded(np.zeros(0, np.int32), np.zeros((0, 2), np.int32))
        return [found.get(row, nothing) for row in range(len(texts))]

    def may_refuse(self, text: str) -> bool:
        """Whether `encode` may raise for a text, valid Unicode though it is, or make no token of it.

        That takes a tokenizer without a token for what its vocabulary lacks; BPE leaves such bytes out.
        """
        if self._backend is None:
            return True
        if self._has_unknown:
            return False
        return type(self._backend.model).__name__ != "BPE" or not any(byte in self._bytes for byte in text.encode())

    @functools.cached_property
    def _has_unknown(self) -> bool:
        return unknown_id(self._tokenizer) is not None

    @functools.cached_property
    def _bytes(self) -> frozenset[int]:
        """The bytes that have an entry of their own."""
        return frozenset(spelled[0] for spelled in self.surfaces.table if spelled is not None and len(spelled) == 1)

    def begins_with_prefix(self, text: str) -> bool:
        """Whether the tokenizer puts a blank before this text where it stands alone."""
        return self.prefix == "always" or (self.prefix == "unless" and not text.startswith(" "))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            # The fast form leaves the offsets out, which few texts need.
            found = [e.ids for e in self._encodings(self._backend.encode_batch_fast, texts)]
            return found if self._dropped is None else [[i for i in ids if i != self._dropped] for ids in found]
        if hasattr(self._tokenizer, "encode_ordinary_batch"):
            return self._tokenizer.encode_ordinary_batch(texts)
        return [self._tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]

    def _encodings(self, encode_batch, texts: list[str]) -> list:
        try:
            return encode_batch(texts, add_special_tokens=False) if texts else []
        except Exception as error:  # the library knows no other kind
            raise ValueError(
                f"{self.name} cannot encode one of {len(texts)} texts, the first of which is {excerpt(texts[0])}: {error}"
            ) from error

    def _exact(self, data: bytes, ids: list[int]) -> Encoded | None:
        """Tokens whose surfaces spell the text; None where they do not."""
        joined = self.surfaces.join(ids)
        shifted = self.prefix == "forced" and joined == b" " + data
        if joined != data and not shifted:
            return None
        encoded = Encoded(np.array(ids, np.int32), spans_from_surfaces(self.surfaces, ids))
        return _without_first_byte(encoded) if shifted else encoded

    def _located(self, texts: list[str]) -> Iterator[Encoded]:
        """The tokens of texts by the tokenizer's own character offsets."""
        if self._backend is not None:
            encodings = self._encodings(self._backend.encode_batch, texts)
            found = (self._fast_spans(*pair) for pair in zip(texts, encodings))
        else:
            found = map(self._slow_spans, texts)
        for text, (ids, spans) in zip(texts, found):
            array = np.array(ids, np.int32)
            unknown = ~self.surfaces.spells[array] & (spans[:, 1] > spans[:, 0])
            yield Encoded(array, spans, unknown) if ids else self._nothing_left(text)

    def _nothing_left(self, text: str) -> Encoded:
        unknown = unknown_id(self._tokenizer)
        if unknown is None:
            raise ValueError(
                f"{self.name} makes no token of the text {excerpt(text)}, and it has no unknown token to stand for it"
            )
        spans = np.array([[0, len(text.encode())]], np.int32)
        return Encoded(np.array([unknown], np.int32), spans, np.ones(1, np.bool_))

    def _fast_spans(self, text: str, encoding) -> tuple[list[int], np.ndarray]:
        """Token ids and spans from what a `tokenizers` backend made of a text."""
        ids, offsets = encoding.ids, encoding.offsets
        if self._dropped in ids:
            kept = [k for k, i in enumerate(ids) if i != self._dropped]
            ids, offsets = [ids[k] for k in kept], [offsets[k] for k in kept]
        return ids, spans_from_offsets(self.surfaces, ids, offsets, text)

    def _slow_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Token ids and spans of a tokenizer without a `tokenizers` backend."""
        ids = self._ids([text])[0]
        model = getattr(self._tokenizer, "sp_model", None)
        if model is not None:
            from sentencepiece import sentencepiece_pb2

            written = model.encode(text, out_type="serialized_proto")
            message = sentencepiece_pb2.SentencePieceText  # ty: ignore[missing-attribute] protobuf makes it on import
            pieces = message.FromString(written).pieces
            if [self._tokenizer.convert_tokens_to_ids(piece.piece) for piece in pieces] == ids:
                offsets = [(piece.begin, piece.end) for piece in pieces]
                return ids, _spans_from_bytes(self.surfaces, ids, offsets, text.encode())
        joined, data = self.surfaces.join(ids), text.encode()
        wrong = next((k for k, (a, b) in enumerate(zip(joined, data)) if a != b), min(len(joined), len(data)))
        raise ValueError(
            f"the tokens that {self.name} makes of a text do not spell it: from byte {wrong} on they give "
            f"{excerpt(joined, wrong)}, the text has {excerpt(data, wrong)}, and the tokenizer says no character offsets"
        )


def _without_first_byte(encoded: Encoded) -> Encoded:
    spans = np.maximum(encoded.spans - 1, 0)
    return Encoded(encoded.ids, spans, encoded.unknown & (spans[:, 1] > spans[:, 0]))


def utf8(text: str, what: str) -> bytes:
    """The text's bytes; ValueError where it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not valid Unicode at character {error.start} ({excerpt(text, error.start)}): it holds a lone "
            "surrogate; repair or remove it in the data"
        ) from None


def _hide_pieces(backend, special: set[int]):
    """Keep a Unigram model, which finds any of its pieces in a text, from reading special tokens or `<0x0A>` out of it."""
    if type(backend.model).__name__ != "Unigram":
        return
    import tokenizers

    model = json.loads(backend.model.__getstate__())
    pieces = [tuple(piece) for piece in model["vocab"]]
    for i in special - {model["unk_id"]}:
        if i < len(pieces):
            pieces[i] = (f"\U0010ffff{i}\U0010ffff", pieces[i][1])  # a character that is none, in no text
    backend.model = type(backend.model)(pieces, model["unk_id"], model.get("byte_fallback", False))
    state = state_of(backend.pre_tokenizer)
    if model.get("byte_fallback") and not any(part.get("prepend_scheme") == "always" for part in parts_of(state)):
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
        rest = [] if state is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, *rest])


def _mark_dropped(backend) -> int | None:
    """Have BPE that drops what its vocabulary lacks show it by a token beyond its ids, which is returned, if need be.

    The library's offsets are wrong behind a symbol that was dropped (SmolLM2 lacks the byte 4).
    """
    if type(backend.model).__name__ != "BPE" or backend.model.unk_token is not None:
        return None
    import tokenizers

    vocabulary = backend.get_vocab(with_added_tokens=True)
    parts = parts_of(state_of(backend.normalizer)) + parts_of(state_of(backend.pre_tokenizer))
    needed = None
    if any(part["type"] == "ByteLevel" for part in parts):
        needed = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    elif backend.model.byte_fallback:
        needed = [f"<0x{byte:02X}>" for byte in range(256)]
    if needed is not None and all(symbol in vocabulary for symbol in needed):
        return None
    marker = max(vocabulary.values()) + 1
    model = json.loads(backend.model.__getstate__())
    model["unk_token"] = "\U0010ffff"
    model["vocab"]["\U0010ffff"] = marker
    backend.model = _from_state("models", model)
    return marker


def _remove_prefix(backend) -> str:
    """Stop a `tokenizers` pipeline from putting a blank before the text; say whether it did so before."""
    prefix = ""
    normalizer, splitter = state_of(backend.normalizer), state_of(backend.pre_tokenizer)
    for part in parts_of(normalizer):
        if part["type"] == "Prepend" and part["prepend"]:
            part["prepend"], prefix = "", "always"
    if prefix:
        backend.normalizer = _from_state("normalizers", normalizer)
    changed = False
    for index, part in enumerate(parts_of(splitter)):
        scheme = part.get("prepend_scheme", "always")
        # Where a part before it has cut the text, every piece gets a blank: that is how words are marked. It stays.
        if part["type"] == "Metaspace" and scheme != "never" and not (index and scheme == "always"):
            part["prepend_scheme"], changed = "never", True
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space") and not index:
            part["add_prefix_space"], changed = False, True
    if changed:
        backend.pre_tokenizer = _from_state("pre_tokenizers", splitter)
    return prefix or ("unless" if changed else "")


def _from_state(kind: str, state: dict | None):
    import tokenizers

    module = getattr(tokenizers, kind)
    component = module.BPE() if kind == "models" else module.Sequence([])
    component.__setstate__(json.dumps(state).encode())
    return component
