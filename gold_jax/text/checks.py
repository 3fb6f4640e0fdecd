"""The check of a data set: which rows can be learned from, which can be evaluated, and why not the others."""

import array
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gold_jax import progress
from gold_jax.text.chat import CHARS_PER_TOKEN, ChatTokenizer, Prompt
from gold_jax.text.data import Example, join_contexts
from gold_jax.text.encode import utf8
from gold_jax.text.row_formats import format_notices
from gold_jax.text.surface import excerpt
from gold_jax.text.template import (
    ROLES,
    Conversation,
    RenderedAnswer,
    conversation_shape,
    extras_of,
    unwritten_keys,
    unwritten_parts,
    writes_calls,
)
from gold_jax.wording import listed, plural, shortened

# What a template may leave out with a notice: everything else is an error.
_NOTICE_ONLY = {"tools": "the tools", "reasoning_content": "the reasoning_content of the last answer"}
# Variables by which templates turn thinking on and off.
_VARIABLES = ("enable_thinking", "thinking", "preserve_thinking")
_BLOCK = 1000  # rows that are checked together
_AT_ONCE = 100  # rows that are encoded together
_DATA = "the data set"
_SHOWN = 5  # errors of skipped rows
# Words in the names of columns that other formats keep an answer in.
_ANSWERS = frozenset("response answer output chosen solution target label completion reasoning thinking reply".split())


@dataclasses.dataclass(frozen=True)
class CheckedRows:
    """The result of checking all rows of a data set."""

    kept: array.array  # numbers of the rows that can be learned from
    notices: list[str]  # lines about the other rows, and about columns that are not read
    digest: str  # hexadecimal, of everything that is learned from the kept rows


