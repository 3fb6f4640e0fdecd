"""Models with their tokenizers, and tokenizers alone, from whatever a caller has: names, folders or objects."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gold_jax.json_files import read_json_object, regular_file
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge, split
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.models.staged_save import check_complete
from gold_jax.quickstart import resolve_embedded
from gold_jax.sharding.placement import Placement
from gold_jax.text.chat import ChatTokenizer, copy_of_tokenizer
from gold_jax.wording import quoted

NAME = str | pathlib.Path
_TOKENIZER_FILES = tuple(
    f"{name}.json" for name in "tokenizer_config special_tokens_map added_tokens config tokenizer".split()
)


class LoadedModel(NamedTuple):
    """A model with its tokenizer and chat template.

    Attributes:
        model: the model; None where it has been handed on.
        chat_tokenizer: its tokenizer; None in a plan, which needs shapes alone.
        name: what it is called.
    """

    model: Decoder
    chat_tokenizer: ChatTokenizer
    name: str


def load_model_and_tokenizer(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    read_dtype: str = "auto",
    remat: bool = False,
    revision: str | None = None,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    eos_token: str | None = None,
    special_tokens_in_prompts: bool = False,
    trust_remote_code: bool = False,
    attention: str | None = None,
    placement: Placement | None = None,
    role: str = "model",
) -> LoadedModel:
    """Brings a model and its tokenizer together, from disk, the hub or memory.

    Args:
        model: a folder, a hub id, `embedded:teacher` or `embedded:student`, a `Decoder`, what `nnx.split` gives for
            one: `(graphdef, state)`, or a `LoadedModel`.
        tokenizer: a folder, a hub id, a transformers tokenizer or a `ChatTokenizer`, whose chat template and variables are
            kept where none are given; None takes the one beside the model.
        dtype: compute dtype, "float32" or "bfloat16"; a model in memory is set to it.
        param_dtype: dtype in which the parameters are kept; a model in memory is copied into it.
        read_dtype: dtype to which the parameters are rounded first, "auto" for none, as in `load_model`.
        remat: recompute layers in the backward pass.
        revision: hub revision of both.
        chat_template: a Jinja template in place of the tokenizer's own; `template_kwargs` are variables for it.
        eos_token: a token that ends a turn, in place of the tokenizer's own end token.
        special_tokens_in_prompts: read special tokens' strings in plain-text prompts as those tokens.
        trust_remote_code: let the tokenizer run its own Python code.
        attention: "auto" or one of `models.attention.IMPLEMENTATIONS`; None: "auto", or what a model in memory has.
        placement: mesh and layout of the parameters; None: one device.
        role: what error messages call it.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: something in it does not fit; no tokenizer is known; or the tokenizer has more entries than the
            model has rows.
    """
    name = str(model) if isinstance(model, NAME) else type(model).__name__
    if isinstance(model, LoadedModel):
        model, own, name = model
        tokenizer = own if tokenizer is None else tokenizer
    more_stops: Sequence[int] = ()
    if isinstance(tokenizer, ChatTokenizer):
        template, more_stops = tokenizer.template, tokenizer.stop_ids
        chat_template = template.given if chat_template is None else chat_template
        template_kwargs = {**template.kwargs, **(template_kwargs or {})}
        special_tokens_in_prompts |= tokenizer.special_tokens_in_prompts
        tokenizer = tokenizer.tokenizer
    if not isinstance(model, NAME | Decoder | tuple):
        known = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
        instead = f"pass its name, {known!r}" if known else "gold_jax.load_model reads Hugging Face folders"
        raise TypeError(f"a model is a name, a gold_jax Decoder, or nnx.split of one, not {name}; {instead}")
    if tokenizer is None and not isinstance(model, NAME):
        raise ValueError(f"the {role} is a model in memory, so its tokenizer must be given too (a name or an object)")
    model, tokenizer = (resolve_embedded(x) for x in (model, tokenizer))
    source = model if tokenizer is None else tokenizer
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    if isinstance(model, NAME):
        sharding = None if placement is None else placement.param_sharding
        settings |= {"read_dtype": read_dtype, "attention": attention or "auto"}
        model = load_model(model, revision=revision, sharding=sharding, **settings)
        model = model if placement is None else model.replace(placement=placement)
    else:
        model = _in_memory(model, read_dtype, attention, placement, settings)
    chat_tokenizer = ChatTokenizer(
        _tokenizer_with_end(source, eos_token, role, revision=revision, trust_remote_code=trust_remote_code),
        stop_ids=[*stop_ids_of(model), *more_stops],
        chat_template=chat_template,
        template_kwargs=dict(template_kwargs or {}),
        special_tokens_in_prompts=special_tokens_in_prompts,
        embedding_rows=model.config.vocab_size,
        copy_tokenizer=False,
    )
    _check_ids(chat_tokenizer, model.config.vocab_size, role)
    return LoadedModel(model, chat_tokenizer, name)


def _tokenizer_with_end(source: Any, eos_token: str | None, role: str, **options: Any) -> Any:
    """The transformers tokenizer of a name, or a copy of one, with this end token (None: its own)."""
    if isinstance(source, NAME):
        source = load_tokenizer(source, **options)
    elif not hasattr(source, "apply_chat_template"):
        raise TypeError(
            f"the {role}'s tokenizer is a {type(source).__name__}; give a folder, a hub id or a transformers tokenizer (of a "
            "tokenizers.Tokenizer: transformers.PreTrainedTokenizerFast(tokenizer_object=…, eos_token=…))"
        )
    else:
        source = copy_of_tokenizer(source)  # to call one sets its truncation and padding: the caller's stays as it is
    if eos_token is not None:
        if source.convert_tokens_to_ids(eos_token) in (None, source.unk_token_id):
            raise ValueError(f"eos_token {eos_token!r} is not in the vocabulary of the {role}'s tokenizer")
        source.eos_token = eos_token
    return source


def _check_ids(tokenizer: ChatTokenizer, rows: int, role: str) -> None:
    """ValueError where a tokenizer writes ids that a model of so many rows has not."""
    beyond = sorted(i for i in tokenizer.tokenizer.get_vocab().values() if i >= rows)
    spelled = [i for i in beyond if tokenizer.surfaces.table[i] is not None or i in tokenizer.stop_ids]
    if spelled:
        first = f"{spelled[0]}, {tokenizer.tokenizer.convert_ids_to_tokens(spelled[0])!r}"
        raise ValueError(
            f"the {role}'s tokenizer has {len(beyond)} ids beyond the {rows} rows of its model (first: {first}): it is not "
            "this model's tokenizer. A model may have more rows than its tokenizer has ids, never fewer."
        )


def _in_memory(
    model: Any, read_dtype: str, attention: str | None, placement: Placement | None, settings: dict
) -> Decoder:
    """A copy of a `Decoder` or of what `nnx.split` gives for one: training donates parameters, and leaves the caller's whole."""
    if isinstance(model, tuple) and len(model) == 2:
        model = merge(*split(model))
    if not isinstance(model, Decoder):
        raise TypeError(f"a model in memory is a gold_jax Decoder, or nnx.split of one, not a {type(model).__name__}")
    kept = settings["param_dtype"]
    rounded = kept if read_dtype == "auto" else read_dtype
    params = jax.tree.map(lambda x: jnp.array(jnp.asarray(x, rounded), kept), split(model)[1])
    model = model.replace(params, attention=attention or model.attention, placement=None, **settings)
    return model if placement is None else model.shard(placement)


