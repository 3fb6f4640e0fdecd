"""Escapes the strings of special tokens in users' text, so that they are read as plain text, unlike the template's own.

In what a chat template makes of messages, a user's `<|im_end|>` looks like the template's own. So every such string is
hidden behind a private-use character while the template runs, and what it wrote goes through a copy of the tokenizer that
knows its special tokens by other names: the template's are written by these, and the user's letters are only letters.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gold_jax.text.surface import backend_of
from gold_jax.text.template import ChatTemplate, Conversation, RenderedAnswer, extras_of

_ROLE = re.compile(r"\w[\w .-]*")
_PRIVATE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))


@dataclasses.dataclass(frozen=True)
class EscapedText:
    """A text in which some strings are hidden."""

    text: str  # with one private-use character in the place of each hidden string
    strings: dict[str, str]  # what every such character stands for; empty where nothing is hidden

    @property
    def original(self) -> str:
        """The text as it was."""
        return _unescape(self.text, self.strings)

    def slice(self, begin: int, end: int) -> "EscapedText":
        """The characters `[begin, end)`, where a hidden string is one."""
        return EscapedText(self.text[begin:end], self.strings)


class SpecialStrings:
    """The strings that a transformers tokenizer reads as special tokens: `tokens`, string to added token.

    `also` are strings of tokens to treat as special although the tokenizer does not call them so: stop tokens. Those
    that are no added tokens are left out, since a tokenizer does not look for them, and so are blanks alone, which are
    text to everyone.
    """

    def __init__(self, tokenizer, also: Iterable[str] = ()):
        named = {*tokenizer.all_special_tokens, *also}
        added = tokenizer.added_tokens_decoder.values()
        self.tokens = {t.content: t for t in added if (t.special or t.content in named) and t.content.strip()}
        self.pattern = re.compile(_any_of(list(self.tokens)) if self.tokens else "(?!)")

    def found_in(self, texts: Iterable[str]) -> list[str]:
        """Those that occur in texts; each once, in order of occurrence."""
        return list(dict.fromkeys(string for text in texts for string in self.pattern.findall(text)))

    def escape(self, value: Any, strings: dict[str, str], keep: frozenset[str] = frozenset()) -> Any:
        """A text, or every text in nested lists and dicts, with placeholders for `strings` (as `EscapedText` has them).

        Those of `keep` are left as they are.
        """
        marks = {string: mark for mark, string in strings.items()}
        return _map_strings(value, lambda t: self.pattern.sub(lambda m: m[0] if m[0] in keep else marks[m[0]], t))


class SpecialTokenEscaper:
    """Renders prompts with special strings of users' text hidden.

    What is hidden: every special string in contents, names, tool calls, tools and a row's own template variables. Roles
    are left alone, for a template compares them: one that is more than a name is a ValueError. Of added tokens that are
    not special but that the template itself writes or looks for (Qwen's `</think>` and `<tool_response>`) those in the
    messages of users and tools are hidden; an assistant may write them, a system message explain them.

    A template may look for a string in an assistant's earlier answer, such as a special `</think>` to drop the thinking
    before it, and has to find it. Such a string is left alone in assistants' messages, and what the template still
    writes of it is read as the token that it names, if all of this holds: the template's source mentions it; with
    it hidden the template would write something else; and it is no part of the frame of turns, that is, neither a token
    that the template writes around a user's turn or after an answer, nor a beginning, end or stop token. The frame
    stays plain text wherever it stands, looked for or not: a conversation must not be cut up by what is said in it. In
    a user's text nothing is left alone.

    `specials` are the tokenizer's special strings, `frame` strings that are never left alone, beside those that the
    template itself frames turns with, and `guard` are `specials` and the added tokens of the template
    (`structural_strings`); None: `specials`.
    """

    def __init__(self, template: ChatTemplate, specials: SpecialStrings, frame=(), guard: SpecialStrings | None = None):
        self._template, self._specials, self._guarded = template, specials, guard or specials
        self._structural = frozenset(self._guarded.tokens.keys() - specials.tokens.keys())
        self._frame_given = frozenset(frame)

    def render(self, prompt: str | list[dict], *, generate: bool = False) -> EscapedText:
        """A prompt as the template writes it (ValueError where it refuses that); a plain text as it is."""
        if isinstance(prompt, str):
            strings = self._placeholders(prompt)
            return EscapedText(self._specials.escape(prompt, strings), strings)
        return self._with_escaped(prompt, lambda messages: (self._template.render(messages, generate=generate), []))[0]

    def answer(self, messages: list[dict]) -> RenderedAnswer:
        """The last answer of a conversation, see `ChatTemplate.answer`.

        Special tokens that the template itself writes after the generation prompt (gpt-oss' channels) are no text: then
        `text` is what stands after the last of them, and `follows_prompt` is False.
        """
        follows_prompt = True

        def work(messages):
            nonlocal follows_prompt
            prompt, text, follows_prompt = self._template.answer(messages)
            return prompt + text, [(len(prompt), len(prompt) + len(text))]

        whole, [(begin, end)] = self._with_escaped(messages, work)
        text = whole.slice(begin, end)
        if written := list(self._specials.pattern.finditer(text.text)):
            strings = self._placeholders(messages)
            said = self._strings_the_template_looks_for(messages, strings) if strings else ()
            for found in written:
                if found[0] not in said:
                    text, follows_prompt = whole.slice(begin + found.end(), end), False
        return RenderedAnswer(whole.slice(0, begin).original, text.original, follows_prompt)

    def answers(self, messages: list[dict], within: int | None = None) -> tuple[EscapedText, list[tuple[int, int]]]:
        """A whole conversation and the characters of the hidden text that are its answers, see `ChatTemplate.answers`."""
        return self._with_escaped(messages, functools.partial(self._template.answers, within=within))

    def _with_escaped(self, messages: list[dict], work: Callable) -> tuple[EscapedText, list]:
        strings = self._placeholders(messages)
        if not strings:
            text, spans = work(messages)
            return EscapedText(text, {}), spans
        try:
            keep = self._strings_the_template_looks_for(messages, strings)
            text, spans = work(self._escape_messages(messages, strings, keep))
        except ValueError:
            work(messages)  # complains in the user's own words
            raise
        for mark in strings:  # a template may write tools as JSON in ASCII
            escaped = _json_escape(mark)
            spans = [tuple(at - (len(escaped) - 1) * text.count(escaped, 0, at) for at in span) for span in spans]
            text = text.replace(escaped, mark)
        return EscapedText(text, strings), spans

    def _placeholders(self, prompt) -> dict[str, str]:
        for turn, role in enumerate(() if isinstance(prompt, str) else [message.get("role") for message in prompt]):
            is_name = isinstance(role, str) and _ROLE.fullmatch(role)
            if not is_name or self._guarded.found_in([role]) and role not in self._template.sources:
                raise ValueError(
                    f"message {turn} has the role {role!r}, which a chat template would write as it is; a role is a name, of letters, "
                    "digits, spaces, '.', '-' and '_', such as 'user'"
                )
        found = self._specials.found_in(_user_texts(prompt))
        if self._structural and not isinstance(prompt, str):
            texts = _user_texts([message for message in prompt if _is_read(message)])
            found += [string for string in self._guarded.found_in(texts) if string in self._structural]
        if not found:
            return {}
        return dict(zip(placeholders(len(found), "".join(_user_texts(prompt)) + self._template.sources), found))

    def _escape_messages(self, messages: list[dict], strings: dict[str, str], keep: frozenset[str]) -> list[dict]:
        hide = functools.partial(self._guarded.escape, strings=strings, keep=self._structural)

        def hidden(message):
            kept = frozenset() if _is_read(message) else self._structural
            if message.get("role") == "assistant":
                kept |= keep
            return {key: value if key == "role" else hide(value, keep=kept) for key, value in message.items()}

        escaped = [hidden(message) for message in messages]
        return Conversation(escaped, **{name: hide(value) for name, value in extras_of(messages).items()})

    def _strings_the_template_looks_for(self, messages: list[dict], strings: dict[str, str]) -> frozenset[str]:
        """What the template looks for in assistants' messages and may find there."""
        said = self._specials.found_in(_user_texts([m for m in messages if m.get("role") == "assistant"]))
        literals = frozenset(s for s in said if s in self._template.sources and s not in self._frame)
        if not literals:
            return literals

        def written(keep):
            return _unescape(self._template.render(self._escape_messages(messages, strings, keep)), strings)

        full = written(literals)
        for string in sorted(literals):
            if written(literals - {string}) == full:
                literals -= {string}
        return literals

    @functools.cached_property
    def _frame(self) -> frozenset[str]:
        try:
            turn = self._template.render([{"role": "user", "content": "Hello?"}])
        except ValueError:  # a template for other conversations than this one
            turn = ""
        return self._frame_given.union(self._specials.found_in([turn, self._template.tail]))


class EscapedTextEncoder:
    """Encodes texts with hidden strings: these as plain text, everything else as the tokenizer by itself reads it.

    The tokenizer, a transformers one, is not changed; `specials` are its special strings.
    """

    def __init__(self, tokenizer, specials: SpecialStrings):
        self._tokenizer, self._specials = tokenizer, specials
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._string_of = {added[string]: string for string in specials.tokens}
        self._names: dict[str, str] = {}
        self._renamed: Any = None  # made when it is first needed

    def encode(self, escaped: EscapedText, *, add_special_tokens: bool = False) -> list[int]:
        """The tokens of a text; `add_special_tokens` has the tokenizer put its own special tokens around it."""
        if backend_of(self._tokenizer) is None:
            return self._encode_segments(escaped, add_special_tokens)
        return self.encode_with_offsets(escaped, add_special_tokens)[0]

    def encode_with_offsets(self, escaped: EscapedText, add_special_tokens=False) -> tuple[list[int], np.ndarray]:
        """The tokens of a text, and the characters `[start, end)` of the escaped text that each spans, int64 [T, 2].

        For tokenizers with a `tokenizers` backend alone: others tell no offsets.
        """
        # One string for every character of the hidden text; "" inside a token that the template wrote.
        pieces = [escaped.strings.get(char, char) for char in escaped.text]
        written = self._template_specials(escaped.text)
        shown = "".join(pieces)
        if self._renamed is None or any(name in shown for name in self._names.values()):
            backend, strings = backend_of(self._tokenizer), self._specials.tokens
            entries = "".join(entry for entry in backend.get_vocab() if len(entry) == 1)  # Gemma's has private-use ones
            self._names = dict(zip(strings, placeholders(len(strings), shown + entries)))
            self._renamed = _with_renamed_special_tokens(backend, self._names)
        ends = np.arange(1, len(pieces) + 1)
        for begin, end, string in written:
            pieces[begin:end] = [self._names[string], *[""] * (end - begin - 1)]
            ends[begin] = end
        encoding = self._renamed.encode("".join(pieces), add_special_tokens=add_special_tokens)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return encoding.ids, _to_escaped_offsets(offsets, np.array([len(piece) for piece in pieces], np.int64), ends)

    def _template_specials(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Where the tokenizer by itself reads a special token in a text that holds none of the user's."""
        if not self._specials.pattern.search(text):
            return
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for i, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"]):
            if (string := self._string_of.get(i)) is None:
                continue
            at = text.find(string, begin, end)  # it may have taken blanks beside it, too
            if at >= 0:  # else the token for unknown characters, which nobody wrote
                yield at, at + len(string), string

    def _encode_segments(self, escaped: EscapedText, add_special_tokens: bool) -> list[int]:
        """For tokenizers that are all Python: they read every stretch between two added tokens by itself."""
        tokens = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        parts = re.split(f"({_any_of(list(tokens))})", escaped.text) if tokens else [escaped.text]
        ids: list[int] = []
        native = ""  # what has been passed since the last stretch with something hidden
        for k, part in enumerate(parts):
            if escaped.strings.keys().isdisjoint(part):
                native += part
                continue
            segment = _unescape(part, escaped.strings)
            if k > 0 and tokens[parts[k - 1]].rstrip:
                segment = segment.lstrip()
            if k + 1 < len(parts) and tokens[parts[k + 1]].lstrip:
                segment = segment.rstrip()
            ids += self._encode(native) + self._encode(segment, split_special_tokens=True)
            native = ""
        ids += self._encode(native)
        return self._tokenizer.build_inputs_with_special_tokens(ids) if add_special_tokens else ids

    def _encode(self, text: str, **kwargs) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, **kwargs) if text else []


def structural_strings(tokenizer, template: ChatTemplate) -> list[str]:
    """The added tokens that are not special and that a chat template names."""
    known = tokenizer.added_tokens_decoder.values()
    return [t.content for t in known if not t.special and t.content.strip() and t.content in template.sources]


def _is_read(message: dict) -> bool:
    """Whether a message is said to the model by somebody: a user or a tool."""
    return message.get("role") not in ("assistant", "system", "developer")


def placeholders(count: int, text: str) -> list[str]:
    """Private-use characters that do not stand in a text, nor their JSON escapes; ValueError where it holds too many."""
    lower = text.lower()
    free = (chr(i) for first, last in _PRIVATE for i in range(first, last))
    marks = list(itertools.islice((c for c in free if c not in text and _json_escape(c) not in lower), count))
    if len(marks) < count:
        raise ValueError(f"a text uses nearly all private-use characters of Unicode; {count} free ones are needed")
    return marks


def _json_escape(char: str) -> str:
    return json.dumps(char)[1:-1]


def _unescape(text: str, strings: dict[str, str]) -> str:
    for mark, string in strings.items():
        text = text.replace(mark, string)
    return text


def _to_escaped_offsets(offsets: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Offsets in a text, [T, 2], as offsets in an escaped text, given the length that each character became."""
    piece = np.repeat(np.arange(len(lengths)), lengths)  # character of the text -> character of the hidden text
    begin = np.append(piece, len(lengths))[offsets[:, 0]]
    end = np.append(ends[piece], 0)[np.maximum(offsets[:, 1], 1) - 1]
    return np.stack([begin, np.where(offsets[:, 1] > offsets[:, 0], end, begin)], 1)


def _with_renamed_special_tokens(backend, names: dict[str, str]):
    """A copy of a `tokenizers.Tokenizer` whose special tokens have other strings and the same ids.

    Nothing in it spells the old strings as one token: neither a Unigram vocabulary, which would choose its `</s>` for
    the letters, nor a merge of BPE.
    """
    import tokenizers

    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(string, string): i for string, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(string, string), score] for string, score in vocabulary]
    if model.get("merges"):
        merges = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
        model["merges"] = [p for p in merges if not (p[0] in names or p[1] in names or p[0] + p[1] in names)]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    renamed = tokenizers.Tokenizer.from_str(json.dumps(state))
    renamed.encode_special_tokens = False
    return renamed


def _any_of(strings: Sequence[str]) -> str:
    """A pattern for any of the strings, the longest that fits; what they begin with in common is tried once."""
    tails: dict[str, list[str]] = {}
    for string in strings:
        if string:
            tails.setdefault(string[0], []).append(string[1:])
    branches = [re.escape(char) + _any_of(rest) for char, rest in tails.items()]
    if "" in strings:
        return f"(?:{'|'.join(branches)})?" if branches else ""
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _user_texts(prompt: str | list[dict]) -> list[str]:
    """Every text that a user controls: of messages all but their roles, tools and template variables."""
    if isinstance(prompt, str):
        return [prompt]
    texts: list[str] = []
    said = [[value for key, value in message.items() if key != "role"] for message in prompt]
    _map_strings([said, *extras_of(prompt).values()], texts.append)
    return texts


def _map_strings(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