class RowReader:
    """Reads rows as the chat templates of a run write them, and collects notices about them.

    Args:
        where: what notices call the data.
        sides: the models that read a row: `student`, and perhaps `teacher`.
        answers: whether answers are read too, not only prompts.
        whole: whether every answer of the assistant's within `max_length` tokens is read.
        context: text before every prompt of the teacher.
        source: what errors call the data; None: as notices.
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
        source: str | None = None,
    ):
        self._source = source or where
        self.where, self.sides, self.answers, self.whole = where, sides, answers, whole
        self.context, self.max_length = context, max_length
        self._unwritten: dict[tuple, tuple[list[str], list[str]]] = {}
        self._unwritten_counts: collections.Counter = collections.Counter()
        self._odd_roles: collections.Counter = collections.Counter()
        self._notes: dict[str, tuple[int, int, str]] = {}  # what is said -> rows, the first one, what it shows

    def read(self, number: int, example: Example) -> tuple[str, str]:
        """Prompt and completion as the student's template writes them.

        The completion is "" if answers are not read, the whole conversation with `whole`. ValueError: a template refuses
        the row or omits a part of it, the answer cannot be located, or a tokenizer cannot encode it.
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
            raise ValueError(shortened(f"row {number} of {self._source}: {error}")) from error

    def _read(self, number: int, example: Example) -> tuple[str, str]:
        conversation = (self.answers and example.messages) or example.prompt
        if not isinstance(conversation, str):
            for who, side in self.sides.items():
                # What the teacher reads of a call is what the student's template writes.
                read = example.prompt if who == "teacher" and example.calls_tools else conversation
                if not isinstance(read, str):
                    self._find_unwritten(who, side, read)
        student, messages = self.sides["student"], example.messages or []
        learns = messages and (self.whole or (example.answers > 1 and len(self.sides) == 1))
        whole = student.locate_answers(messages, self.max_length)[0].original if learns else ""
        for side in self.sides.values():
            if side.lacks_embeddings:
                side.encode_prompt(example.prompt)  # refuses tokens without an embedding
        if learns and student.lacks_embeddings:
            student.encode_turns(messages, limit=self.max_length)
        plain = isinstance(example.prompt, str) or isinstance(conversation, str)
        if plain or conversation is example.prompt or example.calls_tools and self.whole:
            prompt = [side.render(example.prompt) for side in self.sides.values()][0]
            return prompt, whole or (self.answers and example.completion) or ""
        if example.calls_tools:
            answer = student.answer(conversation)
            if "teacher" in self.sides:
                said = (
                    "the last answer calls tools, and the teacher reads the calls as the student's template writes them"
                )
                self._note(said, number, excerpt(answer.text))
            return answer.prompt, whole or answer.text
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
            self._odd_roles.update({str(m.get("role")) for m in conversation} - {*ROLES})

    def _compare(self, number: int, conversation: list[dict], found: Mapping[str, RenderedAnswer]) -> None:
        """Records where a template changes prompt or answer, and where the two models' answers differ."""
        for who, answer in found.items():
            if not answer.follows_prompt:
                said = f"the generation prompt of the {who}'s template is not what it writes before such an answer"
                shown = f"after {excerpt(answer.prompt, len(answer.prompt))} comes {excerpt(answer.text)}"
                self._note(said, number, shown)
            written, wanted = answer.prompt + answer.text, conversation[-1]["content"]
            if wanted not in written and "".join(wanted.split()) not in "".join(written.split()):
                said = f"the {who}'s template leaves out a part of the answer, such as its thinking"
                shown = f"of {excerpt(wanted)} it writes {excerpt(answer.text)}"
                self._note(said, number, shown)
        texts = {who: answer.text for who, answer in found.items()}
        if len(set(texts.values())) > 1:
            said = "the two templates write different answers, and both models read the student's"
            self._note(said, number, "" if said in self._notes else self._describe_difference(conversation, texts))

    def _note(self, said: str, number: int, shown: str) -> None:
        count, first, shown = self._notes.get(said, (0, number, shown))
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
        """Lines about what templates omit and where they differ."""
        return (
            [
                f"the chat template of {self.sides[who].name} ({who}) does not write {part} of {plural(count, 'row')} of {self.where}"
                for (who, part), count in self._unwritten_counts.items()
            ]
            + [
                f"in {plural(count, 'row')} of {self.where} {said}: in row {first} {shown}"
                for said, (count, first, shown) in self._notes.items()
            ]
            + [
                f"the role {excerpt(role)}, in {plural(count, 'row')} of {self.where}, is not one of {', '.join(ROLES)}: "
                "the student's template writes it in its own way, other templates leave such messages out"
                for role, count in self._odd_roles.items()
            ]
        )


def _no_answer(example: Example) -> str:
    """What is wrong with a row without a completion, for an error, such as an unknown role at its end."""
    roles = [str(message.get("role")) for message in example.prompt] if isinstance(example.prompt, list) else []
    unknown = [excerpt(role) for role in dict.fromkeys(roles) if role not in ROLES]
    if roles and roles[-1] not in ROLES:
        known = f"roles are {', '.join(ROLES)}"
        return (
            f"has messages of the role {' and '.join(unknown)}, and no answer of the assistant's at its end ({known})"
        )
    if roles and roles[-1] in ("system", "developer"):
        return f"ends with a message of the role {roles[-1]!r}, not with an answer of the assistant's"
    return "has a prompt but no completion"


def _may_be_answer(column: str) -> bool:
    words = column.lower().replace("_", " ").replace("-", " ").split()
    return any(word.removesuffix("s") in _ANSWERS for word in words)


