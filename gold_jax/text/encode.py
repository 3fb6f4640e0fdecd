"""Turning text into tokens and byte spans: the text as it is, with no token that the text does not spell."""

import copy
import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from gold_jax.text.surface import Surfaces, backend_of, excerpt, name_of, parts_of, state_of, surfaces_of


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of a text.

    Attributes:
        ids: int32 [T].
        spans: int32 [T, 2], the bytes `[start, end)` of the text's UTF-8 that each token spells. They follow each other
            without a gap from 0 to the text's length; a token that spells no bytes of its own has an empty span.
    """

    ids: np.ndarray
    spans: np.ndarray


def spans_from_surfaces(surfaces: Surfaces, ids) -> np.ndarray:
    """The spans of tokens in the text that their surfaces make when joined: int32 [T, 2], in bytes."""
    return _spans(np.cumsum(surfaces.lengths[np.asarray(ids, np.int32)], dtype=np.int32))


def spans_from_offsets(surfaces: Surfaces, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str):
    """The spans of tokens from a tokenizer's own character offsets.

    Tokens that share a character (pieces of one that the vocabulary lacks) are told apart by their surfaces where those
    spell the character; where they do not (a normaliser changed it), the first of them takes all its bytes and the
    others get empty spans at its end, so that no boundary is made up inside it. Characters that no token claims (a
    combining mark that a normaliser composed, blanks that were trimmed) go to the token that spells them, else to the
    one before.

    Args:
        surfaces: the tokenizer's surfaces.
        ids: token ids, [T].
        offsets: the characters `[start, end)` of each token, [T].
        text: the text.

    Returns:
        int32 [T, 2], byte spans that follow each other without a gap and cover the text.
    """
    data = text.encode()
    widths = [len(char.encode()) for char in text]
    at = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)]).tolist()  # character -> byte
    ends: list[int] = []
    begin = 0  # the first byte that no run of tokens has claimed
    k, count = 0, len(ids)
    while k < count:
        # A run: tokens whose characters overlap. Offsets never go back further than the run's own start.
        start, end = offsets[k]
        last = k + 1
        while last < count and offsets[last][0] < end:
            end = max(end, offsets[last][1])
            last += 1
        start, end = max(at[start], begin), max(at[end], begin)
        pieces = [surfaces.spelling[i] for i in ids[k:last]]
        spelled = b"".join(pieces)
        if start > begin and ends and spelled != data[begin:end]:
            # The unclaimed bytes belong to the run before.
            value, j = ends[-1], len(ends) - 1
            while j >= 0 and ends[j] == value:
                ends[j] = start
                j -= 1
            begin = start
        if spelled == data[begin:end]:
            for piece in pieces:
                begin += len(piece)
                ends.append(begin)
        else:
            ends += [end] * (last - k)
            begin = end
        k = last
    if ends and begin < len(data):
        value, j = ends[-1], len(ends) - 1
        while j >= 0 and ends[j] == value:
            ends[j] = len(data)
            j -= 1
    return _spans(np.asarray(ends, np.int32))


def _spans(ends: np.ndarray) -> np.ndarray:
    spans = np.empty((len(ends), 2), np.int32)
    spans[:, 1] = ends
    spans[1:, 0] = ends[:-1]
    spans[:1, 0] = 0
    return spans


class PlainEncoder:
    """Encodes texts as plain text: no special token is added, none is read out of the text, no blank is put before it.

    The tokenizer given is left as it is: a changed copy does the work.

    Args:
        tokenizer: whatever `surfaces_of` takes.
        surfaces: its surfaces, if they are at hand.
    """

    def __init__(self, tokenizer, surfaces: Surfaces | None = None):
        self.surfaces = surfaces or surfaces_of(tokenizer)
        self.name = name_of(tokenizer)
        self._tokenizer = tokenizer
        self._backend = None
        #: Whether the tokenizer by itself puts a blank before a text: "" (no), "always", "unless" the text has one, or
        #: "forced" where this encoder cannot keep it from doing so (its span is then cut to the text).
        self.prefix = ""
        backend = backend_of(tokenizer)
        if backend is not None:
            self._backend = copy.deepcopy(backend)
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self.prefix = _remove_prefix(self._backend)
        elif self.surfaces.join(self._ids(["a"])[0]) == b" a":
            self.prefix = "forced"

    def encode(self, texts: Sequence[str], *, lead: bool = False) -> list[Encoded]:
        """Encode texts.

        Args:
            texts: the texts.
            lead: whether a blank stands before each text, which the first token may hold (`▁answer`) but which is not
                part of the text: spans count from the text's first byte.

        Raises:
            ValueError: a text is not valid Unicode, or the tokens that the tokenizer makes of it cannot be located in it.
        """
        empty = [text == "" for text in texts]
        lead = lead and self.prefix != "forced"
        texts = [" " + text for text in texts] if lead else list(texts)
        data = [_utf8(text, self.name) for text in texts]
        encoded = [self._checked(text, raw, ids) for text, raw, ids in zip(texts, data, self._ids(texts))]
        if lead:
            encoded = [Encoded(e.ids, np.maximum(e.spans - 1, 0)) for e in encoded]
        return [Encoded(e.ids[:0], e.spans[:0]) if none else e for none, e in zip(empty, encoded)]

    def begins_with_prefix(self, text: str) -> bool:
        """Whether the tokenizer puts a blank before this text where it stands alone."""
        return self.prefix == "always" or (self.prefix == "unless" and not text.startswith(" "))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            # The fast form leaves the offsets out, which few texts need.
            return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        if hasattr(self._tokenizer, "encode_ordinary_batch"):
            return self._tokenizer.encode_ordinary_batch(texts)
        return [self._tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in texts]

    def _checked(self, text: str, data: bytes, ids: list[int]) -> Encoded:
        surfaces = self.surfaces
        array = np.array(ids, np.int32)
        joined = b"".join(map(surfaces.spelling.__getitem__, ids))
        if joined == data:
            return Encoded(array, spans_from_surfaces(surfaces, array))
        if self._backend is not None and ids:
            whole = self._backend.encode(text, add_special_tokens=False)
            return Encoded(np.array(whole.ids, np.int32), spans_from_offsets(surfaces, whole.ids, whole.offsets, text))
        if self._backend is None and joined == b" " + data:
            # A slow SentencePiece tokenizer puts the blank there and cannot be told not to.
            return Encoded(array, np.maximum(spans_from_surfaces(surfaces, array) - 1, 0))
        wrong = next((k for k, (a, b) in enumerate(zip(joined, data)) if a != b), min(len(joined), len(data)))
        raise ValueError(
            f"the tokens that {self.name} makes of a text do not spell it: from byte {wrong} on they give "
            f"{excerpt(joined, wrong)}, the text has {excerpt(data, wrong)}, and the tokenizer says no character offsets"
        )


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text for {name} is not valid Unicode at character {error.start} ({excerpt(text, error.start)}): it holds "
            "half of a surrogate pair; repair or remove it in the data"
        ) from None


def _remove_prefix(backend) -> str:
    """Stop a `tokenizers` pipeline from putting a blank before the text; say whether it did so before."""
    prefix = ""
    normalizer, splitter = state_of(backend.normalizer), state_of(backend.pre_tokenizer)
    for part in parts_of(normalizer):
        if part["type"] == "Prepend" and part["prepend"]:
            part["prepend"], prefix = "", "always"
    if prefix:
        backend.normalizer = _from_state("normalizers", normalizer)
        return prefix
    for part in parts_of(splitter):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            part["prepend_scheme"], prefix = "never", "unless"
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            part["add_prefix_space"], prefix = False, "unless"
    if prefix:
        backend.pre_tokenizer = _from_state("pre_tokenizers", splitter)
    return prefix


def _from_state(kind: str, state: dict):
    import tokenizers

    module = getattr(tokenizers, kind)
    component = module.Sequence([])
    component.__setstate__(json.dumps(state).encode())
    return component
