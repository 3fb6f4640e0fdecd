"""One model's way of reading: its chat template, its tokens for prompts and answers, its stop tokens."""

import copy
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gold_jax.text import special_tokens
from gold_jax.text.encode import Encoded, PlainEncoder
from gold_jax.text.special_tokens import EscapedText, SpecialStrings
from gold_jax.text.surface import backend_of, excerpt, name_of, surfaces_of
from gold_jax.text.template import ChatTemplate, RenderedAnswer, with_context

Prompt = str | list[dict]

# A text is read as far as needed by so many characters for each token, then by more; the tokens of a margin do not count.
CHARS_PER_TOKEN, _MARGIN = 32, 16
_END_OF_WORD = re.compile(r"\w(?= )")


def copy_of_tokenizer(tokenizer):
    """A copy of a transformers tokenizer; vocabulary and merges, which are never changed and long to copy, are shared."""
    shared = [value for name, value in vars(tokenizer).items() if name in ("_vocab", "_merges")]
    return copy.deepcopy(tokenizer, {id(value): value for value in shared})


class ChatTokenizer:
    """Turns text into one model's tokens and back.

    Args:
        tokenizer: a transformers tokenizer. It is not changed.
        stop_ids: further stop tokens, such as those of the model's generation config.
        chat_template: a Jinja template, or a file that holds one, in the place of the tokenizer's own. A tokenizer
            without any gets the plain format of `template.PLAIN_TEMPLATE`.
        template_kwargs: further variables of the template, such as `{"enable_thinking": False}`.
        special_tokens_in_prompts: whether strings of special tokens in prompts that are plain text stand for these
            tokens, as they do in a prompt that was rendered beforehand. In messages they never do, see
            `special_tokens.SpecialTokenEscaper`.
        embedding_rows: how many ids the model knows; text that stands for others is refused. None: all of the tokenizer's.
        copy_tokenizer: work with a copy; False where the caller neither uses nor changes it afterwards, to save the time.

    Attributes:
        surfaces: the tokenizer's surfaces; stop tokens have none.
        stop_id: the token that the template writes after an answer, else the tokenizer's end token.
        stop_ids: every stop token: `stop_id`, the tokenizer's end token, those given.
        pad_id: what fills up short rows; masked, so that any id will do.

    Raises:
        ValueError: the tokenizer has neither a template that writes a stop token nor an end token, its entries are not
            known to spell bytes, or it loses the spaces of a text.
    """

    def __init__(
        self,
        tokenizer,
        *,
        stop_ids: Sequence[int] = (),
        chat_template: str | None = None,
        template_kwargs: dict | None = None,
        special_tokens_in_prompts: bool = False,
        embedding_rows: int | None = None,
        copy_tokenizer: bool = True,
    ):
        surfaces = surfaces_of(tokenizer)  # of the original: a copy leaves out one of two entries with one id
        # Calling a tokenizer sets its truncation and padding, and its owner may change it.
        self.tokenizer = tokenizer = copy_of_tokenizer(tokenizer) if copy_tokenizer else tokenizer
        self.name = name_of(tokenizer)
        self.template = ChatTemplate(tokenizer, chat_template, template_kwargs)
        eos = tokenizer.eos_token_id
        self.stop_id = self._stop_of(surfaces, eos)
        known = [self.stop_id, eos, *(int(i) for i in stop_ids)]
        self.stop_ids = tuple(dict.fromkeys(i for i in known if i is not None))
        self.surfaces = surfaces.without(self.stop_ids)
        self.pad_id = next(i for i in (tokenizer.pad_token_id, eos, self.stop_id) if i is not None)
        self._plain = PlainEncoder(tokenizer, self.surfaces)
        stops = [string for i in self.stop_ids if i < len(surfaces) and (string := surfaces.strings[i])]
        ends = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        self._specials = SpecialStrings(tokenizer, also=stops)
        guarded = SpecialStrings(tokenizer, also=[*stops, *special_tokens.structural_strings(tokenizer, self.template)])
        self._escaper = special_tokens.SpecialTokenEscaper(self.template, self._specials, [*stops, *ends], guarded)
        self._escaped_encoder = special_tokens.EscapedTextEncoder(tokenizer, guarded)
        self.special_tokens_in_prompts, self.embedding_rows = special_tokens_in_prompts, embedding_rows
        self._refuse_lost_blanks()

    def _refuse_lost_blanks(self) -> None:
        """Sees that a tokenizer gives the blanks of a text back, which one loaded as another class than its own may not."""
        text = "the fox is 72"
        ids = self._tokenize([text])[0]
        joined = self.surfaces.join(ids).decode(errors="replace")
        lost = self.surfaces.reversible and " " not in joined and joined.lower() == text.replace(" ", "")
        backend = backend_of(self.tokenizer)
        if backend is not None and backend.encode(text, add_special_tokens=False).ids != ids:
            raise ValueError(
                f"{self.name}, a {type(self.tokenizer).__name__}, makes other tokens of {text!r} than its tokenizer.json says: it "
                "changes a text before it is read, so that what stands where in it is not known; pass the tokenizer of tokenizer.json"
            )
        if lost:
            raise ValueError(
                f"{self.name} does not give text back: of {text!r} it makes {joined!r}, as a {type(self.tokenizer).__name__}. Its "
                "`tokenizer_class` may be another one's than its tokenizer.json's; correct it in tokenizer_config.json, or install "
                "a newer transformers"
            )

    def _stop_of(self, surfaces, eos: int | None) -> int:
        text, known = self.template.tail, self.tokenizer.added_tokens_decoder
        tail = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        # Special tokens that stand in the text by their letters (so that none is the one for unknown bytes).
        special = [i for i in tail if surfaces.table[i] is None and surfaces.strings[i] in text]
        # Some models' stop tokens are added to the vocabulary without being called special.
        added = [i for i in tail if i in known and surfaces.spelling[i].strip()]
        stop = next(iter(special or added), eos)
        if stop is None:
            raise ValueError(
                f"{self.name} has no end token and its chat template writes no special token after an answer "
                f"({excerpt(text)} follows it), so that nothing tells the model to stop: set eos_token, or "
                "pass a chat template that writes a stop token"
            )
        return int(stop)

    def describe(self) -> str:
        """Whose chat template it reads with, and the stop tokens, in a line for people."""
        names = {i: self.surfaces.strings[i] if i < len(self.surfaces) else "no token" for i in self.stop_ids}
        line = f"{self.template.origin}, stops at {', '.join(f'{name} ({i})' for i, name in names.items())}"
        tail = self.template.tail
        other = tail.strip() and (names[self.stop_id] or "") not in tail
        return f"{line}; the template ends an answer with {excerpt(tail)}, which is no stop token" if other else line

    def special_strings_in(self, text: str) -> list[str]:
        """The strings in a text that would be special tokens if they were not read as plain text; each once, in order."""
        return self._specials.found_in([text])

    def with_context(self, prompt: Prompt, context: str) -> Prompt:
        """A prompt with more to know before it, see `template.with_context`."""
        return with_context(prompt, context, self.template)

    def render(self, prompt: Prompt) -> str:
        """A prompt as the model reads it: text as it is, messages by the template, up to where the answer begins."""
        return self._render_escaped(prompt).original

    def answer(self, messages: list[dict]) -> RenderedAnswer:
        """The last answer of a conversation as the model has to write it, see `ChatTemplate.answer`."""
        return self._escaper.answer(messages)

    def locate_answers(
        self, messages: list[dict], limit: int | None = None
    ) -> tuple[EscapedText, list[tuple[int, int]]]:
        """A whole conversation and the characters of every answer in it, see `ChatTemplate.answers`.

        Answers that are surely, or nearly so, behind its first `limit` tokens are not looked for.
        """
        within = None if limit is None else 2 * CHARS_PER_TOKEN * (limit + _MARGIN)
        written, answers = self._escaper.answers(messages, within)
        if self.template.lead:  # the blank that the template writes before an answer is the model's to write, too
            answers = [(begin - written.text[:begin].endswith(" "), end) for begin, end in answers]
        return written, answers

    def _render_escaped(self, prompt: Prompt) -> EscapedText:
        if isinstance(prompt, str) and self.special_tokens_in_prompts:
            return EscapedText(prompt, {})
        return self._escaper.render(prompt, generate=True)

    def encode_prompt(self, prompt: Prompt, *, limit: int | None = None) -> np.ndarray:
        """The tokens of a prompt, int32 [P], see `encode_prompts`; of one that has more than `limit`, `limit + 1` of them."""
        if limit is None:
            return self.encode_prompts([prompt])[0]
        written, plain = self._render_escaped(prompt), [isinstance(prompt, str)]
        for cut in _cuts(written.text, limit):
            ids = self._encode_written([written.slice(0, cut)], plain)[0]
            if len(ids) >= limit + _MARGIN:
                return ids[: limit + 1]
        return self._encode_written([written], plain)[0][: limit + 1]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """The tokens of prompts, int32 [P] each.

        Text gets the tokenizer's own special tokens before it (unless it begins with them and is read as markup, see
        `special_tokens_in_prompts`) and none after it; messages get what their template writes. Strings in them that
        look like special tokens are plain text; an added token that is not special (Qwen's `<think>`) is that token, but
        for messages of users and tools, where one that the template itself writes is plain text as well. ValueError where
        the template refuses a conversation, or a token has no embedding.
        """
        written = [self._render_escaped(prompt) for prompt in prompts]
        return self._encode_written(written, [isinstance(prompt, str) for prompt in prompts])

    def _encode_written(self, written: list[EscapedText], plain: list[bool]) -> list[np.ndarray]:
        """The tokens of prompts as they are written; `plain` says which were texts, not messages."""
        begin = self.tokenizer.bos_token
        begun = [bool(begin) and w.text.startswith(begin) for w in written]
        special = [is_text and not has for is_text, has in zip(plain, begun)]
        result: list = [None] * len(written)
        for wanted in set(special):
            rows = [row for row, has in enumerate(special) if has == wanted]
            batch = iter(self._tokenize([written[r].text for r in rows if not written[r].strings], special=wanted))
            for row in rows:
                text, hidden = written[row].text, written[row].strings
                ids = self._escaped_encoder.encode(written[row], add_special_tokens=wanted) if hidden else next(batch)
                result[row] = np.array(self._without_end_token(ids, text) if wanted else ids, np.int32)
        for ids in result:
            self._refuse_unembedded(ids)
        return result

    @property
    def lacks_embeddings(self) -> bool:
        """Whether the tokenizer has ids for which the model has no embedding, see `embedding_rows`."""
        return self.embedding_rows is not None and len(self.surfaces) > self.embedding_rows

    def _refuse_unembedded(self, ids: np.ndarray) -> None:
        last = int(ids.max(initial=0))
        if self.embedding_rows is not None and last >= self.embedding_rows:
            raise ValueError(
                f"what the model reads holds {self.surfaces.strings[last]!r}, the token {last} of {self.name}, for which its model "
                f"has no embedding (it has {self.embedding_rows}): remove it, or leave --special_tokens_in_prompts away; where the "
                "chat template writes it, pass another one"
            )

    def _tokenize(self, texts: list[str], *, special: bool = False) -> list[list[int]]:
        """As the tokenizer by itself reads texts."""
        options = dict(add_special_tokens=special, return_attention_mask=False, verbose=False)
        try:
            return self.tokenizer(texts, **options)["input_ids"] if texts else []
        except Exception as error:  # the `tokenizers` library knows no other kind
            if len(texts) > 1:  # one of them is at fault
                return [self._tokenize([text], special=special)[0] for text in texts]
            raise ValueError(f"{self.name} cannot encode a prompt that begins {excerpt(texts[0])}: {error}") from error

    def may_refuse(self, text: str) -> bool:
        """Whether encoding a text may raise, or make no token of it, see `PlainEncoder.may_refuse`."""
        return self._plain.may_refuse(text)

    def _without_end_token(self, ids: list[int], text: str) -> list[int]:
        """Without the end token that some tokenizers append: more text follows here."""
        end, end_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        while len(ids) > 1 and ids[-1] == end_id and not text.endswith(end):
            ids = ids[:-1]
        return ids

    def encode_completion(self, text: str, *, after: Prompt | None = None) -> Encoded:
        """The tokens of an answer, see `encode_completions`."""
        return self.encode_completions([text], after=[after])[0]

    def encode_completions(self, texts: Sequence[str], *, after: Sequence[Prompt | None] = ()) -> list[Encoded]:
        """The tokens of answers, without stop tokens; strings in them that look like special tokens are plain text.

        Where the template writes a blank before an answer the first token holds it (Llama 2: `▁Yes`), and where a
        completion is a text from its beginning, so does a tokenizer that puts a blank there. The blank is no part of
        the completion: the spans cover its own bytes.

        `after` says what each follows: messages, or None for an answer in a chat; a plain text; "" for a text's beginning.
        ValueError where a text is not valid Unicode, or its tokens cannot be located in it.
        """
        pairs = zip(texts, after or [None] * len(texts), strict=True)
        lead = [self.has_leading_space(text, prompt) for text, prompt in pairs]
        result: list = [None] * len(texts)
        for wanted in set(lead):
            rows = [row for row, has in enumerate(lead) if has == wanted]
            for row, encoded in zip(rows, self._plain.encode([texts[row] for row in rows], lead=wanted)):
                result[row] = encoded
        return result

    def shorten(self, completion: str, tokens: int) -> str:
        """A completion, or as much of its beginning as is needed for its first `tokens` tokens, with some more behind them."""
        for cut in _cuts(completion, max(0, tokens)):
            if len(self._plain.encode([completion[:cut]])[0].ids) >= tokens + _MARGIN:
                return completion[:cut]
        return completion

    def has_leading_space(self, text: str, after: Prompt | None) -> bool:
        """Whether a blank that is no part of a completion stands before it, see `encode_completions`."""
        if isinstance(after, str):
            return after == "" and self._plain.begins_with_prefix(text)
        return self.template.lead

    def decode(self, ids) -> bytes:
        """The bytes that ids spell; special and stop tokens spell none."""
        return self.surfaces.join(np.asarray(ids).tolist())

    def encode_turns(
        self, messages: list[dict], *, limit: int | None = None, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A whole conversation by the template, for training on its answers.

        Returned are the tokens, int32 [T], and which of them the assistant wrote, bool [T]: those of every answer but the
        first `skip`, up to and with its stop token, where the template writes one; of more than `limit` tokens,
        `limit + 1`. ValueError as `ChatTemplate.answers`.
        """
        if limit is None:
            written, answers = self.locate_answers(messages)
            return self._encode_answers(written, answers[skip:])
        every = sum(message.get("role") == "assistant" for message in messages)
        for looked_for in (limit, None):
            written, answers = self.locate_answers(messages, looked_for)
            for cut in _cuts(written.text, limit):
                if len(answers) < every and answers[-1][1] < cut:
                    break
                within = [(begin, min(end, cut)) for begin, end in answers[skip:] if begin < cut]
                ids, counted = self._encode_answers(written.slice(0, cut), within)
                if len(ids) >= limit + _MARGIN:
                    return ids[: limit + 1], counted[: limit + 1]
            if len(answers) == every:
                break
        ids, counted = self._encode_answers(written, answers[skip:])
        return ids[: limit + 1], counted[: limit + 1]

    def _encode_answers(self, written: EscapedText, answers: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        if backend_of(self.tokenizer) is None:
            return self._encode_in_pieces(written, answers)
        if written.strings:
            found, offsets = self._escaped_encoder.encode_with_offsets(written)
        else:
            read = self.tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            found, offsets = read["input_ids"], np.array(read["offset_mapping"], np.int64).reshape(-1, 2)
        ids, counted = np.array(found, np.int32), np.zeros(len(found), np.bool_)
        for begin, end in answers:
            counted |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
            self._count_stop(ids, counted, int(np.searchsorted(offsets[:, 0], end)))
        self._refuse_unembedded(ids)
        return ids, counted

    def _encode_in_pieces(self, written: EscapedText, answers: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The template's text and the answers each encoded alone, as in generation."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at, last = 0, len(written.text)
        for begin, end in [*answers, (last, last)]:
            if begin > at:
                part = written.slice(at, begin)
                ids += self._escaped_encoder.encode(part) if part.strings else self._tokenize([part.text])[0]
            first, part = len(ids), written.slice(begin, end)
            if self._specials.pattern.search(part.text):  # a special token that the template itself writes
                ids += self._escaped_encoder.encode(part)
            elif part.text:
                ids += self._plain.encode([part.original])[0].ids.tolist()
            if begin < last:
                spans.append((first, len(ids)))
            at = end
        array, counted = np.array(ids, np.int32), np.zeros(len(ids), np.bool_)
        for begin, end in spans:
            counted[begin:end] = True
            self._count_stop(array, counted, end)
        self._refuse_unembedded(array)
        return array, counted

    def _count_stop(self, ids: np.ndarray, counted: np.ndarray, at: int):
        """Count the stop token that follows an answer's last token, and blanks before it."""
        for k in range(at, len(ids)):
            if ids[k] in self.stop_ids:
                counted[at : k + 1] = True
            if self.surfaces.spelling[ids[k]].strip() or self.surfaces.table[ids[k]] is None:
                return


def _cuts(text: str, tokens: int) -> Iterator[int]:
    """Where to cut a long text of which the first tokens alone are needed, further and further out; nowhere for a short one.

    Before a blank behind a letter or numeral, where one is near: there tokenizers cut a text into words. Else, and for
    those that do not, the cut is far behind the tokens that are needed: it changes the last few before it.
    """
    size = CHARS_PER_TOKEN * (tokens + _MARGIN)
    while 2 * size < len(text):
        word = _END_OF_WORD.search(text, size, 2 * size)
        yield word.end() if word else size
        size *= 4
