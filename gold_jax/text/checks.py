"""A data set looked through before anything is trained: which rows can be learned from, which measured, and why not the others."""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example, join_contexts
from gold_jax.text.encode import utf8
from gold_jax.text.row_formats import format_notices
from gold_jax.text.surface import excerpt
from gold_jax.text.template import (
    Conversation,
    RenderedAnswer,
    conversation_shape,
    extras_of,
    unwritten_keys,
    unwritten_parts,
)
from gold_jax.wording import listed, shortened

# What a template may leave out with a notice: everything else is an error.
_NOTICE_ONLY = {"tools": "the tools", "reasoning_content": "the reasoning_content of the last answer"}
_ROLES = "system", "developer", "user", "assistant", "tool"
# Variables by which templates turn thinking on and off.
_VARIABLES = ("enable_thinking", "thinking", "preserve_thinking")
_SHOWN = 5  # errors of skipped rows
# Words in the names of columns that other formats keep an answer in.
_ANSWERS = frozenset("response answer output chosen solution target label completion reasoning thinking reply".split())


@dataclasses.dataclass(frozen=True)
class CheckedRows:
    """What is known of a data set once all its rows were looked at."""

    kept: list[int]  # numbers of the rows that can be learned from
    notices: list[str]  # lines about the others, and about columns that are not read
    digest: str  # of all that is learned from the rows that are kept, in hexadecimal


