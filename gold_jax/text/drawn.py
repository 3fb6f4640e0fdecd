"""Reading what a model drew: its tokens as text, up to the first damage."""

import dataclasses

import numpy as np

from gold_jax.text.chat import Codec, Prompt
from gold_jax.text.encode import spans_from_surfaces


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A completion that a model drew.

    Attributes:
        ids: int32 [T], as drawn, without the stop token and without what was left out.
        spans: int32 [T, 2], the bytes of `text` that each token spells.
        text: the completion.
        stopped: whether a stop token ended it.
        damaged: whether tokens were left out at its end: bytes that are no UTF-8, or a token that spells nothing.
    """

    ids: np.ndarray
    spans: np.ndarray
    text: str
    stopped: bool
    damaged: bool


def completion_from_ids(codec: Codec, ids, *, after: Prompt | None = None) -> Drawn:
    """Read what a model drew after a prompt.

    The tokens end before the first stop token. Where they spell something that is not UTF-8 (a character cut off by the
    length limit, a stray byte), or a token spells nothing (a stray special token, an id of the head's padding), what
    comes before the damage is kept and the rest left out, so that nothing shifts.

    Args:
        codec: the codec of the model that drew.
        ids: [N], the ids drawn after the prompt. What follows the first stop token does not matter.
        after: the prompt, as for `encode_completions`.

    Returns:
        The longest prefix that ends with a token and is valid text. It counts as stopped only if it is whole.
    """
    ids = np.asarray(ids, np.int32)
    stops = np.flatnonzero(np.isin(ids, codec.stop_ids))
    ids = ids[: stops[0]] if stops.size else ids
    size = len(codec.surfaces)
    strays = np.flatnonzero((ids < 0) | (ids >= size) | ~codec.surfaces.spells[np.clip(ids, 0, size - 1)])
    kept = int(strays[0]) if strays.size else len(ids)
    data = codec.surfaces.join(ids[:kept].tolist())
    try:
        data.decode()
    except UnicodeDecodeError as error:
        valid = error.start
        ends = spans_from_surfaces(codec.surfaces, ids[:kept])[:, 1]
        inside = np.frombuffer(data + b" ", np.uint8)[ends] & 0xC0 == 0x80  # the next byte continues a character
        whole = np.flatnonzero((ends <= valid) & ((ends == valid) | ~inside))
        kept = int(whole[-1]) + 1 if whole.size else 0
        data = codec.surfaces.join(ids[:kept].tolist())
    damaged = kept < len(ids)
    spans = spans_from_surfaces(codec.surfaces, ids[:kept])
    if data.startswith(b" ") and codec.leads("", after):
        data, spans = data[1:], np.maximum(spans - 1, 0)  # the blank that belongs to the template
    return Drawn(ids[:kept], spans, data.decode(), bool(stops.size) and not damaged, damaged)
