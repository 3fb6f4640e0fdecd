"""A data set looked through before anything is trained: which rows can be learned from, which measured, and why not the others."""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example


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
) -> CheckedRows:
    """Which rows can be learned from, and notices about those that cannot.

    Args:
        examples: all rows.
        chat_tokenizer: the student's.
        budget: most tokens of a prompt; rows with longer ones are left out. None: any.
        need_completion: why every row must have a completion, for the error; None if it need not.
        teacher: a teacher's chat tokenizer, whose template must take every row as well.
        learns_calls: whether an answer that calls tools can be learned, as whole conversations can. A completion cannot
            hold it, because every template writes calls in its own way; such rows are left out where one is needed.
        student_writes, teacher_writes: whether completions are drawn from either model, for which a prompt needs a
            token.
        teacher_context: text before every prompt of the teacher.

    Raises:
        ValueError: a row lacks its completion, a chat template refuses one, or no row is left.
    """
    digest, unread = hashlib.sha256(), collections.Counter()
    kept, long, calls, empty, markup = [], 0, 0, collections.Counter(), []
    # Nothing can be drawn after no token at all. Where a tokenizer puts one before any text, no prompt is without.
    writers = {"student": chat_tokenizer if student_writes else None, "teacher": teacher if teacher_writes else None}
    writers = {who: writer for who, writer in writers.items() if writer and not len(writer.encode_prompt(""))}

    def cannot_write(e: Example) -> str | None:
        """Who would have to write after no token."""
        for who, writer in writers.items():
            context = who == "teacher" and (teacher_context or e.teacher_context)
            if (
                isinstance(e.prompt, str)
                and not e.prompt.strip()
                and not context
                and not len(writer.encode_prompt(e.prompt))
            ):
                return who
        return None

    for i, e in enumerate(examples):
        unread.update(e.unread)
        if need_completion and e.completion is None:
            raise ValueError(f"row {i} of the data set has a prompt but no completion; {need_completion}")
        if need_completion and e.calls_tools and not learns_calls:
            calls += 1
            continue
        if unable := cannot_write(e):
            empty[unable] += 1
            continue
        text, *_ = _render_all(e, f"row {i} of the data set", chat_tokenizer, teacher)
        if (
            isinstance(e.prompt, str)
            and not chat_tokenizer.special_tokens_in_prompts
            and chat_tokenizer.special_strings_in(e.prompt)
        ):
            markup.append(i)
        if budget is not None:
            # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
            if len(text.encode()) + 2 > budget and len(chat_tokenizer.encode_prompt(e.prompt)) > budget:
                long += 1
                continue
        kept.append(i)
        digest.update(b"%d\0%b\0" % (i, e.fingerprint))
    left_out = [
        (
            long,
            f"whose prompt is longer than {budget} tokens",
            "raise --max_prompt_length or --max_length, or lower --max_completion_length",
        ),
        (calls, "whose last answer calls tools, which is no text", "gold_jax.sft --assistant_only_loss learns it"),
        *(
            (
                count,
                f"without a prompt, before which the {who}'s tokenizer puts no token, so that nothing can be drawn",
                "--lmbda 0 without --seq_kd learns them",
            )
            for who, count in empty.items()
        ),
    ]
    left_out = [found for found in left_out if found[0]]
    if not kept:
        why = "; ".join(f"{count} {words} ({remedy})" for count, words, remedy in left_out)
        raise ValueError(f"none of the {len(examples)} rows can be learned from: {why}")
    notices = [f"left out {count} of {len(examples)} rows {words}" for count, words, _ in left_out]
    if markup:
        first = chat_tokenizer.special_strings_in(examples[markup[0]].prompt)[0]
        notices.append(
            f"{len(markup)} prompts, that of row {markup[0]} first, hold the string of a special token such as {first}, read "
            "as plain text; --special_tokens_in_prompts reads it as the token"
        )
    if unread:
        shown = ", ".join(f"{name!r} (rows: {count:,})" for name, count in unread.most_common(8))
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        notices.append(f"columns of the data that nothing reads: {shown}{more}")
    return CheckedRows(kept, notices, digest.hexdigest())


def with_text_completion(examples: Sequence[Example]) -> list[Example]:
    """The rows that have a completion in text."""
    return [e for e in examples if e.completion is not None and not e.calls_tools]


def check_evaluation(examples: Sequence[Example], *chat_tokenizers: ChatTokenizer | None) -> list[str]:
    """Makes sure, before the first update, that there is something to evaluate on and that every template takes it.

    Returns:
        A notice about rows that cannot be measured.

    Raises:
        ValueError: no row has a completion, or a chat template refuses one.
    """
    measured = 0
    for i, e in enumerate(examples):
        if with_text_completion([e]):
            _render_all(e, f"row {i} of the evaluation data", *chat_tokenizers)
            measured += 1
    if not measured:
        raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
    missing = len(examples) - measured
    if not missing:
        return []
    return [f"{missing} of {len(examples)} rows of the evaluation data have no completion in text and are not measured"]


def _render_all(example: Example, error_prefix: str, *chat_tokenizers: ChatTokenizer | None) -> list[str]:
    """The prompt as each template writes it; an error says which row it is."""
    try:
        return [
            chat_tokenizer.render(example.prompt) for chat_tokenizer in chat_tokenizers if chat_tokenizer is not None
        ]
    except ValueError as error:
        raise ValueError(f"{error_prefix}: {error}") from error
