"""From two names, or two tokenizers or models in memory, to a report on what they will do together."""

import contextlib
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from gold_jax.inspection import page, terminal
from gold_jax.inspection.mass import measure
from gold_jax.inspection.prompts import compare_prompts
from gold_jax.inspection.report import Mass, PairMass, Report
from gold_jax.inspection.samples import SAMPLES
from gold_jax.inspection.tokenization import Reader, cut_text, shapes_of
from gold_jax.inspection.vocabularies import Vocabulary, compare
from gold_jax.loading import LoadedModel, compute_dtype, load_model_and_tokenizer, load_tokenizer
from gold_jax.quickstart import resolve_embedded
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.encode import PlainEncoder
from gold_jax.text.surface import surfaces_of

_ROLES = ("student", "teacher")
_BEFORE = "\n"  # any text: a continuation gets no space from the tokenizer


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
        return page.page(self, "fragment.html")


def inspect_pair(
    student: Any,
    teacher: Any,
    texts: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    models: bool | None = None,
    bf16: bool | None = None,
    max_length: int | None = 1024,
    chunk: int = 128,
    trust_remote_code: bool = False,
) -> PairReport:
    """How two models or tokenizers differ: how they cut texts, what their vocabularies share, where probability goes.

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
    sources = dict(zip(_ROLES, (student, teacher)))
    lacking = [role for role, source in sources.items() if not _has_weights(source)]
    scored = models if models is not None else not lacking
    try:
        sides = [_side(source, role, scored, bf16, trust_remote_code) for role, source in sources.items()]
    except (ValueError, FileNotFoundError) as error:
        if not scored or models:
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        hint = "To compare the tokenizers alone: models=False, on the command line --no_models."
        raise kind(f"{str(error).rstrip('.')}. {hint}") from error
    names, vocabularies, readers, loaded, chat = zip(*sides)
    cuts = tuple(cut_text(*readers, name, text) for name, text in named.items())
    figures = compare(*vocabularies)
    mass, notes = None, []
    if models is None and lacking:
        whose = " and ".join(f"the {role}" for role in lacking)
        notes.append(f"The tokenizers alone were compared: no weights were found for {whose}.")
    prompts = None
    try:
        prompts = None if None in chat else compare_prompts(*chat)
    except ValueError as error:
        notes.append(f"The two forms of a conversation are not compared: {error}.")
    if scored:
        options = {"max_length": max_length, "chunk": chunk}
        measured = (measure(who, list(named.values()), rows, **options) for who, rows in zip(loaded, figures.rows))
        by_side, cut = zip(*measured)
        dtypes = dict.fromkeys(str(who.model.dtype) for who in loaded)
        mass = PairMass(*map(Mass.mean, by_side), tuple(zip(*by_side)), " and ".join(dtypes))
        too_long = (name for name, *either in zip(named, *cut) if any(either))
        notes += [f"The models read only the beginning of {name}, as far as max_length goes." for name in too_long]
    return PairReport(*names, cuts, shapes_of(cuts), figures, mass, tuple(notes), prompts)


def _named(texts: str | Sequence[str] | Mapping[str, str] | None) -> Mapping[str, str]:
    if texts is None:
        return SAMPLES
    if not isinstance(texts, Mapping):
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = {f"text {k}" if len(texts) > 1 else "text": text for k, text in enumerate(texts, 1)}
    if not texts:
        raise ValueError("there is no text; give one or more, or leave texts out for the samples")
    for name, text in texts.items():
        if not text:
            raise ValueError(f"{name} is empty; give a text of at least one character")
    return dict(texts)


def _has_weights(source: Any) -> bool:
    """Whether a source is a model in memory or in a folder here."""
    if isinstance(source, LoadedModel):
        return source.model is not None
    if not isinstance(source, str | pathlib.Path):
        return False
    folder = pathlib.Path(resolve_embedded(source)).expanduser()
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _side(
    source: Any, role: str, scored: bool, bf16: bool | None, trust_remote_code: bool
) -> tuple[str, Vocabulary, Reader, LoadedModel | None, ChatTokenizer | None]:
    """One side's name, vocabulary, reader, model if it is `scored` (parameters in the compute dtype), and chat tokenizer."""
    name = str(source) if isinstance(source, str | pathlib.Path) else None
    if scored and not (isinstance(source, LoadedModel) and source.model is not None):
        if name is None:
            raise ValueError(
                f"the {role} is a {type(source).__name__} without a model to read the texts with; give a LoadedModel, or the "
                "folder or hub id of a model, or compare the tokenizers alone (models=False)"
            )
        dtypes = dict.fromkeys(("dtype", "param_dtype"), compute_dtype(bf16))
        source = load_model_and_tokenizer(source, **dtypes, role=role, trust_remote_code=trust_remote_code)
    elif name is not None:
        source = load_tokenizer(resolve_embedded(source), trust_remote_code=trust_remote_code)
    loaded = source if scored else None
    if isinstance(source, LoadedModel):
        name, source = source.name, source.chat_tokenizer
    if hasattr(source, "apply_chat_template"):
        with contextlib.suppress(ValueError):  # one without a stop token or with a template that cannot be used will do
            source = ChatTokenizer(source)
    if isinstance(source, ChatTokenizer):
        surfaces, stop_ids, tokenizer = source.surfaces, source.stop_ids, source.tokenizer
        read = functools.partial(source.encode_completion, after=_BEFORE)
    else:
        surfaces, end, tokenizer = surfaces_of(source), getattr(source, "eos_token_id", None), source
        stop_ids, encoder = () if end is None else (end,), PlainEncoder(source, surfaces)
        read = lambda text: encoder.encode([text])[0]  # noqa: E731
    rows = len(surfaces) if loaded is None else loaded.model.config.vocab_size
    called = name or getattr(tokenizer, "name_or_path", None) or getattr(tokenizer, "name", None)
    called = called if isinstance(called, str) and called else type(tokenizer).__name__
    chat_tokenizer = source if isinstance(source, ChatTokenizer) else None
    return called, Vocabulary(surfaces, rows, stop_ids), read, loaded, chat_tokenizer