class RowChecker:
    """Says which rows can be learned from, block by block, and collects notices about the others.

    Args:
        chat_tokenizer, teacher: the chat tokenizers whose templates must take every row; the student's, perhaps a
            teacher's.
        budget: most tokens of a prompt; rows with longer ones are left out. None: any.
        need_completion: why every row must have a completion, for the error; None if it need not.
        learns_calls: whether whole conversations are learned, including answers that call tools. A completion cannot hold
            these, as every template writes calls in its own way; such rows are left out if a completion is needed.
        student_writes, teacher_writes: whether it samples completions, for which a prompt needs a token.
        teacher_context: text before every prompt of the teacher.
        max_length: most tokens of a row, to find those that are cut; None: any.
        count_targets: returns for each of some rows how many tokens or groups are learned, and whether `max_length` cut
            it. Called for rows that may be longer than `max_length`; those without targets are left out.
        on_bad_row: "error", or "skip": rows that would raise are left out and counted, and the first errors shown.
        source: what errors call the data.
    """

    def __init__(
        self,
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
        count_targets: Callable[[Sequence[Example]], list[tuple[int, bool]]] | None = None,
        on_bad_row: str = "error",
        source: str = _DATA,
    ):
        self.source = source
        self.chat_tokenizer, self.budget, self.max_length = chat_tokenizer, budget, max_length
        self.need_completion, self.learns_calls, self.on_bad_row = need_completion, learns_calls, on_bad_row
        self.teacher_context, self.count_targets = teacher_context, count_targets
        self.total = self._cut = self._several = self._markup = 0
        self._bad: list[str] = []
        self._first_markup: tuple[Any, str] | None = None  # the row, and the special token
        self._unread, self._formats, self._prompts_alone, self.left_out = (collections.Counter() for _ in range(4))
        sides = {"student": chat_tokenizer} | ({"teacher": teacher} if teacher else {})
        utf8(teacher_context or "", "--teacher_context")
        whole, answers = learns_calls, need_completion is not None
        options: dict[str, Any] = dict(answers=answers, whole=whole, context=teacher_context, max_length=max_length)
        self._reader = RowReader(_DATA, sides, source=source, **options)
        # Nothing can be drawn after no token at all. Where a tokenizer puts one before any text, no prompt is without.
        self._writes = {"student": student_writes, "teacher": teacher_writes}
        self._writers = {w: side for w, side in sides.items() if self._writes[w] and not len(side.encode_prompt(""))}

    def check(self, rows: Iterable[tuple[Any, Callable[[], Example]]]) -> list[tuple[Any, Example]]:
        """Those of some rows that can be learned from, with their numbers; `rows` has for each a function that reads it.

        ValueError: the first row without a needed completion, that a chat template refuses or omits a part of, or that
        cannot be read.
        """
        found: dict[Any, Any] = {}  # number -> an example, an error, or one of `reasons`
        texts = {}
        for i, read in rows:
            self.total += 1
            try:
                found[i] = e = read()
                if isinstance(texts_or_reason := self._check_row(i, e), str):
                    found[i] = texts_or_reason
                else:
                    texts[i] = texts_or_reason
            except ValueError as error:
                found[i] = error
                if self.on_bad_row == "error":
                    break
        # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
        sizes = {i: len(prompt.encode()) + 2 for i, (prompt, _) in texts.items()}
        if self.budget is not None:
            uncertain = [i for i, size in sizes.items() if size > self.budget]
            for i, length in zip(uncertain, _each_or_error(self._lengths, [found[i].prompt for i in uncertain])):
                if isinstance(length, ValueError) or length > self.budget:
                    found[i] = length if isinstance(length, ValueError) else "long"
        if self.count_targets is not None and self.max_length is not None:
            uncertain = [i for i, size in sizes.items() if size + len(texts[i][1].encode()) > self.max_length]
            uncertain = [i for i in uncertain if isinstance(found[i], Example)]
            for i, counted in zip(uncertain, _each_or_error(self.count_targets, [found[i] for i in uncertain])):
                if isinstance(counted, ValueError):
                    found[i] = ValueError(shortened(f"row {i} of {self.source}: {counted}"))
                    continue
                targets, was_cut = counted
                self._cut += was_cut and targets > 0
                found[i] = found[i] if targets else "nothing"
        bad = [x for x in found.values() if isinstance(x, ValueError)]
        if bad and self.on_bad_row == "error":
            raise bad[0]
        self._bad += map(str, bad)
        self.left_out["bad"] += len(bad)
        self.left_out.update(x for x in found.values() if isinstance(x, str))
        return [(i, e) for i, e in found.items() if isinstance(e, Example)]

    def _check_row(self, i: Any, e: Example) -> str | tuple[str, str]:
        """The reason why a row is left out, or its prompt and completion as text."""
        self._unread.update(e.unread)
        self._formats[e.format] += 1
        named = [name for name in e.unread if _may_be_answer(name)]
        if e.completion is None:
            if self.need_completion:
                hint = f". Its column {excerpt(named[0])} may be the answer: name it 'completion'" if named else ""
                raise ValueError(f"row {i} of {self.source} {_no_answer(e)}; {self.need_completion}{hint}")
            self._prompts_alone.update(named)
        if self.need_completion and not self.learns_calls and not _writes_calls(self.chat_tokenizer, e):
            return "calls"
        prompt, completion = self._reader.read(i, e)
        self._several += e.answers > 1
        for who, writer in self._writers.items():
            context = who == "teacher" and (self.teacher_context or e.teacher_context)
            blank = not context and (not prompt.strip() or writer.may_refuse(prompt))
            if blank and not len(writer.encode_prompt(e.prompt)):
                return who
        student = self.chat_tokenizer
        if isinstance(e.prompt, str) and not student.special_tokens_in_prompts:
            if strings := student.special_strings_in(e.prompt):
                self._first_markup = self._first_markup or (i, strings[0])
                self._markup += 1
        return prompt, completion

    def _lengths(self, prompts: list[Prompt]) -> list[int]:
        """Lengths of prompts in tokens; for one far over the budget, only some number above it."""
        encode, limit = self.chat_tokenizer.encode_prompt, self.budget or 0
        if sum(len(repr(prompt)) for prompt in prompts) > CHARS_PER_TOKEN * limit * len(prompts):
            return [len(encode(prompt, limit=limit)) for prompt in prompts]
        return list(map(len, self.chat_tokenizer.encode_prompts(prompts)))

    def reasons(self) -> dict[str, tuple[str, str]]:
        """Why rows are left out, in words, with a remedy, by their names in `left_out`."""
        no_token = "without a prompt, before which the {}'s tokenizer puts no token, so that nothing can be drawn"
        shorter = "raise --max_prompt_length or --max_length, or lower --max_completion_length"
        calls = "whose last answer calls tools, which the chat template"
        return {
            "long": (f"whose prompt is longer than {self.budget} tokens", shorter),
            "calls": (f"{calls} does not write as text", "gold_jax.sft --assistant_only_loss learns it"),
            "nothing": (f"of which --max_length {self.max_length} leaves nothing to learn", "raise --max_length"),
            **{who: (no_token.format(who), "--lmbda 0 without --seq_kd learns them") for who in self._writes},
            "bad": ("that cannot be read", f"the first ones: {_first_errors(self._bad)}"),
        }

    def nothing_left(self) -> ValueError:
        """The error where no row can be learned from."""
        left = self.left_out
        why = "; ".join(f"{left[x]} {words} ({remedy})" for x, (words, remedy) in self.reasons().items() if left[x])
        return ValueError(f"none of {plural(self.total, 'row')} can be learned from: {why}")

    def notices(self) -> list[str]:
        """Lines about rows that were left out or cut, and about columns that are not read."""
        left, rows = self.left_out, plural(self.total, "row")
        notices = [f"left out {left[x]} of {rows} {words}" for x, (words, _) in self.reasons().items() if left[x]]
        if self._bad:
            notices[-1] += f" (--on_bad_row skip): {_first_errors(self._bad)}"
        if self._cut:
            cut = f"--max_length {self.max_length} cuts {self._cut} of {rows}"
            notices.append(f"{cut}: their ends are not learned")
        notices += self._reader.notices()
        if self._several and "teacher" in self._reader.sides:
            notices.append(
                f"in {plural(self._several, 'row')} the completion has several answers: the last one is learned, those "
                "before it are read as prompt (gold_jax.sft learns them all)"
            )
        if self._first_markup:
            row, string = self._first_markup
            notices.append(
                f"strings of special tokens, such as {string}, in {plural(self._markup, 'prompt')} (first in row {row}) are "
                "read as plain text; --special_tokens_in_prompts reads them as tokens"
            )
        notices += [
            f"the column {excerpt(name)} of {plural(count, 'row')} with a prompt and no completion may be the answer and is "
            "not read: name it 'completion'"
            for name, count in self._prompts_alone.items()
        ]
        if self._unread:
            shown = listed([f"{excerpt(name)} (rows: {count:,})" for name, count in self._unread.most_common()], 8)
            notices.append(f"columns of the data that nothing reads: {shown}")
        return notices + format_notices(self._formats, _DATA)