class RowReader:
    """Reads rows as the chat templates of a run write them, and remembers what is to be said of that.

    `where` is what errors call the data; `sides` are the models that read a row, `student` first, perhaps `teacher`,
    before every prompt of which stands `context`; `answers` has the rows' answers read, not their prompts alone, and
    `whole` every answer of the assistant's within `max_length` tokens.
    """

    def __init__(
        self,
        where: str,
        sides: Mapping[str, ChatTokenizer],
        *,
        answers: bool,
        whole: bool = False,
        context: str | None = None,
        max_length: int | None = None,
    ):
        self.where, self.sides, self.answers, self.whole = where, sides, answers, whole
        self.context, self.max_length = context, max_length
        self._unwritten: dict[tuple, tuple[list[str], list[str]]] = {}
        self._unwritten_counts: collections.Counter = collections.Counter()
        self._odd_roles: collections.Counter = collections.Counter()
        self._notes: dict[str, tuple[int, int, str]] = {}  # what is said -> rows, the first one, what it shows

    def read(self, number: int, example: Example) -> tuple[str, str]:
        """Prompt and completion as the student's template writes them; "" for a completion that is not read, and the whole
        conversation in its place where that is read.

        ValueError where a template refuses the row or leaves a part of it out, the answer cannot be located, or a tokenizer
        cannot encode it.
        """
        try:
            prompt, completion = self._read(number, example)
            teacher, context = self.sides.get("teacher"), join_contexts(self.context, example.teacher_context)
            if teacher and context:
                teacher.render(teacher.with_context(example.prompt, context))
            for side in self.sides.values():
                if side.may_refuse(prompt) or side.may_refuse(completion):
                    side.encode_prompt(example.prompt)
                    side.encode_completion(completion, after=example.prompt)
            return prompt, completion
        except ValueError as error:
            raise ValueError(shortened(f"row {number} of {self.where}: {error}")) from error

    def _read(self, number: int, example: Example) -> tuple[str, str]:
        conversation = (self.answers and example.messages) or example.prompt
        if not isinstance(conversation, str):
            for who, side in self.sides.items():
                # What the teacher reads of a call is what the student's template writes.
                read = example.prompt if who == "teacher" and example.calls_tools else conversation
                if not isinstance(read, str):
                    self._find_unwritten(who, side, read)
        whole, learns = "", self.whole or (example.answers > 1 and len(self.sides) == 1)
        if learns and example.messages:
            whole = self.sides["student"].locate_answers(example.messages, self.max_length)[0].original
        for side in self.sides.values():
            if side.lacks_embeddings:
                side.encode_prompt(example.prompt)  # refuses tokens without an embedding
        if learns and example.messages and self.sides["student"].lacks_embeddings:
            self.sides["student"].encode_turns(example.messages, limit=self.max_length)
        plain = isinstance(example.prompt, str) or isinstance(conversation, str)
        if plain or conversation is example.prompt or example.calls_tools and self.whole:
            prompt = [side.render(example.prompt) for side in self.sides.values()][0]
            return prompt, whole or (self.answers and example.completion) or ""
        if example.calls_tools:
            text = self.sides["student"].answer(conversation)
            if "teacher" in self.sides:
                said = (
                    "the last answer calls tools, and the teacher reads the calls as the student's template writes them"
                )
                self._note(said, number, lambda: excerpt(text.text))
            return text.prompt, whole or text.text
        found = {who: side.answer(conversation) for who, side in self.sides.items()}
        self._compare(number, conversation, found)
        return found["student"].prompt, whole or found["student"].text

    def _find_unwritten(self, who: str, side: ChatTokenizer, conversation: list[dict]) -> None:
        shape = who, conversation_shape(conversation)
        if shape not in self._unwritten:
            parts = unwritten_parts(side.template, conversation, whole=self.whole)
            self._unwritten[shape] = parts, unwritten_keys(side.template, conversation)
        missing, keys = self._unwritten[shape]
        if parts := [part for part in missing if part not in _NOTICE_ONLY]:
            roles = sorted({str(m.get("role")) for m in conversation} - {"system", "user", "assistant", "tool"})
            known = f"; it may not know the role {', '.join(map(repr, roles))}" if roles else ""
            raise ValueError(
                f"the chat template of {side.name} does not write {', '.join(parts[:3])}, which the model would never read{known}. "
                "Bring the messages into the form that the template takes (roles are system, user, assistant and tool), or "
                "pass another chat template"
            )
        self._unwritten_counts.update((who, _NOTICE_ONLY[part]) for part in missing)
        self._unwritten_counts.update((who, f"the key {excerpt(key)} of messages") for key in keys)
        if who == "student":
            self._odd_roles.update({str(m.get("role")) for m in conversation} - {*_ROLES})

    def _compare(self, number: int, conversation: list[dict], found: Mapping[str, RenderedAnswer]) -> None:
        """Notes where prompt and answer are not what a template writes, or the two models' answers differ."""
        for who, answer in found.items():
            if not answer.follows_prompt:
                said = f"the generation prompt of the {who}'s template is not what it writes before such an answer"
                shown = f"after {excerpt(answer.prompt, len(answer.prompt))} comes {excerpt(answer.text)}"
                self._note(said, number, lambda shown=shown: shown)
            written, wanted = answer.prompt + answer.text, conversation[-1]["content"]
            if wanted not in written and "".join(wanted.split()) not in "".join(written.split()):
                said = f"the {who}'s template leaves out a part of the answer, such as its thinking"
                shown = f"of {excerpt(conversation[-1]['content'])} it writes {excerpt(answer.text)}"
                self._note(said, number, lambda shown=shown: shown)
        texts = {who: answer.text for who, answer in found.items()}
        if len(set(texts.values())) > 1:
            said = "the two templates write different answers, and both models read the student's"
            self._note(said, number, lambda: self._describe_difference(conversation, texts))

    def _note(self, said: str, number: int, describe: Callable[[], str]) -> None:
        count, first, shown = self._notes.get(said) or (0, number, describe())
        self._notes[said] = count + 1, first, shown

    def _describe_difference(self, conversation: list[dict], texts: Mapping[str, str]) -> str:
        shown = " and ".join(f"{excerpt(text)} (the {who}'s)" for who, text in texts.items())
        tools, given = extras_of(conversation).values()
        for name, value in itertools.product(_VARIABLES, (False, True)):
            if any(name in side.template.source for side in self.sides.values()):
                changed = Conversation(conversation, tools=tools, template_kwargs={**(given or {}), name: value})
                try:
                    found = [side.answer(changed) for side in self.sides.values()]
                except ValueError:  # an answer that thinks where the template is told not to
                    continue
                if all(answer.follows_prompt for answer in found) and len({answer.text for answer in found}) == 1:
                    return f"{shown}; --template_kwargs '{json.dumps({name: value})}' makes them agree"
        return shown

    def notices(self) -> list[str]:
        """Lines about what templates do not write and where they do not agree."""
        return (
            [
                f"the chat template of {self.sides[who].name} ({who}) does not write {part} of {count} rows of {self.where}"
                for (who, part), count in self._unwritten_counts.items()
            ]
            + [
                f"in {count} rows of {self.where} {said}: in row {first} {shown}"
                for said, (count, first, shown) in self._notes.items()
            ]
            + [
                f"{count} rows of {self.where} have the role {excerpt(role)}, which is not one of {', '.join(_ROLES)}: the student's "
                "template writes it in its own way, others leave such messages out"
                for role, count in self._odd_roles.items()
            ]
        )


