"""A data set looked through before anything is trained: which rows can be learned from, which measured, and why not the others."""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example
from gold_jax.text.surface import excerpt
from gold_jax.text.template import Answer, Conversation, conversation_shape, unwritten_parts


@dataclasses.dataclass(frozen=True)
class CheckedRows:
    """What is known of a data set once all its rows were looked at.

    Attributes:
        kept: numbers of the rows that can be learned from.
        notices: lines about the others, and about columns that are not read.
        digest: of all that is learned from the rows that are kept, in hexadecimal.
    """

    kept: list[int]
    notices: list[str]
    digest: str


class RowReader:
    """Reads rows as the chat templates of a run write them, and remembers what is to be said of that.

    Args:
        where: what errors call the data.
        sides: the models that read a row: `student` first, perhaps `teacher`.
        answers: whether the rows' answers are read, not their prompts alone.
        whole: whether whole conversations are read, every answer of the assistant's.
    """

    def __init__(self, where: str, sides: Mapping[str, ChatTokenizer], *, answers: bool, whole: bool = False):
        self.where, self.sides, self.answers, self.whole = where, sides, answers, whole
        self._unwritten: dict[tuple, list[str]] = {}
        self._told: collections.Counter = collections.Counter()
        self._disagreement: dict[str, tuple[int, int, str]] = {}  # kind -> rows, the first one, what it shows

    def read(self, number: int, example: Example) -> tuple[str, str]:
        """Prompt and completion as the student's template writes them; "" for a completion that is not read.

        Raises:
            ValueError: a template refuses the row or leaves a part of it out, or the answer cannot be located.
        """
        try:
            found = self._read(number, example)
            for what, text in zip(("prompt", "completion"), found):
                if not text.isascii() and (lone := _LONE_SURROGATE.search(text)):
                    raise ValueError(
                        f"the {what} is not valid Unicode: at {excerpt(text, lone.start())} it holds half of a surrogate pair; repair or "
                        "remove it in the data"
                    )
            return found
        except ValueError as error:
            raise ValueError(f"row {number} of {self.where}: {error}") from error

    def _read(self, number: int, example: Example) -> tuple[str, str]:
        conversation = (self.answers and example.messages) or example.prompt
        if not isinstance(conversation, str):
            for who, side in self.sides.items():
                self._find_unwritten(who, side, conversation)
        if self.whole and example.messages:
            self.sides["student"].locate_answers(example.messages)
        if isinstance(example.prompt, str):
            for side in self.sides.values():
                if side.special_tokens_in_prompts and side.special_strings_in(example.prompt):
                    side.encode_prompt(example.prompt)  # refuses tokens without an embedding
        plain = isinstance(example.prompt, str) or isinstance(conversation, str)
        if plain or conversation is example.prompt or example.calls_tools:
            prompt = [side.render(example.prompt) for side in self.sides.values()][0]
            return prompt, (self.answers and example.completion) or ""
        found = {who: side.answer(conversation) for who, side in self.sides.items()}
        self._compare(number, conversation, found)
        return found["student"].prompt, found["student"].text

    def _find_unwritten(self, who: str, side: ChatTokenizer, conversation: list[dict]) -> None:
        shape = who, conversation_shape(conversation)
        if shape not in self._unwritten:
            self._unwritten[shape] = unwritten_parts(side.template, conversation, whole=self.whole)
        missing = self._unwritten[shape]
        parts = [part for part in missing if part not in _TOLD]
        if parts:
            roles = sorted({str(m.get("role")) for m in conversation} - {"system", "user", "assistant", "tool"})
            known = f"; it may not know the role {', '.join(map(repr, roles))}" if roles else ""
            raise ValueError(
                f"the chat template of {side.name} does not write {', '.join(parts[:3])}, which the model would never read{known}. "
                "Bring the messages into the form that the template takes (roles are system, user, assistant and tool), or "
                "pass another chat template"
            )
        self._told.update((who, part) for part in missing)

    def _compare(self, number: int, conversation: list[dict], found: Mapping[str, Answer]) -> None:
        """Notes where prompt and answer are not what a template writes, or the two models' answers differ."""
        for who, answer in found.items():
            if not answer.continues:
                shown = f"after {excerpt(answer.prompt, len(answer.prompt))} comes {excerpt(answer.text)}"
                self._note(f"continues {who}", number, lambda shown=shown: shown)
        texts = {who: answer.text for who, answer in found.items()}
        if len(set(texts.values())) > 1:
            self._note("answers", number, lambda: self._describe_difference(conversation, texts))

    def _note(self, kind: str, number: int, describe: Callable[[], str]) -> None:
        count, first, shown = self._disagreement.get(kind) or (0, number, describe())
        self._disagreement[kind] = count + 1, first, shown

    def _describe_difference(self, conversation: list[dict], texts: Mapping[str, str]) -> str:
        shown = " and ".join(f"{excerpt(text)} (the {who}'s)" for who, text in texts.items())
        for name in _VARIABLES:
            if any(name in side.template.source for side in self.sides.values()):
                for value in (False, True):
                    variables = {**(getattr(conversation, "template_kwargs", None) or {}), name: value}
                    tools = getattr(conversation, "tools", None)
                    changed = Conversation(conversation, tools=tools, template_kwargs=variables)
                    found = [side.answer(changed) for side in self.sides.values()]
                    if all(answer.continues for answer in found) and len({answer.text for answer in found}) == 1:
                        return f"{shown}; --template_kwargs '{json.dumps({name: value})}' makes them agree"
        return shown

    def notices(self) -> list[str]:
        """Lines about what templates do not write and where they do not agree."""
        found = [
            f"the chat template of {self.sides[who].name} ({who}) does not write {_TOLD[part]} of {count} rows of {self.where}"
            for (who, part), count in self._told.items()
        ]
        for kind, (count, first, shown) in self._disagreement.items():
            if kind == "answers":
                found.append(
                    f"in {count} rows of {self.where} the two templates write different answers, and both models read the "
                    f"student's: in row {first} {shown}"
                )
            else:
                found.append(
                    f"in {count} rows of {self.where} the generation prompt of the {kind.split()[1]}'s template is not what it writes "
                    f"before such an answer: in row {first} {shown}"
                )
        return found


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# What a template may leave out with a notice: everything else is an error.
_TOLD = {"tools": "the tools", "reasoning_content": "the reasoning_content of the last answer"}
# Variables by which templates turn thinking on and off.
_VARIABLES = ("enable_thinking", "thinking", "preserve_thinking")
_SHOWN = 5  # errors of skipped rows
# Columns that other formats keep an answer in.
_ANSWERS = ("response", "answer", "output", "chosen", "solution", "target", "label_text", "completions")


