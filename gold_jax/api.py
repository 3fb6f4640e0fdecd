"""Functions of the public API that accept names or objects; the work is done in the modules that they call."""

import os
from collections.abc import Collection, Sequence
from typing import Any

from gold_jax.loading import LoadedModel, as_chat_tokenizer, as_plain_tokenizer
from gold_jax.models import hf_checkpoint
from gold_jax.models.decoder import Decoder
from gold_jax.text import align as alignment
from gold_jax.text.encode import PlainEncoder
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.export import save_final_model


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


def save_model(
    model: Decoder | LoadedModel, folder: str | os.PathLike, *, dtype: str = "auto", stop_ids: Sequence[int] = ()
) -> None:
    """Writes a model into a folder that transformers, vLLM and `load_model` open.

    Safetensors, `config.json` and, where the model came with one, `generation_config.json`; of a `LoadedModel` also the
    tokenizer with its chat template. A model that came from `load_model` keeps its config and tensor names. The language
    part of a multimodal model is written as a text model. With several processes all of them must call this; the first
    one writes, and each returns when that is done.

    Args:
        model: its parameters may be on any devices of the run, or be numpy arrays.
        folder: created if it does not exist; a model already in it is replaced.
        dtype: "float32", "bfloat16" or "float16"; "auto": that of each tensor in the file it came from, else
            `param_dtype`.
        stop_ids: the `eos_token_id` of both configs, in place of theirs or the `LoadedModel`'s.

    Raises:
        ValueError: unknown dtype, or a config that was not read from a transformers config.
        OSError: the folder cannot be written; raised by the process that writes.
    """
    if not isinstance(model, LoadedModel):
        return hf_checkpoint.save_model(model, folder, dtype=dtype, stop_ids=stop_ids)
    decoder, read, _ = model
    stops, template = stop_ids or read.stop_ids, read.template.portable
    save_final_model(decoder, read.tokenizer, folder, dtype=dtype, stop_ids=stops, chat_template=template)