def load_tokenizer(name: str | pathlib.Path, *, revision: str | None = None, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub id; FileNotFoundError where there is none, ValueError where a file of it is broken."""
    name = os.path.expanduser(name)
    folder, paths = pathlib.Path(name), []
    if folder.is_dir():
        check_complete(folder)
        paths = [path for file in _TOKENIZER_FILES if (path := folder / file).exists()]
    files = {path: read_json_object(path) for path in paths}
    regular_file(folder / "chat_template.jinja")
    needs = "a folder needs tokenizer.json (or a SentencePiece model) and tokenizer_config.json"
    if not folder.exists() and (folder.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"no tokenizer can be read from {name!r} (there is no such folder); {needs}")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust is no Exception
        reason = (str(error).strip().splitlines() or [""])[0]
        if "custom code" in reason:
            look = "read that code, and run it with --trust_remote_code (trust_remote_code=True) if you trust it"
            raise ValueError(f"the tokenizer {name!r} is Python code that comes with the model; {look}") from error
        reason = quoted(f"{type(error).__name__}: {reason}" if len(reason.split()) < 2 else reason, plain=True)
        for path in paths:
            if path.name == "tokenizer.json" and not _opens(path):
                raise ValueError(f"{path} is not the file of a tokenizer ({reason}).") from error
        raise FileNotFoundError(f"no tokenizer can be read from {name!r} ({reason}); {needs}") from error
    if not tokenizer.vocab_size:  # transformers makes one of nothing where a config names its class
        raise FileNotFoundError(f"no tokenizer can be read from {name!r} (it has no vocabulary); {needs}")
    for path, content in files.items():
        for token, i in _added_ids(path.name, content):
            if (read := tokenizer.convert_tokens_to_ids(token)) != i:
                raise ValueError(
                    f"{path} gives the added token {quoted(token)} the id {quoted(i)}, but with the vocabulary beside it the "
                    f"token has the id {read}: an id that is taken or far beyond the others, or files of two tokenizers."
                )
    return tokenizer


def _opens(path: pathlib.Path) -> bool:
    """Whether the library that a `tokenizer.json` is for can read it."""
    try:
        return bool(Tokenizer.from_file(str(path)))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        return False


def _added_ids(file: str, content: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The added tokens that a file of a tokenizer names, with the ids that it gives them."""
    if file == "tokenizer.json":
        return [(token["content"], token["id"]) for token in content.get("added_tokens") or ()]
    if file == "tokenizer_config.json":
        tokens = content.get("added_tokens_decoder") or {}
        return [(token["content"], int(i)) for i, token in tokens.items()]
    return list(content.items()) if file == "added_tokens.json" else []


def stop_ids_of(model: Decoder) -> Sequence[int]:
    """The stop tokens that a model's generation config and config name; ValueError where one is no number."""
    source, found = json.loads(model.config.source), []
    for part in ("generation_config", "config"):
        ids = (source.get(part) or {}).get("eos_token_id")
        for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if isinstance(i, bool) or not isinstance(i, int):
                raise ValueError(
                    f"eos_token_id in {part}.json is {quoted(i)}; it must be the number of a token, or several of them."
                )
            found.append(i)
    return tuple(dict.fromkeys(i for i in found if 0 <= i < model.config.vocab_size))


def as_chat_tokenizer(source: Any) -> ChatTokenizer:
    """The `ChatTokenizer` of a folder, a hub id, `embedded:…`, a transformers tokenizer, a `ChatTokenizer` or a `LoadedModel`.

    FileNotFoundError where no tokenizer can be read from a name, TypeError for something else.
    """
    if isinstance(source, LoadedModel):
        return source.chat_tokenizer
    if isinstance(source, ChatTokenizer):
        return source
    if isinstance(source, NAME):
        return ChatTokenizer(load_tokenizer(resolve_embedded(source)), copy_tokenizer=False)
    if not hasattr(source, "apply_chat_template"):
        raise TypeError(
            f"a {type(source).__name__} is not a tokenizer with a chat template; give a folder, a hub id, a transformers "
            "tokenizer, a ChatTokenizer or a LoadedModel"
        )
    return ChatTokenizer(source)


def as_plain_tokenizer(source: Any) -> Any:
    """What `text.surface.surfaces_of` takes: as `as_chat_tokenizer`, and tokenizers of `tokenizers` and tiktoken as they are."""
    if isinstance(source, NAME):
        return load_tokenizer(resolve_embedded(source))
    source = source.chat_tokenizer if isinstance(source, LoadedModel) else source
    return source.tokenizer if isinstance(source, ChatTokenizer) else source


def as_loaded_model(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A model with its tokenizer, for a function that takes either.

    `model` is a `LoadedModel`, a name, which is read in float32, a `Decoder` or `(graphdef, params)`; `tokenizer` what
    `as_chat_tokenizer` takes, or None for the model's own, which a model in memory has not (ValueError).
    """
    if isinstance(model, LoadedModel):
        return model if tokenizer is None else model._replace(chat_tokenizer=as_chat_tokenizer(tokenizer))
    if isinstance(model, NAME):
        tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ChatTokenizer) else tokenizer
        return load_model_and_tokenizer(model, tokenizer)
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: pass it too, as a name or an object")
    model = merge(*split(model)) if isinstance(model, tuple) else model
    return LoadedModel(model, as_chat_tokenizer(tokenizer), type(model).__name__)


def read_template(path: str) -> str:
    """The chat template of a Jinja file, or of a tokenizer named by folder or hub id; ValueError where that has none."""
    if os.path.isfile(path):
        try:
            return pathlib.Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, which --chat_template_path names, is not valid UTF-8 ({error})") from None
    template = load_tokenizer(path).chat_template
    if not isinstance(template, str):
        raise ValueError(f"the tokenizer {path!r}, which --chat_template_path names, has no chat template")
    return template


def compute_dtype(bf16: bool | None) -> str:
    """bfloat16 where asked for, or by default on accelerators; float32 on CPUs, which are no faster with less."""
    wanted = jax.default_backend() != "cpu" if bf16 is None else bf16
    return "bfloat16" if wanted else "float32"
