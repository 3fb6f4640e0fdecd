"""The text of a sequence that is being written: what of it can be told, where a stop string ends it, what its tokens cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gold_jax.serving.batcher import Tokens
from gold_jax.text.chat import ChatTokenizer, Prompt
from gold_jax.text.detokenize import completion_from_ids

_FIELDS = [field.name for field in dataclasses.fields(Tokens)]
_LONGEST_CHARACTER = 4  # bytes: so many tokens that spell no whole character are damage, not the beginning of one


class Writing:
    """A completion as far as it is drawn.

    Its text is that of `text.detokenize.completion_from_ids`: it ends before what is no UTF-8 and before tokens that spell
    nothing, and then counts as stopped. What may be the beginning of a stop string is kept back while more may come. The
    first stop string that is complete ends it. However many tokens come at once, the result is the same.

    Attributes:
        text: what can be told so far, without the stop string.
        ids: the tokens, up to the one with which it was finished.
        finish: "stop" or "length" where it is finished, else None.
    """

    def __init__(self, chat: ChatTokenizer, after: Prompt | None, stops: Sequence[str] = ()):
        self.chat, self.after, self.stops = chat, after, tuple(stops)
        self.text, self.finish, self.ids = "", None, []
        self._tokens: list[Tokens] = []
        self._starts = np.zeros(0, np.int32)  # bytes of the text before each token that is read
        self._whole = False  # whether it is finished, and not by a stop string

    def add(self, tokens: Tokens) -> str:
        """Further tokens; returns the text that they add."""
        self.ids.extend(tokens.ids.tolist())
        self._tokens.append(tokens)
        return self._read("")

    def end(self, finish: str) -> str:
        """No more come; returns the text that was kept back."""
        return self._read(finish)

    def _read(self, finish: str) -> str:
        if self.finish is not None:
            return ""
        read = completion_from_ids(self.chat, self.ids, after=self.after)
        text, told = read.text, len(self.text)
        self._starts = read.spans[:, 0]
        found = min(((at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            del self.ids[int((self._starts < len(text[: found[0]].encode())).sum()) :]
            text, self.finish = text[: found[1]], "stop"
        elif len(self.ids) - len(read.ids) > _LONGEST_CHARACTER:
            del self.ids[len(read.ids) + _LONGEST_CHARACTER + 1 :]
            self.finish = "stop"
        elif finish:
            self.finish = finish
        else:
            text = text[: len(text) - _held(text, self.stops)]
        self._whole = found is None and self.finish is not None
        if len(text) > told:
            self.text = text
        return self.text[told:]

    def costs(self, first: int = 0) -> tuple[Tokens, list[int]]:
        """The tokens from the `first` on whose text is told, and where in the text, in characters, each begins.

        Of one that is finished these are all up to a stop string, the stop token that ended it included.
        """
        data = self.text.encode()
        last = len(self.ids) if self._whole else int((self._starts < len(data)).sum())
        starts = [*self._starts.tolist(), *[len(data)] * len(self.ids)][first:last]
        offsets = [len(data[:start].decode(errors="ignore")) for start in starts]
        fields = (np.concatenate([getattr(part, name) for part in self._tokens]) for name in _FIELDS)
        return Tokens(*(x[first:last] for x in fields)), offsets


def _held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


def token_text(chat: ChatTokenizer, i: int) -> str:
    """A token for people: its text, the bytes of a part of a character as `bytes:\\xe2`, a special token's own name."""
    size = len(chat.surfaces)
    if not 0 <= i < size or chat.surfaces.table[i] is None:
        return (chat.surfaces.strings[i] if 0 <= i < size else None) or f"token:{i}"
    data = chat.surfaces.table[i]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_of_prompt(chat: ChatTokenizer, prompt: Any, ids: np.ndarray) -> tuple[str, list[int]]:
    """A prompt as text (that of token ids with the names of special tokens), and where in it, in characters, each token begins."""
    known = [i if i < len(chat.surfaces) else -1 for i in ids.tolist()]
    joined = [chat.surfaces.table[i] or token_text(chat, i).encode() for i in known]
    data = b"".join(joined)
    text = prompt if isinstance(prompt, str) else data.decode(errors="replace")
    starts = np.cumsum([0, *map(len, joined)])[:-1]
    # What the tokenizer puts before a text, a token or a blank, is not in it.
    before = len(data.decode(errors="ignore")) - len(text)
    return text, [max(0, len(data[:start].decode(errors="ignore")) - max(0, before)) for start in starts]


def completion_logprobs(chat: ChatTokenizer, tokens: Tokens, offsets: Sequence[int], top: int) -> dict[str, list]:
    """`logprobs` as /v1/completions has them: the `top` likeliest and the token itself, by their texts."""
    likeliest = []
    for i, logprob, others, costs in zip(tokens.ids, tokens.logprobs, tokens.top_ids, tokens.top_logprobs):
        own = {token_text(chat, int(i)): float(logprob)}
        for other, cost in list(zip(others, costs))[:top][::-1]:
            own[token_text(chat, int(other))] = float(cost)  # of two with one text the likelier
        likeliest.append(own)
    names = [token_text(chat, int(i)) for i in tokens.ids]
    values = [float(x) for x in tokens.logprobs]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": list(offsets)}


def chat_logprobs(chat: ChatTokenizer, tokens: Tokens, top: int) -> dict[str, list]:
    """`logprobs` as /v1/chat/completions has them."""

    def entry(i: int, logprob: float) -> dict[str, Any]:
        surface = chat.surfaces.table[i] if i < len(chat.surfaces) else None
        return {
            "token": token_text(chat, i),
            "logprob": float(logprob),
            "bytes": None if surface is None else list(surface),
        }

    found = []
    for i, logprob, others, costs in zip(tokens.ids, tokens.logprobs, tokens.top_ids, tokens.top_logprobs):
        likeliest = [entry(int(other), cost) for other, cost in list(zip(others, costs))[:top]]
        found.append(entry(int(i), logprob) | {"top_logprobs": likeliest})
    return {"content": found}
