"""The models of a plan by their names, and what their vocabularies share, without any weight.

`known_models.json` holds what the `config.json` of well-known models says of shapes and rotations: a family's common
fields and, for each model, its own. Of Gemma 3's multimodal models it is the language part.
"""

import difflib
import functools
import importlib.resources
import json
import pathlib
import re
import types
from typing import Any, NamedTuple

import huggingface_hub
from transformers import AutoConfig, AutoTokenizer

from gold_jax.config import GOLDConfig
from gold_jax.loading import LoadedModel, stop_ids_of
from gold_jax.models.config import DecoderConfig
from gold_jax.models.hf_checkpoint import read_config
from gold_jax.quickstart import resolve_embedded
from gold_jax.text.chat import ChatTokenizer
from gold_jax.training.build import match_pair

# Of the smaller vocabulary: Llama 3.2 and Qwen 3 share 85 %, Gemma 3 and Qwen 3 63 % by surfaces.
ASSUMED_SHARE = 0.72


class Model(NamedTuple):
    """A model of a run that is planned."""

    name: str  # as it was given
    config: DecoderConfig
    source: str  # where its tokenizer is, folder or hub id
    revision: str | None = None  # None: main


class Vocabularies(NamedTuple):
    """What the two vocabularies of a pair share."""

    matched: int | None  # entries that both have; None: they are one and the same
    how: str  # "tokenizers", "given", "configs" (same family and size) or "assumed"


@functools.cache
def known_models() -> dict[str, dict[str, Any]]:
    """Fields of `config.json` by hub id."""
    data = json.loads((importlib.resources.files("gold_jax.planning") / "known_models.json").read_text())
    configs = {}
    for family in data["families"]:
        for name, row in family["models"].items():
            own = row[-1] if isinstance(row[-1], dict) else {}
            configs[name] = family["shared"] | dict(zip(data["sizes"], row)) | own
    return configs | {other: configs[name] for other, name in data["other_names"].items()}


def known_config(name: str) -> DecoderConfig | None:
    """The config of a model by its hub id, upper or lower case, base or instruction-tuned; None for one that is not known."""
    configs, name = {known.lower(): fields for known, fields in known_models().items()}, name.strip().lower()
    for suffix in ("", "-instruct", "-it", "-pt", "-base"):
        if fields := configs.get(name.removesuffix(suffix)):
            return DecoderConfig.from_hf(AutoConfig.for_model(**fields))
    return None


def find_model(name: str, revision: str | None = None, role: str = "model") -> Model:
    """A model by a folder, by the name of a well-known one, or by a hub id, of which config.json alone is downloaded.

    FileNotFoundError: it is none of these; the text names `role` and near ones. ValueError: it is not supported.
    """
    path = pathlib.Path(resolve_embedded(name)).expanduser()
    if path.is_dir():
        return Model(name, read_config(path), str(path))
    if known := known_config(name):
        return Model(name, known, name, revision)
    models = {known.split("/")[-1].lower(): known for known in known_models()}
    near = difflib.get_close_matches(name.split("/")[-1].lower(), models, n=3, cutoff=0.5)
    near = f" Known without the hub are {', '.join(models[key] for key in near)}." if near else ""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"the {role} {name!r} is not a folder here, nor the name of a model on the hub.{near}")
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        unknown = f"the {role} {name!r} is neither a folder here nor a model whose shapes are known without the hub"
        raise FileNotFoundError(f"{unknown}, and the hub did not give its config.json ({said}).{near}") from error
    return Model(name, read_config(pathlib.Path(file).parent), name, revision)


def find_vocabularies(student: Model, teacher: Model, args: GOLDConfig, matched: int | None = None) -> Vocabularies:
    """What two vocabularies share: by the tokenizers where both are on this disk, else as given, else by the configs."""
    smaller = min(student.config.vocab_size, teacher.config.vocab_size)
    if matched is not None and not 0 < matched <= smaller:
        raise ValueError(f"--matched is {matched}; it must be between 1 and {smaller}, the smaller vocabulary's rows.")
    sides = []
    for model, name in ((student, None), (teacher, args.teacher_tokenizer_name_or_path)):
        source, revision = (model.source, model.revision) if name is None else (str(resolve_embedded(name)), None)
        options = {"revision": revision, "local_files_only": True, "trust_remote_code": args.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception:  # each library that reads them has its own errors for files that are not there
            break
        config = types.SimpleNamespace(config=model.config)  # what of a loaded model its vocabulary is matched by
        sides.append(LoadedModel(config, ChatTokenizer(tokenizer, stop_ids=stop_ids_of(config)), model.name))
    else:
        match = match_pair(*sides, args.projection_mask)
        return Vocabularies(None if match.same else match.vocabulary.matched, "tokenizers")
    if matched is not None:
        return Vocabularies(matched, "given")
    if student.config.family == teacher.config.family and student.config.vocab_size == teacher.config.vocab_size:
        return Vocabularies(None, "configs")
    return Vocabularies(round(ASSUMED_SHARE * smaller), "assumed")
