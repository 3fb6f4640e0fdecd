"""Cuts the beginning of prompts that are too long: `--truncation_mode keep_end`.

Turns and texts are cut, not tokens: student and teacher then read the same prompt, and what a chat template writes around
messages, system messages and the completion stay whole.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gold_jax.text.chat import CHARS_PER_TOKEN, ChatTokenizer, Prompt
from gold_jax.text.data import Example
from gold_jax.text.template import like


class EndsOfPrompts(Sequence):
    """Examples with prompts cut to at most `room(example)` tokens of the student's; those that cannot be are as they were.

    `shortened` has the row numbers of the examples read so far that were cut.
    """

    def __init__(self, examples: Sequence[Example], chat_tokenizer: ChatTokenizer, room: Callable[[Example], int]):
        self._examples, self._chat_tokenizer, self._room = examples, chat_tokenizer, room
        self.notices, self.shortened = list(getattr(examples, "notices", ())), set()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._examples[index]
        if example.answers != 1:
            return example
        try:
            prompt = keep_end(example.prompt, self._chat_tokenizer, self._room(example))
        except ValueError:  # of what a template refuses, which the check of all rows reports with the row
            return example
        if prompt is None or prompt is example.prompt:
            return example
        self.shortened.add(index)
        messages = example.messages
        if messages is not None and isinstance(prompt, list):
            messages = like(messages, [*prompt, messages[-1]])
        return dataclasses.replace(example, prompt=prompt, messages=messages)


def keep_end(prompt: Prompt, chat_tokenizer: ChatTokenizer, room: int) -> Prompt | None:
    """The longest end of a prompt that has at most `room` tokens; None where none has.

    Of messages the first turns are left out, each up to the next message of the user's, but no system message; then the
    beginning of the first message that is left. ValueError as `ChatTokenizer.encode_prompts`.
    """

    def fits(candidate: Prompt) -> bool:
        is_short = len(chat_tokenizer.render(candidate).encode()) + 2 <= room  # a token spells at least a byte
        return is_short or len(chat_tokenizer.encode_prompt(candidate, limit=max(0, room))) <= room

    if fits(prompt):
        return prompt
    if isinstance(prompt, str):
        return _longest_end(prompt, room, lambda text: text, fits)
    first = next((k for k, message in enumerate(prompt) if not _is_system(message)), len(prompt))
    head, rest = list(prompt[:first]), list(prompt[first:])
    users = [k for k, message in enumerate(rest) if k and message.get("role") == "user"]
    for k in users:
        if fits(shorter := like(prompt, [*head, *filter(_is_system, rest[:k]), *rest[k:]])):
            return shorter
    if users:
        head, rest = [*head, *filter(_is_system, rest[: users[-1]])], rest[users[-1] :]
    if not rest or not rest[0].get("content"):
        return None
    build = lambda text: like(prompt, [*head, rest[0] | {"content": text}, *rest[1:]])  # noqa: E731
    return _longest_end(rest[0]["content"], room, build, fits)


def _is_system(message: dict) -> bool:
    return message.get("role") in ("system", "developer")


def _longest_end(text: str, room: int, build: Callable[[str], Any], fits: Callable[[Any], bool]) -> Any:
    """`build(end)` for the longest end of a text, of those near the room, for which it fits; None where none does."""
    longest = min(len(text) - 1, max(0, room) * CHARS_PER_TOKEN)
    size = bisect.bisect_left(range(1, longest + 1), True, key=lambda n: not fits(build(text[len(text) - n :])))
    return build(text[len(text) - size :]) if size else None