def _each_or_error(work: Callable[[list], Sequence], given: list) -> list:
    """Results of `work` on values, in batches, which is faster; for a value that makes it raise, the ValueError."""
    found: list = []
    for part in (given[k : k + _AT_ONCE] for k in range(0, len(given), _AT_ONCE)):
        try:
            found += work(part)
        except ValueError as error:
            found += [error] if len(part) == 1 else [x for one in part for x in _each_or_error(work, [one])]
    return found


def check_examples(
    examples: Sequence[Example],
    chat_tokenizer: ChatTokenizer,
    after_block: Callable[[RowChecker], Any] | None = None,
    **options: Any,
) -> CheckedRows:
    """Which rows can be learned from, and notices about those that cannot; `options` as `RowChecker` takes them.

    `after_block` is called with the checker after every block; None: a progress bar shows how many rows are checked.
    ValueError as `RowChecker.check`, or no row is left.
    """
    checker, digest, kept = RowChecker(chat_tokenizer, **options), hashlib.sha256(), array.array("q")
    rows = ((i, functools.partial(examples.__getitem__, i)) for i in range(len(examples)))
    with contextlib.ExitStack() as stack:
        if after_block is None:
            bar = stack.enter_context(progress.task("checking the rows", len(examples)))
            after_block = lambda checker: bar.reach(checker.total)  # noqa: E731
        while block := list(itertools.islice(rows, _BLOCK)):
            for i, e in checker.check(block):
                kept.append(i)
                digest.update(b"%d\0%b\0" % (i, e.fingerprint))
            after_block(checker)
    if not kept:
        raise checker.nothing_left()
    return CheckedRows(kept, checker.notices(), digest.hexdigest())


