"""Reading what a model drew: its tokens as text, up to the first damage."""

import dataclasses

import numpy as np

from gold_jax.text.chat import ChatTokenizer, Prompt
from gold_jax.text.encode import Encoded, spans_from_surfaces


@dataclasses.dataclass(frozen=True, eq=False)
class SampledCompletion(Encoded):
    """A completion that a model drew, without the stop token and without what was left out; or a text of the data set.

    What a model drew has no unknown token, because it ends before the first; a text that was encoded may.
    """

    text: str = ""
    stopped: bool = False  # whether a stop token ended it
    #: Whether tokens were left out at its end: bytes that are no UTF-8, a token that spells nothing, or, where a
    #: tokenizer does not give text back byte for byte, tokens that it would not make of their own text.
    invalid_utf8: bool = False


def completion_from_ids(chat_tokenizer: ChatTokenizer, ids, *, after: Prompt | None = None) -> SampledCompletion:
    """Read what a model drew after a prompt.

    The tokens end before the first stop token. Where they spell something that is not UTF-8 (a character cut off by the
    length limit, a stray byte), or a token spells nothing (a stray special token, an id of the head's padding), what
    comes before the damage is kept and the rest left out, so that nothing shifts.

    Where surfaces, joined, are not the text (WordPiece), the text is what the tokenizer's own decoder makes of the ids.
    Encoded again it must give the same ids: they have the spans found there. From the first that differs on they are
    left out.

    `ids` [N] were drawn after the prompt, `after` (as for `encode_completions`), by the model whose chat tokenizer this is.
    Returned is the longest prefix that ends with a token and is valid text. It counts as stopped only if it is whole.
    """
    ids = np.asarray(ids, np.int32)
    stops = np.flatnonzero(np.isin(ids, chat_tokenizer.stop_ids))
    ids = ids[: stops[0]] if stops.size else ids
    surfaces, size = chat_tokenizer.surfaces, len(chat_tokenizer.surfaces)
    invalid = np.flatnonzero((ids < 0) | (ids >= size) | ~surfaces.spells[np.clip(ids, 0, size - 1)])
    clean = ids[: invalid[0]] if invalid.size else ids
    read = _decode_by_surfaces if surfaces.reversible else _decode_by_tokenizer
    spans, text = read(chat_tokenizer, clean, after)
    damaged = len(spans) < len(ids)
    stopped = bool(stops.size) and not damaged
    return SampledCompletion(ids[: len(spans)], spans, text=text, stopped=stopped, invalid_utf8=damaged)


def _decode_by_surfaces(chat: ChatTokenizer, ids: np.ndarray, after: Prompt | None) -> tuple[np.ndarray, str]:
    """The spans of the tokens that are kept, and their text, where the joined surfaces are the text."""
    data = chat.surfaces.join(ids.tolist())
    spans = spans_from_surfaces(chat.surfaces, ids)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        kept = _count_complete_tokens(spans[:, 1], data, error.start)
        spans = spans[:kept]
        data = data[: spans[-1, 1] if kept else 0]
    if data.startswith(b" ") and _starts_with_space(chat, after):
        data, spans = data[1:], np.maximum(spans - 1, 0)
    return spans, data.decode()


def _decode_by_tokenizer(chat: ChatTokenizer, ids: np.ndarray, after: Prompt | None) -> tuple[np.ndarray, str]:
    """The same where only the tokenizer's decoder knows the text."""
    text = chat.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = chat.encode_completion(text, after=after)
    overlap = min(len(ids), len(again.ids))
    differ = np.flatnonzero(ids[:overlap] != again.ids[:overlap])
    agreed = int(differ[0]) if differ.size else overlap
    data, spans = text.encode(), again.spans
    if agreed < len(again.ids) or agreed < len(ids):
        agreed = _count_complete_tokens(spans[:agreed, 1], data, len(data))
        data = data[: spans[agreed - 1, 1] if agreed else 0]
    return spans[:agreed], data.decode()


def _count_complete_tokens(ends: np.ndarray, data: bytes, valid: int) -> int:
    """How many tokens there are up to the last that ends with a character within the first `valid` bytes."""
    inside = np.frombuffer(data + b" ", np.uint8)[ends] & 0xC0 == 0x80  # the next byte continues a character
    complete = np.flatnonzero((ends <= valid) & ((ends == valid) | ~inside))
    return int(complete[-1]) + 1 if complete.size else 0


def _starts_with_space(chat: ChatTokenizer, after: Prompt | None) -> bool:
    """Whether the first token of any completion there holds a blank that belongs to the template or the tokenizer."""
    if chat.has_leading_space("", after):
        return True
    ids = chat.encode_completion("a", after=after).ids
    return chat.surfaces.join(ids.tolist()).startswith(b" ")
