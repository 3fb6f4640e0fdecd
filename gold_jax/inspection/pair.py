"""From two names, or two tokenizers or models in memory, to a report on what they will do together."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from gold_jax.inspection import page, terminal
from gold_jax.inspection.report import Mass, PairMass, Report
from gold_jax.inspection.samples import SAMPLES
from gold_jax.inspection.tokenization import Reader, cut_text, shapes_of
from gold_jax.inspection.vocabularies import Vocabulary, compare
from gold_jax.loading import LoadedModel, compute_dtype, load_model_and_tokenizer, load_tokenizer
from gold_jax.quickstart import resolve_embedded
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.encode import PlainEncoder
from gold_jax.text.surface import surfaces_of

MAX_LENGTH = 1024
_ROLES = ("student", "teacher")
_BEFORE = "\n"  # any text: a continuation gets no blank of the tokenizer's own


class PairReport(Report):
    """A report that shows itself."""

    def print(self, console: Console | None = None) -> None:
        """Shows everything in the terminal; `console`: where, and how wide."""
        terminal.show(self, console or Console())

    def to_html(self) -> str:
        """A whole page of HTML that needs nothing else."""
        return page.page(self)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return page.fragment(self)


class _Side(NamedTuple):
    """A side once it is loaded; `loaded_model` is None where there is no model."""

    name: str
    vocabulary: Vocabulary
    read: Reader
    loaded_model: LoadedModel | None


def inspect_pair(
    student: Any,
    teacher: Any,
    texts: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    models: bool | None = None,
    bf16: bool | None = None,
    max_length: int | None = MAX_LENGTH,
    chunk: int = 128,
    trust_remote_code: bool = False,
) -> PairReport:
    """What a pair will do together: how the two cut texts, what their vocabularies share, where probability goes.

    Args:
        student: a folder or hub id of a model or a tokenizer, `embedded:student` or `embedded:teacher`, a tokenizer (of
            transformers, `tokenizers` or tiktoken), a `ChatTokenizer`, or a `LoadedModel`.
        teacher: the same.
        texts: what to cut and read, a text or several, with or without names; None: sample texts of several kinds.
        models: whether the models read the texts, too. None: where both sides are loaded models or folders that hold
            weights; nothing but tokenizers is downloaded then. True: in any case.
        bf16: whether models that are read here compute in bfloat16; None: on accelerators, but not on CPUs.
        max_length: longest sequence in tokens that a model reads; None for no limit.
        chunk: positions whose logits are held at once.
        trust_remote_code: let tokenizers run their own Python code.

    Raises:
        FileNotFoundError: a folder or a file in it is missing.
        ValueError: a tokenizer is of an unknown kind, a text is empty, a model is asked for and there is none, or
            something in a folder does not fit.
    """
    named = _named(texts)
    sources = (student, teacher)
    lacking = [role for role, source in zip(_ROLES, sources) if not _has_weights(source)]
    scored = models if models is not None else not lacking
    try:
        sides = [_side(s, role, scored, bf16, trust_remote_code) for role, s in zip(_ROLES, sources)]
    except (ValueError, FileNotFoundError) as error:
        if not scored or models:
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        hint = "To compare the tokenizers alone: models=False, on the command line --no_models."
        raise kind(f"{str(error).rstrip('.')}. {hint}") from error
    cuts = tuple(cut_text(sides[0].read, sides[1].read, name, text) for name, text in named.items())
    vocabularies = compare(sides[0].vocabulary, sides[1].vocabulary)
    notes = []
    if models is None and lacking:
        whose = " and ".join(f"the {role}" for role in lacking)
        notes.append(f"The tokenizers alone were compared: there is no folder with weights of {whose}.")
    mass = None
    if scored:
        mass, cut = _mass(sides, list(named.values()), vocabularies.rows, max_length, chunk)
        notes += [
            f"The models read only the beginning of {name}, as far as max_length goes."
            for name, c in zip(named, cut)
            if c
        ]
    return PairReport(sides[0].name, sides[1].name, cuts, shapes_of(cuts), vocabularies, mass, tuple(notes))


def _named(texts: str | Sequence[str] | Mapping[str, str] | None) -> Mapping[str, str]:
    if texts is None:
        return SAMPLES
    if isinstance(texts, Mapping):
        named = dict(texts)
    else:
        listed = [texts] if isinstance(texts, str) else list(texts)
        named = {f"text {k}" if len(listed) > 1 else "text": text for k, text in enumerate(listed, 1)}
    if not named:
        raise ValueError("there is no text; give one or more, or leave texts out for the samples")
    for name, text in named.items():
        if not text:
            raise ValueError(f"{name} is empty; give a text of at least one character")
    return named


def _has_weights(source: Any) -> bool:
    """Whether a source is a model in memory or in a folder here."""
    if isinstance(source, LoadedModel):
        return source.model is not None
    if not isinstance(source, str | pathlib.Path):
        return False
    folder = pathlib.Path(resolve_embedded(source)).expanduser()
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _side(source: Any, role: str, scored: bool, bf16: bool | None, trust_remote_code: bool) -> _Side:
    if scored:
        loaded = _load_side(source, role, bf16, trust_remote_code)
        return _of_chat_tokenizer(loaded.name, loaded.chat_tokenizer, loaded.model.config.vocab_size, loaded)
    if isinstance(source, LoadedModel):
        return _of_chat_tokenizer(source.name, source.chat_tokenizer)
    if isinstance(source, ChatTokenizer):
        return _of_chat_tokenizer(_called(source.tokenizer), source)
    name = None
    if isinstance(source, str | pathlib.Path):
        name, source = str(source), load_tokenizer(resolve_embedded(source), trust_remote_code=trust_remote_code)
    return _of_tokenizer(name or _called(source), source)


def _load_side(source: Any, role: str, bf16: bool | None, trust_remote_code: bool) -> LoadedModel:
    """A side with its model, the parameters kept in the compute dtype."""
    if isinstance(source, LoadedModel) and source.model is not None:
        return source
    if not isinstance(source, str | pathlib.Path):
        raise ValueError(
            f"the {role} is a {type(source).__name__} without a model to read the texts with; give a LoadedModel, or the "
            "folder or hub id of a model, or compare the tokenizers alone (models=False)"
        )

    dtype = compute_dtype(bf16)
    return load_model_and_tokenizer(
        source, dtype=dtype, param_dtype=dtype, role=role, trust_remote_code=trust_remote_code
    )


def _of_chat_tokenizer(
    name: str, chat_tokenizer: ChatTokenizer, rows: int | None = None, loaded: LoadedModel | None = None
) -> _Side:
    surfaces = chat_tokenizer.surfaces
    vocabulary = Vocabulary(surfaces, len(surfaces) if rows is None else rows, chat_tokenizer.stop_ids)
    return _Side(name, vocabulary, functools.partial(chat_tokenizer.encode_completion, after=_BEFORE), loaded)


def _of_tokenizer(name: str, tokenizer: Any) -> _Side:
    """A bare tokenizer; one without a stop token or with a template that cannot be used will do."""
    if hasattr(tokenizer, "apply_chat_template"):
        try:
            return _of_chat_tokenizer(name, ChatTokenizer(tokenizer))
        except ValueError:
            pass  # what is wrong with its entries shows below
    surfaces = surfaces_of(tokenizer)
    end = getattr(tokenizer, "eos_token_id", None)
    vocabulary = Vocabulary(surfaces, len(surfaces), () if end is None else (end,))
    encoder = PlainEncoder(tokenizer, surfaces)
    return _Side(name, vocabulary, lambda text: encoder.encode([text])[0], None)


def _called(tokenizer: Any) -> str:
    """What a tokenizer in memory is called."""
    name = getattr(tokenizer, "name_or_path", None) or getattr(tokenizer, "name", None)
    return name if isinstance(name, str) and name else type(tokenizer).__name__


def _mass(
    sides: Sequence[_Side], texts: Sequence[str], rows: Sequence[np.ndarray], max_length: int | None, chunk: int
) -> tuple[PairMass, list[bool]]:
    """Where probability lies, and which texts did not fit."""
    from gold_jax.inspection.mass import measure

    found, cut = [], []
    for side, kinds in zip(sides, rows):
        parts, too_long = measure(side.loaded_model, texts, kinds, max_length=max_length, chunk=chunk)
        found.append(parts)
        cut.append(too_long)
    dtypes = dict.fromkeys(str(side.loaded_model.model.dtype) for side in sides)
    mass = PairMass(*(Mass.mean(parts) for parts in found), tuple(zip(*found)), " and ".join(dtypes))
    return mass, [one or other for one, other in zip(*cut)]