def _first_errors(errors: Iterable[str]) -> str:
    """The first errors of skipped rows; one that several rows share is listed once, with their number."""
    alike: dict[str, list[str]] = {}
    for error in errors:
        alike.setdefault(re.sub(r"^row \d+", "", error), []).append(error)
    shown = [f"{first}{f' (and {len(more)} more rows like it)' if more else ''}" for first, *more in alike.values()]
    return listed(shown, _SHOWN, "; ", "; and")


def with_text_completion(examples: Sequence[Example]) -> list[Example]:
    """The rows that have a completion."""
    return [e for e in examples if e.completion is not None]


def _writes_calls(chat_tokenizer: ChatTokenizer, example: Example) -> bool:
    """Whether the template writes the calls of a last answer as text after the generation prompt; true without calls."""
    if not example.calls_tools:
        return True
    messages = example.messages or []
    if isinstance(example.prompt, str):
        return False
    try:
        answer = chat_tokenizer.answer(messages)
    except ValueError:  # reading the row raises a better one
        return True
    return answer.follows_prompt and writes_calls(messages[-1], answer.text)


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
    notices, rows = reader.notices() + format_notices(formats, "the evaluation data"), plural(len(examples), "row")
    if bad:
        first = _first_errors(bad.values())
        notices.append(f"left out {len(bad)} of {rows} of the evaluation data that cannot be read: {first}")
    if unmeasured:
        notices.append(
            f"not measured: {len(unmeasured)} of {rows} of the evaluation data, without a completion in text"
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
