"""The models of a plan by their names, and what their vocabularies share, without any weight.

`known_models.json` holds what the `config.json` of well-known models on the hub says of shapes and rotations: a family's
common fields and, for each model, its sizes and the fields that are its own. Of Gemma 3's multimodal models it is the
language part. An instruction-tuned model and its base have one shape.
"""

import difflib
import functools
import importlib.resources
import json
import pathlib
import re
import types
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from gold_jax.config import GOLDConfig
from gold_jax.loading import LoadedModel, stop_ids_of
from gold_jax.models.config import DecoderConfig
from gold_jax.models.hf_checkpoint import read_config
from gold_jax.quickstart import PREFIX, resolve
from gold_jax.text.chat import ChatTokenizer
from gold_jax.training.build import match_pair

# Of the smaller vocabulary: Llama 3.2 and Qwen 3 share 85 %, Gemma 3 and Qwen 3 63 % by surfaces.
ASSUMED_SHARE = 0.72
_SUFFIXES = ("-instruct", "-it", "-pt", "-base")


class Model(NamedTuple):
    """A model of a plan.

    Attributes:
        name: as it was given.
        config: its config.
        folder: where its files are, if they are here.
        revision: branch, tag or commit on the hub; None: its main one.
    """

    name: str
    config: DecoderConfig
    folder: pathlib.Path | None = None
    revision: str | None = None


class Vocabularies(NamedTuple):
    """What the vocabularies of a pair share.

    Attributes:
        matched: entries that both have; None: they are one and the same.
        how: where that is from: "tokenizers", "given", "configs" (same family and size) or "assumed".
    """

    matched: int | None
    how: str


@functools.cache
def known_models() -> dict[str, dict[str, Any]]:
    """Fields of `config.json` by hub id."""
    data = json.loads((importlib.resources.files("gold_jax.planning") / "known_models.json").read_text())
    configs = {}
    for family in data["families"]:
        for name, (*sizes, last) in family["models"].items():
            own = last if isinstance(last, dict) else {}
            configs[name] = family["shared"] | dict(zip(data["sizes"], sizes if own else [*sizes, last])) | own
    return configs | {other: configs[name] for other, name in data["other_names"].items()}


def known_config(name: str) -> DecoderConfig | None:
    """The config of a model by its hub id, upper or lower case, base or instruction-tuned; None for one that is not known."""
    configs, name = {known.lower(): fields for known, fields in known_models().items()}, name.strip().lower()
    for known in (name, *(name.removesuffix(suffix) for suffix in _SUFFIXES)):
        if known in configs:
            fields = dict(configs[known])
            return DecoderConfig.from_hf(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return None


def find_model(name: str, *, revision: str | None = None, role: str = "model") -> Model:
    """A model by a folder, by the name of a well-known one, or by a hub id, of which config.json alone is downloaded.

    Args:
        name: the folder or name.
        revision: branch, tag or commit on the hub.
        role: what errors call it.

    Raises:
        FileNotFoundError: it is none of these; the text names well-known ones that are near.
        ValueError: a config that this decoder does not support.
    """
    path = resolve(name) if name.startswith(PREFIX) else pathlib.Path(name).expanduser()
    if path.is_dir():
        return Model(name, read_config(path), path)
    known = known_config(name)
    if known is not None:
        return Model(name, known, revision=revision)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(
            f"the {role} {name!r} is no folder here, and no name of a model on the hub.{_near(name)}"
        )
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise FileNotFoundError(
            f"the {role} {name!r} is neither a folder here nor a model whose shapes are known without the hub, and the hub did "
            f"not give its config.json ({type(error).__name__}: {said}).{_near(name)}"
        ) from error
    return Model(name, read_config(pathlib.Path(file).parent), revision=revision)


def _near(name: str) -> str:
    """Well-known models of nearly that name, in words."""
    short = {known.split("/")[-1].lower(): known for known in known_models()}
    found = difflib.get_close_matches(name.split("/")[-1].lower(), short, n=3, cutoff=0.5)
    return f" Known without the hub are {', '.join(short[key] for key in found)}." if found else ""


def find_vocabularies(student: Model, teacher: Model, args: GOLDConfig, *, matched: int | None = None) -> Vocabularies:
    """What two vocabularies share: by the tokenizers where both are on this disk, else as given, else by the configs.

    Args:
        student, teacher: the models.
        args: the settings of their tokenizers and their loss.
        matched: entries that both have, for where the tokenizers are not here.

    Raises:
        ValueError: more entries matched than the smaller vocabulary has.
    """
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if matched is not None and not 0 < matched <= min(sizes):
        raise ValueError(
            f"--matched is {matched}; it must be between 1 and {min(sizes)}, the smaller vocabulary's rows."
        )
    ours = _tokenizer(student, None, args.trust_remote_code)
    theirs = ours and _tokenizer(teacher, args.teacher_tokenizer_name_or_path, args.trust_remote_code)
    if theirs is not None:
        sides = [_loaded(model, tokenizer) for model, tokenizer in ((student, ours), (teacher, theirs))]
        match = match_pair(args, *sides)
        return Vocabularies(None if match.same else match.vocabulary.matched, "tokenizers")
    if matched is not None:
        return Vocabularies(matched, "given")
    if student.config.family == teacher.config.family and sizes[0] == sizes[1]:
        return Vocabularies(None, "configs")
    return Vocabularies(round(ASSUMED_SHARE * min(sizes)), "assumed")


def _loaded(model: Model, tokenizer: Any) -> Any:
    """What of a loaded model its vocabulary is matched by."""
    config = types.SimpleNamespace(config=model.config)
    return LoadedModel(config, ChatTokenizer(tokenizer, stop_ids=stop_ids_of(config)), model.name)


def _tokenizer(model: Model, name: str | None, trust_remote_code: bool):
    """The tokenizer beside a model, or of another name, if its files are on this disk; else None."""
    named = model.folder or model.name
    revision = model.revision
    if name is not None:
        named, revision = resolve(name) if name.startswith(PREFIX) else name, None
    try:
        return AutoTokenizer.from_pretrained(
            str(named), revision=revision, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception:  # each library that reads them has its own errors for files that are not there
        return None