def check_examples(
    examples: Sequence[Example],
    chat_tokenizer: ChatTokenizer,
    *,
    budget: int | None,
    need_completion: str | None,
    teacher: ChatTokenizer | None = None,
    learns_calls: bool = False,
    student_writes: bool = False,
    teacher_writes: bool = False,
    teacher_context: str | None = None,
    max_length: int | None = None,
    count_targets: Callable[[Example], tuple[int, bool]] | None = None,
    on_bad_row: str = "error",
) -> CheckedRows:
    """Which rows can be learned from, and notices about those that cannot.

    Args:
        examples: all rows.
        chat_tokenizer: the student's.
        budget: most tokens of a prompt; rows with longer ones are left out. None: any.
        need_completion: why every row must have a completion, for the error; None if it need not.
        teacher: a teacher's chat tokenizer, whose template must take every row as well.
        learns_calls: whether whole conversations are learned, and with them an answer that calls tools. A completion
            cannot hold it, because every template writes calls in its own way; such rows are left out where one is needed.
        student_writes, teacher_writes: whether completions are drawn from either model, for which a prompt needs a
            token.
        teacher_context: text before every prompt of the teacher.
        max_length: most tokens of a row, to tell which are cut; None: any.
        count_targets: what is learned of a row: tokens or groups, and whether `max_length` cut it. Asked of rows that
            may be longer than `max_length`; those of which nothing is learned are left out.
        on_bad_row: "error", or "skip": rows that would raise are left out, counted, and the first ones' errors told.

    Raises:
        ValueError: a row lacks its completion, a chat template refuses one or leaves a part of it out, or no row is left.
    """
    digest, unread = hashlib.sha256(), collections.Counter()
    kept, bad, markup = [], [], []
    left_out, prompts_alone, cut = collections.Counter(), collections.Counter(), collections.Counter()
    sides = {"student": chat_tokenizer} | ({"teacher": teacher} if teacher else {})
    reader = RowReader("the data set", sides, answers=need_completion is not None, whole=learns_calls)
    # Nothing can be drawn after no token at all. Where a tokenizer puts one before any text, no prompt is without.
    writers = {"student": chat_tokenizer if student_writes else None, "teacher": teacher if teacher_writes else None}
    writers = {who: writer for who, writer in writers.items() if writer and not len(writer.encode_prompt(""))}

    def cannot_write(e: Example) -> str | None:
        """Who would have to write after no token."""
        if not isinstance(e.prompt, str) or e.prompt.strip():
            return None
        for who, writer in writers.items():
            context = who == "teacher" and (teacher_context or e.teacher_context)
            if not context and not len(writer.encode_prompt(e.prompt)):
                return who
        return None

    def reason_to_leave_out(i: int, e: Example) -> str | None:
        unread.update(e.unread)
        if need_completion and e.completion is None:
            named = [name for name in e.unread if name in _ANSWERS]
            hint = f". Its column {named[0]!r} may be the answer: name it 'completion'" if named else ""
            raise ValueError(f"row {i} of the data set has a prompt but no completion; {need_completion}{hint}")
        if e.completion is None:
            prompts_alone.update(name for name in e.unread if name in _ANSWERS)
        if need_completion and e.calls_tools and not learns_calls:
            return "calls"
        if unable := cannot_write(e):
            return unable
        prompt, completion = reader.read(i, e)
        if isinstance(e.prompt, str) and not chat_tokenizer.special_tokens_in_prompts:
            markup.extend([i] * bool(chat_tokenizer.special_strings_in(e.prompt)))
        # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
        size = len(prompt.encode()) + 2
        if budget is not None and size > budget and len(chat_tokenizer.encode_prompt(e.prompt)) > budget:
            return "long"
        if count_targets is None or max_length is None or size + len(completion.encode()) <= max_length:
            return None
        targets, was_cut = count_targets(e)
        cut[bool(targets)] += was_cut
        return None if targets else "nothing"

    for i in range(len(examples)):
        try:
            e = examples[i]
            why = reason_to_leave_out(i, e)
        except ValueError as error:
            if on_bad_row == "error":
                raise
            bad.append(str(error))
            continue
        if why:
            left_out[why] += 1
        else:
            kept.append(i)
            digest.update(b"%d\0%b\0" % (i, e.fingerprint))
    no_token = "without a prompt, before which the {}'s tokenizer puts no token, so that nothing can be drawn"
    reasons = {
        "long": (
            f"whose prompt is longer than {budget} tokens",
            "raise --max_prompt_length or --max_length, or lower --max_completion_length",
        ),
        "calls": ("whose last answer calls tools, which is no text", "gold_jax.sft --assistant_only_loss learns it"),
        "nothing": (f"of which --max_length {max_length} leaves nothing to learn", "raise --max_length"),
        **{who: (no_token.format(who), "--lmbda 0 without --seq_kd learns them") for who in ("student", "teacher")},
    }
    told = [(left_out[why], *words) for why, words in reasons.items() if left_out[why]]
    if bad:
        told.append((len(bad), "that cannot be read", "see the first ones: " + "; ".join(bad[:_SHOWN])))
    if not kept:
        why = "; ".join(f"{count} {words} ({remedy})" for count, words, remedy in told)
        raise ValueError(f"none of the {len(examples)} rows can be learned from: {why}")
    notices = [f"left out {count} of {len(examples)} rows {words}" for count, words, _ in told]
    if bad:
        notices[-1] += f" (--on_bad_row skip): {'; '.join(bad[:_SHOWN])}"
        notices[-1] += f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    if cut[True]:
        notices.append(
            f"--max_length {max_length} cuts {cut[True]} of {len(examples)} rows: their ends are not learned"
        )
    notices += reader.notices()
    if markup:
        first = chat_tokenizer.special_strings_in(examples[markup[0]].prompt)[0]
        notices.append(
            f"{len(markup)} prompts, that of row {markup[0]} first, hold the string of a special token such as {first}, read "
            "as plain text; --special_tokens_in_prompts reads it as the token"
        )
    notices += [
        f"{count} rows have a prompt, no completion, and a column {name!r} that may be the answer and is not read: name it 'completion'"
        for name, count in prompts_alone.items()
    ]
    if unread:
        shown = ", ".join(f"{name!r} (rows: {count:,})" for name, count in unread.most_common(8))
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        notices.append(f"columns of the data that nothing reads: {shown}{more}")
    return CheckedRows(kept, notices, digest.hexdigest())


def with_text_completion(examples: Sequence[Example]) -> list[Example]:
    """The rows that have a completion in text."""
    return [e for e in examples if e.completion is not None and not e.calls_tools]


def check_evaluation(
    examples: Sequence[Example], student: ChatTokenizer, teacher: ChatTokenizer | None = None
) -> list[str]:
    """Makes sure, before the first update, that there is something to evaluate on and that every template writes all of it.

    Returns:
        Notices: about rows that cannot be measured, and about what templates do not write.

    Raises:
        ValueError: no row has a completion, or a chat template refuses one or leaves a part of it out.
    """
    sides = {"student": student} | ({"teacher": teacher} if teacher else {})
    reader, measured = RowReader("the evaluation data", sides, answers=True), 0
    for i, e in enumerate(examples):
        if with_text_completion([e]):
            reader.read(i, e)
            measured += 1
    if not measured:
        raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
    missing, notices = len(examples) - measured, reader.notices()
    if missing:
        notices.append(
            f"{missing} of {len(examples)} rows of the evaluation data have no completion in text and are not measured"
        )
    return notices