def _no_answer(example: Example) -> str:
    """What a row is that has no completion: an unknown role at its end, such as `gpt`, or a system message, is said first."""
    roles = [str(message.get("role")) for message in example.prompt] if isinstance(example.prompt, list) else []
    unknown = [excerpt(role) for role in dict.fromkeys(roles) if role not in _ROLES]
    if roles and roles[-1] not in _ROLES:
        known = f"roles are {', '.join(_ROLES)}"
        return (
            f"has messages of the role {' and '.join(unknown)}, and no answer of the assistant's at its end ({known})"
        )
    if roles and roles[-1] in ("system", "developer"):
        return f"ends with a message of the role {roles[-1]!r}, not with an answer of the assistant's"
    return "has a prompt but no completion"


def _may_be_answer(column: str) -> bool:
    words = column.lower().replace("_", " ").replace("-", " ").split()
    return any(word.removesuffix("s") in _ANSWERS for word in words)


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
        chat_tokenizer, teacher: the chat tokenizers whose templates must take every row; the student's, perhaps a
            teacher's.
        budget: most tokens of a prompt; rows with longer ones are left out. None: any.
        need_completion: why every row must have a completion, for the error; None if it need not.
        learns_calls: whether whole conversations are learned, and with them an answer that calls tools. A completion
            cannot hold it, because every template writes calls in its own way; such rows are left out where one is needed.
        student_writes, teacher_writes: whether completions are drawn from it, for which a prompt needs a token.
        teacher_context: text before every prompt of the teacher.
        max_length: most tokens of a row, to tell which are cut; None: any.
        count_targets: what is learned of a row: tokens or groups, and whether `max_length` cut it. Asked of rows that
            may be longer than `max_length`; those of which nothing is learned are left out.
        on_bad_row: "error", or "skip": rows that would raise are left out, counted, and the first ones' errors told.

    Raises:
        ValueError: a row lacks its completion, a chat template refuses one or leaves a part of it out, or no row is left.
    """
    digest, kept, bad, markup = hashlib.sha256(), [], [], []
    unread, formats, several, left_out, prompts_alone, cut = (collections.Counter() for _ in range(6))
    sides = {"student": chat_tokenizer} | ({"teacher": teacher} if teacher else {})
    utf8(teacher_context or "", "--teacher_context")
    reader = RowReader(
        "the data set",
        sides,
        answers=need_completion is not None,
        whole=learns_calls,
        context=teacher_context,
        max_length=max_length,
    )
    # Nothing can be drawn after no token at all. Where a tokenizer puts one before any text, no prompt is without.
    writes = {"student": student_writes, "teacher": teacher_writes}
    writers = {who: side for who, side in sides.items() if writes[who] and not len(side.encode_prompt(""))}

    def reason_to_leave_out(i: int, e: Example) -> str | None:
        unread.update(e.unread)
        formats[e.format] += 1
        named = [name for name in e.unread if _may_be_answer(name)]
        if e.completion is None:
            if need_completion:
                hint = f". Its column {excerpt(named[0])} may be the answer: name it 'completion'" if named else ""
                raise ValueError(f"row {i} of the data set {_no_answer(e)}; {need_completion}{hint}")
            prompts_alone.update(named)
        if need_completion and not learns_calls and not _writes_calls(chat_tokenizer, e):
            return "calls"
        prompt, completion = reader.read(i, e)
        several[e.answers > 1] += 1
        for who, writer in writers.items():
            context = who == "teacher" and (teacher_context or e.teacher_context)
            blank = not context and (not prompt.strip() or writer.may_refuse(prompt))
            if blank and not len(writer.encode_prompt(e.prompt)):
                return who
        if isinstance(e.prompt, str) and not chat_tokenizer.special_tokens_in_prompts:
            markup.extend([i] * bool(chat_tokenizer.special_strings_in(e.prompt)))
        # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
        size = len(prompt.encode()) + 2
        if budget is not None and size > budget < len(chat_tokenizer.encode_prompt(e.prompt, limit=budget)):
            return "long"
        if count_targets is None or max_length is None or size + len(completion.encode()) <= max_length:
            return None
        try:
            targets, was_cut = count_targets(e)
        except ValueError as error:
            raise ValueError(shortened(f"row {i} of the data set: {error}")) from error
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
    total, first_bad = len(examples), _first_errors(bad)
    no_token = "without a prompt, before which the {}'s tokenizer puts no token, so that nothing can be drawn"
    reasons = {
        "long": (
            f"whose prompt is longer than {budget} tokens",
            "raise --max_prompt_length or --max_length, or lower --max_completion_length",
        ),
        "calls": (
            "whose last answer calls tools, which the chat template does not write as text",
            "gold_jax.sft --assistant_only_loss learns it",
        ),
        "nothing": (f"of which --max_length {max_length} leaves nothing to learn", "raise --max_length"),
        **{who: (no_token.format(who), "--lmbda 0 without --seq_kd learns them") for who in writes},
        "bad": ("that cannot be read", f"see the first ones: {first_bad}"),
    }
    left_out["bad"] = len(bad)
    if not kept:
        why = "; ".join(f"{left_out[x]} {words} ({remedy})" for x, (words, remedy) in reasons.items() if left_out[x])
        raise ValueError(f"none of the {total} rows can be learned from: {why}")
    notices = [f"left out {left_out[x]} of {total} rows {words}" for x, (words, _) in reasons.items() if left_out[x]]
    if bad:
        notices[-1] += f" (--on_bad_row skip): {first_bad}"
    if cut[True]:
        notices.append(f"--max_length {max_length} cuts {cut[True]} of {total} rows: their ends are not learned")
    notices += reader.notices()
    if several[True] and teacher:
        notices.append(
            f"{several[True]} rows have several answers in their completion: the last one is learned, those before it are read "
            "as prompt (gold_jax.sft learns them all)"
        )
    if markup:
        first = chat_tokenizer.special_strings_in(examples[markup[0]].prompt)[0]
        notices.append(
            f"{len(markup)} prompts, that of row {markup[0]} first, hold the string of a special token such as {first}, read "
            "as plain text; --special_tokens_in_prompts reads it as the token"
        )
    notices += [
        f"{count} rows have a prompt, no completion, and a column {excerpt(name)} that may be the answer and is not read: name it 'completion'"
        for name, count in prompts_alone.items()
    ]
    if unread:
        shown = listed([f"{excerpt(name)} (rows: {count:,})" for name, count in unread.most_common()], 8)
        notices.append(f"columns of the data that nothing reads: {shown}")
    notices += format_notices(formats, "the data set")
    return CheckedRows(kept, notices, digest.hexdigest())


def _first_errors(errors: Iterable[str]) -> str:
    """The first errors of skipped rows; one that several rows have is there once, with their number."""
    alike: dict[str, list[str]] = {}
    for error in errors:
        alike.setdefault(re.sub(r"^row \d+", "", error), []).append(error)
    shown = [f"{first}{f' (and {len(more)} more rows like it)' if more else ''}" for first, *more in alike.values()]
    return listed(shown, _SHOWN, "; ", "; and")


def with_text_completion(examples: Sequence[Example]) -> list[Example]:
    """The rows that have a completion."""
    return [e for e in examples if e.completion is not None]


def _writes_calls(chat_tokenizer: ChatTokenizer, example: Example) -> bool:
    """Whether the template writes the calls of a last answer as text behind the generation prompt; so it is where none are."""
    if not example.calls_tools:
        return True
    messages = example.messages or []
    if isinstance(example.prompt, str):
        return False
    try:
        answer = chat_tokenizer.answer(messages)
    except ValueError:  # which reading the row says better
        return True
    calls = [call.get("function") or call for call in messages[-1]["tool_calls"]]
    return answer.follows_prompt and all(str(call.get("name")) in answer.text for call in calls)


def check_evaluation(
    examples: Sequence[Example],
    *tokenizers: ChatTokenizer,
    on_bad_row: str = "error",
    teacher_context: str | None = None,
    whole: bool = False,
) -> tuple[Sequence[Example], list[str], str]:
    """Evaluation data for the student's tokenizer, perhaps a teacher's: the rows that can be read, notices, and a digest.

    `teacher_context` is text before every prompt of the teacher; `whole` says that whole conversations are measured.
    ValueError where no row has a completion, or a chat template refuses one or leaves a part of it out, which
    `on_bad_row` "skip" leaves out.
    """
    sides = dict(zip(("student", "teacher"), tokenizers))
    reader = RowReader("the evaluation data", sides, answers=True, whole=whole, context=teacher_context)
    measured, unmeasured, bad, digest, formats = 0, [], {}, hashlib.sha256(), collections.Counter()
    for i in range(len(examples)):
        try:
            formats[(e := examples[i]).format] += 1
            if e.completion is not None and _writes_calls(tokenizers[0], e):
                reader.read(i, e)
                digest.update(b"%d\0%b\0" % (i, e.fingerprint))
                measured += 1
            else:
                unmeasured.append(i)
        except ValueError as error:
            if on_bad_row == "error":
                raise
            bad[i] = str(error)
    if not measured:
        raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
    notices = reader.notices() + format_notices(formats, "the evaluation data")
    if bad:
        first = _first_errors(bad.values())
        notices.append(
            f"left out {len(bad)} of {len(examples)} rows of the evaluation data that cannot be read: {first}"
        )
    if unmeasured:
        notices.append(
            f"{len(unmeasured)} of {len(examples)} rows of the evaluation data have no completion in text and are not measured"
        )
    left_out = {*bad, *unmeasured}
    kept = [examples[i] for i in range(len(examples)) if i not in left_out] if left_out else examples
    return kept, notices, digest.hexdigest()


def check_evaluations(
    examples: Sequence[Example] | Mapping[str, Sequence[Example]], sides: Sequence[ChatTokenizer], **options: Any
) -> tuple[Sequence[Example] | dict[str, Sequence[Example]], list[str], str]:
    """`check_evaluation` of one set of rows, or of several by their names, which lines and errors then begin with."""
    if not isinstance(examples, Mapping):
        rows, notices, digest = check_evaluation(examples, *sides, **options)
        return rows, [*getattr(examples, "notices", ()), *notices], digest
    found: dict[str, Sequence[Example]] = {}
    lines, digests = [], []
    for name, part in examples.items():
        try:
            found[name], notices, digest = check_evaluation(part, *sides, **options)
        except ValueError as error:
            raise ValueError(f"eval_dataset {excerpt(name)}: {error}") from error
        said = [*getattr(part, "notices", ()), *notices]
        lines += [f"eval_dataset {excerpt(name)}: {line}" for line in said]
        digests.append(f"{name} {digest}")
    return found, lines, ", ".join(digests)
