"""Functions of the public surface that take whatever a caller has; what they do is in the modules that they call."""

from collections.abc import Collection
from typing import Any

from gold_jax.loading import LoadedModel, as_chat_tokenizer, as_plain_tokenizer
from gold_jax.text import align as alignment
from gold_jax.text.encode import PlainEncoder
from gold_jax.text.vocabulary import VocabularyMap


def align(student: Any, teacher: Any, text: str) -> alignment.Alignment:
    """Cuts a text as two tokenizers do and groups the tokens that hold the same bytes.

    The result can be printed, and looped over: each group is its bytes, the student's ids and the teacher's ids.

    Args:
        student, teacher: a folder, a hub id, `embedded:…`, a tokenizer (of transformers, `tokenizers` or tiktoken), a
            `ChatTokenizer` or a `LoadedModel`; or a `PlainEncoder`, which is quicker where many texts are aligned.
        text: read as plain text: special strings in it are characters like others.

    Raises:
        FileNotFoundError: no tokenizer can be read from a name.
        ValueError: a tokenizer is of an unknown kind, or its tokens cannot be located in the text.
    """
    sides = (side if isinstance(side, PlainEncoder) else as_plain_tokenizer(side) for side in (student, teacher))
    return alignment.align(*sides, text)


def match_vocabularies(student: Any, teacher: Any, *, mask: Collection[str] = ()) -> VocabularyMap:
    """Which entry of one vocabulary is which entry of the other, by the bytes that they spell; stop tokens by role.

    Args:
        student, teacher: a folder, a hub id, `embedded:…`, a transformers tokenizer, a `ChatTokenizer` or a `LoadedModel`,
            whose head may have more rows than its tokenizer has entries.
        mask: kinds of unmatched entries, "whitespace" and "numerals", that give their probability to no prefix.

    Raises:
        FileNotFoundError: no tokenizer can be read from a name.
    """

    def tokenizer_and_size(side):
        tokenizer = as_chat_tokenizer(side)
        if isinstance(side, LoadedModel) and side.model is not None:
            return tokenizer, side.model.config.vocab_size
        return tokenizer, 1 + max(tokenizer.tokenizer.get_vocab().values())

    (ours, student_size), (theirs, teacher_size) = tokenizer_and_size(student), tokenizer_and_size(teacher)
    sizes, stop = {"student_size": student_size, "teacher_size": teacher_size}, (ours.stop_ids, theirs.stop_ids)
    return VocabularyMap.build(ours.surfaces, theirs.surfaces, stop=stop, mask=mask, **sizes)
