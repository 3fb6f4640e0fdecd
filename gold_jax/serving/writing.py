"""The text of a sequence during generation: what can be sent, stop strings, and log-probabilities of its tokens."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gold_jax.serving.batcher import Tokens
from gold_jax.text.chat import ChatTokenizer, Prompt
from gold_jax.text.detokenize import completion_from_ids

_FIELDS = [field.name for field in dataclasses.fields(Tokens)]
_LONGEST_CHARACTER = 4  # bytes: more tokens without a complete character are invalid, not the beginning of one


class Writing:
    """A completion that grows token by token.

    Its text is that of `text.detokenize.completion_from_ids`: it ends before invalid UTF-8 and before tokens without
    text, and then counts as stopped. Text that may be the beginning of a stop string is held back until that is known.
    The first complete stop string ends it. However many tokens come at once, the result is the same.

    Attributes:
        text: what can be sent so far, without the stop string.
        ids: the tokens, up to the one that finished it.
        finish: "stop" or "length" if it is finished, else None.
    """

    def __init__(self, chat: ChatTokenizer, after: Prompt | None, stops: Sequence[str] = ()):
        self.chat, self.after, self.stops = chat, after, tuple(stops)
        self.text, self.finish, self.ids = "", None, []
        self._tokens: list[Tokens] = []
        self._starts = np.zeros(0, np.int32)  # byte offset of each token in the text
        self._whole = False  # whether it is finished, and not by a stop string

    def add(self, tokens: Tokens) -> str:
        """Adds tokens; returns the text that they add."""
        self.ids.extend(tokens.ids.tolist())
        self._tokens.append(tokens)
        return self._read("")

    def end(self, finish: str) -> str:
        """Finishes the completion; returns the text that was held back."""
        return self._read(finish)

    def _read(self, finish: str) -> str:
        if self.finish is not None:
            return ""
        read = completion_from_ids(self.chat, self.ids, after=self.after)
        text, sent = read.text, len(self.text)
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
        if len(text) > sent:
            self.text = text
        return self.text[sent:]

    def ready(self, first: int = 0) -> tuple[Tokens, list[int]]:
        """The tokens from `first` on whose text can be sent, with their character offsets in the text.

        For a finished completion these are all tokens up to a stop string, including a final stop token.
        """
        data = self.text.encode()
        last = len(self.ids) if self._whole else int((self._starts < len(data)).sum())
        starts = [*self._starts.tolist(), *[len(data)] * len(self.ids)][first:last]
        offsets = [len(data[:start].decode(errors="ignore")) for start in starts]
        fields = (np.concatenate([getattr(part, name) for part in self._tokens]) for name in _FIELDS)
        return Tokens(*(x[first:last] for x in fields)), offsets


def _held(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of a text that may be the beginning of a stop string."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


def token_text(chat: ChatTokenizer, i: int) -> str:
    """A readable token: its text, `bytes:\\xe2` for part of a character, the name of a special token."""
    size = len(chat.surfaces)
    if not 0 <= i < size or chat.surfaces.table[i] is None:
        return (chat.surfaces.strings[i] if 0 <= i < size else None) or f"token:{i}"
    data = chat.surfaces.table[i]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_of_prompt(chat: ChatTokenizer, prompt: Any, ids: np.ndarray) -> tuple[str, list[int]]:
    """A prompt as text (for token ids with the names of special tokens), and the character offset of each token."""
    known = [i if i < len(chat.surfaces) else -1 for i in ids.tolist()]
    joined = [chat.surfaces.table[i] or token_text(chat, i).encode() for i in known]
    data = b"".join(joined)
    text = prompt if isinstance(prompt, str) else data.decode(errors="replace")
    starts = np.cumsum([0, *map(len, joined)])[:-1]
    # A token or space that the tokenizer prepends is not part of the text.
    before = len(data.decode(errors="ignore")) - len(text)
    return text, [max(0, len(data[:start].decode(errors="ignore")) - max(0, before)) for start in starts]


def completion_logprobs(chat: ChatTokenizer, tokens: Tokens, offsets: Sequence[int], top: int) -> dict[str, list]:
    """`logprobs` in the format of /v1/completions: the `top` most likely tokens and the token itself, by text."""
    names, values, likeliest = [], [], []
    for token, logprob, others in _with_likeliest(tokens, top):
        name = token_text(chat, token)
        names.append(name)
        values.append(logprob)
        # Of two tokens with the same text the likelier.
        likeliest.append({name: logprob} | {token_text(chat, other): value for other, value in reversed(others)})
    return {"tokens": names, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": list(offsets)}


def chat_logprobs(chat: ChatTokenizer, tokens: Tokens, top: int) -> dict[str, list]:
    """`logprobs` in the format of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        surface = chat.surfaces.table[token] if token < len(chat.surfaces) else None
        return {
            "token": token_text(chat, token),
            "logprob": logprob,
            "bytes": None if surface is None else list(surface),
        }

    content = [
        entry(token, logprob) | {"top_logprobs": [entry(*other) for other in others]}
        for token, logprob, others in _with_likeliest(tokens, top)
    ]
    return {"content": content}


def _with_likeliest(tokens: Tokens, top: int) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    """Each token, its log-probability, and the `top` likeliest in its place with theirs, likeliest first."""
    for token, logprob, others, logprobs in zip(tokens.ids, tokens.logprobs, tokens.top_ids, tokens.top_logprobs):
        yield int(token), float(logprob), list(zip(others[:top].tolist(), logprobs[:top].tolist()))
